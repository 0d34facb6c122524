"""Two workers that share the parts of a model train as one process does, save what any number of
workers can read, and start again with fewer rows when one of them runs out of memory."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed import TCPStore

from tests.stub_jobs import finish, log, read, specification, start
from tests.trainer.conftest import in_folder
from tests.trainer.faults import Faults
from tests.trainer.sharded_runs import optimizer_digest
from tests.trainer.test_loop import lines
from tests.trainer.test_recovery import Ran, apart, same
from trainer import alarm, parallel, smaller
from trainer.checkpoint import load_state
from trainer.config import (
    Adapter,
    ConfigError,
    Distill,
    Evaluate,
    Job,
    KeepLogits,
    Model,
    StageConfig,
    to_dict,
)
from trainer.config_train import refused
from trainer.manifest import verify
from trainer.runtime import Runtime
from trainer.smaller import Leave

STEPS = 4
#: Rows of a step, however it is cut.
ROWS = 8
#: Of the passes of the tiny model in training, those of one of two workers.
STUDENT: dict[str, Any] = {"hidden": 32, "learning": True}
#: Five micro-batches of held-out rows: one of two workers has one more.
JUDGED = {"evaluate_every": 2, "evaluate_batches": 5}
Start = Callable[..., Ran]


@pytest.fixture(scope="module")
def faults() -> Iterator[Faults]:
    process = Faults()
    yield process
    process.close()


@pytest.fixture(scope="module")
def begin(
    faults: Faults, tmp_path_factory: pytest.TempPathFactory, tokenizer: str, texts: str
) -> Start:
    """Run the tiny stage in the folder `name`, on so many ranks, with a fault on the last one;
    `go_on`: the run from whose folder a new one is filled before."""
    out = tmp_path_factory.mktemp("fsdp")
    attempts = iter(range(1, 1000))

    def run(
        name: str, ranks: int, fault: Optional[dict[str, Any]] = None, *,
        go_on: Optional[Ran] = None, model: Optional[dict[str, Any]] = None, packing: bool = True,
        kd: Optional[Distill] = None, models: Optional[dict[str, Ran]] = None, **train: Any,
    ) -> Ran:  # fmt: skip
        config = tiny(out / name, tokenizer, texts, model or {}, packing)
        settings = {"steps": STEPS, "micro_batch": ROWS // ranks, "report_to": (), **train}
        config = in_folder(config, out / name, **settings)
        if kd is not None:
            config = replace(config, stage="kd", kd=kd)
        if models is not None:
            read = Evaluate({label: str(ran.folder) for label, ran in models.items()})
            config = replace(config, stage="evaluate", evaluate=read)
        if go_on is not None:
            shutil.copytree(go_on.folder, out / name)
        attempt = next(attempts)
        job = out / f"{name}-{attempt}.json"
        job.write_text(json.dumps(to_dict(Job(run="r", stages=(config,), attempt=attempt))))
        said = job.with_suffix(".log")
        codes = faults.run(job, ranks, fault, said)
        return Ran(codes, out / name, said.read_text())

    return run


def tiny(
    folder: Path, tokenizer: str, texts: str, model: dict[str, Any], packing: bool
) -> StageConfig:
    """The tiny stage of sharded_runs.py, with fields of `model` and its architecture replaced."""
    from tests.trainer.sharded_runs import stage

    config = stage(folder, tokenizer, texts, 1)
    assert config.model is not None and config.model.architecture is not None
    shape = {key: model[key] for key in model if key == "tie_embeddings"}
    other = {key: model[key] for key in model if key not in shape}
    plan = replace(config.model, architecture=replace(config.model.architecture, **shape))
    if "adapter" in other:
        plan = Model(**other)
    data = replace(config.data, validation=config.data.train, packing=packing)
    return replace(config, model=plan if "adapter" in other else replace(plan, **other), data=data)


@pytest.fixture(scope="module")
def one(begin: Start) -> Ran:
    """One process, undisturbed."""
    return begin("one", 1, micro_batch=4, accumulate=2, **JUDGED)


@pytest.fixture(scope="module")
def fsdp(begin: Start) -> Ran:
    return begin("fsdp", 2, parallel="fsdp", **JUDGED)


def test_two_sharded_workers_train_as_one_process_and_as_two_whole_ones(
    begin: Start, one: Ran, fsdp: Ran
) -> None:
    whole = begin("ddp", 2, **JUDGED)
    assert one.codes + whole.codes + fsdp.codes == [0] * 5, fsdp.said
    assert "parallel: ddp, 2 workers (no GPU)" in whole.said
    assert "parallel: fsdp, 2 workers (train.parallel: fsdp)" in fsdp.said
    assert [line["val_tokens"] for line in lines(one.folder, "eval")] == [
        line["val_tokens"] for line in lines(fsdp.folder, "eval")
    ]
    assert [line["val_loss"] for line in lines(one.folder, "eval")] == pytest.approx(
        [line["val_loss"] for line in lines(fsdp.folder, "eval")], rel=1e-6
    )
    alone = begin("alone", 1, parallel="fsdp", micro_batch=4, accumulate=2)
    assert alone.codes == [0] and same(one.weights(), alone.weights())
    for other in (one, whole):
        assert apart(other.weights(), fsdp.weights()) < 1e-6
        for column in ("train_loss", "grad_norm"):
            assert other.column(column) == pytest.approx(fsdp.column(column), rel=1e-6)
    assert len(fsdp.column("train_loss")) == STEPS


def test_a_tied_head_and_recomputed_blocks_are_shared_as_well(begin: Start) -> None:
    """Also unpacked, in several micro-batches, with a part of the model frozen."""
    model = {"tie_embeddings": True, "freeze": ["model.layers.0.*"]}
    calm = begin("tied-one", 1, model=model, packing=False)
    again = {**model, "gradient_checkpointing": True}
    shared = begin(
        "tied-fsdp", 2, model=again, packing=False, parallel="fsdp", micro_batch=2, accumulate=2
    )
    assert shared.codes == [0, 0], shared.said
    assert "lm_head.weight" not in shared.weights()
    assert apart(calm.weights(), shared.weights()) < 1e-6


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_blocks_compute_in_16_bits_and_weights_stay_fp32(begin: Start, precision: str) -> None:
    """As near to whole workers as rounding lets them be, also after an overflow on one."""
    model = {"precision": precision}
    fault = {**STUDENT, "kind": "overflow", "calls": [1]} if precision == "fp16" else None
    whole = begin(f"{precision}-ddp", 2, fault, model=model)
    shared = begin(f"{precision}-fsdp", 2, fault, model=model, parallel="fsdp")
    assert shared.codes == [0, 0], shared.said
    assert {value.dtype for value in shared.weights().values()} == {torch.float32}
    assert apart(whole.weights(), shared.weights()) < 1e-3
    assert shared.column("train_loss") == pytest.approx(whole.column("train_loss"), rel=1e-3)
    if precision == "fp16":
        assert shared.column("scale") == whole.column("scale") == [65536.0] + [32768.0] * 3


def test_the_saved_adapter_is_whole_and_reads_back(begin: Start, one: Ran) -> None:
    """Rank 1: the second worker has no part of A [1, in]; B was zero before the first step."""
    adapter = Adapter(rank=1, alpha=4, dropout=0.0)
    model = {"name": str(one.folder), "adapter": adapter, "gradient_checkpointing": True}
    calm = begin("adapter-one", 1, model=model, lr=1e-2)
    shared = begin("adapter-fsdp", 2, model=model, lr=1e-2, parallel="fsdp")
    assert shared.codes == [0, 0], shared.said
    ours, theirs = (load_file(r.checkpoint / "adapter_model.safetensors") for r in (shared, calm))
    assert len([name for name in ours if "lora_B" in name]) == 14
    assert all(bool(value.count_nonzero() == value.numel()) for value in ours.values())
    assert apart(theirs, ours) < 1e-6
    judged = begin("read", 1, models={"calm": calm, "shared": shared, "base": one}, model=model)
    loss = {row["model"]: row["val_loss"] for row in lines(judged.folder, "table")[0]["rows"]}
    assert loss["shared"] == pytest.approx(loss["calm"], rel=1e-6)
    assert loss["base"] > loss["shared"] * 1.001
    assert shared.column("train_loss") == pytest.approx(calm.column("train_loss"), rel=1e-6)


def test_distillation_has_the_head_of_a_shared_student(begin: Start, one: Ran) -> None:
    """Its teacher and the copy of its start are whole."""
    kd = Distill(teacher=str(one.folder), alpha=0.5, keep_logits=KeepLogits(weight=0.5, fade=1.0))
    calm = begin("kd-one", 1, kd=kd)
    shared = begin("kd-fsdp", 2, kd=kd, parallel="fsdp")
    assert shared.codes == [0, 0], shared.said
    assert apart(calm.weights(), shared.weights()) < 1e-6
    for column in ("train_loss", "kd_loss", "keep_l2", "grad_norm"):
        assert shared.column(column) == pytest.approx(calm.column(column), rel=1e-5, abs=1e-7)


def test_a_run_goes_on_with_its_state_however_it_is_shared(
    begin: Start, one: Ran, fsdp: Ran
) -> None:
    """From parts to parts bit for bit; to whole workers, to other numbers of them, and back."""
    half = begin("half-fsdp", 2, parallel="fsdp", until=2)
    state = half.checkpoint / "state"
    assert not verify(half.checkpoint) and {p.name for p in state.iterdir()} == {
        ".metadata", "__0_0.distcp", "__1_0.distcp",
    }  # fmt: skip
    sizes = [(state / f"__{rank}_0.distcp").stat().st_size for rank in range(2)]
    assert max(sizes) < 1.2 * min(sizes), "each wrote its half"
    whole = begin("half-ddp", 2, until=2)
    again = begin("fsdp-fsdp", 2, go_on=half, parallel="fsdp", save_async=False)
    assert same(fsdp.weights(), again.weights())
    assert optimizer_digest(fsdp.checkpoint) == optimizer_digest(again.checkpoint)
    ways = (
        begin("fsdp-one", 1, go_on=half),
        begin("fsdp-ddp", 2, go_on=half),
        begin("fsdp-four", 4, go_on=half, parallel="fsdp"),
        begin("ddp-fsdp", 2, go_on=whole, parallel="fsdp"),
    )
    for other in ways:
        assert set(other.codes) == {0} and "resumed at step 2" in other.said, other.said
        assert apart(one.weights(), other.weights()) < 1e-6
    assert apart(_moments(one), _moments(ways[0])) < 1e-5


def test_a_step_that_is_not_finite_leaves_all_parts_untouched(begin: Start) -> None:
    bad = begin("nan", 2, {**STUDENT, "kind": "nan", "calls": [1]}, parallel="fsdp")
    undone = begin("undone", 2, {"undo": [1]}, parallel="fsdp")
    assert bad.codes == undone.codes == [0, 0], bad.said
    assert "step 2: not finite, skipped; weights and optimizer are untouched" in bad.said
    assert same(bad.weights(), undone.weights())
    assert optimizer_digest(bad.checkpoint) == optimizer_digest(undone.checkpoint)


def test_two_steps_that_are_not_finite_leave_a_dump_of_the_whole_model(begin: Start) -> None:
    bad = begin("crash", 2, {**STUDENT, "kind": "nan", "calls": [1, 2]}, parallel="fsdp")
    assert bad.codes == [1, 1], bad.said
    dump = torch.load(bad.folder / "crash_dump.pt", weights_only=True)
    assert dump["model"]["model.embed_tokens.weight"].shape == (258, 32)


def test_out_of_memory_ends_all_workers_and_the_next_start_is_smaller(
    begin: Start, fsdp: Ran
) -> None:
    """Saved after every second step; the fault is in the fourth. With the same rows in a step, the
    end is that of the run that was not disturbed."""
    fault = {**STUDENT, "kind": "oom", "calls": [3], "rows": 2}
    failed = begin("oom", 2, fault, parallel="fsdp", save_every=2)
    assert failed.codes == [75, 75], failed.said
    line = "out of memory with 4 rows at a time, and sharded workers cannot repeat a step"
    assert line in failed.said and f"error: rank 1: {line}" in failed.said
    assert smaller.noted(failed.folder) == 2 and failed.checkpoint.name == "step-2"
    # All later steps would fail with 4 rows.
    fault = {**STUDENT, "kind": "oom", "calls": [], "rows": 2}
    again = begin("oom-again", 2, fault, go_on=failed, parallel="fsdp", save_every=2)
    assert again.codes == [0, 0], again.said
    assert "at most 2 rows at a time: more ran out of memory before" in again.said
    assert "resumed at step 2" in again.said and again.checkpoint.name == "step-4"
    assert apart(fsdp.weights(), again.weights()) < 1e-6
    assert load_state(again.checkpoint)["micro_batch"] == 2


def test_workers_that_run_out_of_memory_at_once_wait_for_nobody(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each has something to tell, and none of them listens any more."""
    kept = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(kept.port))
    cpu = torch.device("cpu")
    alarms = [alarm.Alarm(Runtime(cpu, "fp32", rank, 3), tmp_path) for rank in range(3)]
    for each in alarms:
        each.close()
    began = time.monotonic()
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda each: each.tell(Leave(4, 2)), alarms))
    assert time.monotonic() - began < alarm.PATIENCE


