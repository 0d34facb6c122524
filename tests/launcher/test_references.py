"""What is found before a run starts: folders of this machine that a recipe names, and as many
problems of it as can be told in one reading."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.launcher.test_recipe import PIPELINE, SINGLE, at, load, problems

assert at  # a fixture: tests name it


@pytest.mark.parametrize(
    ("stage", "blocks", "keys"),
    [
        ("pretrain", "model: {name: ./no, tokenizer: ~/no-such-folder@best}",
         ["model.name", "model.tokenizer"]),
        ("kd", "model: {name: a/b}\nkd: {teacher: ../no@last}", ["kd.teacher"]),
        ("kd", "model: {name: a/b}\nkd: {mode: precompute, logits_dir: no}", ["kd.logits_dir"]),
        ("kd", "model: {name: a/b}\nkd: {mode: precompute, targets: no}", ["kd.targets"]),
        ("targets", "targets: {teacher: file:///no/where}", ["targets.teacher"]),
        ("evaluate", "evaluate: {models: {old: ./no, new: a/b}}", ["evaluate.models.old"]),
        ("merge", "merge: {adapter: ./no, base: /no/where}", ["merge.adapter", "merge.base"]),
        ("export", "export: {model: ./no}", ["export.model"]),
    ],
)  # fmt: skip
def test_a_model_that_is_not_there_is_found_where_it_is_written(
    at: Path, stage: str, blocks: str, keys: list[str]
) -> None:
    data = "" if stage in ("merge", "export") else SINGLE[SINGLE.index("data:") :]
    train = "" if stage in ("pretrain", "kd") else data[data.find("train: {") :]
    text = f"launch: 1\nname: one\nstage: {stage}\n{blocks}\n{data.removesuffix(train)}"
    found = problems(text)
    assert [re.split(r":\d+:\d+: ", line)[1].split(": ")[0] for line in found] == keys
    assert all(re.match(r"r.yaml:[45]:\d+: .*: no such folder: /", line) for line in found), found


def test_a_model_folder_may_be_there_or_be_what_an_earlier_stage_exports(at: Path) -> None:
    (at / "m").mkdir()
    (at / "f.bin").write_text("")
    assert load(SINGLE.replace("org/model", "./m@best")).stages[0].model
    (found,) = problems(SINGLE.replace("org/model", "./f.bin"))
    assert found == f"r.yaml:4:15: model.name: {at}/f.bin is a file; name the folder"
    text = """\
launch: 1
name: two
pipeline:
  - {id: out, stage: export, export: {model: a/b, to: ./out}}
  - id: seen
    stage: evaluate
    evaluate: {models: {out: ./out, same: "./out@best"}}
    data: {validation: [{builtin: python-reference}]}
"""
    assert len(load(text).stages) == 2
    found = problems(text.replace("stage: evaluate", "stage: evaluate\n    needs: []"))
    assert len(found) == 2 and "no such folder yet" in found[0] and "add 'out'" in found[0]


def test_a_cloud_job_is_not_sent_to_a_folder_of_this_machine(at: Path) -> None:
    (at / "m").mkdir()
    cloud = "hardware: {backend: vertex, accelerator: L4:1}\nartifacts: gs://b/{run}\n"
    (found,) = problems(SINGLE.replace("org/model", "./m") + cloud)
    assert found.startswith("r.yaml:4:15: model.name: a Vertex AI job cannot read this machine's")


@pytest.mark.parametrize(
    ("stage", "blocks", "line"),
    [
        ("sft", 'model: {name: "${stage:words}"}',
         "model.name: stage 'words' (tokenizer) leaves no model; allowed: whole"),
        ("sft", 'model: {name: "${stage:part}@best"}',
         "model.name: stage 'part' trains an adapter, which is not trained further; merge it"),
        ("sft", 'model: {name: a/b, tokenizer: "${stage:compare}"}',
         "model.tokenizer: stage 'compare' (evaluate) leaves no tokenizer; allowed: part, whole,"),
        ("kd", 'model: {name: a/b}, kd: {teacher: "${stage:compare}"}',
         "kd.teacher: stage 'compare' (evaluate) leaves no model; allowed: part, whole"),
        ("kd", 'model: {name: a/b}, kd: {mode: precompute, targets: "${stage:whole}"}',
         "kd.targets: stage 'whole' (sft) leaves no stored answers"),
        ("merge", 'merge: {adapter: "${stage:whole}"}',
         "merge.adapter: stage 'whole' (sft) leaves no adapter; allowed: part"),
        ("export", 'export: {model: "${stage:file}"}',
         "export.model: stage 'file' writes a GGUF file, which is not read here; name the model"),
        ("evaluate", 'evaluate: {models: {w: "${stage:words}"}}',
         "evaluate.models.w: stage 'words' (tokenizer) leaves no model; allowed: part, whole"),
    ],
)  # fmt: skip
def test_a_stage_that_leaves_something_else_is_refused_with_the_recipe(
    at: Path, stage: str, blocks: str, line: str
) -> None:
    text = f"""\
