"""Recovery in the step, with faults that come through torch's hooks: in one process, and on one of
two ranks. What a run ends with is compared with one that was not disturbed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.overrides import TorchFunctionMode

from tests.trainer import gradients
from tests.trainer.conftest import in_folder
from tests.trainer.faults import Faults
from tests.trainer.test_loop import lines
from trainer import __main__, scaler
from trainer.checkpoint import load_state
from trainer.config import Distill, Job, KeepLogits, StageConfig, Targets, to_dict
from trainer.losses.distance import logit_distance
from trainer.manifest import STATE, seal
from trainer.models import load_tokenizer
from trainer.scaler import Scaler
from trainer.teacher_pass import write_targets

STEPS = 5
RANKS = pytest.mark.parametrize("ranks", [1, 2])
#: Of the passes of the tiny model in training: one micro-batch a step.
STUDENT: dict[str, Any] = {"hidden": 32, "learning": True}


@dataclass
class Ran:
    """One run: exit codes by rank, and what it left."""

    codes: list[int]
    folder: Path
    said: str

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in lines(self.folder, "event") if event["event"] == name]

    def column(self, name: str) -> list[float]:
        return [line[name] for line in lines(self.folder, "step")]

    @property
    def checkpoint(self) -> Path:
        pointer = json.loads((self.folder / "checkpoints" / "last.json").read_text())
        return self.folder / "checkpoints" / str(pointer["path"])

    def weights(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = load_file(self.checkpoint / "model.safetensors")
        return found

    def moments(self) -> dict[str, torch.Tensor]:
        state = load_state(self.checkpoint)["optimizer"]["state"]
        return {f"{i}.{k}": v for i, parts in state.items() for k, v in parts.items()}


@pytest.fixture(scope="module")
def faults() -> Iterator[Faults]:
    process = Faults()
    yield process
    process.close()


@pytest.fixture
def run(faults: Faults, tmp_path: Path) -> Callable[..., Ran]:
    """Run a stage in its folder on so many ranks, with a fault on the last one."""

    def start(
        config: StageConfig, ranks: int, fault: Optional[dict[str, Any]] = None, attempt: int = 1
    ) -> Ran:
        folder = Path(config.output)
        job = tmp_path / f"{folder.name}-{attempt}.json"
        job.write_text(json.dumps(to_dict(Job(run="r", stages=(config,), attempt=attempt))))
        codes = faults.run(job, ranks, fault, log := job.with_suffix(".log"))
        return Ran(codes, folder, log.read_text())

    return start


@pytest.fixture
def tiny(stage: StageConfig, tmp_path: Path) -> Callable[..., StageConfig]:
    """The tiny stage in a folder of this test, in few steps and without trackers."""

    def make(name: str, *, dropout: float = 0.0, precision: Any = "fp32", **train: Any) -> Any:
        assert stage.model is not None and stage.model.architecture is not None
        architecture = replace(stage.model.architecture, dropout=dropout)
        model = replace(stage.model, architecture=architecture, precision=precision)
        settings = {"steps": STEPS, "report_to": (), **train}
        return in_folder(replace(stage, model=model), tmp_path / name, **settings)

    return make


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The relative distance of two sets of weights."""
    x, y = (torch.cat([p[name].flatten().double() for name in sorted(a)]) for p in (a, b))
    return float((x - y).norm() / y.norm())


@RANKS
def test_out_of_memory_on_one_rank_ends_with_the_weights_of_the_calm_run(
    ranks: int, run: Any, tiny: Any
) -> None:
    calm = run(tiny("calm"), ranks)
    split = run(tiny("split"), ranks, {"kind": "oom", **STUDENT, "calls": [], "rows": 1})
    assert calm.codes == split.codes == [0] * ranks, split.said
    assert [e["micro_batch"] for e in split.events("oom_split")] == [2, 1]
    assert split.column("tokens") == calm.column("tokens")
    assert apart(split.weights(), calm.weights()) < 1e-6


