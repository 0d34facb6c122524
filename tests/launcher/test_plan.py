"""What a run will create: jobs, configurations, specifications, prices."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import launcher.plan as planning
from launcher import recipe, schema
from launcher.backends.base import Env
from launcher.clock import ManualClock
from launcher.errors import Exit
from launcher.spec import Budget, Recipe
from trainer.config import ConfigError, load_job

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = sorted((REPOSITORY / "recipes").glob("*.yaml"))
NOW = 1_795_000_000.0  # 2026-11-18

HEAD = """\
launch: 1
name: three
data:
  train: [{builtin: python-reference, split: train}]
  validation: [{builtin: python-reference, split: heldout}]
train: {steps: 100}
env: {NCCL_DEBUG: WARN}
secrets: {HF_TOKEN: "env://HF_TOKEN"}
budget: {hours: 2}
"""
PIPELINE = """\
pipeline:
  - {id: tok, stage: tokenizer, tokenizer: {vocab_size: 300}}
  - id: teacher
    stage: pretrain
    model: {init: random, tokenizer: "${stage:tok}", architecture: {layers: 2}}
  - id: student
    stage: kd
    model: {init: random, tokenizer: "${stage:tok}", architecture: {layers: 1}}
    kd: {teacher: "${stage:teacher}@best"}
    train: {steps: null, seconds_of: "${stage:teacher}"}
  - id: compare
    stage: evaluate
    evaluate: {models: {kd: "${stage:student}", ce: "${stage:teacher}@last"}}
