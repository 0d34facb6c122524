"""Sources that are more than a file of texts: manifests, the hub, built-in questions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.config import FieldErrors, Hub, Source
from trainer.data import DataError
from trainer.data.manifest import expand
from trainer.data.questions import python_questions
from trainer.data.read import documents
from trainer.data.shapes import View


def write_lines(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for number in range(3):
        write_lines(tmp_path / "wiki" / f"part-{number}.jsonl", [{"text": f"w{number}"}])
    write_lines(tmp_path / "math.jsonl", [{"body": 'CALL calculator:"1+1"'}])
    return tmp_path


def test_a_manifest_is_the_sources_that_it_lists(shards: Path) -> None:
    entries = [
        {"path": "wiki/part-*.jsonl", "type": "lm", "weight": 2},
        {"path": str(shards / "math.jsonl"), "type": "math_tool", "field": "body"},
    ]
    manifest = write_lines(shards / "manifest.jsonl", entries)
    source = Source(manifest=str(manifest), weight=1.5)
    listed = expand((source,))
    assert [(s.format, s.weight, s.field) for s in listed] == [
        ("text", 3.0, "text"),
        ("math_tool", 1.5, "body"),
    ]
    found = list(documents((Source(manifest=manifest.as_uri()),), View(tool_ratio=1.0)))
    assert [(d.text, d.source) for d in found] == [
        *((f"w{number}", 0) for number in range(3) for _ in range(2)),
        ('CALL calculator:"1+1"\nRESULT: 2', 1),
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("[]", 'expected an object like {"path": ...}'),
        ('{"type": "lm"}', "'path' must be a file, folder or glob, got null"),
        ('{"path": "x", "type": "mesages"}', "'mesages' is not known; did you mean 'messages'?"),
        ('{"path": "x", "weigth": 1}', "unknown key 'weigth'; did you mean 'weight'?"),
        ('{"path": "x", "weight": "1"}', "'weight' must be a number"),
        ('{"path": "x", "weight": 0}', "weight: must be greater than 0"),
        ('{"path": "x", "field": 3}', "'field' must be a string"),
    ],
)
def test_a_bad_line_of_a_manifest_is_an_error_with_its_place(
    line: str, said: str, tmp_path: Path
) -> None:
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(f"\n{line}\n")
    with pytest.raises(DataError) as error:
        expand((Source(manifest=str(manifest)),))
    assert str(error.value).startswith(f"{manifest}:2: ") and said in str(error.value)


def test_a_manifest_that_is_empty_or_not_there_says_so(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text("\n")
    with pytest.raises(DataError, match="an empty manifest"):
        expand((Source(manifest=str(tmp_path / "m.jsonl")),))
    with pytest.raises(DataError, match="cannot be read: No such file"):
        expand((Source(manifest=str(tmp_path / "nowhere.jsonl")),))


def test_the_shape_is_seen_per_file(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    write_lines(tmp_path / "1.jsonl", [{"messages": turns}])
    write_lines(tmp_path / "2.jsonl", [{"prompt": "p ", "completion": "c"}])
    write_lines(tmp_path / "3.jsonl", [{"text": "t", "id": 1}])
    (tmp_path / "4.txt").write_text("whole")
    source = Source(path=str(tmp_path))
    found = list(documents((source,), View(default="auto")))
    assert [d.text for d in found] == ["q\na", "p c", "t", "whole"]
    with pytest.raises(DataError, match=r"4\.txt: a \.txt file holds no `messages`"):
        list(documents((Source(path=str(tmp_path / "4.txt"), format="messages"),)))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "give exactly one of `path`, `builtin`, `hf` and `manifest`"),
        ({"path": "a", "manifest": "b"}, "give exactly one"),
        ({"manifest": "m", "format": "text"}, "a manifest says `type` on each line"),
        ({"hf": Hub("a"), "split": "train"}, "belongs to `builtin` sources"),
    ],
)
def test_sources_that_contradict_themselves_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(FieldErrors, match=said.replace("(", r"\(")):
        Source(**fields)


def test_questions_are_split_by_name_and_no_answer_is_on_both_sides() -> None:
    parts = {split: dict(python_questions(split)) for split in ("train", "heldout")}
    both = dict(python_questions())
    assert len(both) == len(parts["train"]) + len(parts["heldout"])
    assert len(both) > 500 and 0.05 < len(parts["heldout"]) / len(both) < 0.15
    answers = {
        split: {record["messages"][1]["content"] for record in records.values()}
        for split, records in parts.items()
    }
    assert not answers["train"] & answers["heldout"]
    question = both["str.upper"]["messages"]
    assert "str.upper" in question[0]["content"]
    assert question[1]["content"] == "Return a copy of the string converted to uppercase."


def test_without_the_library_a_dataset_of_the_hub_is_one_clear_line() -> None:
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        "from trainer.config import Hub, Source\n"
        "from trainer.data import DataError\n"
        "from trainer.data.read import documents\n"
        "try:\n"
        "    list(documents((Source(hf=Hub('org/name', 'main')),)))\n"
        "except DataError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("hf:org/name/main:train: datasets of the hub are read with")
    assert "pip install 'launch-llm[hub]'" in done.stdout
    assert done.stdout.count("\n") == 1, done.stderr


def test_a_dataset_with_configurations_gives_the_one_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    names = ("small", "large")
    card = [f"- config_name: {name}\n  data_files: {name}/*.jsonl\n" for name in names]
    for name in names:
        write_lines(tmp_path / "set" / name / "part.jsonl", [{"text": f"{name} text"}])
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n{''.join(card)}---\n")
    for name in names:
        source = Source(hf=Hub(str(tmp_path / "set"), name))
        assert [d.text for d in documents((source,))] == [f"{name} text"]
    with pytest.raises(DataError, match=r"set:train: cannot be loaded: [^\n]*small[^\n]*$"):
        list(documents((Source(hf=Hub(str(tmp_path / "set"))),)))


def test_a_dataset_is_read_by_name_configuration_and_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_lines(tmp_path / "set" / "train.jsonl", [{"prompt": "a", "completion": "b"}] * 3)
    write_lines(tmp_path / "set" / "test.jsonl", [{"prompt": "c", "completion": "d"}])
    name = str(tmp_path / "set")
    found = list(documents((Source(hf=Hub(name, split="test")),), View(default="auto")))
    assert [(d.id, d.text) for d in found] == [("0", "cd")]
    assert len(list(documents((Source(hf=Hub(name)),), View(default="auto")))) == 3
    with pytest.raises(DataError, match=r"set/other:train: cannot be loaded: [^\n]+$"):
        list(documents((Source(hf=Hub(name, "other")),), View(default="auto")))
    with pytest.raises(DataError, match=r":nope: cannot be loaded: [^\n]+$"):
        list(documents((Source(hf=Hub(name, split="nope")),)))
    with pytest.raises(DataError, match=r"row 0: no key 'text'; keys here: 'completion', 'prompt'"):
        list(documents((Source(hf=Hub(name)),)))
