"""`python -m trainer check [JOB.json] [--json]`: is this machine fit to train? Rows of pass, warn,
fail and skip, each with its reason and its fix, then the environment score.

The facts come from `check_facts`; here they are judged. Only the standard library is imported.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from trainer.check_facts import Facts, Flash, Gpu, Torch, gather
from trainer.config import Job, load_job
from trainer.environment import DIRECT, TORCH

OK, ENVIRONMENT = 0, 78
Result = Literal["pass", "warn", "fail", "skip"]

#: The environment score is 100 less what rows lose of these points: a `fail` all, a `warn` half, a
#: `pass` or a `skip` (it does not apply here) nothing.
WEIGHTS = {
    "torch": 20, "driver": 15, "gpu": 15, "precision": 10, "packages": 10, "python": 5,
    "flash-attn": 5, "nccl": 5, "disk": 5, "memory": 3, "shared memory": 3, "open files": 2,
    "clock": 1, "hub token": 1, "tokenizers": 0,
}  # fmt: skip
#: The oldest driver for each major version of CUDA, from NVIDIA's release notes of CUDA, "CUDA
#: minor version compatibility"; read 2026-11-21.
DRIVERS = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
#: Compute capability from which the matrix units know bf16 (Ampere) and fp8 (Ada).
BF16, FP8 = 8.0, 8.9
#: Versions of libraries that the trainer is tested with: from the first to below the second.
_BELOW = {"transformers": (6,), "tokenizers": (1,), "peft": (1,)}
_WATCHED = ("transformers", "peft", "tokenizers", "huggingface-hub", "safetensors", "numpy")
_GIB = 1024**3
_LEAST_DISK, _LEAST_MEMORY, _LEAST_SHARED, _LEAST_FILES = 20 * _GIB, 8 * _GIB, 1 * _GIB, 4096
_IN_USE = 0.05  # share of a GPU's memory that somebody else may hold


@dataclass(frozen=True)
class Row:
    """One thing looked at. `fix` is what to do about a warning or a failure."""

    name: str
    result: Result
    detail: str
    fix: str = ""

    @property
    def lost(self) -> float:
        """Points of the environment score."""
        return WEIGHTS.get(self.name, 0) * {"fail": 1.0, "warn": 0.5}.get(self.result, 0.0)


def command(arguments: Sequence[str], say: Callable[[str], None]) -> int:
    """Print the rows and the score (`--json`: as one document). Returns 0, or 78 when a row fails.
    Errors: `ConfigError` for a job that cannot be read."""
    paths = [given for given in arguments if given != "--json"]
    job = load_job(paths[0]) if paths else None
    output = job.stages[-1].output if job and job.stages else "."
    folder = Path.cwd() if "://" in output else Path(output)
    found = rows(gather(_WATCHED, folder, os.environ), job)
    if "--json" in arguments:
        checks = [{**asdict(row), "lost": row.lost} for row in found]
        say(json.dumps({"v": 1, "score": score(found), "ok": _ok(found), "checks": checks}))
    else:
        for line in lines(found):
            say(line)
    return OK if _ok(found) else ENVIRONMENT


def rows(facts: Facts, job: Job | None = None) -> list[Row]:
    """Everything that is judged of a machine, and of what `job` asks of it."""
    found = [
        _python(facts), _torch(facts), _driver(facts), _gpu(facts), _precision(facts),
        _flash(facts), _packages(facts), _tokenizers(facts), _nccl(facts), _disk(facts),
        _shared_memory(facts), _memory(facts), _open_files(facts), _hub_token(facts, job),
        _clock(facts),
    ]  # fmt: skip
    return found + list(_job(facts, job) if job else ())


def score(found: Sequence[Row]) -> float:
    """The environment score, 0 to 100: 100 less the points that the rows lose (WEIGHTS)."""
    return 100.0 - sum(row.lost for row in found)


def lines(found: Sequence[Row]) -> list[str]:
    """The rows for a terminal, their fixes, the score and the reason of every lost point."""
    width = max(len(row.name) for row in found)
    shown = []
    for row in found:
        shown.append(f"{row.name:<{width}}  {row.result}  {row.detail}")
        if row.fix and row.result in ("warn", "fail"):
            shown.append(f"{'':<{width}}  fix: {row.fix}")
    shown.append(f"environment score: {score(found):g} of 100")
    shown += [f"  -{row.lost:g} {row.name}: {row.detail}" for row in found if row.lost]
    return shown


def _ok(found: Sequence[Row]) -> bool:
    return all(row.result != "fail" for row in found)


def _python(facts: Facts) -> Row:
    version = ".".join(map(str, facts.python))
    detail = f"{version} at {facts.executable}"
    if facts.python < (3, 10):
        return Row("python", "fail", detail, "use an image with Python 3.10 or newer")
    if facts.python > (3, 12):
        return Row("python", "warn", f"{detail}; packages are pinned for 3.10 to 3.12",
                   "use Python 3.10, 3.11 or 3.12")  # fmt: skip
    return Row("python", "pass", detail)


def _torch(facts: Facts) -> Row:
    low, high = _dots(TORCH[0]), f"{TORCH[1][0]}.{TORCH[1][1] - 1}"
    fix = f"install torch {low} to {high}, or use an image that has it (docker/Dockerfile)"
    if facts.torch is None:
        return Row("torch", "fail", facts.torch_error or "is not installed", fix)
    built = f"built for CUDA {facts.torch.cuda}" if facts.torch.cuda else "a CPU build"
    if facts.torch.hip:
        built = f"built for ROCm {facts.torch.hip}"
    detail = f"{facts.torch.version}, {built}"
    if not TORCH[0] <= _numbers(facts.torch.version)[:2] < TORCH[1]:
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
    wanted, has = _numbers(torch.cuda), _numbers(driver.cuda)
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
    if broken := [gpu for gpu in gpus if gpu.ecc]:
        return Row("gpu", "warn", f"{detail}; GPU {broken[0].index} counts {broken[0].ecc} memory "
                   "errors that were not corrected", "take another machine")  # fmt: skip
    if busy := [gpu for gpu in gpus if gpu.used_mib > _IN_USE * gpu.memory_mib]:
        used = busy[0].used_mib / 1024
        return Row("gpu", "warn", f"{detail}; {used:.1f} GiB of GPU {busy[0].index} are in use",
                   "`nvidia-smi` names the processes that hold it")  # fmt: skip
    return Row("gpu", "pass", detail)


def _precision(facts: Facts) -> Row:
    if not facts.gpus:
        return Row("precision", "skip", "no GPU: fp32")
    least = min(facts.gpus, key=lambda gpu: gpu.capability)
    detail = f"compute capability {least.capability:g}: "
    if least.capability < BF16:
        return Row("precision", "warn", f"{detail}no bf16; `precision: auto` is fp32 here",
                   "set model.precision to fp16, or take an Ampere GPU or newer")  # fmt: skip
    fp8 = "bf16 and fp8" if least.capability >= FP8 else "bf16, no fp8"
    return Row("precision", "pass", detail + fp8)


def _flash(facts: Facts) -> Row:
    flash, torch = facts.flash, facts.torch
    able = any(gpu.capability >= BF16 for gpu in facts.gpus)
    if flash is None:
        if not able:
            return Row("flash-attn", "skip", "not installed; no GPU here could use it")
        return Row("flash-attn", "warn", "not installed: attention runs with torch's SDPA",
                   "name a wheel for this torch and CUDA in hardware.environment")  # fmt: skip
    detail = f"{flash.version}" + (f", built for {flash.built}" if flash.built else "")
    if wrong := _misbuilt(flash, torch):
        return Row("flash-attn", "fail", f"{detail}; here is {wrong}",
                   "install the wheel for this torch, CUDA and C++ ABI, or remove it")  # fmt: skip
    if flash.error:
        return Row("flash-attn", "fail", f"{detail}; cannot be imported: {flash.error}",
                   "install the wheel for this torch, CUDA and C++ ABI, or remove it")  # fmt: skip
    if not able:
        return Row("flash-attn", "skip", f"{detail}; no GPU here can use it")
    return Row("flash-attn", "pass", f"{detail}; can be imported")


def _packages(facts: Facts) -> Row:
    short, new, good = [], [], []
    for name in _WATCHED:
        version, least = facts.versions.get(name), DIRECT[name]
        if version is None:
            short.append(f"{name} is missing")
        elif _numbers(version)[: len(least)] < least:
            short.append(f"{name} {version} is older than {_dots(least)}")
        elif name in _BELOW and _numbers(version) >= _BELOW[name]:
            new.append(f"{name} {version} is newer than what is tested")
        else:
            good.append(f"{name} {version}")
    if short:
        return Row("packages", "fail", "; ".join(short),
                   "pip install 'launch-llm[train]' (a job in a cloud does it itself)")  # fmt: skip
    if new:
        return Row("packages", "warn", "; ".join(new), "install an older one, or try it first")
    return Row("packages", "pass", ", ".join(good))


def _tokenizers(facts: Facts) -> Row:
    said = (facts.parallelism or "").lower()
    if said in ("0", "false", "off", "no", "f", "n"):
        detail = f"TOKENIZERS_PARALLELISM={facts.parallelism}: data is prepared on one core"
        return Row("tokenizers", "warn", detail, "unset TOKENIZERS_PARALLELISM")
    return Row("tokenizers", "pass", "several threads")


def _nccl(facts: Facts) -> Row:
    torch, many = facts.torch, len(facts.gpus) > 1
    if torch is None or not torch.available:
        return Row("nccl", "skip", "no GPU")
    if torch.nccl:
        return Row("nccl", "pass", torch.nccl)
    result: Result = "fail" if many else "warn"
    return Row("nccl", result, "this torch has none: GPUs cannot work together",
               "install the CUDA build of torch for Linux")  # fmt: skip


def _disk(facts: Facts) -> Row:
    if facts.disk_free is None:
        return Row("disk", "skip", f"the disk of {facts.disk_folder} tells nothing")
    detail = f"{facts.disk_free / _GIB:.1f} GiB free for {facts.disk_folder}"
    fix = "free space, or give the machine a larger disk: checkpoints are written there"
    if facts.disk_free < _GIB:
        return Row("disk", "fail", detail, fix)
    return Row("disk", "warn" if facts.disk_free < _LEAST_DISK else "pass", detail, fix)


def _shared_memory(facts: Facts) -> Row:
    """NCCL and the workers of data loaders exchange through it; a container's default is 64 MiB."""
    if facts.shared_memory is None:
        return Row("shared memory", "skip", "there is no /dev/shm")
    detail = f"/dev/shm has {facts.shared_memory / _GIB:.2f} GiB"
    if facts.shared_memory >= _LEAST_SHARED:
        return Row("shared memory", "pass", detail)
    result: Result = "fail" if len(facts.gpus) > 1 else "warn"
    return Row("shared memory", result, f"{detail}, which several GPUs outgrow",
               "docker run --shm-size=8g; in Kubernetes a memory volume at /dev/shm")  # fmt: skip


