"""The trainer as a process: dry runs of recipes, exit codes and the lines of bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from trainer.__main__ import main
from trainer.config import Data, Export, Job, Source, StageConfig, Tokenizer, to_dict
from trainer.gguf_model import FAMILIES, _odd
from trainer.shrink import shrink, tiny


def trainer(job: Any, folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """`python -m trainer run` on a job (or on what a user might give instead)."""
    file = folder / "job.json"
    file.write_text(job if isinstance(job, str) else json.dumps(to_dict(job)))
    return subprocess.run(
        [sys.executable, "-m", "trainer", "run", str(file)],
        capture_output=True, text=True, timeout=120, env={**os.environ, **environ},
    )  # fmt: skip


def test_a_dry_run_trains_one_step_and_says_what_was_shrunk(
    stage: StageConfig, tmp_path: Path
) -> None:
    remote = (Source(path="gs://nowhere/train.jsonl"),)
    data = replace(stage.data, train=remote, validation=remote, sequence_length=4096)
    done = trainer(Job(run="r", stages=(replace(stage, data=data),), dry_run=True), tmp_path)
    assert done.returncode == 0, done.stderr
    for said in (
        "gs://nowhere/train.jsonl: not on this machine",
        "128 instead of 4096",
        "random llama of 2 layers",
        "2 batches",
        "step 1/1",
        "val_loss",
        "saved",
    ):
        assert said in done.stdout
    out = Path(stage.output)
    pointer = json.loads((out / "checkpoints" / "last.json").read_text())
    assert pointer["step"] == 1
    lines = [json.loads(x) for x in (out / "metrics" / "0001.jsonl").read_text().splitlines()]
    assert {"step", "eval"} <= {line["kind"] for line in lines}


def test_what_is_small_already_or_not_read_is_not_said_to_have_shrunk(
    stage: StageConfig, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    sources = (Source(builtin="python-reference"),)

    def notes(size: int) -> list[str]:
        words = StageConfig(id="words", stage="tokenizer", output=out, data=Data(train=sources),
                            tokenizer=Tokenizer(vocab_size=size))  # fmt: skip
        return shrink(words, set())[1]

    assert not any(note.startswith("tokenizer:") for note in notes(400))
    assert "tokenizer: 512 tokens instead of 2048" in notes(2048)
    file = Export(model=stage.output, format="gguf")
    written = StageConfig(id="file", stage="export", output=out, export=file)
    assert shrink(written, {stage.output, out})[1] == []


def test_a_hub_name_that_is_not_on_disk_keeps_its_architecture(
    stage: StageConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert stage.model is not None
    model = replace(stage.model, name="Qwen/Qwen3-0.6B", init="pretrained", architecture=None,
                    tokenizer=None, attention="varlen", float8="torchao")  # fmt: skip
    config, notes = shrink(replace(stage, model=model), set())
    assert config.model is not None and config.model.name is not None
    written = json.loads((Path(config.model.name) / "config.json").read_text())
    assert written["model_type"] == "qwen3" and written["hidden_size"] == 64
    assert any("byte-level" in note for note in notes)
    assert (config.model.attention, config.model.float8) == ("auto", "off")  # those need a GPU


def test_stand_ins_are_of_the_kind_that_is_written_as_gguf(tokenizer: str, tmp_path: Path) -> None:
    """The classes' own defaults are not always those of the models that are published."""
    for kind in FAMILIES:
        folder = tiny(tmp_path / kind, kind, tokenizer, weights=False)
        assert _odd(AutoConfig.from_pretrained(folder)) is None, kind


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"data": {"train": [{"path": "/nowhere/x.jsonl"}]}}, 65, "/nowhere/x.jsonl"),
        ({"model": {"name": "/nowhere/model"}}, 64, "/nowhere/model"),
        ({"train": {"steps": 2, "lrr": 1}}, 64, "did you mean 'lr'?"),
        ({"stage": "kd"}, 64, "missing kd"),
    ],
)
def test_bad_input_is_one_line_and_its_exit_code(
    change: dict[str, Any], code: int, said: str, stage: StageConfig, tmp_path: Path
) -> None:
    job = to_dict(Job(run="r", stages=(stage,)))
    job["stages"][0].update(change)
    done = trainer(json.dumps(job), tmp_path)
    assert done.returncode == code, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "out", "errors"),
    [
        (["--help"], 0, "usage: ", ""),
        (["-h"], 0, "usage: ", ""),
        ([], 64, "", "usage: "),
        (["rum", "job.json"], 64, "", "error: not understood: 'rum job.json'; usage: "),
        (["check", "--help"], 0, "usage: ", ""),
        (["check", "--jsn"], 64, "", "error: not understood: 'check --jsn'; usage: "),
    ],
)
def test_usage(
    arguments: list[str], code: int, out: str, errors: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    printed = capsys.readouterr()
    assert (printed.out[:7], printed.err.split("python")[0]) == (out, errors)


def test_a_completed_stage_is_skipped(stage: StageConfig, tmp_path: Path) -> None:
    out = Path(stage.output)
    out.mkdir(parents=True)
    (out / "run_meta.json").write_text('{"completed": true}')
    done = trainer(Job(run="r", stages=(stage,)), tmp_path)
    assert done.returncode == 0 and "completed before, skipped" in done.stdout
    assert not (out / "checkpoints").exists()
