"""What `python -m trainer check` makes of torch, driver, GPUs, and what is built for them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from trainer.check_facts import Facts, Flash, Gpu, Torch
from trainer.check_row import Result, Row, dots, numbers
from trainer.environment import TORCH

#: The oldest driver for each major version of CUDA, from NVIDIA's release notes of CUDA, "CUDA
#: minor version compatibility"; read 2026-11-21.
DRIVERS = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
#: Compute capability from which the matrix units know bf16 (Ampere) and fp8 (Ada).
BF16, FP8 = 8.0, 8.9
_UNREAD = "run `nvidia-smi -q`; update the driver, or restart the machine"
_IN_USE = 0.05  # share of a GPU's memory that somebody else may hold


def rows(facts: Facts) -> list[Row]:
    """Torch, driver, GPUs, their precision, flash-attn and NCCL."""
    return [
        _torch(facts), _driver(facts), _gpu(facts), _precision(facts), flash_attn(facts),
        _nccl(facts),
    ]  # fmt: skip


def flash_attn(facts: Facts) -> Row:
    """Whether attention can run with it: built for this torch, and importable."""
    flash, torch = facts.flash, facts.torch
    able = any(gpu.capability >= BF16 for gpu in facts.gpus)
    if flash is None:
        if not able:
            return Row("flash-attn", "skip", "not installed; no GPU here could use it")
        return Row("flash-attn", "warn", "not installed: attention runs on torch's own, or SDPA",
                   "name a wheel for this torch and CUDA in hardware.environment")  # fmt: skip
    detail = f"{flash.version}" + (f", built for {flash.built}" if flash.built else "")
    if wrong := _misbuilt(flash, torch):
        return Row("flash-attn", "fail", f"{detail}; here is {wrong}",
                   "install the wheel for this torch, CUDA and C++ ABI, or remove it")  # fmt: skip
    if flash.error:
        return Row("flash-attn", "fail", f"{detail}; cannot be imported: {flash.error}",
                   "install the wheel for this torch, CUDA and C++ ABI, or remove it")  # fmt: skip
    if not able:
        known = all(gpu.capability for gpu in facts.gpus)
        why = "no GPU here can use it" if known else "whether a GPU here can use it is not known"
        return Row("flash-attn", "skip", f"{detail}; {why}")
    return Row("flash-attn", "pass", f"{detail}; can be imported")


def _torch(facts: Facts) -> Row:
    low, high = dots(TORCH[0]), f"{TORCH[1][0]}.{TORCH[1][1] - 1}"
    fix = f"install torch {low} to {high}, or use an image that has it (docker/Dockerfile)"
    if facts.torch is None:
        return Row("torch", "fail", facts.torch_error or "is not installed", fix)
    built = f"built for CUDA {facts.torch.cuda}" if facts.torch.cuda else "a CPU build"
    if facts.torch.hip:
        built = f"built for ROCm {facts.torch.hip}"
    detail = f"{facts.torch.version}, {built}"
    if not TORCH[0] <= numbers(facts.torch.version)[:2] < TORCH[1]:
        return Row("torch", "fail", f"{detail}; the trainer runs on {low} to {high}", fix)
    if facts.gpus and not facts.torch.cuda:
        return Row("torch", "fail", f"{detail}, which does not see the {facts.gpus[0].name} here",
                   "install a torch that is built for CUDA")  # fmt: skip
    if facts.torch.hip:
        return Row("torch", "warn", f"{detail}; nobody has tried this trainer on ROCm",
                   "compare a short run with one on a CPU first")  # fmt: skip
    return Row("torch", "pass", detail)


def _driver(facts: Facts) -> Row:
    """NVIDIA's rule: a driver runs all CUDA of its own major version and older ones; of its own,
    newer minor versions run too, but what is compiled from PTX at run time may not."""
    driver, torch = facts.driver, facts.torch
    if driver is None:
        if facts.smi_error:
            return Row("driver", "fail", f"nvidia-smi: {facts.smi_error}",
                       "load or reinstall the driver; after an update of it, restart the machine "
                       "or the container")  # fmt: skip
        return Row("driver", "skip", "no NVIDIA driver")
    detail = f"driver {driver.version} supports CUDA {driver.cuda or 'of no known version'}"
    if torch is None or not torch.cuda or not driver.cuda:
        return Row("driver", "pass", detail)
    detail += f", torch is built for {torch.cuda}"
    wanted, has = numbers(torch.cuda), numbers(driver.cuda)
    least = DRIVERS.get(wanted[0])
    fix = "update the driver" + (f" to {least} or newer" if least else "")
    fix += f", or install a torch built for CUDA {has[0]}"
    if wanted[0] > has[0] and torch.available:
        return Row("driver", "pass", f"{detail}; a compatibility package bridges them")
    if wanted[0] > has[0]:
        return Row("driver", "fail", f"{detail}: the driver is too old", fix)
    if wanted[:2] > has[:2]:
        return Row("driver", "warn",
                   f"{detail}: runs, but what compiles PTX at run time may fail",
                   f"update the driver to one of CUDA {torch.cuda}, or install a torch built for "
                   f"{driver.cuda} or older")  # fmt: skip
    return Row("driver", "pass", detail)


def _gpu(facts: Facts) -> Row:
    torch, gpus = facts.torch, facts.gpus
    if not gpus and not (torch and torch.available):
        if facts.driver is not None:
            return Row("gpu", "fail", "there is a driver, and no GPU that may be used",
                       "give the container or the job a GPU (docker run --gpus all)")  # fmt: skip
        return Row("gpu", "warn", "none: training runs on the CPU",
                   "take a machine with a GPU for more than a trial")  # fmt: skip
    detail = ", ".join(_grouped(gpus)) or f"{torch.gpus if torch else 0} GPUs"
    if torch is not None and torch.cuda and (lacking := _no_kernels(torch, gpus)):
        return Row("gpu", "fail", f"{detail}; torch {torch.version} has no kernels for {lacking}",
                   "install a torch whose build names that generation")  # fmt: skip
    if torch is not None and torch.cuda and (torch.error or not torch.available):
        why = torch.error or "torch finds none of them"
        return Row("gpu", "fail", f"{detail}; {why}",
                   "see `driver` and `torch` above; CUDA_VISIBLE_DEVICES may hide it")  # fmt: skip
    if strange := [gpu for gpu in gpus if gpu.unread]:
        return Row("gpu", "warn", f"{detail}; nvidia-smi tells of GPU {strange[0].index}: "
                   f"{', '.join(strange[0].unread)}", _UNREAD)  # fmt: skip
    if broken := [gpu for gpu in gpus if gpu.ecc]:
        return Row("gpu", "warn", f"{detail}; GPU {broken[0].index} counts {broken[0].ecc} memory "
                   "errors that were not corrected", "take another machine")  # fmt: skip
    if busy := [gpu for gpu in gpus if gpu.used_mib > _IN_USE * gpu.memory_mib > 0]:
        used = busy[0].used_mib / 1024
        return Row("gpu", "warn", f"{detail}; {used:.1f} GiB of GPU {busy[0].index} are in use",
                   "`nvidia-smi` names the processes that hold it")  # fmt: skip
    return Row("gpu", "pass", detail)


def _precision(facts: Facts) -> Row:
    if not facts.gpus:
        return Row("precision", "skip", "no GPU: fp32")
    least = min(facts.gpus, key=lambda gpu: gpu.capability)
    if not least.capability:
        return Row("precision", "warn", f"the compute capability of GPU {least.index} is not known "
                   f"(nvidia-smi tells {', '.join(least.unread)})", _UNREAD)  # fmt: skip
    detail = f"compute capability {least.capability:g}: "
    if least.capability < BF16:
        return Row("precision", "warn", f"{detail}no bf16; `precision: auto` is fp32 here",
                   "set model.precision to fp16, or take an Ampere GPU or newer")  # fmt: skip
    fp8 = "bf16 and fp8" if least.capability >= FP8 else "bf16, no fp8"
    return Row("precision", "pass", detail + fp8)


def _nccl(facts: Facts) -> Row:
    torch, many = facts.torch, len(facts.gpus) > 1
    if torch is None or not torch.available:
        return Row("nccl", "skip", "no GPU")
    if torch.nccl:
        return Row("nccl", "pass", torch.nccl)
    result: Result = "fail" if many else "warn"
    return Row("nccl", result, "this torch has none: GPUs cannot work together",
               "install the CUDA build of torch for Linux")  # fmt: skip


def _grouped(gpus: Sequence[Gpu]) -> Iterator[str]:
    """`8 x NVIDIA H100 80GB HBM3, 79.6 GiB`, one for each kind."""
    for name in dict.fromkeys(gpu.name for gpu in gpus):
        same = [gpu for gpu in gpus if gpu.name == name]
        memory = f"{same[0].memory_mib / 1024:.1f} GiB" if same[0].memory_mib else "memory unknown"
        capability = f"{same[0].capability:g}" if same[0].capability else "unknown"
        yield f"{len(same)} x {name} ({memory}, compute capability {capability})"


def _no_kernels(torch: Torch, gpus: Sequence[Gpu]) -> str:
    """The generations here that torch brings no kernels for; empty: none. sm_XY runs on X.Z with
    Z >= Y; compute_XY (PTX) is compiled for any later one."""
    if not torch.archs:
        return ""
    kernels = [_capability(name) for name in torch.archs if name.startswith("sm_")]
    sources = [_capability(name) for name in torch.archs if name.startswith("compute_")]
    lacking = []
    for gpu in (gpu for gpu in gpus if gpu.capability):
        major, minor = divmod(round(gpu.capability * 10), 10)
        own = (major, minor)
        if not any(k[0] == major and k[1] <= minor for k in kernels) and not any(
            s <= own for s in sources
        ):
            lacking.append(f"{gpu.name} ({gpu.capability:g})")
    return ", ".join(dict.fromkeys(lacking))


def _capability(name: str) -> tuple[int, int]:
    """`sm_90a` is (9, 0), `sm_120` (12, 0)."""
    digits = "".join(re.findall(r"\d", name)) or "0"
    return int(digits[:-1] or 0), int(digits[-1])


def _misbuilt(flash: Flash, torch: Torch | None) -> str:
    """In what this torch differs from the one that flash-attn was built for; empty: in nothing that
    its name says."""
    if torch is None or not flash.built:
        return ""
    wrong = []
    if (match := re.search(r"torch(\d+\.\d+)", flash.built)) and (
        numbers(match[1]) != numbers(torch.version)[:2]
    ):
        wrong.append(f"torch {torch.version}")
    if (match := re.search(r"cu(\d\d)", flash.built)) and (
        torch.cuda is None or int(match[1]) != numbers(torch.cuda)[0]
    ):
        wrong.append(f"CUDA {torch.cuda or 'none'}")
    if (match := re.search(r"cxx11abi(true|false)", flash.built, re.I)) and (
        (match[1].lower() == "true") != torch.cxx11_abi
    ):
        wrong.append(f"a C++11 ABI that is {'on' if torch.cxx11_abi else 'off'}")
    return ", ".join(wrong)