@RANKS
def test_a_nan_on_one_rank_costs_that_update_and_nothing_else(
    ranks: int, run: Any, tiny: Any
) -> None:
    """The third update: the run goes on as one that took it back, weights and moments alike. The
    rows of the step are gone, and the learning rate has moved on."""
    undone = run(tiny("undone"), ranks, {"undo": [2]})
    skipped = run(tiny("skipped"), ranks, {"kind": "nan", **STUDENT, "calls": [2]})
    assert undone.codes == skipped.codes == [0] * ranks, skipped.said
    assert [e["step"] for e in skipped.events("nan_skipped")] == [3]
    assert not undone.events("nan_skipped")
    assert same(skipped.weights(), undone.weights())
    assert same(skipped.moments(), undone.moments())
    assert skipped.column("lr") == undone.column("lr")
    assert skipped.column("train_loss")[3:] == undone.column("train_loss")[3:]
    position = load_state(skipped.checkpoint)["stream"]["position"]
    assert position == load_state(undone.checkpoint)["stream"]["position"]


@RANKS
def test_two_nans_in_a_row_end_the_run_on_all_ranks(ranks: int, run: Any, tiny: Any) -> None:
    ran = run(tiny("ended"), ranks, {"kind": "nan", **STUDENT, "calls": [1, 2]})
    assert ran.codes == [1] * ranks, ran.said
    assert ran.said.count("two steps in a row; state and batch shapes are in") == ranks
    (event,) = ran.events("aborted")
    assert event["step"] == 3
    dump = torch.load(ran.folder / "crash_dump.pt", weights_only=True)
    assert dump["batch_shape"] == [4, 128]
    assert all(torch.isfinite(weight).all() for weight in dump["model"].values())


@RANKS
def test_sigterm_on_one_rank_saves_and_resumes_bit_for_bit(ranks: int, run: Any, tiny: Any) -> None:
    calm = run(tiny("calm", dropout=0.1), ranks)
    cut = run(tiny("cut", dropout=0.1), ranks, {"kind": "term", **STUDENT, "calls": [1]})
    assert cut.codes == [75] * ranks, cut.said
    assert [e["reason"] for e in cut.events("stopped")] == ["signal"]
    assert load_state(cut.checkpoint)["step"] == 2
    resumed = run(tiny("cut", dropout=0.1), ranks, attempt=2)
    assert resumed.codes == calm.codes == [0] * ranks, resumed.said
    assert same(resumed.weights(), calm.weights()) and same(resumed.moments(), calm.moments())


@RANKS
def test_an_fp16_overflow_ends_as_if_the_scale_had_been_lower_before(
    ranks: int, run: Any, tiny: Any, tmp_path: Path
) -> None:
    """From one checkpoint: an overflow in the first step after it, against half of the scale in the
    checkpoint. With dropout, so that other random numbers would show; to the last bit."""
    settings: dict[str, Any] = {"dropout": 0.1, "precision": "fp16"}
    begun = run(tiny("over", **settings, until=2), ranks)
    shutil.copytree(begun.folder, tmp_path / "lower")
    folder = tmp_path / "lower" / "checkpoints" / "step-2"
    state = load_state(folder)
    assert state["scaler"] == {"scale": 2.0**16, "clean": 2}
    state = {**state, "scaler": {"scale": 2.0**15, "clean": 0}, "rng": list(state["rng"])}
    torch.save(state, tmp_path / "state.pt")
    shutil.move(tmp_path / "state.pt", folder / STATE)
    (folder / "MANIFEST.json").unlink()
    seal(folder, 2)

    fault = {"kind": "overflow", **STUDENT, "calls": [0]}
    over = run(tiny("over", **settings), ranks, fault, attempt=2)
    lower = run(tiny("lower", **settings), ranks, attempt=2)
    assert begun.codes == over.codes == lower.codes == [0] * ranks, over.said
    assert [(e["step"], e["scale"]) for e in over.events("overflow_retry")] == [(3, 2.0**15)]
    assert not over.events("nan_skipped") and not lower.events("overflow_retry")
    assert over.column("scale") == [2.0**16] * 2 + [2.0**15] * 3
    assert same(over.weights(), lower.weights()) and same(over.moments(), lower.moments())
    assert load_state(over.checkpoint)["scaler"] == {"scale": 2.0**15, "clean": 3}


