"""The throughput benchmark: what it compares, what it says of a baseline that is not there, and
that both sides of a ratio do the same work."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.config import ConfigError

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "throughput.py"


@pytest.fixture(scope="module")
def throughput() -> Any:
    spec = importlib.util.spec_from_file_location("throughput", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def speed(tokens: float) -> dict[str, Any]:
    return {"real_per_sec": tokens, "supervised_per_sec": tokens, "peak_mib": 100.0, "loss": 1.0}


def report(module: Any, results: dict[str, Any], tiny: bool = False) -> dict[str, Any]:
    return {"tiny": tiny, "results": results, "ratios": module.ratios(results)}


def test_a_budget_is_missed_met_or_not_checked(throughput: Any, capsys: Any) -> None:
    slow = {"kd ours": speed(140.0), "kd trl": speed(100.0)}
    assert throughput.verdict(report(throughput, slow), check=True) == 1
    assert "at least 1.5 x: 1.40" in capsys.readouterr().err
    assert throughput.verdict(report(throughput, slow), check=False) == 0
    assert throughput.verdict(report(throughput, slow, tiny=True), check=True) == 0
    assert "not checked: " in capsys.readouterr().out
    fast = slow | {"kd ours": speed(151.0)}
    assert throughput.verdict(report(throughput, fast), check=True) == 0


@pytest.mark.parametrize("state", ["absent", "failed"])
def test_a_baseline_without_a_measurement_is_never_beaten(
    state: str, throughput: Any, capsys: Any
) -> None:
    results = {"kd ours": speed(140.0), "kd trl": {state: "no such module"}}
    facts = report(throughput, results)
    assert facts["ratios"] == []
    assert throughput.verdict(facts, check=True) == 0
    assert f"not checked: {state} (no such module)" in capsys.readouterr().out


def test_a_failure_of_ours_fails_the_benchmark(throughput: Any, capsys: Any) -> None:
    results = {"kd ours": {"failed": "out of memory"}, "kd trl": speed(100.0)}
    assert throughput.verdict(report(throughput, results), check=False) == 1
    assert "kd ours: failed (out of memory)" in capsys.readouterr().err


def test_medians_leave_out_a_measurement_that_failed(throughput: Any) -> None:
    taken = [speed(1.0), speed(5.0), {"failed": "interrupted"}, speed(3.0)]
    facts = throughput.summary(taken)
    assert facts["real_per_sec"] == 3.0 and facts["failed_once"] == "interrupted"
    assert throughput.summary([{"failed": "a"}, {"failed": "b"}]) == {"failed": "a"}


def test_utilisation_is_flops_over_the_peak_or_nothing(throughput: Any) -> None:
    facts = {"flops_per_token": {"sft": 2e9, "kd": None}, "peak_tflops": 100.0}
    assert throughput.utilisation(facts, "sft ours packed", speed(10_000.0)) == 0.2
    assert throughput.utilisation(facts, "kd ours", speed(10_000.0)) is None
    unknown = facts | {"peak_tflops": None}
    assert throughput.utilisation(unknown, "sft ours packed", speed(10_000.0)) is None


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("task", ["sft", "kd"])
def test_ours_and_the_textbook_are_measured_on_the_same_batches(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from speed import ours, textbook, world

    size = replace(world.TINY, steps=2, vocabulary=512)
    world.prepare(tmp_path, size, on_gpu=False)
    packed = " packed" * (task == "sft")
    mine = ours.measure(f"{task} ours{packed}", tmp_path, size, None)
    book = textbook.measure(f"{task} textbook{packed}", tmp_path, size, None)
    assert mine["loss"] == pytest.approx(book["loss"], rel=1e-4)
    assert min(mine["real_per_sec"], book["real_per_sec"], mine["peak_mib"]) > 0
    shares = [facts["supervised_per_sec"] / facts["real_per_sec"] for facts in (mine, book)]
    assert shares[0] == pytest.approx(shares[1], rel=1e-9) and 0.8 < shares[0] < 1


def test_a_key_that_the_trainer_lacks_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from speed import ours, world

    monkeypatch.setitem(ours.CHANGES, "sft ours fsdp", {"train": {"warp": 9}})
    with pytest.raises(ConfigError, match=r"train\.warp: unknown key"):
        ours.stage("sft ours fsdp", tmp_path, world.TINY)
    monkeypatch.setitem(ours.CHANGES, "sft ours fsdp", {"model": {"compile": True}})
    made = ours.stage("sft ours fsdp", tmp_path, world.TINY)
    assert made.model is not None and made.model.compile


def test_a_case_of_ours_may_be_absent_on_a_toy_and_not_at_full_size(throughput: Any) -> None:
    results = {"sft ours float8": {"absent": "there is no GPU"}}
    assert throughput.verdict(report(throughput, results, tiny=True), check=False) == 0
    assert throughput.verdict(report(throughput, results), check=False) == 1
    failed = {"sft ours float8": {"failed": "there is no GPU"}}
    assert throughput.verdict(report(throughput, failed, tiny=True), check=False) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which would be measured")
def test_without_a_gpu_its_cases_are_refused_but_on_a_toy(
    throughput: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr("sys.argv", [str(SCRIPT), "--gpu"])
    assert throughput.main() == 1
    assert "--gpu --tiny runs its cases on a toy" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [str(SCRIPT), "--gpu", "--tiny", "--only", "kd"])
    assert throughput.main() == 1
    assert "--gpu has no case of kd" in capsys.readouterr().err


def test_the_set_up_of_a_gpus_cases_is_made_on_a_cpu(
    throughput: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from speed import gpu, ours, world

    for name, cases in gpu.CASES.items():
        size, work = world.SIZES[f"{name} tiny"], tmp_path / name
        assert throughput.is_tiny(f"{name} tiny") and not throughput.is_tiny(name)
        world.prepare(work, size, on_gpu=False)
        assert (work / "teacher").exists() == world.SIZES[name].weights
        for case in cases:
            if case in ours.CASES:
                model = ours.stage(case, work, size).model
                assert model is not None and model.name is not None and Path(model.name).exists()


def test_every_case_has_a_side_and_every_ratio_its_cases(
    throughput: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from speed import gpu, ours, peers, textbook, world

    sides = {*ours.CASES, *peers.CASES, *textbook.CASES}
    cases = {f"{task} {case}" for task, found in throughput.CASES.items() for case in found}
    assert cases | {case for found in gpu.CASES.values() for case in found} <= sides
    assert {case for ratio in throughput.RATIOS for case in ratio[:2]} <= cases
    assert ours.CHANGES.keys() <= ours.CASES.keys() and gpu.CASES.keys() <= world.SIZES.keys()


def test_what_is_asked_of_an_h100_is_met_missed_or_not_measured(
    throughput: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from speed import gpu

    plain, eight = gpu.CASES["3b"]

    def asked(mfu: float, faster: float, loss: float) -> list[Any]:
        reports = {
            "1b": {"results": {"sft ours compiled": {**speed(1.0), "mfu": mfu}}},
            "3b": {"results": {plain: speed(100.0), eight: {**speed(100 * faster), "loss": loss}}},
            "8b": {"results": {"lora ours": speed(5000.0), "lora trl": {"absent": "no trl"}}},
        }
        return [met for _, met in gpu.verdicts(reports)]

    assert asked(0.51, 1.2, 1.004) == [True, True, True, None]
    assert asked(0.49, 1.1, 1.006) == [False, False, False, None]
    nothing: dict[str, Any] = {name: {"results": {}} for name in gpu.CASES}
    assert [met for _, met in gpu.verdicts(nothing)] == [None] * 4
