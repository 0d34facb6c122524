"""`python -m trainer check`: what it says of machines that are not here.

The texts below are samples of the tools' formats, written after their documentation, not captures
of one machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer import check, check_facts, check_row
from trainer.check_facts import Driver, Facts, Flash, Gpu, Torch
from trainer.config import Job, build

GIB = 1024**3
#: The head of a plain `nvidia-smi` (format sample).
SMI = """\
Sat Nov 21 12:00:00 2026
+---------------------------------------------------------------------------------------+
| NVIDIA-SMI 535.183.01             Driver Version: 535.183.01   CUDA Version: 12.2     |
|-----------------------------------------+----------------------+----------------------+
| GPU  Name                 Persistence-M | Bus-Id        Disp.A | Volatile Uncorr. ECC |
"""
#: `nvidia-smi --query-gpu=... --format=csv,noheader,nounits` (format samples).
H100, T4 = (
    "0, NVIDIA H100 80GB HBM3, 81559, 4, 9.0, 0\n1, NVIDIA H100 80GB HBM3, 81559, 4, 9.0, 0\n",
    "0, Tesla T4, 15360, 3, 7.5, [N/A]\n",
)
ARCHS = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
VERSIONS: dict[str, str | None] = {
    "transformers": "5.23.0", "peft": "0.21.2", "tokenizers": "0.23.3",
    "huggingface-hub": "2.4.0", "safetensors": "0.8.0", "numpy": "2.4.6",
}  # fmt: skip


def machine(**other: Any) -> Facts:
    """Two H100 on which everything is as it should be, but for `other`."""
    torch = Torch("2.9.1+cu128", "12.8", None, True, True, 2, ARCHS, "2.27.5")
    good = Facts(
        python=(3, 11), executable="/usr/bin/python3", torch=torch,
        driver=Driver("570.86.10", "12.8"), gpus=check_facts.read_gpus(H100), versions=VERSIONS,
        flash=Flash("2.8.3", "cu12torch2.9cxx11abiTRUE"), disk_folder="/w", disk_free=500.0 * GIB,
        shared_memory=8.0 * GIB, memory=200.0 * GIB, open_files=65536, hub_token=True, now=2e9,
        code_time=1.9e9, synchronised=True,
    )  # fmt: skip
    return replace(good, **other)


def row(name: str, facts: Facts, job: Job | None = None) -> check_row.Row:
    return next(row for row in check.rows(facts, job) if row.name == name)


def test_a_machine_without_fault_scores_100_and_loses_nothing() -> None:
    found = check.rows(machine())
    assert {one.result for one in found} == {"pass"}
    assert check.score(found) == 100 and check.lines(found)[-1] == "environment score: 100 of 100"


def test_the_weights_are_a_hundred_points_and_every_row_has_one() -> None:
    assert sum(check_row.WEIGHTS.values()) == 100
    assert {one.name for one in check.rows(machine())} == set(check_row.WEIGHTS)


def test_an_empty_machine_fails_and_every_lost_point_has_its_reason() -> None:
    found = check.rows(Facts((3, 9), "/usr/bin/python3"))
    failing = {one.name for one in found if one.result == "fail"}
    assert {"python", "torch", "packages"} <= failing
    lost = [line for line in check.lines(found) if line.startswith("  -")]
    assert sum(float(line.split()[0]) for line in lost) == check.score(found) - 100
    assert all(one.fix for one in found if one.result in ("warn", "fail"))


def test_the_driver_s_cuda_is_read_and_compared_with_torch_s() -> None:
    driver = check_facts.read_driver(SMI)
    assert driver == Driver("535.183.01", "12.2")
    older = row("driver", machine(driver=driver))
    assert older.result == "warn"
    assert "driver 535.183.01 supports CUDA 12.2, torch is built for 12.8" in older.detail
    assert "built for 12.2 or older" in older.fix

    new = Torch("2.11.0+cu130", "13.0", None, True, False, 0, ARCHS, None, "driver is too old")
    broken = machine(driver=driver, torch=new)
    assert row("driver", broken).result == "fail" and "580.65.06" in row("driver", broken).fix
    assert row("gpu", broken).result == "fail" and "driver is too old" in row("gpu", broken).detail
    bridged = machine(driver=driver, torch=replace(new, available=True, gpus=2, error=""))
    assert row("driver", bridged).result == "pass"


def test_a_driver_that_does_not_answer_and_one_that_is_not_there() -> None:
    said = "Failed to initialize NVML: Driver/library version mismatch"
    broken = row("driver", machine(driver=None, smi_error=said))
    assert (broken.result, said in broken.detail) == ("fail", True)
    assert row("driver", machine(driver=None)).result == "skip"
    assert check_facts.read_driver("No devices were found") is None


def test_gpus_are_read_with_what_they_do_not_tell() -> None:
    assert check_facts.read_gpus(H100)[1] == Gpu(1, "NVIDIA H100 80GB HBM3", 81559, 4, 9.0, 0)
    (old,) = check_facts.read_gpus(T4)
    assert (old.capability, old.ecc) == (7.5, None)
    assert check_facts.read_gpus("No devices were found\n") == ()
    assert "2 x NVIDIA H100 80GB HBM3 (79.6 GiB" in row("gpu", machine()).detail


def test_memory_is_in_gib_and_the_disk_in_gb() -> None:
    facts = machine(disk_free=0.5e9)
    assert row("disk", facts).detail.startswith("0.5 GB free for ")
    assert "GiB for processes" in row("memory", facts).detail


@pytest.mark.parametrize("said", ["nan", "-nan", "inf", "-8.0", "8.9x", "", "[N/A]", "garbage"])
def test_what_nvidia_smi_does_not_tell_is_passed_for_nothing(said: str) -> None:
    strange = check_facts.read_gpus(f"0, NVIDIA L4, 23034, 2, {said}, 0\n")
    facts = machine(gpus=strange, flash=None)
    for name in ("gpu", "precision"):
        found = row(name, facts)
        assert (found.result, f"compute_cap '{said}'" in found.detail) == ("warn", True)
        assert found.fix
    assert row("flash-attn", machine(gpus=strange)).result == "skip"
    assert row("job", facts, job(precision="bf16")).result == "pass"


def test_a_memory_that_is_no_number_is_told_as_it_stands() -> None:
    gpus = check_facts.read_gpus("0, NVIDIA L4, nan, lots, 8.9, 0\n")
    found = row("gpu", machine(gpus=gpus))
    assert found.result == "warn"
    assert "memory unknown" in found.detail
    assert "memory.total 'nan', memory.used 'lots'" in found.detail
    shared = check_facts.read_gpus("0, NVIDIA GB10, [N/A], [N/A], 12.1, [N/A]\n")
    assert row("gpu", machine(gpus=shared)).result == "pass"


@pytest.mark.parametrize(
    ("gpu", "result", "words"),
    [
        (Gpu(0, "Tesla V100", 16160, 0, 7.0), "fail", "no kernels for Tesla V100 (7)"),
        (Gpu(0, "NVIDIA L4", 23034, 2, 8.9), "pass", "1 x NVIDIA L4"),  # sm_86 runs there
        (Gpu(0, "NVIDIA B300", 270000, 2, 12.1), "pass", "B300"),  # from compute_120
        (Gpu(0, "NVIDIA L4", 23034, 9000, 8.9), "warn", "8.8 GiB of GPU 0 are in use"),
        (Gpu(0, "NVIDIA L4", 23034, 2, 8.9, 3), "warn", "3 memory errors"),
    ],
)
def test_a_gpu_is_one_that_torch_has_kernels_for_and_that_is_free(
    gpu: Gpu, result: str, words: str
) -> None:
    found = row("gpu", machine(gpus=(gpu,)))
    assert found.result == result and words in found.detail


def test_a_gpu_that_computes_wrongly_or_is_hidden_fails() -> None:
    torch = machine().torch
    assert torch is not None
    wrong = replace(torch, error="GPU 1 multiplies wrongly")
    assert row("gpu", machine(torch=wrong)).result == "fail"
    assert row("gpu", machine(torch=replace(torch, available=False))).result == "fail"
    assert row("gpu", machine(gpus=(), torch=replace(torch, available=False))).result == "fail"
    cpu_build = Torch("2.9.1+cpu")
    assert row("torch", machine(torch=cpu_build)).result == "fail"
    assert row("gpu", machine(driver=None, gpus=(), torch=cpu_build)).result == "warn"


def test_precision_is_that_of_the_oldest_gpu() -> None:
    assert row("precision", machine()).detail.endswith("bf16 and fp8")
    assert "no bf16" in row("precision", machine(gpus=check_facts.read_gpus(T4))).detail
    ampere = machine(gpus=(Gpu(0, "A100", 40960, 0, 8.0), *machine().gpus))
    assert row("precision", ampere).detail.endswith("bf16, no fp8")


@pytest.mark.parametrize(
    ("flash", "result", "words"),
    [
        (Flash("2.8.3", "cu12torch2.9cxx11abiTRUE"), "pass", "can be imported"),
        (Flash("2.8.3", "cu12torch2.4cxx11abiTRUE"), "fail", "here is torch 2.9.1"),
        (Flash("2.8.3", "cu11torch2.9cxx11abiTRUE"), "fail", "here is CUDA 12.8"),
        (Flash("2.8.3", "cu12torch2.9cxx11abiFALSE"), "fail", "C++11 ABI that is on"),
        (Flash("2.8.3", "", "undefined symbol: _ZN3c10"), "fail", "undefined symbol"),
        (None, "warn", "SDPA"),
    ],
)
def test_flash_attn_has_to_be_built_for_this_torch(
    flash: Flash | None, result: str, words: str
) -> None:
    found = row("flash-attn", machine(flash=flash))
    assert found.result == result and words in found.detail


def test_what_a_wheel_was_built_for_is_in_its_version_or_its_address() -> None:
    assert check_facts.built_for("2.8.3+cu12torch2.4cxx11abitrue", None) == (
        "cu12torch2.4cxx11abitrue"
    )
    url = "https://h/flash_attn-2.8.3%2Bcu12torch2.4cxx11abiTRUE-cp310-cp310-linux_x86_64.whl"
    assert check_facts.built_for("2.8.3", json.dumps({"url": url})) == "cu12torch2.4cxx11abiTRUE"
    assert check_facts.built_for("2.8.3", None) == ""


def test_packages_are_there_and_within_what_is_tested() -> None:
    assert row("packages", machine(versions={**VERSIONS, "peft": None})).detail == "peft is missing"
    old = row("packages", machine(versions={**VERSIONS, "transformers": "4.56.2"}))
    assert (old.result, old.detail) == ("fail", "transformers 4.56.2 is older than 5.0")
    assert row("packages", machine(versions={**VERSIONS, "transformers": "6.0"})).result == "warn"


@pytest.mark.parametrize(
    ("name", "facts", "result"),
    [
        ("python", {"python": (3, 13)}, "warn"),
        ("torch", {"torch": None, "torch_error": "libcudart.so.12: cannot open"}, "fail"),
        ("torch", {"torch": Torch("2.4.0+cu124", "12.4")}, "fail"),
        ("nccl", {"torch": replace(machine().torch or Torch(""), nccl=None)}, "fail"),
        ("disk", {"disk_free": 0.5 * GIB}, "fail"),
        ("disk", {"disk_free": 10.0 * GIB}, "warn"),
        ("shared memory", {"shared_memory": 64.0 * 1024**2}, "fail"),  # two GPUs, docker's default
        ("shared memory", {"shared_memory": 64.0 * 1024**2, "gpus": ()}, "warn"),
        ("memory", {"memory": 30.0 * GIB}, "warn"),  # beside 159 GiB of GPU memory
        ("memory", {"memory": 0.5 * GIB}, "fail"),
        ("open files", {"open_files": 1024}, "warn"),
        ("open files", {"open_files": -1}, "pass"),
        ("tokenizers", {"parallelism": "false"}, "warn"),
        ("clock", {"now": 1.0}, "fail"),
    ],
)
def test_each_row_tells_what_is_short(name: str, facts: dict[str, Any], result: str) -> None:
    found = row(name, machine(**facts))
    assert found.result == result
    assert (found.fix != "") == (result != "pass")


def test_memory_is_what_the_cgroup_leaves() -> None:
    meminfo = "MemTotal:       65536000 kB\nMemAvailable:   32768000 kB\n"
    assert check_facts.read_memory(meminfo, ["max\n", ""]) == 32768000 * 1024
    assert check_facts.read_memory(meminfo, ["8589934592\n"]) == 8 * GIB
    assert check_facts.read_memory(meminfo, ["9223372036854771712"]) == 32768000 * 1024
    assert check_facts.read_memory("", []) is None


def test_a_hub_token_is_found_where_the_library_looks(tmp_path: Path) -> None:
    assert check_facts.has_hub_token({"HF_TOKEN": "x", "HOME": str(tmp_path)})
    assert not check_facts.has_hub_token({"HOME": str(tmp_path)})
    (tmp_path / "token").write_text("secret")
    assert check_facts.has_hub_token({"HF_HOME": str(tmp_path)})


def job(**model: Any) -> Job:
    stage = {"id": "s", "stage": "sft", "output": "/tmp/out", "model": {"name": "m/m", **model},
             "data": {"train": [{"path": "/d"}]}, "train": {"steps": 1}}  # fmt: skip
    problems: list[Any] = []
    made: Job = build(Job, {"run": "r", "schema": 1, "stages": [stage]}, (), problems)
    assert not problems
    return made


def test_a_job_that_asks_for_what_the_gpus_lack_fails() -> None:
    old = machine(gpus=check_facts.read_gpus(T4))
    assert row("job", old, job(precision="bf16")).result == "fail"
    assert row("job", old, job(attention="flash_attention_2")).result == "fail"
    assert row("job", old, job(float8="torchao")).detail == (
        "s: model.float8 is torchao, and Tesla T4 has none"
    )
    assert row("job", old, job(float8="auto")).result == "pass"
    assert row("job", machine(), job(precision="bf16")).result == "pass"
    assert row("hub token", machine(hub_token=False), job()).result == "warn"
    assert row("hub token", machine(hub_token=False), job(name="/models/m")).result == "skip"


def trainer(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False,
        env={**os.environ, **environ},
    )  # fmt: skip


def test_here_the_command_ends_as_its_rows_say() -> None:
    ended = trainer("-m", "trainer", "check", "--json")
    said = json.loads(ended.stdout)
    failing = [one for one in said["checks"] if one["result"] == "fail"]
    assert (ended.returncode, said["ok"]) == ((78, False) if failing else (0, True))
    assert said["score"] == 100 - sum(one["lost"] for one in said["checks"])
    assert "torch" not in [one["name"] for one in failing], said


def test_without_torch_the_command_still_answers(tmp_path: Path) -> None:
    """A Python without packages: `-I -S` leaves the standard library alone."""
    root = Path(check.__file__).parents[1]
    code = f"import sys; sys.path.insert(0, {str(root)!r}); from trainer import __main__ as m; "
    ended = trainer("-I", "-S", "-c", f"{code} sys.exit(m.main(['check']))")
    assert ended.returncode == 78, ended.stderr
    assert "is not installed" in ended.stdout and "environment score: " in ended.stdout


def test_boot_runs_it_as_it_runs_the_trainer() -> None:
    boot = Path(check.__file__).with_name("boot.py")
    ended = trainer(str(boot), "trainer", "check", "absent.json",
                    PYTHONPATH=str(boot.parents[1]))  # fmt: skip
    assert ended.returncode == 64 and "absent.json: No such file" in ended.stderr


@pytest.mark.parametrize("wrong", [["a", "b"], ["absent.json"]])
def test_a_wrong_command_line_is_64(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from trainer.__main__ import main

    assert main(["check", *wrong]) == 64
    assert "error: " in capsys.readouterr().err