def test_what_no_scale_helps_is_left_to_the_nan_policy(run: Any, tiny: Any) -> None:
    """Gradients that stay infinite are tried down to a scale of 1; a loss that is not finite is
    not tried again, since the scale has no part in it. Either way the scale is then as before."""
    often = {"kind": "overflow", **STUDENT, "calls": list(range(1, 18))}
    ran = run(tiny("stubborn", precision="fp16"), 1, often)
    assert ran.codes == [0], ran.said
    assert [e["scale"] for e in ran.events("overflow_retry")] == [2.0**k for k in range(15, -1, -1)]
    assert [e["step"] for e in ran.events("nan_skipped")] == [2]
    assert ran.column("scale") == [2.0**16] * STEPS

    ran = run(tiny("nan", precision="fp16"), 2, {"kind": "nan", **STUDENT, "calls": [1]})
    assert ran.codes == [0, 0], ran.said
    assert not ran.events("overflow_retry")
    assert [e["step"] for e in ran.events("nan_skipped")] == [2]
    assert ran.column("scale") == [2.0**16] * STEPS


def test_out_of_memory_in_the_teachers_pass_splits_the_step(
    run: Any, tiny: Any, tmp_path: Path
) -> None:
    """On one of two ranks; the other has prepared its batches by then, and drops them."""
    wide = tiny("teacher", steps=1)
    architecture = replace(wide.model.architecture, hidden_size=64)
    wide = replace(wide, model=replace(wide.model, architecture=architecture))
    assert run(wide, 1).codes == [0]
    kd = Distill(teacher=str(tmp_path / "teacher"), temperature=2.0, alpha=0.3)
    calm = run(replace(tiny("calm"), stage="kd", kd=kd), 2)
    fault = {"kind": "oom", "hidden": 64, "learning": False, "calls": [], "rows": 2}
    split = run(replace(tiny("split"), stage="kd", kd=kd), 2, fault)
    assert calm.codes == split.codes == [0, 0], split.said
    assert [e["micro_batch"] for e in split.events("oom_split")] == [2]
    assert apart(split.weights(), calm.weights()) < 2e-6


def test_out_of_memory_while_targets_are_stored_changes_none_of_them(
    run: Any, tiny: Any, tmp_path: Path
) -> None:
    assert run(tiny("teacher", steps=1), 1).codes == [0]
    asked = Targets(teacher=str(tmp_path / "teacher"), top_k=4, micro_batch=4)

    def stored(name: str, fault: Optional[dict[str, Any]]) -> tuple[Ran, list[Any]]:
        stage = replace(tiny(name), stage="targets", model=None, train=None, targets=asked)
        ran = run(stage, 1, fault)
        assert ran.codes == [0], ran.said
        files = sorted((ran.folder / "targets").glob("shard-*/*.npy"))
        return ran, [np.load(file).astype(np.float64) for file in files]

    _, calm = stored("calm", None)
    fault = {"kind": "oom", "hidden": 32, "learning": False, "calls": [], "rows": 1}
    split, halved = stored("split", fault)
    assert "targets: out of memory with 2 rows: 1 at a time" in split.said
    assert len(calm) == len(halved) == 5
    for ours, theirs in zip(halved, calm):
        np.testing.assert_allclose(ours, theirs, rtol=2e-3)

    fault = {**fault, "rows": 0}
    stage = replace(tiny("none"), stage="targets", model=None, train=None, targets=asked)
    assert run(stage, 1, fault).codes == [64]


class OutOfMemoryOnce(TorchFunctionMode):
    """The first call of `torch.unique` finds no memory: samples have been drawn by then."""

    raised = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.unique and not self.raised:
            self.raised = True
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return func(*args, **(kwargs or {}))


def test_samples_that_were_drawn_before_an_out_of_memory_are_drawn_again(
    tokenizer: str, texts: str, tmp_path: Path
) -> None:
    """The stored answers are those of the calm pass: a generator that had moved on gives others."""
    rows = gradients.rows(tokenizer, texts, packing=True)
    teacher = gradients.model(tokenizer, torch.float32, seed=2).eval()
    plan = Targets("t", sampler="sample", samples=16, micro_batch=4)
    said: list[str] = []

    def stored(name: str) -> list[Any]:
        folder = tmp_path / name
        write_targets(
            folder, plan, rows, teacher, load_tokenizer(tokenizer), gradients.CPU, said.append
        )
        return [np.load(file) for file in sorted(folder.glob("shard-*/*.npy"))]

    calm = stored("calm")
    with OutOfMemoryOnce():
        found = stored("split")
    assert "targets: out of memory with 4 rows: 2 at a time" in said
    assert len(calm) == len(found) > 0
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(found, calm))


