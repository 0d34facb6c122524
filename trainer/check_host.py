"""What `python -m trainer check` makes of Python, packages, disk, memory, limits and the job."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainer.check_facts import Facts
from trainer.check_gpu import BF16, FP8, flash_attn
from trainer.check_row import GIB, Result, Row, dots, numbers
from trainer.config import Job
from trainer.environment import DIRECT

#: Versions of libraries that the trainer is tested with: from the first to below the second.
_BELOW = {"transformers": (6,), "tokenizers": (1,), "peft": (1,)}
WATCHED = ("transformers", "peft", "tokenizers", "huggingface-hub", "safetensors", "numpy")
_LEAST_DISK, _LEAST_MEMORY, _LEAST_SHARED, _LEAST_FILES = 20 * GIB, 8 * GIB, 1 * GIB, 4096


def rows(facts: Facts, job: Job | None) -> list[Row]:
    """Python, packages, disk, memory, limits, token and clock, and what `job` asks of the GPUs."""
    found = [
        _python(facts), _packages(facts), _tokenizers(facts), _disk(facts), _memory(facts),
        _shared_memory(facts), _open_files(facts), _hub_token(facts, job), _clock(facts),
    ]  # fmt: skip
    return [*found, *_job(facts, job)] if job else found


def _python(facts: Facts) -> Row:
    version = ".".join(map(str, facts.python))
    detail = f"{version} at {facts.executable}"
    if facts.python < (3, 10):
        return Row("python", "fail", detail, "use an image with Python 3.10 or newer")
    if facts.python > (3, 12):
        return Row("python", "warn", f"{detail}; packages are pinned for 3.10 to 3.12",
                   "use Python 3.10, 3.11 or 3.12")  # fmt: skip
    return Row("python", "pass", detail)


def _packages(facts: Facts) -> Row:
    short, new, good = [], [], []
    for name in WATCHED:
        version, least = facts.versions.get(name), DIRECT[name]
        if version is None:
            short.append(f"{name} is missing")
        elif numbers(version)[: len(least)] < least:
            short.append(f"{name} {version} is older than {dots(least)}")
        elif name in _BELOW and numbers(version) >= _BELOW[name]:
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


def _disk(facts: Facts) -> Row:
    if facts.disk_free is None:
        return Row("disk", "skip", f"the disk of {facts.disk_folder} tells nothing")
    detail = f"{facts.disk_free / 1e9:.1f} GB free for {facts.disk_folder}"
    fix = "free space, or give the machine a larger disk: checkpoints are written there"
    if facts.disk_free < GIB:
        return Row("disk", "fail", detail, fix)
    return Row("disk", "warn" if facts.disk_free < _LEAST_DISK else "pass", detail, fix)


def _shared_memory(facts: Facts) -> Row:
    """NCCL and the workers of data loaders exchange through it; a container's default is 64 MiB."""
    if facts.shared_memory is None:
        return Row("shared memory", "skip", "there is no /dev/shm")
    detail = f"/dev/shm has {facts.shared_memory / GIB:.2f} GiB"
    if facts.shared_memory >= _LEAST_SHARED:
        return Row("shared memory", "pass", detail)
    result: Result = "fail" if len(facts.gpus) > 1 else "warn"
    return Row("shared memory", result, f"{detail}, which several GPUs outgrow",
               "docker run --shm-size=8g; in Kubernetes a memory volume at /dev/shm")  # fmt: skip


def _memory(facts: Facts) -> Row:
    if facts.memory is None:
        return Row("memory", "skip", "the system does not tell")
    detail = f"{facts.memory / GIB:.1f} GiB for processes"
    largest = sum(gpu.memory_mib for gpu in facts.gpus) / 1024 * GIB
    if facts.memory < GIB:
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
    known = [gpu.capability for gpu in facts.gpus if gpu.capability]
    wrong = []
    for stage in job.stages:
        model = stage.model
        if model is None:
            continue
        if model.precision == "bf16" and known and min(known) < BF16:
            wrong.append((f"{stage.id}: model.precision is bf16, and {facts.gpus[0].name} has none",
                          "set model.precision to fp16 or fp32"))  # fmt: skip
        if model.float8 in ("torchao", "transformer_engine") and known and min(known) < FP8:
            wrong.append((f"{stage.id}: model.float8 is {model.float8}, and {facts.gpus[0].name} "
                          "has none", "set model.float8 to off or auto"))  # fmt: skip
        if model.attention == "flash_attention_2" and flash_attn(facts).result != "pass":
            wrong.append((f"{stage.id}: model.attention is flash_attention_2: see `flash-attn`",
                          "set model.attention to auto or sdpa"))  # fmt: skip
    for detail, fix in wrong:
        yield Row("job", "fail", detail, fix)
    if not wrong:
        yield Row("job", "pass", f"{job.run}: {', '.join(stage.id for stage in job.stages)}")


def _of_hub(name: str | None) -> bool:
    return bool(name) and "://" not in str(name) and not Path(str(name)).is_absolute()
