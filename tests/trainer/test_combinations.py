"""Where parts of the trainer meet: several workers and objectives, lengths, experts, compilers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import pytest
from safetensors.torch import load_file

from tests.trainer.conftest import in_folder
from tests.trainer.faults import Faults
from tests.trainer.test_experts import save_base
from tests.trainer.test_loop import lines
from tests.trainer.test_recovery import Ran, apart, same
from trainer import reference, smaller
from trainer.config import (
    Adapter,
    Architecture,
    Data,
    Grpo,
    Job,
    Model,
    Preference,
    Sdce,
    Source,
    StageConfig,
    Train,
    to_dict,
)
from trainer.config_data import Phase

Start = Callable[..., Ran]
SHAPE = Architecture(hidden_size=32, layers=2, heads=4, kv_heads=2, intermediate_size=64)
#: Passes of the model that learns, in passes without gradients.
READING: dict[str, Any] = {"hidden": 32, "learning": False}


@pytest.fixture(scope="module")
def begin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Run a stage in the folder `name` on so many ranks, which share a step's 8 rows; `fault`: on
    the last of them; `go_on`: the run from whose folder a new one is filled before."""
    out, attempts, process = tmp_path_factory.mktemp("together"), iter(range(1, 1000)), Faults()

    def run(
        config: StageConfig, name: str, ranks: int, fault: Optional[dict[str, Any]] = None, *,
        go_on: Optional[Ran] = None, without: str = "", **train: Any,
    ) -> Ran:  # fmt: skip
        settings = {"micro_batch": 8 // ranks, **train}
        config = in_folder(config, out / name, **settings)
        if go_on is not None:
            shutil.copytree(go_on.folder, out / name, ignore=shutil.ignore_patterns(without))
        attempt = next(attempts)
        job, said = (out / f"{name}-{attempt}{end}" for end in (".json", ".log"))
        job.write_text(json.dumps(to_dict(Job(run="r", stages=(config,), attempt=attempt))))
        return Ran(process.run(job, ranks, fault, said), out / name, said.read_text())

    yield run
    process.close()


@pytest.fixture(scope="module")
def plain(tokenizer: str, texts: str) -> StageConfig:
    """Three steps of a tiny model on texts."""
    return StageConfig(
        id="both", stage="pretrain", output="o",
        model=Model(init="random", tokenizer=tokenizer, architecture=SHAPE),
        data=Data(train=(Source(path=texts),), sequence_length=64),
        train=Train(steps=3, lr=3e-3, warmup=1, log_every=1, report_to=()),
    )  # fmt: skip


@pytest.fixture(scope="module")
def base(begin: Start, plain: StageConfig) -> Ran:
    """A model with its tokenizer."""
    return begin(plain, "base", 1, steps=1)


@pytest.fixture(scope="module")
def prefers(plain: StageConfig, tmp_path_factory: pytest.TempPathFactory) -> StageConfig:
    """Pairs: 13 rows of two answers to learn from and 5 held out, so that one of two workers has
    one more of both."""
    folder = tmp_path_factory.mktemp("pairs")
    for name, count in (("train", 13), ("heldout", 5)):
        pairs = (
            {"prompt": "ab" * (3 + i), "chosen": f"A{i}", "rejected": f"B{i}" * 3}
            for i in range(count)
        )
        (folder / name).with_suffix(".jsonl").write_text(
            "".join(json.dumps(p) + "\n" for p in pairs)
        )
    data = replace(
        plain.data, train=(Source(path=str(folder / "train.jsonl")),), packing=False,
        validation=(Source(path=str(folder / "heldout.jsonl")),), sequence_length=128,
    )  # fmt: skip
    return replace(plain, stage="dpo", data=data, preference=Preference(beta=0.5))


def alike(one: Ran, other: Ran, *columns: str) -> None:
    """The same training, up to rounding."""
    assert set(one.codes + other.codes) == {0}, one.said + other.said
    for column in ("train_loss", "grad_norm", *columns):
        wanted = pytest.approx(one.column(column), rel=1e-4, abs=1e-6)
        assert other.column(column) == wanted, column
    for ours, theirs in zip(lines(one.folder, "eval"), lines(other.folder, "eval")):
        for name in {"val_loss", "val_count", "val_tokens"} & set(ours):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4), name


def test_pairs_are_learned_from_by_workers_that_share_a_model(
    begin: Start, prefers: StageConfig
) -> None:
    calm = begin(prefers, "dpo-one", 1, evaluate_every=1)
    shared = begin(prefers, "dpo-fsdp", 2, parallel="fsdp", evaluate_every=1)
    assert "parallel: fsdp, 2 workers" in shared.said
    assert shared.said.count("reference: the starting model reads 18 rows once") == 1
    alike(calm, shared, "margin", "accuracy")
    assert apart(calm.weights(), shared.weights()) < 1e-5
    assert calm.column("margin")[-1] != 0
    # Without its file, the starting model is read in again, and shared as well.
    half = begin(prefers, "dpo-half", 2, parallel="fsdp", until=2)
    lost = begin(prefers, "dpo-lost", 2, go_on=half, without=reference.NAME, parallel="fsdp")
    assert lost.codes == [0, 0] and "parameters, read in again" in lost.said, lost.said
    assert apart(shared.weights(), lost.weights()) < 1e-6