def test_fp16_distils_and_evaluates_as_fp32_does(run: Any, tiny: Any, tmp_path: Path) -> None:
    """With a frozen teacher and a frozen copy of the start in fp16, and the loss that is logged
    without its scale."""
    assert run(tiny("teacher", steps=1), 1).codes == [0]
    kd = Distill(
        teacher=str(tmp_path / "teacher"),
        temperature=2.0,
        alpha=0.3,
        keep_logits=KeepLogits(0.5, 1.0),
    )
    fp32, fp16 = (
        run(replace(tiny(precision, precision=precision, evaluate_every=2), stage="kd", kd=kd), 1)
        for precision in ("fp32", "fp16")
    )
    assert fp32.codes == fp16.codes == [0], fp16.said
    for name in ("train_loss", "kd_loss", "keep_l2", "grad_norm"):
        assert fp16.column(name) == pytest.approx(fp32.column(name), rel=2e-2, abs=1e-5), name
    for found, expected in zip(lines(fp16.folder, "eval"), lines(fp32.folder, "eval")):
        assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-3)
    assert fp16.weights().keys() == fp32.weights().keys()
    assert {weight.dtype for weight in fp16.weights().values()} == {torch.float32}


def test_out_of_memory_in_an_evaluation_halves_its_batch(run: Any, tiny: Any) -> None:
    calm = run(tiny("calm", evaluate_every=2), 2)
    fault = {"kind": "oom", "hidden": 32, "learning": False, "calls": [], "rows": 1}
    split = run(tiny("split", evaluate_every=2), 2, fault)
    assert calm.codes == split.codes == [0, 0], split.said
    events = split.events("oom_split")
    assert [(e["global_step"], e["micro_batch"], e["evaluation"]) for e in events] == [
        (step, 1, True) for step in (2, 4, 5)
    ]
    found, expected = (
        [line[name] for line in lines(ran.folder, "eval") for name in ("val_loss", "val_tokens")]
        for ran in (split, calm)
    )
    assert found == pytest.approx(expected, rel=1e-6)
    assert same(split.weights(), calm.weights())

    never = run(tiny("never"), 2, {**fault, "rows": 0})
    assert never.codes == [64, 64], never.said
    assert never.said.count("error: evaluation: one row does not fit") == 2