@pytest.mark.parametrize("beside", [True, False], ids=["beside", "waiting"])
def test_out_of_memory_while_a_checkpoint_is_gathered_starts_again(
    begin: Start, fsdp: Ran, beside: bool
) -> None:
    """Of the 21 tensors of the second save the third finds none, on one of the workers: the other
    one waits for it there. The save before it is the one that the next start goes on from."""
    name, settings = f"gather-{beside}", {"save_every": 2, "save_async": beside}
    failed = begin(name, 2, {"whole": [21 + 2]}, parallel="fsdp", until=4, **settings)
    assert failed.codes == [75, 75], failed.said
    assert "error: rank 1: out of memory while a checkpoint was gathered" in failed.said
    assert smaller.noted(failed.folder) == 2 and failed.checkpoint.name == "step-2"
    assert not verify(failed.checkpoint)
    again = begin(f"{name}-again", 2, go_on=failed, parallel="fsdp", **settings)
    assert again.codes == [0, 0] and "resumed at step 2" in again.said, again.said
    assert apart(fsdp.weights(), again.weights()) < 1e-6


def test_whatever_else_fails_while_a_checkpoint_is_gathered_is_not_waited_for(begin: Start) -> None:
    fault = {"whole": [21 + 2], "host": True}
    failed = begin("gather-host", 2, fault, parallel="fsdp", save_every=2)
    assert failed.codes == [78, 78], failed.said
    assert "step 4 not saved: " in failed.said and "not enough memory (injected)" in failed.said
    assert failed.checkpoint.name == "step-2" and not verify(failed.checkpoint)