launch: 1
name: kinds
data: {{train: [{{builtin: python-questions}}], validation: [{{builtin: python-questions}}]}}
train: {{steps: 3}}
pipeline:
  - {{id: words, stage: tokenizer, tokenizer: {{vocab_size: 300}}}}
  - {{id: whole, stage: sft, model: {{name: a/b}}}}
  - {{id: part, stage: sft, model: {{name: a/b, adapter: {{rank: 4}}}}}}
  - {{id: file, stage: export, export: {{model: "${{stage:whole}}", format: gguf}}}}
  - {{id: compare, stage: evaluate, evaluate: {{models: {{a: "${{stage:part}}"}}}}}}
  - {{id: last, stage: {stage}, {blocks}}}
"""
    (found,) = problems(text)
    assert re.match(r"r.yaml:11:\d+: ", found) and line in found


def test_what_a_stage_leaves_is_taken_where_it_fits(at: Path) -> None:
    text = """\
launch: 1
name: kinds
data: {train: [{builtin: python-questions}], validation: [{builtin: python-questions}]}
train: {steps: 3}
pipeline:
  - {id: words, stage: tokenizer, tokenizer: {vocab_size: 300}}
  - {id: part, stage: sft, model: {name: a/b, tokenizer: "${stage:words}", adapter: {rank: 4}}}
  - {id: answers, stage: targets, targets: {teacher: "${stage:part}"}}
  - {id: kd, stage: kd, model: {name: "${stage:part}", init: random},
     kd: {mode: precompute, targets: "${stage:answers}"}}
  - {id: more, stage: kd, model: {name: "${stage:kd}@best"}, kd: {teacher: "${stage:part}"}}
"""
    assert len(load(text).stages) == 5


def test_an_adapter_is_merged_before_it_is_exported(at: Path) -> None:
    text = (
        PIPELINE[: PIPELINE.index("  - id: tokenizer")]
        + """\
  - {id: tuned, stage: sft, model: {name: a/b, adapter: {rank: 4}}}
  - {id: whole, stage: merge, merge: {adapter: "${stage:tuned}"}}
  - {id: out, stage: export, export: {model: "${stage:whole}"}}
"""
    )
    assert len(load(text).stages) == 3
    (found,) = problems(text.replace("${stage:whole}", "${stage:tuned}@best"))
    assert "export.model: stage 'tuned' trains an adapter" in found and "`merge` first" in found
    plain = text.replace("adapter: {rank: 4}", "adapter: null").replace("whole}", "tuned}")
    assert load(plain.replace("stage: merge, merge: {adapter:", "stage: export, export: {model:"))


def test_rules_types_missing_files_and_models_are_told_together(at: Path) -> None:
    text = """\
launch: 1
name: one
stage: pretrain
model: {name: ./no, precision: fp23}
data:
  train: [{path: no.jsonl}]
  sequence_length: -1
train: {steps: 5, epochs: 2, lr: fast, micro_batch: auto, warmup: -1}
"""
    told = [re.split(r":\d+:\d+: ", line)[1].split(": ")[0] for line in problems(text)]
    assert told == ["model.name", "model.precision", "data.train[0].path", "data.sequence_length",
                    "train.global_batch", "train.steps", "train.lr", "train.warmup"]  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "only"),
    [
        ("train: {epochs: two}", "train.epochs"),
        ("train: {epoch: 2}", "train.epoch"),
        ("train: {steps: 5, micro_batch: automatic, global_batch: 64}", "train.micro_batch"),
        ("model: {init: randm, tokenizer: a/b, architecture: {layers: 2}}", "model.init"),
        ("model: {init: random, tokenizer: a/b, architecture: {heads: x, kv_heads: 3}}",
         "model.architecture.heads"),
    ],
)  # fmt: skip
def test_a_rule_waits_for_the_fields_that_it_is_about(at: Path, wrong: str, only: str) -> None:
    block = wrong.split(":")[0]
    lines = [line for line in SINGLE.splitlines() if not line.startswith(f"{block}:")]
    found = problems("\n".join([*lines, wrong]) + "\n")
    assert len(found) == 1 and f": {only}: " in found[0], found
