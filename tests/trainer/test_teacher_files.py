"""Files of logits, one for each sample: what is read, what is cut, and what is refused."""

from __future__ import annotations

import json
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
from trainer.config import Distill, Source, StageConfig
from trainer.data import DataError
from trainer.data.read import sample_names
from trainer.data.stream import Rows, build_rows
from trainer.models import load_tokenizer
from trainer.objectives.distill_stored import DistillStored
from trainer.shrink import shrink
from trainer.teacher import gather, missing_chunks
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
    assert missing_chunks(files, rows) == (1, 8)


def test_a_stage_learns_from_files_and_its_dry_run_needs_none(
    stage: StageConfig, logits: Path, samples: str, tmp_path: Path, run_stage: Callable[..., Any]
) -> None:
    (logits / "s3.pt").unlink()
    kd = Distill(mode="precompute", logits_dir=str(logits), top_k=8)
    data = replace(stage.data, train=(Source(path=samples),))
    student = replace(stage, stage="kd", kd=kd, data=data)
    outcome = run_stage(student)
    assert f"teacher: answers for 7 of 8 chunks, from {logits}" in outcome.lines
    assert any(line.startswith("WARNING: 12%") for line in outcome.lines)
    gone = replace(kd, logits_dir="/nowhere")
    with pytest.raises(DataError, match="/nowhere: no such folder"):
        run_stage(replace(student, kd=gone, output=str(tmp_path / "other")))
    config, notes = shrink(replace(student, kd=gone, output=str(tmp_path / "dry")), set())
    assert config.kd is not None and config.kd.mode == "online"
    assert any(note.startswith("teacher /nowhere: ") for note in notes)


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