def test_a_checkpoint_that_no_number_of_rows_gathers_ends_all_workers_for_good(
    begin: Start,
) -> None:
    failed = begin("gather-one", 2, {"whole": [2]}, parallel="fsdp", micro_batch=1, accumulate=4)
    assert failed.codes == [64, 64], failed.said
    assert "no memory to gather a checkpoint, even with one row at a time" in failed.said
    assert smaller.noted(failed.folder) is None


def test_one_row_without_memory_ends_all_workers_for_good(begin: Start) -> None:
    fault = {**STUDENT, "kind": "oom", "calls": []}
    failed = begin("one-row", 2, fault, parallel="fsdp", micro_batch=1, accumulate=4)
    assert failed.codes == [64, 64], failed.said
    assert "one row does not fit in the device's memory" in failed.said
    assert smaller.noted(failed.folder) is None


def test_a_micro_batch_that_is_looked_for_starts_again_with_what_fits(
    begin: Start, fsdp: Ran
) -> None:
    fault = {**STUDENT, "kind": "oom", "calls": [], "rows": 2}
    auto = {"micro_batch": "auto", "global_batch": ROWS, "parallel": "fsdp"}
    failed = begin("auto", 2, fault, **auto)
    assert failed.codes == [75, 75] and smaller.noted(failed.folder) == 2, failed.said
    assert "resumed" not in failed.said
    again = begin("auto-again", 2, fault, go_on=failed, **auto)
    assert again.codes == [0, 0] and load_state(again.checkpoint)["micro_batch"] == 2, again.said
    assert apart(fsdp.weights(), again.weights()) < 1e-6