def _memory(facts: Facts) -> Row:
    if facts.memory is None:
        return Row("memory", "skip", "the system does not tell")
    detail = f"{facts.memory / _GIB:.1f} GiB for processes"
    largest = sum(gpu.memory_mib for gpu in facts.gpus) / 1024 * _GIB
    if facts.memory < _GIB:
        return Row("memory", "fail", detail, "take a machine with more memory")
    if facts.memory < max(_LEAST_MEMORY, largest / 4):
        return Row("memory", "warn", f"{detail}: little to load models and write checkpoints from",
                   "take a machine with more memory, or set train.save_async=false")  # fmt: skip
    return Row("memory", "pass", detail)


def _open_files(facts: Facts) -> Row:
    if facts.open_files is None or facts.open_files < 0:
        return Row("open files", "pass", "no limit")
    detail = f"at most {facts.open_files}"
    if facts.open_files < _LEAST_FILES:
        return Row("open files", "warn", detail, f"ulimit -n {_LEAST_FILES}, or docker run "
                   f"--ulimit nofile={_LEAST_FILES}")  # fmt: skip
    return Row("open files", "pass", detail)


def _hub_token(facts: Facts, job: Job | None) -> Row:
    if facts.hub_token:
        return Row("hub token", "pass", "there is one")
    if job is None:
        return Row("hub token", "skip", "none; open models need none")
    if not any(_of_hub(stage.model.name) for stage in job.stages if stage.model):
        return Row("hub token", "skip", "none, and the job's models are files")
    return Row("hub token", "warn", "none: models behind a licence cannot be read",
               "set HF_TOKEN, or `hf auth login`")  # fmt: skip


