"""Rows that become longer within one run: what is read, and that a stop changes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.conftest import in_folder
from tests.trainer.test_loop import Faulty, lines, weights
from trainer import phases, smaller, stages
from trainer.batch import IGNORE
from trainer.config import (
    ConfigError,
    Data,
    Distill,
    FieldErrors,
    Job,
    Phase,
    StageConfig,
    Train,
    to_dict,
)
from trainer.data import DataError
from trainer.data.chunks import Chunks, recut
from trainer.data.curriculum import Curriculum
from trainer.data.pack import pack
from trainer.data.stream import Rows, Stream

Run = Callable[..., Any]
PHASES = (Phase(64, 0.3), Phase(128, 0.6))
STEPS = 10
#: A job whose process is killed in its sixth step.
KILLED = """
import signal, sys
from tests.trainer.test_loop import Interrupted
from trainer import stages
from trainer.__main__ import main
stages.STAGES["pretrain"] = stages.train(lambda *_: Interrupted(5, signal.SIGKILL))
main(["run", sys.argv[1]])
"""


def documents(sizes: list[int], cut: bool = True, learned: Any = None) -> Chunks:
    """Documents of which every token is its own number."""
    count = sum(sizes)
    none = np.zeros(0, dtype=np.int64)
    bare = Chunks(
        np.arange(count, dtype=np.int32), none, none, none, learned, none, count, [], none,
        [(0, str(i)) for i in range(len(sizes))], np.array(sizes, dtype=np.int64),
        np.full(len(sizes), cut),
    )  # fmt: skip
    return bare


def cut_anew(bare: Chunks, length: int, read: Any = None) -> Chunks:
    read = np.zeros(len(bare.tokens), dtype=np.bool_) if read is None else read
    return recut(bare, length, np.arange(len(bare.sizes)), read)


def rows_of(sizes: list[int], length: int) -> Rows:
    chunks = cut_anew(documents(sizes), length)
    return Rows(chunks, pack(chunks.lengths, length), length, fixed=True)


def stream(rows: Rows, **changes: Any) -> Curriculum:
    cut: dict[str, Any] = {"micro_batch": 2, "accumulate": 1, "rank": 0, "world_size": 1, "seed": 0}
    return Curriculum(rows, PHASES, **{**cut, **changes})


def learned(group: list[Any]) -> list[int]:
    """The tokens that a group predicts from: each its own number."""
    return [
        int(token) for batch in group for token in batch.input_ids[batch.targets != IGNORE].tolist()
    ]


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 40), min_size=1, max_size=8),
    length=st.integers(2, 16),
    read=st.data(),
)
def test_what_is_left_is_cut_once_and_whole(
    sizes: list[int], length: int, read: st.DataObject
) -> None:
    bare = documents(sizes)
    count = sum(sizes)
    gone = np.array(read.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    found = cut_anew(bare, length, gone)
    ends = set((np.cumsum(sizes) - 1).tolist())
    predicting = Counter(
        int(token)
        for start, _, supervised in found.spans(np.arange(len(found)))
        for token in bare.tokens[start : start + supervised]
    )
    assert predicting == Counter(t for t in range(count) if not gone[t] and t not in ends)
    for start, size, _ in found.spans(np.arange(len(found))):
        assert size <= length and not gone[start : start + size].any()
        assert not ends & set(range(start, start + size - 1))  # never across a document's end


def test_an_exchange_has_its_beginning_or_nothing() -> None:
    bare = documents([20, 20], cut=False)
    assert cut_anew(bare, 8).starts.tolist() == [0, 20]
    read = np.zeros(40, dtype=np.bool_)
    read[:8] = True
    assert cut_anew(bare, 16, read).starts.tolist() == [20]


def test_what_only_asks_is_left_out_at_every_length() -> None:
    answers = np.zeros(20, dtype=np.bool_)
    answers[15:] = True
    assert cut_anew(documents([20], learned=answers), 8).starts.tolist() == [8, 16]
    assert cut_anew(documents([20], learned=answers), 20).targets.tolist() == [5]


def test_within_a_pass_nothing_is_read_twice_and_little_is_left() -> None:
    sizes = [3 + (i * 37) % 400 for i in range(40)]
    rows = rows_of(sizes, 256)
    found = stream(rows)
    seen: Counter[int] = Counter()
    steps = len(rows) // 2
    lengths, tokens = [], []
    for step in range(steps):
        found.advance(step, step / steps)
        group = found.next_group()
        lengths.append(found.rows.sequence_length)
        tokens.append(sum(batch.input_ids.numel() for batch in group))
        seen.update(learned(group))
    assert set(tokens) == {2 * 256}
    assert sorted(set(lengths)) == [64, 128, 256] and lengths == sorted(lengths)
    assert max(seen.values()) == 1
    possible = sum(size - 1 for size in sizes)
    assert len(seen) > 0.9 * possible
    # Then all of it comes again.
    again: Counter[int] = Counter()
    for step in range(steps, 3 * steps + 2):
        found.advance(step, 1.0)
        again.update(learned(found.next_group()))
    assert len(again) == possible


@pytest.mark.parametrize("cut", [(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=str)
def test_what_a_step_reads_depends_on_no_cut(cut: tuple[int, int, int]) -> None:
    rows = rows_of([3 + (i * 37) % 400 for i in range(60)], 256)
    micro_batch, accumulate, ranks = cut

    def streams(micro_batch: int, accumulate: int, ranks: int) -> list[Curriculum]:
        return [
            stream(rows, micro_batch=micro_batch, accumulate=accumulate, rank=r, world_size=ranks)
            for r in range(ranks)
        ]

    one, parts = streams(4, 2, 1), streams(micro_batch, accumulate, ranks)
    for step in range(STEPS):
        for each in (*one, *parts):
            each.advance(step, step / STEPS)
        whole = learned(one[0].next_group())
        assert learned([b for part in parts for b in part.next_group()]) == whole


def test_the_state_holds_the_place_at_every_step() -> None:
    rows = rows_of([3 + (i * 37) % 400 for i in range(40)], 256)
    through = stream(rows)
    for step in range(2 * STEPS):
        state = json.loads(json.dumps(through.state_dict()))
        back = stream(rows)
        back.load_state_dict(state)
        assert back.state_dict() == through.state_dict()
        for each in (through, back):
            each.advance(step, step / (2 * STEPS))
        assert learned(back.next_group()) == learned(through.next_group())
    with pytest.raises(DataError, match="curriculum changed"):
        Stream(rows, micro_batch=2, accumulate=1, rank=0, world_size=1, seed=0).load_state_dict(
            state
        )
    with pytest.raises(DataError, match="the data changed"):
        stream(rows_of([9] * 60, 256)).load_state_dict(state)


@pytest.fixture
def lengthened(stage: StageConfig) -> StageConfig:
    """Ten steps over 64, 128 and 256 tokens."""
    data = replace(stage.data, sequence_length=256, curriculum=PHASES)
    train = Train(
        steps=STEPS, micro_batch=2, accumulate=2, lr=3e-3, log_every=1, save_every=1, keep=20
    )
    return replace(stage, data=data, train=train)


def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    lengthened: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    """In the middle of phases, at their borders (after steps 3 and 6), and by a kill."""
    whole = run_stage(in_folder(lengthened, tmp_path / "whole"))
    said = "\n".join(whole.lines)
    assert "curriculum: 64 tokens until 30%, 128 until 60%, then 256" in said
    assert "step 4: rows of 128 tokens from here on, 4 at a time" in said
    changes = [e for e in lines(tmp_path / "whole", "event") if e["event"] == "sequence_length"]
    assert [(e["global_step"], e["sequence_length"], e["micro_batch"]) for e in changes] == [
        (3, 128, 4), (6, 256, 2)
    ]  # fmt: skip
    for attempt, step in enumerate((2, 3, 5, 6, 8), 1):
        run_stage(in_folder(lengthened, tmp_path / "parts", until=step), attempt=attempt)
    run_stage(in_folder(lengthened, tmp_path / "parts"), attempt=9)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    tokens = [line["tokens"] for line in lines(tmp_path / "whole", "step")]
    assert [line["tokens"] for line in lines(tmp_path / "parts", "step")] == tokens

    killed = in_folder(lengthened, tmp_path / "killed")
    job = tmp_path / "job.json"
    job.write_text(json.dumps(to_dict(Job(run="r", stages=(killed,)))))
    root = str(Path(__file__).resolve().parents[2])
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(job)], env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
    )  # fmt: skip
    assert process.returncode == -signal.SIGKILL, process.stderr
    resumed = run_stage(killed, attempt=2)
    assert any(line.startswith("resumed at step") for line in resumed.lines)
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


class Long(Faulty):
    """Out of memory with more than `largest` rows of 128 tokens and more."""

    def loss(self, model: Any, batch: Any, norm: Any, log: bool) -> Any:
        largest = self.largest
        if batch.input_ids.shape[1] < 128:
            self.largest = 1 << 30
        try:
            return super().loss(model, batch, norm, log)
        finally:
            self.largest = largest


def test_out_of_memory_at_a_longer_length_halves_and_stays_halved(
    lengthened: StageConfig, run_stage: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def use(objective: Any) -> None:
        monkeypatch.setitem(stages.STAGES, "pretrain", stages.train(lambda *_: objective))

    use(Long())
    run_stage(in_folder(lengthened, tmp_path / "calm"))
    use(Long(largest=2))
    run_stage(in_folder(lengthened, tmp_path / "split"))
    events = lines(tmp_path / "split", "event")
    shown = [
        (e["event"], e["global_step"], e["micro_batch"])
        for e in events
        if e["event"] in ("oom_split", "sequence_length")
    ]
    assert shown == [
        ("sequence_length", 3, 4), ("oom_split", 3, 2), ("sequence_length", 6, 1)
    ]  # fmt: skip
    calm, split = lines(tmp_path / "calm", "step"), lines(tmp_path / "split", "step")
    assert [s["tokens"] for s in split] == [s["tokens"] for s in calm]
    use(Long(largest=2))
    run_stage(in_folder(lengthened, tmp_path / "taught", until=5))
    run_stage(in_folder(lengthened, tmp_path / "taught", until=7), attempt=2)
    run_stage(in_folder(lengthened, tmp_path / "taught"), attempt=3)
    taught = [e for e in lines(tmp_path / "taught", "event") if e["event"] == "oom_split"]
    assert len(taught) == 1  # the resumed run knows, also in rows of another length
    assert weights(tmp_path / "taught") == weights(tmp_path / "split")


def test_fewer_rows_that_were_noted_hold_in_the_phase_that_goes_on(
    lengthened: StageConfig, run_stage: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As workers that share a model note them; the checkpoint before knows nothing of it."""
    run_stage(in_folder(lengthened, tmp_path / "out", until=8))
    smaller.note(tmp_path / "out", 1)
    made = stages.train(lambda *_: Long(largest=1))
    monkeypatch.setitem(stages.STAGES, "pretrain", made)
    assert run_stage(in_folder(lengthened, tmp_path / "out"), attempt=2).step == STEPS
    assert not [e for e in lines(tmp_path / "out", "event") if e["event"] == "oom_split"]


