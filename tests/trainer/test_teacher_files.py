"""Files of logits, one for each sample: what is read, what is cut, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.trainer import gradients
from tests.trainer.test_distill_stored import distance, gradient, online
from trainer import teacher_files
from trainer.config import Distill, Source, StageConfig
from trainer.data import DataError
from trainer.data.read import sample_names
from trainer.data.stream import Rows, build_rows
from trainer.models import load_tokenizer
from trainer.objectives.distill_stored import DistillStored
from trainer.shrink import shrink
from trainer.teacher import coverage, gather
from trainer.teacher_files import LogitFiles


@pytest.fixture
def samples(texts: str, tmp_path: Path) -> str:
    """Eight documents that have ids."""
    lines = [json.loads(x) for x in Path(texts).read_text().splitlines()[:8]]
    path = tmp_path / "samples.jsonl"
    path.write_text("\n".join(json.dumps({"id": f"s{i}", **x}) for i, x in enumerate(lines)))
    return str(path)


@pytest.fixture
def logits(samples: str, tokenizer: str, tmp_path: Path) -> Path:
    """The teacher's logits for them, in float64: four `.npy` and four `.pt`."""
    folder = tmp_path / "logits"
    folder.mkdir()
    teacher = gradients.model(tokenizer, torch.float64, seed=2, hidden=64).eval()
    for i, document in enumerate(whole(samples, tokenizer, 256)):
        with torch.no_grad():
            found = teacher(input_ids=torch.tensor([document])).logits[0]
        if i % 2:
            torch.save(found, folder / f"s{i}.pt")
        else:
            np.save(folder / f"s{i}.npy", found.numpy())
    return folder


def whole(samples: str, tokenizer: str, length: int) -> list[list[int]]:
    chunks = rows_of(samples, tokenizer, length).chunks
    return [chunks.tokens[s : s + n].tolist() for s, n in zip(chunks.starts, chunks.lengths)]


def rows_of(samples: str, tokenizer: str, length: int = 128) -> Rows:
    tokens = load_tokenizer(tokenizer)
    return build_rows((Source(path=samples),), tokens, sequence_length=length, packing=True)


def reader(folder: Path, samples: str, tokenizer: str, rows: Rows, top_k: int = 10**6) -> Any:
    size = len(load_tokenizer(tokenizer))
    names = sample_names((Source(path=samples),))
    return LogitFiles(
        str(folder), names, rows, tokens=size, vocabularies=(size,), temperature=2.0, top_k=top_k
    )


def test_files_give_the_gradient_of_an_online_teacher(
    logits: Path, samples: str, tokenizer: str
) -> None:
    rows = rows_of(samples, tokenizer)
    files = reader(logits, samples, tokenizer, rows)
    kd = Distill(mode="precompute", logits_dir=str(logits), temperature=2.0, alpha=0.3)
    found = gradient(DistillStored(kd, files, gradients.CPU), tokenizer, rows, torch.float64)
    expected = gradient(online(tokenizer, torch.float64, 0.3), tokenizer, rows, torch.float64)
    assert distance(found, expected) < 1e-10


def test_long_documents_find_their_part_of_a_file(
    logits: Path, samples: str, tokenizer: str
) -> None:
    rows = rows_of(samples, tokenizer, length=16)
    files = reader(logits, samples, tokenizer, rows, top_k=1)
    batch = rows.batch(range(len(rows)))
    found = gather(files, batch)
    assert bool(found.status.all())
    best = {}
    for i, document in enumerate(whole(samples, tokenizer, 256)):
        path = logits / f"s{i}.npy"
        stored = np.load(path) if path.exists() else torch.load(path.with_suffix(".pt")).numpy()
        best.update({(i, t): int(stored[t].argmax()) for t in range(len(document))})
    chunks, expected = rows.chunks, []
    for row in range(len(rows)):
        for chunk in rows.packing[row].tolist():
            offset, document = chunks.offset(chunk), int(chunks.document[chunk])
            expected += [best[document, offset + t] for t in range(int(chunks.supervised[chunk]))]
    assert found.ids[:, 0].tolist() == expected


def test_a_file_may_be_longer_or_shorter_than_its_document(
    logits: Path, samples: str, tokenizer: str
) -> None:
    rows = rows_of(samples, tokenizer)
    batch = rows.batch(range(len(rows)))
    before = gather(reader(logits, samples, tokenizer, rows), batch)
    longer = np.load(logits / "s0.npy")
    np.save(logits / "s0.npy", np.concatenate([longer, longer]))
    shorter = torch.load(logits / "s1.pt")
    torch.save(shorter[:10].clone(), logits / "s1.pt")
    (logits / "s2.npy").unlink()
    files = reader(logits, samples, tokenizer, rows)
    after = gather(files, batch)
    gone = len(shorter) - 1 - 10 + len(whole(samples, tokenizer, 256)[2]) - 1
    assert int((~after.status).sum()) == gone
    assert torch.equal(after.p[after.status], before.p[after.status])
    assert float(after.p[~after.status].abs().sum()) == 0
    seen = coverage(files, rows)
    assert seen == (len(after.status) - gone, len(after.status), 7, 8)


