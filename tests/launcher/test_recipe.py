"""Recipes: what is accepted, what it means, and how wrong ones are reported."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher import drafts, recipe
from launcher.errors import RecipeErrors
from launcher.spec import Recipe

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = sorted((REPOSITORY / "recipes").glob("*.yaml"))

SINGLE = """\
launch: 1
name: one
stage: pretrain
model: {name: org/model}
data:
  train: [{builtin: python-reference, split: train}]
  validation: [{builtin: python-reference, split: heldout}]
train: {steps: 100, lr: 1e-4}
"""
PIPELINE = """\
launch: 1
name: three
data:
  train: [{builtin: python-reference, split: train}]
  validation: [{builtin: python-reference, split: heldout}]
train: {steps: 100, lr: 1e-3, micro_batch: 4}
pipeline:
  - id: tokenizer
    stage: tokenizer
    tokenizer: {vocab_size: 300}
  - id: teacher
    stage: pretrain
    model: {init: random, tokenizer: "${stage:tokenizer}", architecture: {layers: 2}}
  - id: student
    stage: kd
    model: {init: random, tokenizer: "${stage:tokenizer}", architecture: {layers: 1}}
    kd: {teacher: "${stage:teacher}@best"}
    train: {steps: 50}
"""


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str, *overrides: str, name: str = "r.yaml", **options: Any) -> Recipe:
    Path(name).write_text(text, encoding="utf-8")
    options.setdefault("environ", {})
    return recipe.load(name, overrides, **options).recipe


def problems(text: str, *overrides: str, **options: Any) -> list[str]:
    with pytest.raises(RecipeErrors) as caught:
        load(text, *overrides, **options)
    return caught.value.problems


# What is read.


def test_a_single_stage_is_typed_with_every_default_filled(at: Path) -> None:
    made = load(SINGLE)
    assert [stage.id for stage in made.stages] == ["pretrain"] and not made.pipeline
    assert made.stages[0].train and made.stages[0].train.lr == 1e-4
    assert made.stages[0].hardware.backend == "local" and made.artifacts is None


def test_scalars_follow_yaml_1_2(at: Path) -> None:
    env = "env: {A: on, B: 12:30, C: 2026-11-21, D: no, E: 0x, F: 1_000}\n"
    made = load(SINGLE + env + "description: yes\n", "train.lr=1e-4", "train.steps=0x10")
    assert dict(made.env) == {
        "A": "on", "B": "12:30", "C": "2026-11-21", "D": "no", "E": "0x", "F": "1_000",
    }  # fmt: skip
    assert made.description == "yes"
    assert made.stages[0].train and made.stages[0].train.steps == 16


def test_anchors_may_be_reused(at: Path) -> None:
    text = PIPELINE.replace("model: {init", "model: &m {init", 1)
    start = text.index("    model: {init", text.index("id: student"))
    text = text[:start] + "    model: *m\n" + text[text.index("    kd:") :]
    stages = load(text).stages
    assert stages[1].model == stages[2].model


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("env: {A: !!str x}", "9:10: not valid YAML: tags are not allowed"),
        ("env: {A: x, A: y}", "9:13: duplicate key 'A'; first on line 9"),
        ("env: {<<: {A: x}}", "9:7: merge keys (<<) are not part of YAML 1.2; use `extends:`"),
        ("env: &e {A: *e}", "9:6: an anchor that contains itself"),
        ("env: {1: x}", "9:7: a key must be a string (write it in quotes)"),
        ("env: {? [a] : x}", "9:9: a key must be a string (write it in quotes)"),
        ("retry: {job: 99999999999999999999}", "9:14: a whole number beyond 64 bits"),
        ('env: {A: "\\ud800"}', "9:10: holds a character that is not text"),
        ('env: {A: "\\U00110000"}', "not valid YAML"),
        ("env: {A: \x07}", "9:10: not valid YAML: character '\\x07' is not allowed"),
        ("env: {A: ${B}}", 'inside { } and [ ] write "${VAR}" in quotes'),
        ("\tenv: {}", "not valid YAML: found character '\\t'"),
        ("env: " + "[" * 90 + "]" * 90, "nested deeper than 60 levels"),
        ("--- \nlaunch: 1", "expected a single document"),
        ("env: {A: nope, B: 1}", "9:19: env.B: expected a string, got 1; write it in quotes"),
        ("budget: {usd: .nan}", "9:15: budget.usd: expected a finite number"),
    ],
)
def test_unusable_yaml_is_one_line_with_its_place(at: Path, line: str, what: str) -> None:
    found = problems(SINGLE + line + "\n")
    assert any(what in problem for problem in found), found
    assert all(re.match(r"r\.yaml:\d+:\d+: ", problem) for problem in found)


def test_aliases_cannot_unfold_without_bound(at: Path) -> None:
    levels = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    levels += [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    assert any("too many for a recipe" in p for p in problems("\n".join(levels)))


# How problems are told.


def test_everything_wrong_is_told_at_once_sorted_with_places_and_near_names(at: Path) -> None:
    text = """\