def test_epochs_seconds_and_steps_end_phases(
    lengthened: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    by_epochs = in_folder(
        lengthened, tmp_path / "epochs", steps=None, epochs=2, save_every=0, evaluate_every=0
    )
    run_stage(by_epochs)
    steps = lines(tmp_path / "epochs", "step")
    changes = [e for e in lines(tmp_path / "epochs", "event") if e["event"] == "sequence_length"]
    whole = steps[-1]["global_step"]
    assert [e["global_step"] for e in changes] == [-(-whole * 3 // 10), -(-whole * 6 // 10)]
    timed = in_folder(
        lengthened, tmp_path / "seconds", steps=None, seconds_of=str(tmp_path / "epochs"),
        save_every=0,
    )  # fmt: skip
    run_stage(timed)
    changes = [e for e in lines(tmp_path / "seconds", "event") if e["event"] == "sequence_length"]
    assert [e["sequence_length"] for e in changes] == [128, 256]
    numbered = replace(
        lengthened, data=replace(lengthened.data, curriculum=(Phase(64, 2), Phase(128, 3)))
    )
    run_stage(in_folder(numbered, tmp_path / "steps", steps=4, save_every=0))
    changes = [e for e in lines(tmp_path / "steps", "event") if e["event"] == "sequence_length"]
    assert [e["global_step"] for e in changes] == [2, 3]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"curriculum": (Phase(96, 0.5),)}, "96 must divide sequence_length"),
        ({"curriculum": (Phase(256, 0.5),)}, "and be below it"),
        ({"curriculum": (Phase(128, 0.3), Phase(64, 0.6))}, "must ascend"),
        ({"curriculum": (Phase(64, 0.6), Phase(128, 0.3))}, "must ascend"),
        ({"curriculum": (Phase(64, 0.6), Phase(128, 30))}, "all shares of the horizon"),
        ({"curriculum": (Phase(64, 0.6),), "packing": False}, "needs `packing: true`"),
    ],
)
def test_phases_that_make_no_curriculum_are_refused(data: dict[str, Any], told: str) -> None:
    with pytest.raises(FieldErrors, match=told):
        Data(sequence_length=256, **data)


