"""Recipes whose inputs and TensorBoard files are in buckets, and what is planned from them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import launcher.plan as planning
from launcher.schema import json_schema
from tests.launcher.test_recipe import SINGLE, at, load, problems
from tests.launcher.test_vertex_plan import BUNDLE, ENV

assert at  # a fixture: tests name it

CLOUD = "hardware: {backend: vertex, accelerator: L4:1, vertex: {project: p, image: i}}\n"
CLOUD += "artifacts: gs://b/{run}\n"
KD = """\
launch: 1
name: kd
stage: kd
model: {name: URI/student, tokenizer: URI/words}
data:
  train: [{path: "URI/*.jsonl"}, {manifest: URI/m.jsonl}, {hf: {name: URI/set}}]
  validation: [{path: URI/val}]
  chat_template: URI/chat.jinja
train: {seconds_of: URI/run/a, resume: URI/run/a}
kd: {mode: precompute, targets: URI/t}
"""
OTHERS = {
    "kd": "model: {name: a/b}\ntrain: {steps: 3}\nkd: {teacher: URI/t@best}\n",
    "logits": "model: {name: a/b}\ntrain: {steps: 3}\nkd: {mode: precompute, logits_dir: URI/t}\n",
    "targets": "targets: {teacher: URI/t}\n",
    "evaluate": "evaluate: {models: {a: URI/x@last, b: URI/y}}\n",
    "merge": "merge: {adapter: URI/a, base: URI/b}\n",
    "export": "export: {model: URI/a, to: URI/b}\n",
}


def other(stage: str) -> str:
    kind = "validation" if stage == "evaluate" else "train"
    data = "" if stage in ("merge", "export") else f"data: {{{kind}: [{{path: URI/d}}]}}\n"
    name = {"logits": "kd"}.get(stage, stage)
    return f"launch: 1\nname: one\nstage: {name}\n{OTHERS[stage]}{data}"


@pytest.mark.parametrize("uri", ["gs://bucket", "gs://bucket/in/x y", "s3://bucket/in"])
@pytest.mark.parametrize("where", ["local", "vertex"])
def test_every_input_may_be_in_a_bucket(at: Path, uri: str, where: str) -> None:
    for text in (KD, *map(other, OTHERS)):
        made = load(text.replace("URI", uri) + (CLOUD if where == "vertex" else ""))
        (config,) = planning.stage_configs(made, made.stages, "/r")
        assert config.stage == made.stages[0].stage  # paths are left as they are written
        if config.kd is not None and config.kd.targets is not None:
            assert config.kd.targets == f"{uri}/t"


FORMS = "write gs://BUCKET/NAME, s3://BUCKET/NAME or a path"


@pytest.mark.parametrize(
    ("uri", "advice"),
    [
        ("http://host/x", FORMS),
        ("gs:///x", "'' cannot be the name of a bucket"),
        ("gs:bucket://x", FORMS),
        ("abfs://b", FORMS),
    ],
)
def test_a_uri_that_no_job_reads_is_told_where_it_is_written(
    at: Path, uri: str, advice: str
) -> None:
    found = problems(KD.replace("URI", uri))
    told = [re.split(r":\d+:\d+: ", line)[1].split(": ")[0] for line in found]
    assert told == [
        "model.name", "model.tokenizer", "data.train[0].path", "data.train[1].manifest",
        "data.train[2].hf.name", "data.validation[0].path", "data.chat_template",
        "train.seconds_of", "train.resume", "kd.targets",
    ]  # fmt: skip
    assert all(advice in line for line in found)


def test_a_folder_to_resume_from_is_there_or_in_a_bucket(at: Path) -> None:
    (at / "old").mkdir()
    text = re.sub(r"train: \{steps.*", "train: {steps: 3, resume: ./old}", SINGLE)
    train = load(text).stages[0].train
    assert train is not None and train.resume == str(at / "old")
    (found,) = problems(text.replace("./old", "./gone"))
    assert "train.resume: no such folder: " in found
    (found,) = problems(text + CLOUD)
    assert "train.resume: a Vertex AI job cannot read this machine's files" in found


def test_a_plan_says_where_a_stage_goes_on_from(at: Path) -> None:
    made = load(KD.replace("URI", "gs://b/x"))
    plan = planning.make(made, ENV, BUNDLE)  # type: ignore[arg-type]
    said = "stage kd goes on from gs://b/x/run/a where it has no checkpoint of its own"
    assert said in plan.notes and f"note: {said}" in plan.lines()


@pytest.mark.parametrize(
    ("board", "uri"),
    [("gs://b/tb", "gs://b/tb/one-0000ff"), ("s3://b/{run}/tb", "s3://b/one-0000ff/tb")],
)
def test_tensorboard_goes_into_the_boot_specification(at: Path, board: str, uri: str) -> None:
    text = SINGLE + CLOUD

    def boot(text: str) -> dict[str, object]:
        made = load(text)
        spec = planning.job_spec(
            made, "0f", "one-0000ff", 0, "gs://b/r", ENV.home, BUNDLE, "ann", ENV  # type: ignore[arg-type]
        )  # fmt: skip
        return dict(spec.boot)

    assert boot(f"{text}tensorboard: {board}\n")["tensorboard"] == uri
    assert "tensorboard" not in boot(text)
    here = load(f"{text}tensorboard: {board}\n", on="local")
    assert here.tensorboard is None and here.artifacts is None
    recipe = json_schema()["$defs"]["Recipe"]["properties"]
    assert "tensorboard" in recipe


@pytest.mark.parametrize(
    ("board", "said"),
    [
        ("./tb", "tensorboard: write gs://BUCKET/FOLDER or s3://BUCKET/FOLDER"),
        ("gs://b/{name}", r"tensorboard: \{name\} is not known; only \{run\} is filled in"),
        ("gs://b/tb", "tensorboard: is where a run with `artifacts` in a bucket copies"),
        ("7", "tensorboard: expected a string"),
    ],
)
def test_a_tensorboard_that_cannot_be_is_told(at: Path, board: str, said: str) -> None:
    found = problems(f"{SINGLE}tensorboard: {board}\n")
    assert any(re.match(rf"r\.yaml:9:14: {said}", line) for line in found), found
