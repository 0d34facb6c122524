"""Documents: what is read, under which names, how much of it, and what bad input says."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config import Source
from trainer.data import DataError
from trainer.data.read import Document, documents, shards


def read(path: Any, **source: Any) -> list[Document]:
    return list(documents((Source(path=str(path), **source),)))


def write_lines(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def hundred(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "hundred.jsonl", [{"text": f"number {i}"} for i in range(100)])


def test_a_folder_is_read_in_order_of_its_files_and_names_documents_by_their_place_in_it(
    tmp_path: Path,
) -> None:
    write_lines(tmp_path / "b.jsonl", [{"text": "b1"}, {"text": "b2"}])
    write_lines(tmp_path / "a" / "z.jsonl", [{"text": "z1"}])
    (tmp_path / "c.txt").write_text("one\ntwo\n")
    (tmp_path / "README.md").write_text("not data")
    write_lines(tmp_path / ".cache" / "old.jsonl", [{"text": "hidden"}])

    found = read(tmp_path)

    assert [(d.id, d.text) for d in found] == [
        ("a/z.jsonl:1", "z1"),
        ("b.jsonl:1", "b1"),
        ("b.jsonl:2", "b2"),
        ("c.txt", "one\ntwo\n"),
    ]
    assert shards(Source(path=str(tmp_path))) == 3


def test_a_moved_folder_keeps_the_ids_of_its_documents(tmp_path: Path) -> None:
    write_lines(tmp_path / "here" / "x" / "1.jsonl", [{"text": "t"}])
    before = read(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert read(tmp_path / "there") == before
    assert read(tmp_path / "there" / "*" / "*.jsonl") == before


@pytest.mark.parametrize("pattern", ["s*.jsonl", "**/s*.jsonl", "s[12].jsonl", "s?.jsonl"])
def test_a_pattern_takes_the_files_that_match(tmp_path: Path, pattern: str) -> None:
    for name in ("s2", "s1", "other"):
        write_lines(tmp_path / f"{name}.jsonl", [{"text": name}])
    assert [d.text for d in read(tmp_path / pattern)] == ["s1", "s2"]


def test_a_file_uri_is_a_path(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "with space #1.jsonl", [{"text": "t"}])
    assert [d.text for d in read(path.as_uri())] == ["t"]


def test_an_existing_file_may_have_the_name_of_a_pattern(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "part[1].jsonl", [{"text": "t"}])
    assert [d.text for d in read(path)] == ["t"]


def test_blank_lines_and_blank_texts_are_no_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": "x"}\r\n   \n{"text": " \\n"}\n{"text": "y"}')
    assert [(d.id, d.text) for d in read(path)] == [("a.jsonl:2", "x"), ("a.jsonl:5", "y")]


@given(texts=st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=5))
@settings(max_examples=50, derandomize=True, deadline=None)
def test_any_text_comes_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    path = tmp_path_factory.mktemp("any") / "a.jsonl"
    lines = [json.dumps({"body": text}, ensure_ascii=False) for text in texts]
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    assert [d.text for d in read(path, field="body")] == texts


def test_each_document_says_which_source_it_is_from(hundred: Path) -> None:
    twice = (Source(path=str(hundred)), Source(path=str(hundred)))
    assert [d.source for d in documents(twice)] == [0] * 100 + [1] * 100


def test_a_larger_share_keeps_all_that_a_smaller_one_keeps(hundred: Path) -> None:
    kept = [{d.id for d in read(hundred, share=share)} for share in (0.1, 0.4, 0.7, 1.0)]
    assert all(small < large for small, large in pairwise(kept))
    assert 25 <= len(kept[1]) <= 55 and len(kept[3]) == 100


def test_the_share_is_the_same_in_another_process_with_another_hash_seed(hundred: Path) -> None:
    script = (
        "import sys; from trainer.config import Source; from trainer.data.read import documents\n"
        "for d in documents((Source(path=sys.argv[1], share=0.3, weight=1.5),)): print(d.id)"
    )
    there = subprocess.run(
        [sys.executable, "-c", script, str(hundred)],
        env={**os.environ, "PYTHONHASHSEED": "4711"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.split() == [d.id for d in read(hundred, share=0.3, weight=1.5)]


@pytest.mark.parametrize("weight", [0.5, 1.0, 2.5, 3.0])
def test_a_weight_repeats_every_document_and_a_fraction_of_them_once_more(
    hundred: Path, weight: float
) -> None:
    found = [d.id for d in read(hundred, weight=weight)]
    times = [found.count(f"hundred.jsonl:{line}") for line in range(1, 101)]
    assert set(times) <= {math.floor(weight), math.ceil(weight)}
    assert abs(len(found) - 100 * weight) <= (0 if weight == int(weight) else 15)


def test_share_and_weight_choose_independently(hundred: Path) -> None:
    kept = len(read(hundred, share=0.5))
    assert 0.25 * kept <= len(read(hundred, share=0.5, weight=0.5)) <= 0.75 * kept


BAD_LINES = [
    (b'{"text": "cut', "not JSON at column 10: Unterminated string starting"),
    (b'["a"]', 'expected an object like {"text": ...}, got a list'),
    (b'"a"', 'expected an object like {"text": ...}, got a string'),
    (b"3", 'expected an object like {"text": ...}, got a number'),
    (b'{"body": "a", "id": 1}', "no key 'text'; keys here: 'body', 'id'; name one with `field`"),
    (b"{}", "no key 'text'; keys here: none; name one with `field`"),
    (b'{"text": null}', "'text' must be a string, got null"),
    (b'{"text": true}', "'text' must be a string, got a boolean"),
    (b'{"text": "\\ud83d!"}', "'text' holds half a character (a lone surrogate, U+D83D) at 0"),
    (b'{"text": "caf\xe9"}', "not UTF-8: byte 0xe9 at 13; convert the file (iconv -t UTF-8)"),
    (b"[" * 100_000, "cannot be read as JSON: "),
]


@pytest.mark.parametrize(("line", "says"), BAD_LINES, ids=[says[:25] for _, says in BAD_LINES])
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: bytes, says: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:2: {says}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("absent.jsonl", "no such file or folder (looked in "),
        ("absent/*.jsonl", "no file matches this pattern (looked in "),
        ("a**.jsonl", "no file matches" if sys.version_info >= (3, 13) else "cannot be matched: "),
        ("empty", "no data file in this folder; `.jsonl`"),
        ("table.csv", "unknown kind of file; `.jsonl`"),
        ("*.csv", "table.csv; only `.jsonl`"),
        ("blank.txt", "holds no text"),
        ("no_lines.jsonl", "holds no text"),
        ("gs://bucket/train.jsonl", "cannot read `gs://` data; allowed: a file, folder or glob"),
        ("s3://bucket/*.jsonl", "cannot read `s3://` data; allowed: a file, folder or glob"),
        ("file://host/a.jsonl", "`host` is another host; write file:///PATH"),
        ("~nobody-of-that-name/a.jsonl", "no such user; write the path in full"),
        ("latin.txt", "not UTF-8: byte 0xe9 at 3"),
        ("x" * 300 + ".jsonl", "cannot be read: File name too long"),
    ],
)
def test_a_source_that_cannot_be_read_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("table.csv").write_text("a,b\n")
    Path("blank.txt").write_text(" \n")
    Path("no_lines.jsonl").touch()
    Path("latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(path) and says in message and "\n" not in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_forbidden_file_says_so(hundred: Path) -> None:
    hundred.chmod(0)
    with pytest.raises(DataError, match=r"hundred.jsonl: cannot be read: Permission denied"):
        read(hundred)


def test_a_share_that_keeps_nothing_says_so(hundred: Path) -> None:
    with pytest.raises(DataError, match=r"share 1e-09 and weight 1 keep none of its 100 documents"):
        read(hundred, share=1e-9)


def test_no_source_at_all_is_an_error() -> None:
    with pytest.raises(DataError, match=r"name a source under `data.train`"):
        list(documents(()))
