"""What people give by mistake, or by malice: `python -m trainer run` says one clear line each."""

from __future__ import annotations

import gzip
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.trainer.conftest import in_folder
from trainer.__main__ import main
from trainer.checkpoint import resolve
from trainer.config import (
    Adapter,
    Data,
    Distill,
    Evaluate,
    Export,
    Job,
    Merge,
    Model,
    Source,
    StageConfig,
    Targets,
    to_dict,
)

Run = Callable[..., Any]
Fails = Callable[[StageConfig], tuple[int, str]]
#: Without the time of its making: tests are told apart by their values.
GZIP = gzip.compress(b'{"text": "a"}\n', mtime=0)
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))


@pytest.fixture
def fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Fails:
    """Run a stage as a job: the exit code, and the only line that it wrote to stderr."""

    def run(config: StageConfig) -> tuple[int, str]:
        job = tmp_path / "job.json"
        job.write_text(json.dumps(to_dict(Job(run="r", stages=(config,)))))
        capsys.readouterr()
        code = main(["run", str(job)])
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        return code, line

    return run


def reading(stage: StageConfig, **source: Any) -> StageConfig:
    return replace(stage, data=replace(stage.data, train=(Source(**source),), validation=()))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("image.jsonl", PNG, "image.jsonl:1: not text: begins like a PNG image"),
        ("packed.jsonl", GZIP, ":1: not text: begins like a gzip"),
        ("wide.jsonl", '{"text": "é"}\n'.encode("utf-16"), "iconv -f UTF-16 -t UTF-8"),
        ("latin.jsonl", '{"text": "é"}\n'.encode("latin-1"), "not UTF-8: byte 0xe9 at 10"),
        ("zeros.jsonl", bytes(3000), "zeros.jsonl:1: not text: byte 0x00 at 0"),
        ("cut.jsonl", b'{"text": "a"}\n{"text": "b', "cut.jsonl:2: not JSON at column 10"),
        ("empty.jsonl", b"", "empty.jsonl: holds no text"),
        ("image.png", PNG, "image.png: unknown kind of file; `.jsonl`"),
        ("folder/image.png", PNG, "folder: no data file in this folder"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_data_that_is_none(
    name: str, content: bytes, said: str, stage: StageConfig, fails: Fails, tmp_path: Path
) -> None:
    path = tmp_path / "given" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    given = path.parent if name.startswith("folder/") else path
    code, line = fails(reading(stage, path=str(given)))
    assert code == 65 and said in line


def test_a_manifest_that_matches_nothing_is_named_with_its_line(
    stage: StageConfig, fails: Fails, tmp_path: Path
) -> None:
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text('\n{"path": "shard-*.jsonl"}\n')
    code, line = fails(reading(stage, manifest=str(manifest)))
    assert code == 65
    assert f"{manifest}:2: {tmp_path}/shard-*.jsonl: no file matches this pattern" in line


class Malice:
    """A pickle of it makes a folder where it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def _pickle(path: Path, malice: Malice) -> None:
    path.with_suffix(".pt").write_bytes(pickle.dumps(malice, protocol=4))


def _torch_file(path: Path, malice: Malice) -> None:
    torch.save({"logits": torch.zeros(3, 258), "more": malice}, path.with_suffix(".pt"))


def _objects(path: Path, malice: Malice) -> None:
    np.save(path.with_suffix(".npy"), np.array([malice], dtype=object), allow_pickle=True)


def _cut_off(path: Path, malice: Malice) -> None:
    torch.save(torch.zeros(60, 258), path.with_suffix(".pt"))
    whole = path.with_suffix(".pt").read_bytes()
    path.with_suffix(".pt").write_bytes(whole[: len(whole) // 2])


def _flat(path: Path, malice: Malice) -> None:
    torch.save(torch.zeros(258), path.with_suffix(".pt"))


def _other_vocabulary(path: Path, malice: Malice) -> None:
    np.save(path.with_suffix(".npy"), np.zeros((60, 300), dtype=np.float32))


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (_pickle, "holds more than tensors, and is not opened"),
        (_torch_file, "holds more than tensors, and is not opened"),
        (_objects, "cannot be read: Array can't be memory-mapped: Python objects"),
        (_cut_off, "; write the logits of this sample again"),
        (_flat, "expected logits as one array [tokens, vocabulary], got float32 [258]"),
        (_other_vocabulary, "logits over 300 tokens, but the student's vocabulary has 258"),
    ],
)
def test_logits_that_are_none_and_no_pickle_is_run(
    write: Callable[[Path, Malice], None],
    said: str, stage: StageConfig, fails: Fails, tmp_path: Path,
) -> None:  # fmt: skip
    folder = tmp_path / "logits"
    folder.mkdir()
    malice = Malice(tmp_path / "it-ran")
    write(folder / "train-1", malice)
    kd = Distill(mode="precompute", logits_dir=str(folder))
    code, line = fails(replace(stage, stage="kd", kd=kd))
    assert code == 65 and f"{folder}/train-1." in line and said in line
    assert not malice.folder.exists()
    pickle.loads(pickle.dumps(malice))
    assert malice.folder.is_dir(), "it would have run"


@pytest.fixture
def base(stage: StageConfig, run_stage: Run, tmp_path: Path) -> StageConfig:
    made = in_folder(stage, tmp_path / "base", steps=2, save_every=1, warmup=0)
    run_stage(made)
    return made


def cut_off(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def test_a_model_whose_file_is_cut_off_is_named_wherever_it_is_read(
    base: StageConfig, fails: Fails, tmp_path: Path
) -> None:
    # As a download that was cut off: there is no manifest beside it to say so.
    folder = tmp_path / "model"
    Path(resolve(base.output)).rename(folder)
    (folder / "MANIFEST.json").unlink()
    cut_off(folder / "model.safetensors")
    name = str(folder)
    out = str(tmp_path / "out")
    stages = [
        replace(base, output=out, model=Model(name=name)),
        replace(base, output=out, stage="kd", kd=Distill(teacher=name)),
        StageConfig("t", "targets", out, data=base.data, targets=Targets(teacher=name)),
        StageConfig("e", "evaluate", out, data=base.data, evaluate=Evaluate(models={"a": name})),
        StageConfig("x", "export", out, export=Export(model=name)),
    ]
    for config in stages:
        code, line = fails(config)
        assert code == 64, config.stage
        assert f"'{name}': model.safetensors is damaged" in line


def test_a_model_that_lacks_a_tensor_or_has_another_shape_is_not_filled_at_random(
    base: StageConfig, fails: Fails, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    Path(resolve(base.output)).rename(folder)
    (folder / "MANIFEST.json").unlink()
    whole = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    config = replace(base, output=str(tmp_path / "out"), model=Model(name=str(folder)))
    save_file(
        {k: v for k, v in whole.items() if k != name},
        folder / "model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    code, line = fails(config)
    assert code == 64 and f"lack 1 of its tensors, such as {name}" in line
    shorter = {**whole, name: whole[name][:-1].clone()}
    save_file(shorter, folder / "model.safetensors", metadata={"format": "pt"})
    code, line = fails(config)
    assert code == 64 and f"cannot load the model '{folder}': " in line


def test_a_cut_off_checkpoint_is_passed_over_for_the_one_before(
    base: StageConfig, run_stage: Run
) -> None:
    cut_off(Path(base.output) / "checkpoints" / "step-2" / "model.safetensors")
    outcome = run_stage(base, attempt=2)
    assert outcome.step == 2
    (told,) = [line for line in outcome.lines if "skipping the broken checkpoint" in line]
    assert "step-2: model.safetensors has" in told
    assert any("resumed" in line and "1" in line for line in outcome.lines), outcome.lines


def test_stored_targets_that_are_cut_off_are_named(
    base: StageConfig, run_stage: Run, fails: Fails, tmp_path: Path
) -> None:
    targets = Targets(teacher=base.output, top_k=4)
    made = StageConfig("t", "targets", str(tmp_path / "t"), data=base.data, targets=targets)
    run_stage(made)
    (values,) = Path(made.output).rglob("values.npy")
    cut_off(values)
    kd = Distill(mode="precompute", targets=made.output)
    code, line = fails(in_folder(replace(base, stage="kd", kd=kd), tmp_path / "kd"))
    assert code == 65 and str(values.parent) in line and "store the targets again" in line


def test_adapters_that_do_not_fit_or_have_no_base(
    base: StageConfig, run_stage: Run, fails: Fails, tmp_path: Path
) -> None:
    model = Model(name=base.output, adapter=Adapter(rank=2))
    lora = in_folder(replace(base, model=model), tmp_path / "lora", steps=1)
    run_stage(lora)
    nothing = replace(model, adapter=Adapter(rank=2, targets=("q_prj",)))
    code, line = fails(in_folder(replace(base, model=nothing), tmp_path / "nothing"))
    assert code == 64 and "no linear layer 'q_prj'; did you mean 'q_proj'?" in line

    def merge(**settings: Any) -> tuple[int, str]:
        out = str(tmp_path / "merged")
        return fails(StageConfig("m", "merge", out, data=Data(), merge=Merge(**settings)))

    code, line = merge(adapter=lora.output, base="/nowhere/base")
    assert code == 64 and line.endswith("the base model '/nowhere/base': no such folder")
    said = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    four = tmp_path / "four"
    four.mkdir()
    config = json.loads((Path(resolve(base.output)) / "config.json").read_text())
    (four / "config.json").write_text(json.dumps({**config, **said}))
    code, line = merge(adapter=lora.output, base=str(four))
    assert code == 64 and "is quantised (gptq); merge into the full-precision model" in line
    cut_off(Path(resolve(lora.output)) / "adapter_model.safetensors")
    alone = tmp_path / "alone"
    Path(resolve(f"{lora.output}/checkpoints/step-1")).rename(alone)
    code, line = merge(adapter=str(alone))
    assert code == 64 and "adapter_model.safetensors is damaged" in line