def test_the_adapter_that_is_switched_off_may_be_shared(
    begin: Start, prefers: StageConfig, base: Ran
) -> None:
    adapter = Adapter(rank=2, alpha=4, dropout=0.0)
    config = replace(
        prefers, stage="ipo", model=Model(name=str(base.folder), adapter=adapter),
        preference=Preference(reference="adapter", beta=0.5),
    )  # fmt: skip
    calm = begin(config, "ipo-one", 1, lr=1e-2)
    shared = begin(config, "ipo-fsdp", 2, lr=1e-2, parallel="fsdp")
    alike(calm, shared, "margin")
    ours, theirs = (load_file(r.checkpoint / "adapter_model.safetensors") for r in (shared, calm))
    assert apart(theirs, ours) < 1e-5 and all(bool(value.any()) for value in ours.values())


def test_out_of_memory_while_the_reference_reads_starts_again_with_fewer_rows(
    begin: Start, prefers: StageConfig
) -> None:
    failed = begin(prefers, "ref-oom", 2, {**READING, "kind": "oom", "calls": [], "rows": 2},
                   parallel="fsdp")  # fmt: skip
    assert failed.codes == [75, 75], failed.said
    assert smaller.noted(failed.folder) == 2
    again = begin(prefers, "ref-again", 2, {**READING, "kind": "oom", "calls": [], "rows": 2},
                  go_on=failed, parallel="fsdp")  # fmt: skip
    assert again.codes == [0, 0], again.said


def test_rows_become_longer_on_all_workers_at_once(begin: Start, plain: StageConfig) -> None:
    """Also with selective recomputation, which changes nothing."""
    assert plain.model is not None
    data = replace(plain.data, curriculum=(Phase(16, 1), Phase(32, 2)), validation=plain.data.train)
    config = replace(plain, data=data)
    again = replace(config, model=replace(plain.model, gradient_checkpointing="selective"))
    one = begin(config, "grows-one", 1, evaluate_batches=2)
    each = begin(again, "grows-ddp", 2, evaluate_batches=4)
    shared = begin(again, "grows-fsdp", 2, parallel="fsdp", evaluate_batches=4)
    for two in (each, shared):
        alike(one, two)
        assert [x["sequence_length"] for x in two.events("sequence_length")] == [32, 64]
    half = begin(again, "grows-half", 2, until=2)
    rest = begin(again, "grows-rest", 2, go_on=half, evaluate_batches=4)
    assert rest.codes == [0, 0] and same(rest.weights(), each.weights())


def test_a_surrogate_is_whole_beside_a_model_that_is_shared(
    begin: Start, plain: StageConfig, base: Ran
) -> None:
    config = replace(plain, stage="sdce", sdce=Sdce(surrogate=str(base.folder), weight=2.0))
    one = begin(config, "sdce-one", 1)
    shared = begin(config, "sdce-fsdp", 2, parallel="fsdp")
    alike(one, shared)
    assert apart(one.weights(), shared.weights()) < 1e-5


def test_experts_of_a_shared_model_learn_as_those_of_a_whole_one(
    begin: Start, plain: StageConfig, tokenizer: str, tmp_path: Path
) -> None:
    adapter = Adapter(rank=2, alpha=4, dropout=0.0, experts=True)
    name = save_base(tmp_path / "experts", tokenizer, "mixtral")
    config = replace(plain, model=Model(name=name, adapter=adapter))
    one = begin(config, "experts-one", 1, lr=1e-2)
    two = begin(config, "experts-fsdp", 2, lr=1e-2, parallel="fsdp")
    alike(one, two)
    ours, theirs = (load_file(r.checkpoint / "adapter_model.safetensors") for r in (two, one))
    assert any(".experts." in name for name in ours)
    assert all(bool(value.any()) for value in ours.values())
    assert apart(theirs, ours) < 1e-4


def test_answers_are_drawn_by_two_workers_with_an_adapter_that_goes_on(
    begin: Start, plain: StageConfig, base: Ran
) -> None:
    data = Data(train=(Source(builtin="digits"),), sequence_length=32)
    adapter = Adapter(rank=2, alpha=4, dropout=0.0)
    config = replace(
        plain, stage="grpo", data=data, model=Model(name=str(base.folder), adapter=adapter),
        grpo=Grpo(("tests.trainer.grpo_cases:sums",), group=2, max_new_tokens=4, iterations=2,
                  beta=0.1),
    )  # fmt: skip
    two = begin(config, "grpo-two", 2, lr=1e-2)
    half = begin(config, "grpo-half", 2, lr=1e-2, until=1)
    again = begin(config, "grpo-half-again", 2, go_on=half, lr=1e-2)
    assert two.codes + half.codes + again.codes == [0] * 6, two.said + again.said
    whole, parts = (load_file(r.checkpoint / "adapter_model.safetensors") for r in (two, again))
    assert same(whole, parts) and any(bool(value.any()) for value in whole.values())
    first, second, third = two.column("reward")
    assert first == second != third