@pytest.mark.parametrize("until", [0, -1, 2.5])
def test_an_end_is_a_share_or_a_step(until: float) -> None:
    with pytest.raises(FieldErrors, match="share of the horizon below 1, or a number of steps"):
        Phase(64, until)


def test_what_has_no_curriculum_says_so(lengthened: StageConfig, run_stage: Run) -> None:
    stored = replace(lengthened, stage="kd", kd=Distill(mode="precompute", targets="t"))
    assert "rows of one length" in str(phases.problem(stored))
    assert "has no curriculum" in str(phases.problem(replace(lengthened, stage="dpo")))
    late = replace(lengthened, data=replace(lengthened.data, curriculum=(Phase(64, 10),)))
    with pytest.raises(ConfigError, match=r"data\.curriculum: no step of 10 is left"):
        run_stage(late)


def test_the_mean_length_and_a_shorter_curriculum() -> None:
    data = Data(sequence_length=2048, curriculum=(Phase(512, 0.5), Phase(1024, 0.75)))
    assert phases.mean_length(data) == 0.5 * 512 + 0.25 * 1024 + 0.25 * 2048
    by_steps = replace(data, curriculum=(Phase(512, 50), Phase(1024, 75)))
    assert phases.mean_length(by_steps, 100) == phases.mean_length(data)
    assert phases.mean_length(by_steps) == 2048
    assert phases.mean_length(replace(data, curriculum=())) == 2048
    small = replace(data, curriculum=phases.shortened(data, 128), sequence_length=128)
    assert [phase.sequence_length for phase in small.curriculum] == [32, 64]
