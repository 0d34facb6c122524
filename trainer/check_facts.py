"""What `python -m trainer check` finds on a machine: plain facts, nothing is judged here.

Each fact comes from one small function that reads one source (a command's output, a file of /proc,
a library). A source that is not there gives None. Only the standard library is imported; torch is
asked in a process of its own, because a damaged one may end the process that loads it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

#: Seconds for torch to be imported and to multiply on each GPU; for nvidia-smi.
TORCH_SECONDS, SMI_SECONDS = 120.0, 20.0
#: What nvidia-smi is asked of each GPU, and in this order it answers.
SMI_FIELDS = "index,name,memory.total,memory.used,compute_cap,ecc.errors.uncorrected.volatile.total"
_SMI_VERSION = re.compile(r"Driver Version:\s*([\d.]+)")
_SMI_CUDA = re.compile(r"CUDA Version:\s*([\d.]+)")
_LOCAL = re.compile(r"\+([A-Za-z0-9.]+?)(?:-cp\d|$)")
#: A cgroup without a limit has `max`, or (version 1) a number beyond any memory.
_NO_LIMIT = 1 << 60
_TIME_ERROR = 5  # what adjtimex(2) returns for a clock that is not synchronised

#: Runs in a process of its own; its last line is JSON.
_ASK_TORCH = """\
import json, torch
found = {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip,
         "cxx11_abi": bool(torch._C._GLIBCXX_USE_CXX11_ABI), "available": False, "archs": [],
         "nccl": None, "error": "", "gpus": 0}
if torch.version.cuda:
    import warnings
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found["available"] = torch.cuda.is_available()
    found["error"] = " ".join(str(one.message) for one in said)
    found["archs"] = torch.cuda.get_arch_list()
    if torch.distributed.is_available() and torch.distributed.is_nccl_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    if found["available"]:
        found["gpus"] = torch.cuda.device_count()
        for index in range(found["gpus"]):
            try:
                one = torch.ones(256, 256, device=f"cuda:{index}")
                if float((one @ one)[0, 0]) != 256.0:
                    found["error"] = f"GPU {index} multiplies wrongly"
            except Exception as error:
                found["error"] = f"GPU {index}: {error}"
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Torch:
    """A torch that can be imported. `cuda`: what it was built for (None: a CPU build); `archs`: the
    GPU generations whose kernels it has; `error`: why a GPU does not compute."""

    version: str
    cuda: str | None = None
    hip: str | None = None
    cxx11_abi: bool = True
    available: bool = False
    gpus: int = 0
    archs: tuple[str, ...] = ()
    nccl: str | None = None
    error: str = ""


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver, and the newest CUDA that it supports."""

    version: str
    cuda: str


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi tells of it; memory in MiB, `ecc` None where it does not count them, 0
    for another figure that it does not tell. `unread`: what stood there in its place, by field."""

    index: int
    name: str
    memory_mib: float
    used_mib: float
    capability: float
    ecc: int | None = None
    unread: tuple[str, ...] = ()


@dataclass(frozen=True)
class Flash:
    """An installed flash-attn. `built`: what the name of its wheel says (cu12torch2.9cxx11abiTRUE);
    `error`: why it cannot be imported."""

    version: str
    built: str = ""
    error: str = ""


@dataclass(frozen=True)
class Facts:
    """A machine. Bytes are bytes; None: unknown."""

    python: tuple[int, int]
    executable: str
    torch: Torch | None = None
    torch_error: str = ""
    driver: Driver | None = None
    smi_error: str = ""
    gpus: tuple[Gpu, ...] = ()
    versions: Mapping[str, str | None] = field(default_factory=dict)
    flash: Flash | None = None
    disk_folder: str = "."
    disk_free: float | None = None
    shared_memory: float | None = None
    memory: float | None = None
    open_files: int | None = None
    hub_token: bool = False
    parallelism: str | None = None
    now: float = 0.0  # UTC seconds
    code_time: float = 0.0  # when this code was written, UTC seconds
    synchronised: bool | None = None