def _clock(facts: Facts) -> Row:
    if facts.now + 86400 < facts.code_time:
        return Row("clock", "fail", "is earlier than this code: certificates will be refused",
                   "set the clock, or start a time service")  # fmt: skip
    told = {True: "follows a time server", False: "right as far as this code can tell; the kernel "
            "knows of no time server", None: "right as far as this code can tell"}  # fmt: skip
    return Row("clock", "pass", told[facts.synchronised])


def _job(facts: Facts, job: Job) -> Iterator[Row]:
    """What the job's own settings ask of the GPUs; one row for each that they do not have."""
    able = min((gpu.capability for gpu in facts.gpus), default=0.0)
    wrong = []
    for stage in job.stages:
        model = stage.model
        if model is None:
            continue
        if model.precision == "bf16" and facts.gpus and able < BF16:
            wrong.append((f"{stage.id}: model.precision is bf16, and {facts.gpus[0].name} has none",
                          "set model.precision to fp16 or fp32"))  # fmt: skip
        if model.attention == "flash_attention_2" and _flash(facts).result != "pass":
            wrong.append((f"{stage.id}: model.attention is flash_attention_2: see `flash-attn`",
                          "set model.attention to auto or sdpa"))  # fmt: skip
    for detail, fix in wrong:
        yield Row("job", "fail", detail, fix)
    if not wrong:
        yield Row("job", "pass", f"{job.run}: {', '.join(stage.id for stage in job.stages)}")