def test_out_of_memory_in_an_evaluation_starts_again(begin: Start) -> None:
    fault = {"kind": "oom", "hidden": 32, "learning": False, "calls": [], "rows": 2}
    failed = begin("judged", 2, fault, parallel="fsdp", save_every=1, **JUDGED)
    assert failed.codes == [75, 75] and smaller.noted(failed.folder) == 2, failed.said
    assert "step 2" in failed.said and failed.checkpoint.name == "step-1"


#: A trainer that has no memory until it may take at most 2 rows at a time.
HUNGRY = """
folder = Path(job["stages"][0]["output"])
folder.mkdir(parents=True, exist_ok=True)
note = folder / "memory.json"
rows = json.loads(note.read_text())["micro_batch"] if note.exists() else 8
say("rows", rows)
if rows > {fits}:
    if rank == 0:
        note.write_text(json.dumps({{"v": 1, "micro_batch": {next}}}))
    sys.exit(75 if rank == 0 else {peer})
"""


@pytest.mark.parametrize(
    ("workers", "starts"), [(1, [8, 4, 2]), pytest.param(2, [8, 4], marks=pytest.mark.slow)]
)
def test_boot_starts_the_workers_again_with_fewer_rows(
    tmp_path: Path, workers: int, starts: list[int]
) -> None:
    """Within one attempt, also where the other worker fell over the one that left."""
    source = HUNGRY.format(fits=starts[-1], next="rows // 2", peer=1)
    spec = specification(tmp_path, source, workers=workers)
    assert finish(start(tmp_path, spec, {}))[0] == 0
    assert read(tmp_path / "root" / "attempts" / "00-0001.json")["exit_code"] == 0
    assert len(list((tmp_path / "root" / "attempts").iterdir())) == 1
    assert [line for line in log(tmp_path) if "rows" in line] == [f"rows {n}" for n in starts]
    said = (tmp_path / "root" / "logs" / "boot" / "00-0001.log").read_text()
    assert f"again, rows at a time for stage s: {starts[-1]}" in said