def gather(names: tuple[str, ...], folder: Path, environ: Mapping[str, str]) -> Facts:
    """The facts of this machine. `names`: distributions whose versions are looked up; `folder`:
    where the job will write."""
    torch, torch_error = ask_torch()
    smi, smi_error = _output(["nvidia-smi"], SMI_SECONDS)
    query = ["nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader,nounits"]
    listed = _output(query, SMI_SECONDS)[0] if smi else None
    place = _existing(folder)
    return Facts(
        python=sys.version_info[:2],
        executable=sys.executable,
        torch=torch,
        torch_error=torch_error,
        driver=read_driver(smi or ""),
        smi_error=smi_error if shutil.which("nvidia-smi", path=environ.get("PATH")) else "",
        gpus=read_gpus(listed or ""),
        versions={name: _version(name) for name in names},
        flash=ask_flash(),
        disk_folder=str(folder),
        disk_free=_free(place),
        shared_memory=_total(Path("/dev/shm")),
        memory=read_memory(_text("/proc/meminfo"), [
            _text("/sys/fs/cgroup/memory.max"),
            _text("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        ]),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        hub_token=has_hub_token(environ),
        parallelism=environ.get("TOKENIZERS_PARALLELISM"),
        now=time.time(),
        code_time=Path(__file__).stat().st_mtime,
        synchronised=_synchronised(),
    )  # fmt: skip


def ask_torch() -> tuple[Torch | None, str]:
    """The torch of this interpreter, or why there is none."""
    if importlib.util.find_spec("torch") is None:
        return None, ""
    text, error = _output([sys.executable, "-c", _ASK_TORCH], TORCH_SECONDS)
    if text is None:
        return None, error
    return read_torch(text)


def read_torch(text: str) -> tuple[Torch | None, str]:
    """The last line of what the process above printed."""
    try:
        raw = json.loads(text.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return None, f"it answers {text[-200:]!r}"
    return Torch(**{**raw, "archs": tuple(raw["archs"])}), ""


def read_driver(text: str) -> Driver | None:
    """From the header of a plain `nvidia-smi`; `N/A` in place of CUDA is told as empty."""
    version, cuda = _SMI_VERSION.search(text), _SMI_CUDA.search(text)
    return Driver(version[1], cuda[1] if cuda else "") if version else None


def read_gpus(text: str) -> tuple[Gpu, ...]:
    """From `nvidia-smi --query-gpu=SMI_FIELDS --format=csv,noheader,nounits`. A figure that a GPU
    does not tell counts as 0, its errors as unknown; a memory of `[N/A]` is that of the host."""
    found = []
    names = SMI_FIELDS.split(",")
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) != len(names) or not parts[0].isdecimal():
            continue
        total, used, capability = (_number(part) or 0.0 for part in parts[2:5])
        ecc = int(parts[5]) if parts[5].isdecimal() else None
        unread = tuple(
            f"{names[at]} '{parts[at]}'"
            for at in (2, 3, 4)
            if _number(parts[at]) is None and (at == 4 or not parts[at].startswith("["))
        )
        found.append(Gpu(int(parts[0]), parts[1], total, used, capability, ecc, unread))
    return tuple(found)


def read_memory(meminfo: str, limits: list[str]) -> float | None:
    """Bytes that processes here may use: what is available, or less where a cgroup limits it."""
    match = re.search(r"^MemAvailable:\s*(\d+) kB", meminfo, re.M)
    numbers = [float(match[1]) * 1024] if match else []
    numbers += [float(text) for text in map(str.strip, limits)
                if text.isdigit() and int(text) < _NO_LIMIT]  # fmt: skip
    return min(numbers, default=None)


def has_hub_token(environ: Mapping[str, str]) -> bool:
    """Whether huggingface_hub will find a token; the token itself is not read."""
    if environ.get("HF_TOKEN") or environ.get("HUGGING_FACE_HUB_TOKEN"):
        return True
    home = environ.get("HF_HOME") or str(Path(environ.get("HOME", "~")) / ".cache/huggingface")
    path = Path(environ.get("HF_TOKEN_PATH") or Path(home) / "token")
    with contextlib.suppress(OSError):
        return path.stat().st_size > 0
    return False


def ask_flash() -> Flash | None:
    """The installed flash-attn, tried in a process of its own."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    _, error = _output([sys.executable, "-c", "import flash_attn"], TORCH_SECONDS)
    try:
        found = metadata.distribution("flash-attn")
    except metadata.PackageNotFoundError:
        return Flash("of no known version", "", error)
    return Flash(found.version, built_for(found.version, found.read_text("direct_url.json")), error)


def built_for(version: str, direct_url: str | None) -> str:
    """What a wheel says that it was built for: in its version (2.8.3+cu12torch2.9cxx11abiTRUE), or
    in the address that it came from (PEP 610); empty: nothing does."""
    url = ""
    with contextlib.suppress(ValueError, TypeError):
        url = str(json.loads(direct_url or "{}").get("url", ""))
    for text in (version, url.rpartition("/")[2].replace("%2B", "+")):
        if match := _LOCAL.search(text):
            return match[1]
    return ""


def _output(command: list[str], seconds: float) -> tuple[str | None, str]:
    """What a command prints, or None and why not, in one line."""
    try:
        ended = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=seconds, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        return None, f"{command[0]} is not there"
    except OSError as error:
        return None, f"{command[0]}: {error.strerror}"
    except subprocess.TimeoutExpired:
        return None, f"no answer within {seconds:.0f} s"
    if ended.returncode == 0:
        return ended.stdout, ""
    lines = (ended.stderr.strip() or ended.stdout.strip()).splitlines()
    return None, (lines or [f"exit code {ended.returncode}"])[-1][:300]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _synchronised() -> bool | None:
    """Whether the kernel's clock follows a time server (adjtimex(2), read only)."""
    try:
        said = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(512))
    except (OSError, AttributeError):
        return None
    return None if said < 0 else said != _TIME_ERROR


def _existing(folder: Path) -> Path:
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place


def _free(place: Path) -> float | None:
    with contextlib.suppress(OSError):
        return float(shutil.disk_usage(place).free)
    return None


def _total(place: Path) -> float | None:
    with contextlib.suppress(OSError):
        return float(shutil.disk_usage(place).total)
    return None


def _text(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text()
    return ""


def _number(text: str) -> float | None:
    """A plain figure; None: it is something else (`nan`, `[N/A]`, a word)."""
    return float(text) if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) else None
