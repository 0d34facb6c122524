"""What a rehearsal puts where a job reads, and that the trainer can work with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer import stand_ins
from trainer.__main__ import main
from trainer.config import (
    Adapter,
    ConfigError,
    Data,
    Distill,
    Hub,
    Job,
    Merge,
    Model,
    Source,
    StageConfig,
    Train,
    load_job,
    to_dict,
)
from trainer.data.read import documents

STUDENT, TEACHER = "meta-llama/Llama-3.2-1B", "Qwen/Qwen3-8B"
BUCKET = "gs://bkt/"


def stage(path: str = f"{BUCKET}data/train.jsonl", **given: Any) -> StageConfig:
    return StageConfig(**{
        "id": "kd", "stage": "kd", "output": "${stage:kd}", "model": Model(name=STUDENT),
        "data": Data(train=(Source(path=path),), validation=(Source(path=f"{BUCKET}val.jsonl"),),
                     sequence_length=4096),
        "train": Train(epochs=3, warmup=50, report_to=("tensorboard", "wandb"), until=7, resume="gs://bkt/old",
                       evaluate_every=1000),
        "kd": Distill(teacher=TEACHER), **given,
    })  # fmt: skip


def made(config: StageConfig, folder: Path) -> tuple[StageConfig, list[str]]:
    folder.mkdir(exist_ok=True)
    notes = stand_ins.write(Job(run="r", stages=(config,)), folder, f"{BUCKET}rehearsal")
    return load_job(folder / "job.json").stages[0], notes


def here(config: StageConfig, folder: Path, steps: int = 1) -> Path:
    """The job on this disk, of so many steps; its file."""
    train = replace(config.train or Train(steps=1), steps=steps, accumulate=1, save_every=0)
    small = replace(config, train=train, output=str(folder / "out"))
    text = json.dumps(to_dict(Job(run="r", stages=(small,))))
    file = folder / "here.json"
    file.write_text(text.replace("gs://", f"{folder}/objects/"))
    return file


def test_the_job_becomes_small_and_says_so(tmp_path: Path) -> None:
    config, notes = made(stage(), tmp_path)
    assert config.train is not None and config.model is not None and config.kd is not None
    train = config.train
    assert (train.steps, train.epochs, train.until, train.warmup) == (24, None, None, 1)
    assert train.resume is None
    assert (train.save_every, train.evaluate_every, train.log_every) == (4, 4, 1)
    assert train.report_to == ("tensorboard",)
    assert config.data.sequence_length == 128
    assert config.data.train[0].path == f"{BUCKET}data/train.jsonl"
    assert config.model.name == f"{BUCKET}rehearsal/models/meta-llama-llama-3.2-1b"
    assert config.kd.teacher == f"{BUCKET}rehearsal/models/qwen-qwen3-8b"
    kinds = [json.loads((tmp_path / "objects" / name[5:] / "config.json").read_text())
             for name in (config.model.name, config.kd.teacher)]  # fmt: skip
    assert [kind["model_type"] for kind in kinds] == ["llama", "qwen3"]
    said = "\n".join(notes)
    for what in (STUDENT, TEACHER, "data/train.jsonl", "128 instead of 4096", "24 steps",
                 "report_to", "gs://bkt/old"):  # fmt: skip
        assert what in said
    assert (tmp_path / "notes.txt").read_text().splitlines() == notes


def test_two_rehearsals_are_alike(tmp_path: Path) -> None:
    weights = []
    for name in ("one", "two"):
        made(stage(), tmp_path / name)
        found = sorted((tmp_path / name / "objects").rglob("model.safetensors"))
        weights.append([path.read_bytes() for path in found])
    assert weights[0] == weights[1]
    assert weights[0][0] != weights[0][1], "student and teacher differ"


@pytest.mark.parametrize(
    ("path", "file"),
    [
        (f"{BUCKET}data/part-*.jsonl", "data/part-0.jsonl"),
        (f"{BUCKET}data/20[12]?/a.jsonl", "data/2010/a.jsonl"),
        (f"{BUCKET}folder", "folder/0.jsonl"),
        (f"{BUCKET}notes.txt", "notes.txt"),
    ],
)
def test_data_lies_where_a_reader_looks(path: str, file: str, tmp_path: Path) -> None:
    config, _ = made(stage(path), tmp_path)
    assert (tmp_path / "objects" / "bkt" / file).stat().st_size > 10_000
    local = str(config.data.train[0].path).replace("gs://", f"{tmp_path}/objects/")
    assert next(documents((Source(path=local),))).text


def test_manifests_and_datasets_of_the_hub_get_files(tmp_path: Path) -> None:
    sources = (Source(manifest=f"{BUCKET}list.jsonl"), Source(hf=Hub("org/Set"), weight=2.0))
    data = Data(train=sources, validation=(Source(builtin="python-reference", split="heldout"),))
    config, notes = made(stage(data=data), tmp_path)
    listed = json.loads((tmp_path / "objects" / "bkt" / "list.jsonl").read_text())
    assert (tmp_path / "objects" / "bkt" / listed["path"]).exists()
    hub = config.data.train[1]
    assert (hub.path, hub.hf, hub.weight) == (
        f"{BUCKET}rehearsal/data/org-set-train.jsonl", None, 2.0,
    )  # fmt: skip
    assert config.data.validation == data.validation
    assert any("hf:org/Set" in note for note in notes)


def test_a_student_finds_the_stored_answers_of_its_stand_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kd = Distill(mode="precompute", targets=f"{BUCKET}targets", temperature=1.5)
    config, notes = made(stage(kd=kd), tmp_path)
    assert config.kd == kd
    assert any("tiny teacher" in note for note in notes)
    assert main(["run", str(here(config, tmp_path))]) == 0
    said = capsys.readouterr().out
    lines = (tmp_path / "out" / "metrics" / "0001.jsonl").read_text().splitlines()
    step = next(line for line in map(json.loads, lines) if line["kind"] == "step")
    assert step["kd_loss"] > 0 and step.get("teacher_missing", 0) == 0, said


def test_a_conversation_is_learned_from_conversations(tmp_path: Path) -> None:
    config, _ = made(stage(stage="sft", kd=None), tmp_path)
    assert config.data.chat_template == "chatml"
    assert main(["run", str(here(config, tmp_path))]) == 0


def test_pairs_are_learned_from_pairs(tmp_path: Path) -> None:
    sources = (Source(path=f"{BUCKET}pairs/*.jsonl"), Source(hf=Hub("org/pairs")))
    data = Data(train=sources, validation=(Source(manifest=f"{BUCKET}list.jsonl"),))
    config, notes = made(stage(stage="dpo", kd=None, data=data), tmp_path)
    assert config.data.chat_template == "chatml"
    assert any("questions about Python with two answers" in note for note in notes)
    assert config.data.train[1].format == "preference"
    assert main(["run", str(here(config, tmp_path))]) == 0
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["val_count"] == 4


def test_what_belongs_to_real_data_is_refused(tmp_path: Path) -> None:
    kd = Distill(mode="precompute", logits_dir=f"{BUCKET}logits")
    with pytest.raises(ConfigError, match=r"kd\.logits_dir.*kd\.teacher"):
        made(stage(kd=kd), tmp_path)
    merge = StageConfig(id="m", stage="merge", output="o", merge=Merge(adapter="org/adapter"))
    with pytest.raises(ConfigError, match=r"org/adapter"):
        made(merge, tmp_path)


def test_a_model_whose_experts_learn_is_replaced_by_one_that_has_some(tmp_path: Path) -> None:
    adapted = Model(name=f"{BUCKET}base", adapter=Adapter(rank=2, experts=True))
    config, notes = made(stage(kd=None, stage="pretrain", model=adapted), tmp_path)
    assert any("a random mixtral" in note for note in notes)
    assert main(["run", str(here(config, tmp_path))]) == 0
    learns = json.loads((tmp_path / "out" / "frozen_mask.json").read_text())["trainable"]["names"]
    assert any(".experts." in name for name in learns)


def test_as_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = tmp_path / "job.json"
    job.write_text(json.dumps(to_dict(Job(run="r", stages=(stage(),)))))
    folder = tmp_path / "made"
    folder.mkdir()
    assert main(["stand-ins", str(job), str(folder), f"{BUCKET}x"]) == 0
    assert capsys.readouterr().out == (folder / "notes.txt").read_text()


@pytest.mark.parametrize("stage_name", ["pretrain", "sft"])
def test_records_have_the_shape_that_their_source_says(stage_name: Any, tmp_path: Path) -> None:
    shapes: tuple[Any, ...] = ("text", "math_tool", "prompt", "messages", "preference")
    sources = [Source(path=f"{BUCKET}{shape}.jsonl", format=shape) for shape in shapes]
    sources += [Source(path=f"{BUCKET}notes.txt")]
    sources += [Source(hf=Hub(f"org/{shape}"), format=shape) for shape in shapes[1:3]]
    data = Data(train=tuple(sources), validation=(Source(path=f"{BUCKET}y.txt"),))
    config, _ = made(stage(stage=stage_name, kd=None, data=data), tmp_path)
    assert [source.format for source in config.data.train] == [*shapes, None, *shapes[1:3]]
    assert main(["run", str(here(config, tmp_path))]) == 0