launch: 2
nam: x
hardware: {backend: locl, accelerator: L44:1}
data:
  train: [{builtin: python-reference}]
  sequence_length: yes
train: {steps: 10, stps: 3, warmup: "${NOPE}"}
pipeline:
  - {id: tok, stage: tokenizr}
  - {id: Teacher, stage: pretrain, kd: {}, model: {name: a/b, presicion: bf16}, budget: {}}
"""
    assert problems(text) == [
        "r.yaml:1:1: missing key `name`",
        "r.yaml:1:9: launch: this version reads recipes of version 1, not 2",
        "r.yaml:2:1: nam: unknown key; did you mean 'name'?",
        "r.yaml:3:21: hardware.backend: no backend 'locl'; did you mean 'local'?",
        "r.yaml:3:40: hardware.accelerator: no accelerator 'L44'; did you mean 'L4'?",
        "r.yaml:6:20: data.sequence_length: expected a whole number, got 'yes'",
        "r.yaml:7:20: train.stps: unknown key; did you mean 'steps'?",
        "r.yaml:7:37: ${NOPE} is not set; set NOPE or write ${NOPE:-default}",
        "r.yaml:9:22: stage: 'tokenizr' is not allowed; did you mean 'tokenizer'?",
        "r.yaml:10:10: id: 'Teacher' is not a name; write a lower-case letter, then at most 39 "
        "of a-z, 0-9 and -",
        "r.yaml:10:36: stage 'pretrain' takes no `kd`; it takes: data, model, train",
        "r.yaml:10:63: model.presicion: unknown key; did you mean 'precision'?",
        "r.yaml:10:81: budget: belongs to the top of the recipe",
    ]


def test_a_mistake_in_a_shared_block_is_told_once(at: Path) -> None:
    found = problems(PIPELINE.replace("micro_batch: 4", "micro_batch: 0"))
    assert found == ["r.yaml:6:44: train.micro_batch: must be at least 1"]


def test_a_file_that_is_no_recipe_is_one_line(at: Path) -> None:
    (at / "folder").mkdir()
    (at / "latin.yaml").write_bytes(b"launch: 1\nname: caf\xe9\n")
    (at / "big.yaml").write_bytes(b"#" * 1_000_001)
    for name, text, what in [
        ("zzz.yml", None, "zzz.yml: no such file; there are: big.yaml, latin.yaml"),
        ("latn.yaml", None, "latn.yaml: no such file; did you mean 'latin.yaml'?"),
        ("folder", None, "folder: not a file; name a recipe (a .yaml file)"),
        ("latin.yaml", None, "latin.yaml:2:10: not UTF-8; save the file in that encoding"),
        ("big.yaml", None, "big.yaml: larger than 1000000 bytes: not a recipe"),
        ("a\0b", None, "no such file"),
        ("x" * 300, None, "cannot be read: File name too long"),
        ("e.yaml", "", "e.yaml:1:1: empty; a recipe starts with `launch: 1`"),
        ("e.yaml", "# nothing\n", "e.yaml:1:1: empty; a recipe starts with `launch: 1`"),
        ("e.yaml", "- a\n", "e.yaml:1:1: not a mapping of keys"),
        ("e.yaml", "a: [1\nb: 2\n", "e.yaml:2:2: not valid YAML: expected ',' or ']', but got ':'"),
    ]:
        if text is not None:
            (at / name).write_text(text)
        with pytest.raises(RecipeErrors) as caught:
            recipe.load(name)
        assert len(caught.value.problems) == 1 and what in caught.value.problems[0], name


# Files on files, variables.


def test_extends_merges_deeply_replaces_lists_and_null_removes(at: Path) -> None:
    (at / "sub").mkdir()
    load(SINGLE + "env: {A: a, B: b}\n", name="sub/base.yaml")
    text = """\