def _grouped(gpus: Sequence[Gpu]) -> Iterator[str]:
    """`8 x NVIDIA H100 80GB HBM3, 79.6 GiB`, one for each kind."""
    for name in dict.fromkeys(gpu.name for gpu in gpus):
        same = [gpu for gpu in gpus if gpu.name == name]
        memory = f"{same[0].memory_mib / 1024:.1f} GiB, compute capability {same[0].capability:g}"
        yield f"{len(same)} x {name} ({memory})"


def _no_kernels(torch: Torch, gpus: Sequence[Gpu]) -> str:
    """The generations here that torch brings no kernels for; empty: none. sm_XY runs on X.Z with
    Z >= Y; compute_XY (PTX) is compiled for any later one."""
    if not torch.archs:
        return ""
    kernels = [_capability(name) for name in torch.archs if name.startswith("sm_")]
    sources = [_capability(name) for name in torch.archs if name.startswith("compute_")]
    lacking = []
    for gpu in gpus:
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
        _numbers(match[1]) != _numbers(torch.version)[:2]
    ):
        wrong.append(f"torch {torch.version}")
    if (match := re.search(r"cu(\d\d)", flash.built)) and (
        torch.cuda is None or int(match[1]) != _numbers(torch.cuda)[0]
    ):
        wrong.append(f"CUDA {torch.cuda or 'none'}")
    if (match := re.search(r"cxx11abi(true|false)", flash.built, re.I)) and (
        (match[1].lower() == "true") != torch.cxx11_abi
    ):
        wrong.append(f"a C++11 ABI that is {'on' if torch.cxx11_abi else 'off'}")
    return ", ".join(wrong)


def _of_hub(name: str | None) -> bool:
    return bool(name) and "://" not in str(name) and not Path(str(name)).is_absolute()


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _dots(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