def test_boot_does_not_start_again_without_fewer_rows(tmp_path: Path) -> None:
    spec = specification(tmp_path, HUNGRY.format(fits=2, next="8", peer=75))
    assert finish(start(tmp_path, spec, {}))[0] == 75
    said = [line for line in log(tmp_path) if line.startswith("rows")]
    assert said == ["rows 8", "rows 8"], "the first note asked for fewer than none did"


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"micro_batch": 0}', '{"micro_batch": "2"}', '{"micro_batch": true}']
)
def test_a_note_that_makes_no_sense_asks_for_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / smaller.NOTE).write_text(text)
    assert smaller.noted(tmp_path) is None


def test_a_note_only_becomes_smaller(tmp_path: Path) -> None:
    for rows, kept in ((4, 4), (8, 4), (1, 1)):
        smaller.note(tmp_path, rows)
        assert smaller.noted(tmp_path) == kept
    assert (Leave(4, 2).code, Leave(1, 0, "why").code, str(Leave(1, 0, "why"))) == (75, 64, "why")


def test_auto_shards_what_would_take_too_much_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(10, 10, bias=False)
    assert parallel.replicated_bytes(model) == 16 * 100
    assert parallel.replicated_bytes(model.requires_grad_(False)) == 4 * 100
    model.requires_grad_(True)
    cpu, cuda = (Runtime(torch.device(kind), "fp32", 0, 2) for kind in ("cpu", "cuda"))
    assert parallel.choose(model, cpu, "auto") == ("ddp", "no GPU")
    assert parallel.choose(model, replace(cuda, world_size=1), "auto") == ("ddp", "one worker")
    assert parallel.choose(model, cpu, "fsdp")[0] == "fsdp"
    for total, expected in ((3900, "fsdp"), (4100, "ddp")):
        gpu = type("Gpu", (), {"total_memory": total})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, gpu=gpu: gpu)
        how, why = parallel.choose(model, cuda, "auto")
        assert how == expected and "weights, gradients and moments take" in why


def _moments(ran: Ran) -> dict[str, torch.Tensor]:
    state = ran.moments()
    return {name: value for name, value in state.items() if value.ndim}


def test_quantised_weights_are_not_shared() -> None:
    model = nn.Linear(10, 10, bias=False).requires_grad_(False)
    model.weight = nn.Parameter(torch.zeros(50, 1, dtype=torch.uint8), requires_grad=False)
    cuda = Runtime(torch.device("cuda"), "fp32", 0, 2)
    assert parallel.choose(model, cuda, "auto") == ("ddp", "quantised weights")
    with pytest.raises(ConfigError, match=r"fsdp cannot share quantised weights \(weight\)"):
        parallel.shard(model, Runtime(torch.device("cpu"), "fp32"))


def test_a_stage_that_writes_answers_needs_the_whole_model() -> None:
    assert "needs the whole model" in refused("grpo", "fsdp")
    assert not refused("grpo", "auto") and not refused("dpo", "fsdp")