def test_the_same_words_after_others_have_no_answer_of_another_document(
    tokenizer: str, tmp_path: Path
) -> None:
    """Documents A + C and B + C, cut where C begins: the answer for C depends on A or B."""
    a, b, c = ("abcdefghijklmnop", "qrstuvwxyz012345", "the same words, ")
    texts = {"one": a + c, "two": b + c, "three": b + c, "four": b + c}
    (tmp_path / "logits").mkdir()
    size = len(load_tokenizer(tokenizer))
    for i, name in enumerate(["one", "two", "three"]):  # of `four` there is none
        answer = np.full((40, size), -20.0, np.float32)
        answer[:, i] = 20
        np.save(tmp_path / "logits" / f"{name}.npy", answer)

    def given(*names: str) -> tuple[list[list[int]], Any]:
        path = tmp_path / "samples.jsonl"
        path.write_text("\n".join(json.dumps({"id": n, "text": texts[n]}) for n in names))
        rows = build_rows(
            (Source(path=str(path)),), load_tokenizer(tokenizer), sequence_length=16, packing=False
        )
        files = reader(tmp_path / "logits", str(path), tokenizer, rows, top_k=1)
        found = [gather(files, rows.batch([row])).ids.unique().tolist() for row in range(len(rows))]
        return found, coverage(files, rows)

    found, seen = given("one", "two")
    assert found == [[0], [-1], [1], [-1]]
    assert (seen.known, seen.known_chunks) == (32, 2)
    assert given("one")[0] == [[0], [0]]
    assert given("one", "four")[0] == [[0], [-1], [-1], [-1]]
    # What begins alike has equal answers: the first file is asked.
    assert given("two", "three")[0] == [[1], [1], [1], [1]]


def test_files_of_one_token_are_nearly_no_answer(
    stage: StageConfig, logits: Path, samples: str, run_stage: Callable[..., Any]
) -> None:
    for path in logits.iterdir():
        full = np.load(path) if path.suffix == ".npy" else torch.load(path).numpy()
        path.unlink()
        np.save(path.with_suffix(".npy"), full[:1])
    kd = Distill(mode="precompute", logits_dir=str(logits), top_k=8)
    data = replace(stage.data, train=(Source(path=samples),))
    outcome = run_stage(replace(stage, stage="kd", kd=kd, data=data))
    (told,) = [line for line in outcome.lines if line.startswith("teacher: answers for ")]
    assert told.startswith("teacher: answers for 8 of ") and " in 8 of 8 chunks" in told
    assert any(line.startswith("WARNING: 98%") for line in outcome.lines)


def test_a_file_that_cannot_be_used_is_found_before_training(
    logits: Path, samples: str, tokenizer: str
) -> None:
    good = torch.load(logits / "s1.pt")
    torch.save(good, logits / "s1.pt", _use_new_zipfile_serialization=False)
    reader(logits, samples, tokenizer, rows_of(samples, tokenizer))
    np.save(logits / "s6.npy", np.load(logits / "s6.npy")[:, 1:])
    with pytest.raises(DataError, match=r"s6.npy: .* made with another tokenizer"):
        reader(logits, samples, tokenizer, rows_of(samples, tokenizer))


def test_of_many_files_some_are_looked_at(
    logits: Path, samples: str, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_files, "CHECKED", 3)
    torch.save(torch.load(logits / "s1.pt")[:1].clone(), logits / "s1.pt")  # not looked at
    torch.save(torch.load(logits / "s7.pt")[:1].clone(), logits / "s7.pt")
    rows = rows_of(samples, tokenizer)
    seen = coverage(reader(logits, samples, tokenizer, rows), rows)
    assert seen.tokens - seen.known == len(whole(samples, tokenizer, 256)[7]) - 2


def test_names_that_match_no_sample_are_told_what_is_expected(
    logits: Path, samples: str, tokenizer: str
) -> None:
    for path in logits.iterdir():
        path.rename(logits / f"other-{path.name}")
    line = refused(logits, samples, tokenizer)
    assert "none of its 8 files" in line and "such as s0.npy or s1.npy (or .pt)" in line


def test_the_banner_names_samples_as_their_files_are(
    stage: StageConfig, samples: str, run_stage: Callable[..., Any]
) -> None:
    data = replace(stage.data, train=(Source(path=samples),))
    lines = run_stage(replace(stage, data=data)).lines
    assert any(x.startswith(f"  {samples}: ") and x.endswith("samples s0, s1, s2") for x in lines)
    (held_out,) = (x.path for x in stage.data.validation)
    assert any(x.startswith(f"  {held_out}: ") and "train.jsonl:1, " in x for x in lines)