"""


@dataclass(frozen=True)
class Bundle:
    path: Path
    sha256: str
    bytes: int


BUNDLE = Bundle(Path("/home/u/.launch/bundles/b.tar.gz"), "ab" * 32, 1000)


def environment(**environ: str) -> Env:
    return Env(Path("/home/u/.launch"), environ, ManualClock(NOW), "ann", "/usr/bin/python3")


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def read(text: str, *overrides: str) -> Recipe:
        (tmp_path / "r.yaml").write_text(text)
        return recipe.load(tmp_path / "r.yaml", overrides, environ={}).recipe

    return read


def ids(made: Recipe) -> list[list[str]]:
    return [[stage.id for stage in job] for job in planning.jobs(made)]


def test_contiguous_stages_on_equal_hardware_share_a_job(load: Any) -> None:
    assert ids(load(HEAD + PIPELINE)) == [["tok", "teacher", "student", "compare"]]
    assert ids(load(HEAD + PIPELINE, "pipeline.student.hardware.accelerator=cpu:2")) == [
        ["tok", "teacher"], ["student"], ["compare"],
    ]  # fmt: skip
    same = load(HEAD + PIPELINE, "pipeline.teacher.hardware.accelerator=cpu:1")
    assert len(ids(same)) == 1


def test_a_gate_ends_its_job_unless_nothing_follows(load: Any) -> None:
    gate = "gate={metric: val_loss, max: 9}"
    assert ids(load(HEAD + PIPELINE, f"pipeline.teacher.{gate}")) == [
        ["tok", "teacher"], ["student", "compare"],
    ]  # fmt: skip
    last = load(HEAD + PIPELINE, "pipeline.compare.gate={metric: kd.val_loss, below: ce.val_loss}")
    assert len(ids(last)) == 1


def test_stage_references_become_folders_under_the_root(load: Any) -> None:
    made = load(HEAD + PIPELINE)
    for root, shown in (("/r", "/r"), ("gs://b/x", "gs://b/x"), ("/r/", "/r")):
        tok, teacher, student, compare = planning.stage_configs(made, made.stages, root)
        assert tok.output == f"{shown}/tok" and teacher.model.tokenizer == f"{shown}/tok"
        assert student.kd.teacher == f"{shown}/teacher@best"
        assert student.train.seconds_of == f"{shown}/teacher"
        assert compare.evaluate.models == {
            "kd": f"{shown}/student", "ce": f"{shown}/teacher@last",
        }  # fmt: skip


def test_a_recipe_without_pipeline_writes_to_the_root_itself(load: Any) -> None:
    made = load(HEAD + "stage: pretrain\nmodel: {name: a/b}\n")
    assert [config.output for config in planning.stage_configs(made, made.stages, "/r")] == ["/r"]


def spec_of(made: Recipe, index: int = 0, **environ: str) -> Any:
    env = environment(**environ)
    return planning.job_spec(
        made, "00000000000000ff", "three-0000ff", index, "/r", env.home, BUNDLE, "ann", env  # type: ignore[arg-type]
    )  # fmt: skip


def test_the_boot_specification_is_the_contract_and_its_job_is_read_by_the_trainer(
    load: Any, tmp_path: Path
) -> None:
    made = load(HEAD + PIPELINE, "hardware.accelerator=cpu:2")
    spec = spec_of(made)
    boot = planning.fill(spec.boot, {"attempt": 3, "deadline": 7200})
    job = boot.pop("job")
    assert boot == {
        "schema": 1, "run": "00000000000000ff", "name": "three-0000ff-j0", "job_index": 0,
        "attempt": 3, "owner": "ann", "root": "/r",
        "bundle": {"url": str(BUNDLE.path), "sha256": BUNDLE.sha256, "bytes": 1000},
        "work": "/home/u/.launch/local/three-0000ff-j0-a3", "python": "/usr/bin/python3",
        "workers": 2, "nodes": 1, "env": {"NCCL_DEBUG": "WARN"},
        "secrets": {"HF_TOKEN": "env://HF_TOKEN"},
        "deadline_seconds": 7200, "grace_seconds": 600,
    }  # fmt: skip
    assert spec.labels == {"launch-run": "00000000000000ff", "launch-owner": "ann"}
    file = tmp_path / "job.json"
    file.write_text(json.dumps(job))
    read = load_job(file)
    assert (read.attempt, read.control, len(read.stages)) == (3, "/r/control", 4)
    assert (read.run, read.name) == ("00000000000000ff", "three-0000ff")


@pytest.mark.parametrize(
    ("accelerator", "peak"), [("H100:8", 989.0), ("RTX4090:2", 165.0), ("cpu:2", None)]
)
def test_a_job_knows_the_peak_of_one_accelerator(load: Any, accelerator: str, peak: Any) -> None:
    made = load(HEAD + PIPELINE, f"hardware.accelerator={accelerator}")
    assert spec_of(made).boot["job"]["peak_tflops"] == peak


def test_an_unfilled_job_is_refused_by_the_trainer(load: Any, tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    file.write_text(json.dumps(spec_of(load(HEAD + PIPELINE)).boot["job"]))
    with pytest.raises(ConfigError, match="attempt: expected a whole number"):
        load_job(file)


def test_a_secret_of_the_environment_is_nowhere_in_a_plan(load: Any) -> None:
    made = load(HEAD + PIPELINE)
    spec = spec_of(made, HF_TOKEN="hf_s3cr3t")
    assert "s3cr3t" not in json.dumps([spec.boot, dict(spec.env), dict(spec.secrets)])


def test_local_python_and_the_project_come_from_recipe_or_environment(load: Any) -> None:
    made = load(HEAD + PIPELINE, "hardware.local.python=/opt/py")
    spec = spec_of(made, GOOGLE_CLOUD_PROJECT="p")
    assert spec.boot["python"] == "/opt/py" and spec.boot["job"]["project"] == "p"


def test_holes_are_filled_by_name_and_type() -> None:
    request = {"n": "${attempt}", "t": ["a-${attempt}", "${ref:disk}", "${other}", "$HOME"], "x": 1}
    filled = planning.fill(request, {"attempt": 2, "ref:disk": "d-1", "resume": True})
    assert filled == {"n": 2, "t": ["a-2", "d-1", "${other}", "$HOME"], "x": 1}
    assert planning.fill("${resume}", {"resume": True}) is True


@pytest.mark.parametrize(("deadline", "timeout"), [(90, "90s"), (None, None)])
def test_a_text_around_a_hole_without_a_value_is_null(deadline: Any, timeout: Any) -> None:
    request = {"deadline_seconds": "${deadline}", "timeout": "${deadline}s"}
    filled = planning.fill(request, {"deadline": deadline})
    assert filled == {"deadline_seconds": deadline, "timeout": timeout}


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=100, derandomize=True)
@given(plain)
def test_filling_changes_nothing_but_holes(request_: Any) -> None:
    filled = planning.fill(request_, {"attempt": 1})
    assert "${attempt}" in repr(request_) or filled == request_
    assert planning.fill(filled, {"attempt": 2}) == filled


def test_the_artifact_root_is_one_per_run(load: Any) -> None:
    made = load(HEAD + PIPELINE)
    home = Path("/h")
    assert planning.artifact_root(made, "0f", "n-0f", home) == "/h/runs/0f/artifacts"
    for given_, root in (("/a/{run}/x", "/a/n-0f/x"), ("/a/", "/a/n-0f"), ("/a", "/a/n-0f")):
        there = load(HEAD + PIPELINE, f"artifacts='{given_}'")
        assert planning.artifact_root(there, "0f", "n-0f", home) == root


@pytest.mark.parametrize(
    ("rate", "budget", "total"),
    [
        (2.0, Budget(hours=3), 6.0),
        (2.0, Budget(hours=3, usd=5), 5.0),
        (2.0, Budget(usd=5), 5.0),
        (2.0, Budget(), None),
        (None, Budget(hours=3, usd=5), None),
        (0.0, Budget(), 0.0),
    ],
)
def test_the_total_is_bounded_by_hours_and_dollars_or_unknown(
    load: Any, rate: float | None, budget: Budget, total: float | None
) -> None:
    assert planning._total(rate, budget) == total


def test_offers_above_the_hourly_budget_are_left_out(load: Any) -> None:
    text = HEAD.replace('secrets: {HF_TOKEN: "env://HF_TOKEN"}\n', "")
    text += "stage: pretrain\nmodel: {name: a/b}\nartifacts: gs://b/x\n"
    text = text.replace("{builtin: python-reference, split: train}", "{path: gs://b/t}")
    text = text.replace("{builtin: python-reference, split: heldout}", "{path: gs://b/v}")
    text += (
        "hardware: {backend: vertex, accelerator: 'H100:8', capacity: [standard, spot], "
        "places: [us-east4]}\n"
    )
    made = planning.make(load(text), environment(), BUNDLE)  # type: ignore[arg-type]
    assert [o.usd_per_hour for o in made.jobs[0].offers] == [87.8325, 34.16]
    assert (made.usd_per_hour, made.usd_total) == (87.8325, 175.665)
    cheap = planning.make(load(text, "budget.usd_per_hour=40"), environment(), BUNDLE)  # type: ignore[arg-type]
    assert [o.capacity for o in cheap.jobs[0].offers] == ["spot"]
    assert "cost: 34.16 USD/h, at most 68.32 USD (2 h)" in cheap.lines()
    none = planning.make(load(text, "budget.usd_per_hour=4"), environment(), BUNDLE)  # type: ignore[arg-type]
    assert none.jobs[0].offers == () and none.jobs[0].intents == ()
    assert none.refusal is not None and none.refusal.exit_code == Exit.BUDGET
    assert "the cheapest offer is 34.16 USD an hour" in none.refusal.message


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_plans_offline(path: Path) -> None:
    loaded = recipe.load(path, environ={}).recipe
    made = planning.make(loaded, environment(), BUNDLE)  # type: ignore[arg-type]
    assert made.jobs and all(job.offers and job.intents for job in made.jobs), made.notes
    assert not any(intent.billable for job in made.jobs for intent in job.intents[:-1])
    assert all(job.intents[-1].billable == (job.backend != "local") for job in made.jobs)
    assert json.loads(json.dumps(made.to_json()))["v"] == 1
    lines = made.lines()
    assert lines[0].startswith(f"{loaded.name}: ") and all("\n" not in line for line in lines)
    again = planning.make(loaded, environment(), BUNDLE)  # type: ignore[arg-type]
    assert again == made


# The schema.


def conforms(value: Any, rule: dict[str, Any], root: dict[str, Any]) -> bool:
    """A checker for the words of JSON Schema that `json_schema` uses; others raise."""
    import re

    kinds = {"object": dict, "array": list, "string": str, "null": type(None), "boolean": bool}
    known = {"$schema", "$defs", "title", "description", "default", "$ref", "anyOf", "enum",
             "const", "type", "pattern", "properties", "additionalProperties", "required", "items",
             "minItems"}  # fmt: skip
    assert set(rule) <= known, set(rule) - known
    if "$ref" in rule and not conforms(value, root["$defs"][rule["$ref"].rpartition("/")[2]], root):
        return False
    if "anyOf" in rule and not any(conforms(value, option, root) for option in rule["anyOf"]):
        return False
    if "enum" in rule and value not in rule["enum"]:
        return False
    if "const" in rule and value != rule["const"]:
        return False
    kind = rule.get("type")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if (kind == "number" and not number) or (
        kind == "integer" and not (number and value == int(value))
    ):
        return False
    if kind in kinds and not isinstance(value, kinds[kind]):
        return False
    if isinstance(value, str) and "pattern" in rule and not re.search(rule["pattern"], value):
        return False
    if isinstance(value, list):
        return len(value) >= rule.get("minItems", 0) and all(
            conforms(item, rule.get("items", {}), root) for item in value
        )
    if isinstance(value, dict):
        properties, extra = rule.get("properties", {}), rule.get("additionalProperties", {})
        return all(key in value for key in rule.get("required", [])) and all(
            conforms(child, properties[key], root) if key in properties
            else extra is not False and conforms(child, extra if extra is not True else {}, root)
            for key, child in value.items()
        )  # fmt: skip
    return True


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_conforms_to_the_schema(path: Path) -> None:
    from launcher.positions import Position, parse
    from launcher.positions import plain as values

    found: list[Any] = []
    tree = parse(path.read_text(), Position(str(path), 1, 1), {}, found)
    assert tree is not None and not found
    rules = schema.json_schema()
    document = values(tree)
    assert conforms(document, rules, rules)
    for wrong in (
        {**document, "nam": 1}, {**document, "launch": 2}, {**document, "train": {"stps": 1}},
        {**document, "hardware": {"nodes": "two"}}, {**document, "secrets": {"A": "hf_literal"}},
        {**document, "pipeline": [{"stage": "kd"}]}, {**document, "budget": {"usd": [1]}},
        {**document, "stage": "kdd"}, {**document, "gate": {"metrc": "x"}},
    ):  # fmt: skip
        assert not conforms(wrong, rules, rules), wrong


def test_the_schema_lets_variables_stand_for_values_and_null_remove_them() -> None:
    rules = schema.json_schema()
    document = {"launch": 1, "name": "a", "stage": "kd", "train": {"steps": "${STEPS}", "lr": None}}
    assert conforms(document, rules, rules)
    assert conforms({"extends": "b.yaml"}, rules, rules)
    assert not conforms({"name": "a"}, rules, rules)