extends: sub/base.yaml
name: two
train: {steps: null, epochs: 2}
data: {validation: [{path: v.txt}]}
env: {B: null, C: c}
"""
    (at / "v.txt").write_text("x")
    made = load(text)
    train = made.stages[0].train
    assert made.name == "two" and dict(made.env) == {"A": "a", "C": "c"}
    assert train and (train.steps, train.epochs, train.lr) == (None, 2.0, 1e-4)
    assert len(made.stages[0].data.validation) == 1 and made.stages[0].data.train


def test_problems_in_an_extended_file_name_that_file(at: Path) -> None:
    (at / "sub").mkdir()
    (at / "sub/base.yaml").write_text(SINGLE.replace("lr: 1e-4", "lr: fast"))
    assert problems("extends: sub/base.yaml\n") == [
        "sub/base.yaml:8:25: train.lr: expected a number, got 'fast'"
    ]


def test_an_inherited_block_that_the_stage_cannot_use_is_dropped(at: Path) -> None:
    load(PIPELINE, name="base.yaml")
    (at / "base.yaml").write_text(SINGLE.replace("pretrain", "kd") + "kd: {teacher: a/b}\n")
    assert load("extends: base.yaml\nstage: pretrain\n").stages[0].kd is None
    found = problems("extends: base.yaml\nstage: pretrain\nkd: {teacher: a/c}\n")
    assert found == ["r.yaml:3:1: stage 'pretrain' takes no `kd`; it takes: data, model, train"]


def test_extends_in_a_circle_or_of_nothing_is_told_where_it_is_asked(at: Path) -> None:
    (at / "a.yaml").write_text("extends: r.yaml\n")
    assert problems("extends: a.yaml\n") == [
        "a.yaml:1:10: extends: goes in a circle: r.yaml -> a.yaml -> r.yaml"
    ]
    assert problems("extends: aa.yaml\n") == [
        "r.yaml:1:10: aa.yaml: no such file; did you mean 'a.yaml'?"
    ]
    assert problems("extends: [a]\n") == [
        "r.yaml:1:10: extends: expected the path of another recipe"
    ]


def test_variables_are_filled_and_unquoted_ones_keep_their_type(at: Path) -> None:
    text = SINGLE.replace("steps: 100", 'steps: 100, schedule: "${SCHEDULE:-linear}"')
    text = text.replace("name: one", "name: ${NAME}-x")
    text += "env: {A: 'a${NAME}b', B: '$${NAME} $5', C: '${EMPTY:-d}', D: '${EMPTY}'}\n"
    text += "budget:\n  hours: ${HOURS}\n"
    made = load(text, environ={"NAME": "run", "HOURS": "3", "EMPTY": ""})
    assert made.name == "run-x" and made.budget.hours == 3.0
    assert made.stages[0].train and made.stages[0].train.schedule == "linear"
    assert dict(made.env) == {"A": "arunb", "B": "${NAME} $5", "C": "d", "D": ""}


def test_malformed_references_say_what_may_be_written(at: Path) -> None:
    assert problems(SINGLE + "description: a ${9} b\n") == [
        "r.yaml:9:14: `${` without a name; write ${VAR}, ${VAR:-default}, ${stage:ID} or $${"
    ]


def test_relative_paths_start_at_the_file_they_are_written_in(at: Path) -> None:
    (at / "sub/m").mkdir(parents=True)
    (at / "sub/t.jsonl").write_text("{}")
    (at / "v.jsonl").write_text("{}")
    text = SINGLE.replace("{builtin: python-reference, split: train}", "{path: t.jsonl}")
    load(text.replace("org/model", "./m"), name="sub/base.yaml")
    made = load("extends: sub/base.yaml\nartifacts: out\n", "data.validation=[{path: v.jsonl}]")
    assert made.stages[0].data.train[0].path == str(at / "sub/t.jsonl")
    assert made.stages[0].data.validation[0].path == str(at / "v.jsonl")
    assert made.stages[0].model and made.stages[0].model.name == str(at / "sub/m")
    assert made.artifacts == str(at / "out")
    found = problems(text, "data.train=[{path: 'gs://b/*'}, {path: '*.gz'}, {path: no}]")
    assert found == [
        f"--set data.train: data.train[1].path: no file matches {at}/*.gz",
        f"--set data.train: data.train[2].path: no such file or folder: {at}/no",
    ]


def test_manifests_templates_and_folders_of_datasets_are_found_beside_the_recipe(at: Path) -> None:
    (at / "set").mkdir()
    for name in ("m.jsonl", "t.jinja"):
        (at / name).write_text("{}")
    text = SINGLE.replace("stage: pretrain", "stage: sft")
    made = load(text, "data.train=[{manifest: m.jsonl}, {hf: {name: ./set}}, {hf: {name: a/b}}]")
    first, second, third = made.stages[0].data.train
    assert first.manifest == str(at / "m.jsonl")
    assert second.hf and third.hf and (second.hf.name, third.hf.name) == (str(at / "set"), "a/b")
    for template, wanted in (("chatml", "chatml"), ("t.jinja", str(at / "t.jinja"))):
        assert load(text, f"data.chat_template={template}").stages[0].data.chat_template == wanted
    found = problems(text, "data.train=[{manifest: no}]", "data.chat_template=none.jinja")
    assert [line.split(": ", 1)[1] for line in found] == [
        f"data.chat_template: no such file or folder: {at}/none.jinja",
        f"data.train[0].manifest: no such file or folder: {at}/no",
    ]


# Pipelines.


def test_entries_inherit_the_blocks_at_the_top(at: Path) -> None:
    made = load(PIPELINE)
    tokenizer, teacher, student = made.stages
    assert tokenizer.train is None and tokenizer.data == teacher.data
    assert teacher.train and (teacher.train.steps, teacher.train.micro_batch) == (100, 4)
    assert student.train and (student.train.steps, student.train.micro_batch) == (50, 4)
    assert [stage.needs for stage in made.stages] == [(), ("tokenizer",), ("teacher",)]
    assert student.kd and student.kd.teacher == "${stage:teacher}@best"


def test_an_entry_may_be_another_recipe(at: Path) -> None:
    (at / "sub").mkdir()
    load(SINGLE + "env: {A: sub, B: sub}\nbudget: {hours: 9}\n", name="sub/first.yaml")
    text = PIPELINE.replace("  - id: student", "  - {id: more, recipe: sub/first.yaml, "
                            "train: {steps: 7}}\n  - id: student")  # fmt: skip
    text = text.replace("    kd:", "    needs: [teacher]\n    kd:") + "env: {A: top}\n"
    made = load(text)
    more = made.stages[2]
    assert more.id == "more" and more.model and more.model.name == "org/model"
    assert more.train and (more.train.steps, more.train.lr, more.train.micro_batch) == (7, 1e-4, 4)
    assert dict(made.env) == {"A": "top", "B": "sub"} and made.budget.hours is None
    load(PIPELINE, name="sub/all.yaml")
    found = problems(text.replace("first.yaml", "all.yaml"))
    assert "recipe: sub/all.yaml is a pipeline; a pipeline cannot hold another" in found[0]


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("${stage:teacher}@best", "${stage:teachr}", "no stage 'teachr'; did you mean 'teacher'?"),
        ("${stage:teacher}@best", "${stage:student}", "stage 'student' is this one"),
        ("layers: 2}", 'layers: 2}, name: "${stage:student}"', "stage 'student' comes later"),
        ("    kd:", "    needs: [tokenizer]\n    kd:",
         "stage 'teacher' is not among those this one waits for; add it to `needs`"),
        ("    kd:", "    needs: [studnt]\n    kd:", "no earlier stage 'studnt'"),
        ("    kd:", "    needs: [student]\n    kd:", "a stage cannot wait for itself"),
        ("    tokenizer: {", "    needs: [teacher]\n    tokenizer: {", "'teacher' comes later"),
        ("    kd:", "    needs: teacher\n    kd:", "needs: expected a list of stage ids"),
        ("id: student", "id: teacher", "id: there is already a stage 'teacher'"),
        ("id: student", "id: logs", "id: a run keeps folders of its own"),
        ("  - id: student\n    stage: kd", "  - stage: kd", "missing key `id`"),
        ("    stage: kd\n", "", "missing key `stage` (or `recipe`)"),
        ("name: three", "name: three\nstage: kd", "belongs to an entry of `pipeline`"),
        ("name: three", "name: three\nevaluate: {models: {a: b}}", "no stage of the pipeline"),
        ("    kd: {teacher: \"${stage:teacher}@best\"}\n", "", "stage 'kd' needs a `kd` block"),
        ("name: three", 'name: three\nhardware: {places: ["${stage:teacher}"]}',
         "belongs in model, data, train, kd and evaluate"),
        ("    train: {steps: 50}", "    gate: {metric: techer.val_loss, max: 3}",
         "no stage 'techer'; did you mean 'teacher'?"),
        ("layers: 2}}", "layers: 2}}\n    gate: {metric: val_loss, below: student.val_loss}",
         "stage 'student' comes later"),
        ("    train: {steps: 50}", "    gate: {metric: val_loss}", "needs `min`, `max`, `below`"),
        ("    train: {steps: 50}", "    gate: {metric: x, min: 3, max: 2}", "no number is at"),
        ("    train: {steps: 50}", "    gate: {metric: x, max: 2, by: 1}", "neither is given"),
        ("    train: {steps: 50}", "    gate: {metric: x, below: y, by: -1}", "not be negative"),
    ],
)  # fmt: skip
def test_stages_that_do_not_fit_together(at: Path, old: str, new: str, what: str) -> None:
    text = PIPELINE.replace(old, new)
    assert text != PIPELINE
    found = problems(text)
    assert any(what in problem and problem.startswith("r.yaml:") for problem in found), found


# Overrides.


def test_set_reaches_every_place_of_a_recipe(at: Path) -> None:
    made = load(
        PIPELINE,
        "train.lr=2e-3", "pipeline.teacher.train.steps=5", "pipeline.2.kd.alpha=0.25",
        "data.train.0.share=0.5", "budget.hours=2", "env={A: b}", "description=a=b",
        "train.seed=7",
    )  # fmt: skip
    teacher, student = made.stages[1:]
    assert teacher.train and (teacher.train.steps, teacher.train.lr) == (5, 2e-3)
    assert student.train and (student.train.steps, student.train.seed) == (50, 7)
    assert student.kd and student.kd.alpha == 0.25 and student.data.train[0].share == 0.5
    assert made.budget.hours == 2 and dict(made.env) == {"A": "b"} and made.description == "a=b"


def test_set_null_removes(at: Path) -> None:
    made = load(SINGLE, "train.steps=null", "train.epochs=1")
    assert made.stages[0].train and made.stages[0].train.epochs == 1.0


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("train.lr=fast", "--set train.lr: train.lr: expected a number, got 'fast'"),
        ("train.lrr=1", "--set train.lrr: train.lrr: unknown key; did you mean 'lr'?"),
        ("train.lr=[1", "--set train.lr: not valid YAML"),
        ("train.lr", "--set train.lr: expected KEY=VALUE"),
        ("=1", "--set : expected KEY=VALUE"),
        ("train..lr=1", "--set train..lr: expected KEY=VALUE"),
        ("name.x=1", "--set name.x: name is a single value and has no 'x'"),
        ("pipeline.techer.train.lr=1", "no entry 'techer' in pipeline; did you mean 'teacher'?"),
        ("pipeline.9.train.lr=1", "no entry '9' in pipeline; allowed: student, teacher"),
        ("model.name=a/b", None),
        ("kd.alpha=2", "--set kd.alpha: kd.alpha: must be in [0, 1]"),
        ("train.lr=${X}", "--set train.lr: ${X} is not set"),
    ],
)
def test_a_wrong_set_is_told_by_its_own_name(at: Path, override: str, what: str | None) -> None:
    if what is None:
        model = load(PIPELINE, override).stages[1].model
        assert model and model.name == "a/b"
        return
    found = problems(PIPELINE, override)
    assert len(found) == 1 and what in found[0]


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("train.learning_rate=1", "train.learning_rate: unknown key; here it is 'lr'"),
        ("model.lora={r: 4}", "model.lora: unknown key; here it is 'adapter'"),
        ("data.max_length=4", "data.max_length: unknown key; here it is 'sequence_length'"),
        ("hardware.gpu=H100", "hardware.gpu: unknown key; here it is 'accelerator'"),
        ("budget.r=1", "budget.r: unknown key; allowed: hours, usd, usd_per_hour, wait"),
    ],
)
def test_a_key_as_other_trainers_name_it_is_told_its_name_here(
    at: Path, override: str, what: str
) -> None:
    assert problems(SINGLE, override)[0].endswith(what)


def test_a_later_set_of_one_stage_wins_over_one_of_all(at: Path) -> None:
    """As the forecast advises what one stage needs in order to fit."""
    text = PIPELINE.replace("layers: 2}}", "layers: 2}}\n    train: {micro_batch: 2}")
    everywhere, one = "train.micro_batch=64", "pipeline.student.train.micro_batch=8"
    rows = [s.train.micro_batch for s in load(text, everywhere, one).stages if s.train]
    assert rows == [2, 8]
    assert "has no effect" in problems(text, one, everywhere)[0]  # the last word is lost
    text = text.replace("{steps: 50}", "{steps: 50, micro_batch: 8}")
    other = "pipeline.student.train.lr=1e-3"
    assert "has no effect" in problems(text, everywhere, other)[0]


def test_a_set_that_every_stage_overrides_is_an_error(at: Path) -> None:
    text = PIPELINE.replace("layers: 2}}", "layers: 2}}\n    train: {steps: 60}")
    assert problems(text, "train.steps=5") == [
        "--set train.steps: has no effect: every stage says otherwise; use pipeline.ID.train.steps"
    ]


@pytest.mark.parametrize("cause", ["preempted", "capacity", "infrastructure", "job"])
def test_retry_counts_are_not_negative(at: Path, cause: str) -> None:
    (what,) = problems(SINGLE, f"retry.{cause}=-1")
    assert what == f"--set retry.{cause}: retry.{cause}: must not be negative"


def test_a_data_path_that_the_trainer_does_not_read_is_noticed_early(at: Path) -> None:
    (at / "x.csv").write_text("a,b\n")
    (at / "x.txt").write_text("a\n")
    (at / "folder").mkdir()
    (what,) = problems(SINGLE, "data.train=[{path: x.csv}]")
    assert f"{at}/x.csv is no data file: name a folder, a .jsonl or a .txt file" in what
    load(SINGLE, "data.train=[{path: x.txt}, {path: folder}]")


def test_a_pattern_that_no_file_matches_is_noticed_early(at: Path) -> None:
    (at / "a" / "b").mkdir(parents=True)
    (at / "a" / "b" / "x[1].jsonl").write_text("{}\n")
    (what,) = problems(SINGLE, "data.train=[{path: a/*.jsonl}]")
    assert what == f"--set data.train: data.train[0].path: no file matches {at}/a/*.jsonl"
    load(SINGLE, "data.train=[{path: a/**/*.jsonl}, {path: 'a/b/x[1].jsonl'}, {path: a/*/x*}]")
    (what,) = problems(SINGLE, "data.train=[{path: z**.jsonl}]")
    assert "data.train[0].path: " in what and f"{at}/z**.jsonl" in what


# Backends.


KD_L4 = REPOSITORY / "recipes" / "kd_l4.yaml"


def test_on_local_drops_what_only_the_cloud_understands(at: Path) -> None:
    (at / "t.txt").write_text("x")
    data = [f"data.{key}=[{{path: t.txt}}]" for key in ("train", "validation")]
    made = recipe.load(KD_L4, data, on="local", environ={})
    hardware = made.recipe.stages[0].hardware
    assert (hardware.backend, hardware.accelerator, hardware.capacity, hardware.places) == (
        "local", "cpu:1", ("standard",), (),
    )  # fmt: skip
    assert hardware.vertex is None and made.recipe.artifacts is None
    assert dict(made.recipe.secrets) == {"HF_TOKEN": "env://HF_TOKEN"}


def test_set_wins_over_on(at: Path) -> None:
    made = recipe.load(KD_L4, ["hardware.accelerator=L4:1"], on="local", environ={})
    assert made.recipe.stages[0].hardware.accelerator == "L4:1"
    assert load(SINGLE, on="local") == load(SINGLE)


def test_on_another_backend_asks_for_what_it_needs(at: Path) -> None:
    found = problems(SINGLE, on="vertex")
    assert any("backend 'vertex' has no 'cpu'; allowed: L4" in p for p in found)
    assert any("needs a bucket: gs://" in p for p in found)
    assert problems(SINGLE, on="vortex") == [
        "--on vortex: hardware.backend: no backend 'vortex'; did you mean 'vertex'?"
    ]


@pytest.mark.parametrize(
    ("hardware", "what"),
    [
        ("{backend: local, accelerator: v4-8}", "runs on cpu:N and NVIDIA GPUs, not on 'v4-8'"),
        ("{backend: local, nodes: 2}", "is one machine; ask for workers instead: cpu:2"),
        ("{backend: local, places: [x]}", "has one place: this machine"),
        ("{backend: local, capacity: [spot]}", "has no 'spot' capacity; allowed: standard"),
        ("{backend: local, vertex: {}}", "belongs to backend 'vertex', but the backend is 'local'"),
        ("{backend: vertex, accelerator: RTX4090:1}", "has no 'RTX4090'; allowed: L4, A100-40GB"),
        ("{backend: vertex, accelerator: 'L4:3'}", "allowed: L4:1, L4:2, L4:4, L4:8"),
        ("{backend: vertex, accelerator: 'L4:1', capacity: [reserved]}", "has no 'reserved'"),
        ("{accelerator: 'v4-8:2'}", "'v4-8:2' is not a TPU slice; write v4-8 and no count"),
        ("{accelerator: ':1'}", "must look like L4:1"),
        ("{nodes: 0}", "hardware.nodes: must be at least 1"),
    ],
)
def test_impossible_hardware(at: Path, hardware: str, what: str) -> None:
    assert any(what in problem for problem in problems(SINGLE + f"hardware: {hardware}\n"))


@pytest.mark.parametrize(
    ("model", "accelerator", "what"),
    [
        (
            "attention: varlen",
            "cpu:2",
            "model.attention: 'varlen' needs a GPU of compute capability "
            "8.0 or higher; hardware.accelerator is cpu:2; take auto or sdpa",
        ),
        ("attention: flash_attention_2", "T4:1", "needs a GPU of compute capability 8.0 or higher"),
        (
            "attention: flash_attention_3",
            "B200:1",
            "needs an H100 or H200; hardware.accelerator is",
        ),
        (
            "float8: torchao",
            "A100:1",
            "model.float8: 'torchao' needs a GPU of compute capability 8.9",
        ),
        ("float8: torchao, precision: fp16", "H100:1", "model.float8: needs precision bf16"),
        (
            "attention: varlen, precision: fp32",
            "H100:1",
            "model.precision: varlen computes in bf16",
        ),
        ("float8: torchao, attention: flash_attention_3", "H100:1", None),
        ("float8: auto, attention: auto", "cpu:1", None),
        ("float8: off", "T4:1", None),
    ],
)
def test_kernels_that_the_accelerator_does_not_have(
    at: Path, model: str, accelerator: str, what: str | None
) -> None:
    text = SINGLE.replace("{name: org/model}", f"{{name: org/model, {model}}}")
    assert text != SINGLE
    text += f"hardware: {{accelerator: '{accelerator}'}}\n"
    if what is None:
        made = load(text).stages[0].model
        assert made and f"float8: {made.float8}" in model
        return
    (found,) = problems(text)
    assert what in found


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("steps: 100", "steps: 100, warmup: 100", "8:29: train.warmup: 100 steps of warm-up leave"),
        (
            "stage: pretrain",
            "stage: grpo\ngrpo: {rewards: ['m:f'], max_new_tokens: 1024}",
            "1024 tokens leave no room for a prompt in data.sequence_length 1024",
        ),
        ("steps: 100", "epochs: 1, steps: 100", "give exactly one of `steps`, `epochs`"),
        ("{name: org/model}", "{init: random}", "model: needs a `name`, or `init: random` with"),
        ("train: [{builtin: python-reference, split: train}]", "train: []", "at least one source"),
        ("steps: 100", "steps: 100, evaluate_every: 5", None),
        ("stage: pretrain", "stage: kd\nkd: {teacher: org/model}", "is the student itself"),
        (
            "stage: pretrain",
            "stage: dpo\npreference: {reference: adapter}",
            "4:25: preference.reference: `adapter` needs a model.adapter that can be switched off",
        ),
        (
            "stage: pretrain",
            "stage: ipo\npreference: {label_smoothing: 0.1}",
            "4:31: preference.label_smoothing: belongs to stage `dpo`",
        ),
        ("stage: pretrain", "stage: dpo", "'python-reference' holds nothing for stage 'dpo'"),
        (
            "stage: pretrain\nmodel: {name: org/model}",
            "stage: pretrain\nmodel: {name: openai/gpt-oss-20b, attention: sdpa}",
            "'sdpa' leaves out the attention sinks of openai/gpt-oss-20b",
        ),
        ("launch: 1\n", "", "missing key `launch`; write `launch: 1`"),
        ("launch: 1", "launch: true", "reads recipes of version 1, not True"),
        ("stage: pretrain\n", "", "missing key `stage` (or `pipeline`)"),
        (
            "stage: pretrain",
            "stage: [pretrain]",
            "stage: ['pretrain'] is not allowed; did you mean",
        ),
        ("name: one", "name: One", "3"),
        ("name: one", "name: one\nartifacts: 'x/{run}/{id}'", "{id} is not known; only {run}"),
        ("name: one", "name: one\nartifacts: gs://b/x", "writes to a folder of this machine"),
        ("name: one", "name: one\nenv: {A-B: x}", "env.A-B: is not the name of a variable"),
        ("name: one", 'name: one\nbudget: {wait: "5m\\n"}', "must be a number and a unit"),
        ("org/model}", 'org/model, tokenizer: "${stage:x}"}', "there is no pipeline, so no stage"),
    ],
)
def test_impossible_combinations(at: Path, old: str, new: str, what: str | None) -> None:
    text = SINGLE.replace(old, new)
    assert text != SINGLE
    if what is None:
        load(text)
        text = text.replace("  validation: [{builtin: python-reference, split: heldout}]\n", "")
        what = "there is nothing to evaluate on: no `data.validation`"
    assert any(what in problem for problem in problems(text))


# Secrets.


@pytest.mark.parametrize(
    "block",
    [
        "secrets: {HF_TOKEN: hf_s3cr3t}",
        "secrets: {HF_TOKEN: [hf_s3cr3t]}",
        "secrets: hf_s3cr3t",
        "secrets: {HF_TOKEN: 'env://hf s3cr3t'}",
        "secrets: {'hf_s3cr3t x': env://A}",
        "secrets: {HF_TOKEN: '${TOKEN}'}",
        "env: {HF_TOKEN: hf_s3cr3t}",
        "env: {HF_TOKEN: [hf_s3cr3t]}",
        "secret: {HF_TOKEN: hf_s3cr3t}",
    ],
)
def test_a_secret_in_clear_is_refused_and_never_repeated(at: Path, block: str) -> None:
    found = problems(SINGLE + block + "\n", environ={"TOKEN": "hf_s3cr3t"})
    assert found and "s3cr3t" not in "\n".join(found)
    assert all(problem.startswith("r.yaml:9:") for problem in found)


def test_secrets_that_the_backend_cannot_read_are_refused(at: Path) -> None:
    manager = "secrets: {HF_TOKEN: secret-manager://project/hf-token}\n"
    assert "reads secrets from env://NAME only" in problems(SINGLE + manager)[0]
    with pytest.raises(RecipeErrors, match="shown to everybody who may list jobs"):
        recipe.load(KD_L4, ["secrets.HF_TOKEN=env://HF_TOKEN"], environ={})


# The whole.


def test_the_fingerprint_is_of_the_meaning_not_of_the_text(at: Path) -> None:
    Path("a.yaml").write_text(SINGLE)
    lines = SINGLE.splitlines()
    Path("b.yaml").write_text("# a comment\n" + "\n".join([lines[-1], *lines[:-1]]) + "\n")
    first, second = recipe.load("a.yaml"), recipe.load("b.yaml", ["train.micro_batch=8"])
    assert first.fingerprint == second.fingerprint and len(first.fingerprint) == 64
    assert recipe.load("a.yaml", ["train.seed=1"]).fingerprint != first.fingerprint
    assert json.loads(json.dumps(first.canonical)) == first.canonical


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_load_without_any_environment_and_say_what_they_need(path: Path) -> None:
    assert recipe.load(path, environ={}).recipe.description
    header = path.read_text().split("\nlaunch:")[0].split("\nextends:")[0]
    assert all(f"# {word}" in header for word in ("What it does:", "Needs:", "Costs:"))


fuzzed = settings(
    max_examples=60, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


def test_a_stage_that_writes_answers_cannot_share_its_model(at: Path) -> None:
    text = SINGLE.replace("stage: pretrain", "stage: grpo\ngrpo: {rewards: [rewards:length]}")
    said = problems(text.replace("lr: 1e-4", "lr: 1e-4, parallel: fsdp"))
    assert any("train.parallel: fsdp: grpo writes answers of any length" in x for x in said), said


def test_a_base_of_4_bits_cannot_be_shared(at: Path) -> None:
    text = SINGLE.replace("org/model}", "org/model, adapter: {quantization: nf4}}")
    load(text)
    said = problems(text.replace("lr: 1e-4", "lr: 1e-4, parallel: fsdp"))
    assert any("train.parallel: fsdp cannot share quantised weights" in x for x in said), said


def test_a_source_of_another_format_holds_no_pairs(at: Path) -> None:
    (at / "pairs.jsonl").write_text("")
    text = SINGLE.replace("stage: pretrain", "stage: ipo").replace("  validation", "  # validation")
    text = text.replace(
        "builtin: python-reference, split: train", "path: pairs.jsonl, format: FORMAT"
    )
    load(text.replace("FORMAT", "preference"))
    (said,) = problems(text.replace("FORMAT", "messages"))
    assert "data.train[0].format: 'messages' holds no pairs, which stage 'ipo' needs" in said


@fuzzed
@given(text=st.text() | st.text(alphabet="{}[]:-&*!|>'\"%@`#,?\n \tab1$<~."))
def test_no_text_raises_anything_but_recipe_errors(at: Path, text: str) -> None:
    Path("r.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(RecipeErrors) as caught:
        recipe.load("r.yaml", environ={})
    assert all(problem.startswith("r.yaml") for problem in caught.value.problems)
    assert all(len(problem.splitlines()) == 1 for problem in caught.value.problems)


scalars = st.sampled_from(
    [None, True, -1, 0, 3, 2**70, 0.5, float("nan"), "", "kd", "x", "${stage:a}", "${A", "L4:1",
     "/**", "~/x", "vertex", "local", "2h", "env://A", "a.b", "\0"]
)  # fmt: skip
KEYS = sorted({*drafts.TOP, *drafts.ENTRY, "name", "path", "metric", "below", "models", "teacher",
               "architecture", "steps", "accelerator", "backend", "places", "vertex"})  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=12,
)


@fuzzed
@given(
    block=st.sampled_from(KEYS), value=values, other=st.sampled_from(KEYS), second=values,
    base=st.sampled_from([SINGLE, PIPELINE]), on=st.sampled_from([None, "local", "vertex", "x"]),
    override=st.text(max_size=12) | st.builds("{}={}".format, st.sampled_from(KEYS), st.text()),
)  # fmt: skip
def test_no_values_raise_anything_but_recipe_errors(
    at: Path, block: str, value: Any, other: str, second: Any, base: str, on: str, override: str
) -> None:
    Path("base.yaml").write_text(base)
    text = json.dumps({"extends": "base.yaml", block: value, other: second})
    Path("r.yaml").write_text(text)
    try:
        loaded = recipe.load("r.yaml", [override], on=on, environ={})
    except RecipeErrors as errors:
        assert errors.problems
        assert all(len(problem.splitlines()) == 1 for problem in errors.problems)
    else:
        json.dumps(loaded.canonical, allow_nan=False)