def test_samples_of_a_manifest_are_found(samples: str, texts: str, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("\n".join(json.dumps({"path": path}) for path in (samples, texts)))
    sources = (Source(manifest=str(manifest)), Source(path=samples))
    names = sample_names(sources)
    assert names[0, "samples.jsonl:2"] == names[2, "samples.jsonl:2"] == "s1"
    assert names[1, "train.jsonl:3"] == "train-3"
    few = {(0, "samples.jsonl:2"), (1, "train.jsonl:3"), (2, "gone.jsonl:1")}
    assert sample_names(sources, few) == {at: names[at] for at in few if at in names}


def test_a_stage_learns_from_files_and_its_dry_run_looks_for_them(
    stage: StageConfig, logits: Path, samples: str, tmp_path: Path, run_stage: Callable[..., Any]
) -> None:
    (logits / "s5.pt").unlink()
    kd = Distill(mode="precompute", logits_dir=str(logits), top_k=8)
    data = replace(stage.data, train=(Source(path=samples),))
    student = replace(stage, stage="kd", kd=kd, data=data)
    outcome = run_stage(student)
    assert any(
        line.startswith("teacher: answers for ") and f"in 7 of 8 chunks, from {logits}" in line
        for line in outcome.lines
    )
    assert any(re.match(r"WARNING: \d\d% of the tokens", line) for line in outcome.lines)
    gone = replace(kd, logits_dir="/nowhere")
    with pytest.raises(DataError, match="/nowhere: no such folder"):
        run_stage(replace(student, kd=gone, output=str(tmp_path / "other")))
    config, notes = shrink(replace(student, output=str(tmp_path / "dry")), set())
    assert config.kd is not None and config.kd.mode == "online"
    assert any(note.startswith(f"teacher {logits}: ") for note in notes)
    with pytest.raises(DataError, match="/nowhere: no such folder"):
        shrink(replace(student, kd=gone, output=str(tmp_path / "dry")), set())
    (tmp_path / "empty").mkdir()
    empty = replace(kd, logits_dir=str(tmp_path / "empty"))
    with pytest.raises(DataError, match="none of its 0 files is named after a sample"):
        shrink(replace(student, kd=empty, output=str(tmp_path / "dry")), set())
    remote = replace(data, train=(Source(path="gs://nowhere/x.jsonl"),))  # whose names nobody knows
    shrink(replace(student, kd=empty, data=remote, output=str(tmp_path / "dry")), set())


class Attack:
    """What a pickle can do: `open` a file for writing when it is loaded."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def test_a_malicious_pickle_does_not_run(
    logits: Path, samples: str, tokenizer: str, tmp_path: Path
) -> None:
    trace = tmp_path / "ran"
    torch.save(Attack(str(trace)), logits / "s1.pt")
    torch.load(logits / "s1.pt", weights_only=False)
    assert trace.exists(), "the attack works where nobody watches"
    trace.unlink()
    assert "could run code" in refused(logits, samples, tokenizer)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        (lambda good: good[:, :-1].clone(), "made with another tokenizer"),
        (lambda good: good[None], "got float64 [1, "),
        (lambda good: {"logits": good}, "got a dict"),
        (lambda good: good.long(), "got int64 ["),
        (lambda good: F.pad(good[:, 1:], (1, 0), value=float("nan")), "no distribution"),
    ],
)
def test_wrong_logits_are_one_line(
    stored: Any, said: str, logits: Path, samples: str, tokenizer: str
) -> None:
    torch.save(stored(torch.load(logits / "s1.pt")), logits / "s1.pt")
    line = refused(logits, samples, tokenizer)
    assert line.startswith(f"{logits / 's1.pt'}: ") and said in line and "\n" not in line


@pytest.mark.parametrize("name", ["s0.npy", "s1.pt"])
def test_a_damaged_file_is_one_line(name: str, logits: Path, samples: str, tokenizer: str) -> None:
    path = logits / name
    path.write_bytes(path.read_bytes()[:200])
    line = refused(logits, samples, tokenizer)
    assert line.startswith(f"{path}: cannot be read: ") and "\n" not in line


def test_an_array_of_objects_is_not_opened(logits: Path, samples: str, tokenizer: str) -> None:
    np.save(logits / "s0.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert "cannot be read" in refused(logits, samples, tokenizer)


def refused(logits: Path, samples: str, tokenizer: str) -> str:
    rows = rows_of(samples, tokenizer)
    with pytest.raises(DataError) as error:
        gather(reader(logits, samples, tokenizer, rows), rows.batch(range(len(rows))))
    return str(error.value)