def test_a_model_that_does_not_fit_ends_with_one_line(
    stage: StageConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def full(self: nn.Module, device: Any) -> nn.Module:
        raise torch.OutOfMemoryError("CUDA out of memory. (injected)\nSee the documentation")

    monkeypatch.setattr(nn.Module, "to", full)
    job = tmp_path / "job.json"
    job.write_text(json.dumps(to_dict(Job(run="r", stages=(stage,)))))
    assert __main__.main(["run", str(job)]) == 64
    said = [line for line in capsys.readouterr().err.splitlines() if line]
    why = "out of memory where fewer rows at a time do not help (CUDA out of memory. (injected)):"
    assert len(said) == 1 and said[0].startswith(f"error: {why}")


def test_a_limited_evaluation_compares_the_same_rows_however_it_is_cut(run: Any, tiny: Any) -> None:
    """Of 24 rows, 2 x 4: on one worker or two, with rows that fit or not, before the split of a
    step and after it."""
    settings = {"evaluate_every": 2, "evaluate_batches": 2}
    fault = {"kind": "oom", **STUDENT, "calls": [], "rows": 1}
    found = [
        [line["val_tokens"] for line in lines(ran.folder, "eval")]
        for ran in (
            run(tiny("one", **settings), 1),
            run(tiny("two", **settings), 2),
            run(tiny("split", **settings), 1, fault),
        )
    ]
    assert len(found[0]) == 3 and found[0] == found[1] == found[2]
    whole = run(tiny("whole", **{**settings, "evaluate_batches": 6}), 1)
    assert lines(whole.folder, "eval")[0]["val_tokens"] > 2 * found[0][0]


@RANKS
def test_the_longest_rows_are_tried_before_the_first_step(ranks: int, run: Any, tiny: Any) -> None:
    """Rows of unequal length, and memory for two of them on one rank: the run is the one that was
    asked for two, to the last bit and with dropout, and a checkpoint's moments change nothing."""

    def loose(name: str, **train: Any) -> StageConfig:
        config = tiny(name, dropout=0.1, **train)
        return replace(config, data=replace(config.data, packing=False))

    fault = {"kind": "oom", **STUDENT, "calls": [], "rows": 2}
    given = run(loose("given", micro_batch=2, accumulate=2), ranks)
    run(loose("tried", until=3), ranks, fault)
    tried = run(loose("tried"), ranks, fault, attempt=2)
    assert given.codes == tried.codes == [0] * ranks, tried.said
    (event,) = tried.events("oom_split")
    assert (event["global_step"], event["tried"], event["micro_batch"]) == (0, 4, 2)
    assert not given.events("oom_split")
    assert tried.column("train_loss") == given.column("train_loss")
    assert same(tried.weights(), given.weights()) and same(tried.moments(), given.moments())


def test_one_row_that_does_not_fit_ends_all_ranks_before_the_first_step(
    run: Any, tiny: Any
) -> None:
    config = tiny("never")
    loose = replace(config, data=replace(config.data, packing=False))
    ran = run(loose, 2, {"kind": "oom", **STUDENT, "calls": [], "rows": 0})
    assert ran.codes == [64, 64], ran.said
    assert ran.said.count("error: one row does not fit in the device's memory") == 2
    assert not lines(ran.folder, "step")


@pytest.mark.parametrize("name", ["next_token", "distill", "kept", "top_k", "sample"])
def test_the_loss_scale_reaches_the_gradients_before_they_are_rounded(
    name: str, tokenizer: str, texts: str
) -> None:
    """In fp16, against fp32: what is scaled only after the losses' forward pass would be lost."""
    fp16 = gradients.CPU.at("fp16")
    exact = gradients.of(name, tokenizer, texts, torch.float32, micro_batch=4)

    def error(scale: float) -> float:
        rounded = gradients.of(
            name, tokenizer, texts, torch.float32, micro_batch=4, runtime=fp16, scale=scale
        )
        return float((rounded - exact).norm() / exact.norm())

    assert error(2.0**16) < 1e-3
    assert error(2.0**-10) > 0.1  # without a scale, they would be too small here


def test_the_term_that_holds_logits_leaves_its_gradient_unrounded_for_the_scale() -> None:
    """Its gradient of fp16 hidden states, before the scale is multiplied in, is below 6e-8."""
    torch.manual_seed(0)
    head, start = (torch.randn(256, 8) * 1e-4 for _ in range(2))

    def gradient(dtype: torch.dtype) -> torch.Tensor:
        hidden = torch.linspace(-1, 1, 32).view(4, 8).to(dtype).requires_grad_()
        distance = logit_distance(hidden, head, hidden.detach(), start)
        (distance * 2.0**16).backward()
        assert hidden.grad is not None
        return hidden.grad.double()

    exact = gradient(torch.float32)
    assert float(exact.abs().max()) / 2.0**16 < 6e-8
    assert float((gradient(torch.float16) - exact).norm() / exact.norm()) < 5e-3


def test_the_scale_doubles_after_many_clean_steps_up_to_a_limit() -> None:
    scale = Scaler()
    for _ in range(scaler.INTERVAL - 1):
        scale.passed()
    assert scale.lower()
    for _ in range(scaler.INTERVAL - 1):
        scale.passed()
    assert scale.scale == scaler.INITIAL / 2
    scale.passed()
    assert scale.state_dict() == {"scale": scaler.INITIAL, "clean": 0}
    for _ in range(20 * scaler.INTERVAL):
        scale.passed()
    assert scale.scale == scaler.LARGEST


def test_the_scale_falls_to_its_floor_and_a_step_that_gives_up_puts_it_back() -> None:
    scale = Scaler(8.0)
    assert [scale.lower() for _ in range(4)] == [True, True, True, False]
    assert scale.scale == scaler.SMALLEST
    scale.give_up()
    assert scale.scale == 8.0
    assert scale.lower()
    scale.passed()
    scale.give_up()
    assert scale.scale == 4.0
    large = Scaler(scaler.LARGEST)
    assert [large.lower() for _ in range(scaler.RETRIES + 1)] == [True] * scaler.RETRIES + [False]
