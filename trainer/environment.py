"""The Python environment of a job: what the image has, what it lacks, and the recipe's own wheels.

Torch is the image's, and is only checked. Everything else that the trainer imports is pinned, with
hashes, in `locks/`. Only the standard library is imported here: it may be all that there is.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from trainer.packages import required, source_of

Say = Callable[[str], None]

#: Torch that the trainer is tested with: from the first up to, but without, the second.
TORCH = (2, 9), (2, 16)
#: Pythons for which `locks/` has hashes.
PYTHONS = ("3.10", "3.11", "3.12")
#: What the trainer imports itself, and the oldest version that will do. The extras of
#: pyproject.toml say the same (a test compares them).
DIRECT: Mapping[str, tuple[int, ...]] = {
    "transformers": (5, 0),
    "tokenizers": (0, 22),
    "safetensors": (0, 5),
    "numpy": (2, 0),
    "tensorboard": (2, 19),
    "peft": (0, 19),
    "huggingface-hub": (1, 0),
    "nvidia-ml-py": (13,),
    "google-auth": (2, 60),
    "requests": (2, 32),
    "google-cloud-storage": (3, 17),
    "google-cloud-secret-manager": (2, 32),
}
#: What only some jobs need (`asked`): the extras `quantize` and `hub`. What datasets needs in turn
#: has a lock of its own.
ASKED: Mapping[str, tuple[int, ...]] = {
    "torchao": (0, 15),
    "bitsandbytes": (0, 48),
    "gguf": (0, 17),
    "sentencepiece": (0, 2),
    "datasets": (5,),
}
_GPU_ONLY = ("nvidia-ml-py",)
_LOCKS = Path(__file__).parent / "locks"
_PIN = re.compile(r"([A-Za-z0-9._-]+)==([^\s;]+)")
_FOR_PYTHON = re.compile(r'python_version == "([0-9.]+)"')
_REQUIREMENT = re.compile(r"[A-Za-z0-9._-]+")
_PATIENCE = 1800.0  # seconds that one pip may take: a slow mirror, not a stuck one
_WAITS = (2.0, 10.0)  # seconds between tries of a download
_CHUNK = 1 << 20
_RETRIES = "10"
#: What pip says of the network, and not of what it was asked for.
_OUTAGE = re.compile(
    r"connection broken by|timed out|no end after|name resolution|connection (?:refused|reset)|"
    r"HTTP error (?:429|5\d\d)|\b(?:429|5\d\d) (?:client|server) error",
    re.I,
)
#: A bundle first on PYTHONPATH is not pip's business; the others contradict `--target`.
_NOT_FOR_PIP = ("PYTHONPATH", "PIP_TARGET", "PIP_USER", "PIP_PREFIX", "PIP_REQUIRE_VIRTUALENV")


class Unfit(Exception):
    """This environment cannot run the trainer, in one line. `code` is the exit code for it."""

    code = 78


class Unreachable(Unfit):
    """What is missing could not be fetched now; another time it may be."""

    code = 75


@dataclass(frozen=True)
class Pin:
    """One line of a lock: `text` is the requirement as pip reads it, with its hashes."""

    name: str
    version: str
    text: str


def ensure(
    folder: Path,
    wheels: list[dict[str, Any]],
    say: Say,
    packages: bool = True,
    beside: Iterable[str] = (),
) -> list[str]:
    """Make this interpreter able to run the trainer. What is missing is installed below `folder`,
    never into the environment itself (without `packages` it is not looked for), `beside` (of
    `ASKED`) too; `wheels` (`name`, `url`, `sha256`) after that, one folder each. Returns the
    folders to put first on PYTHONPATH, best first; they are first on this process's path already. A
    wheel that fails costs a warning, through `say`. Errors: `Unfit`."""
    torch, cuda = torch_found()
    say(f"environment: Python {_python()}, torch {torch}, CUDA {cuda or 'none'}")
    pins = lock("cuda" if cuda else "cpu")
    paths: list[str] = []
    if packages and (short := lacking(cuda is not None)):
        wanted = [pin for pin in pins if _installed(pin.name) != pin.version]
        say(f"environment: {'; '.join(short)}: installing {len(wanted)} packages")
        paths.append(str(_packages(wanted, folder)))
        _first([paths[0]])
    chosen = {name: ASKED[name] for name in beside}
    if packages and (short := _short(chosen)):
        say(f"environment: {'; '.join(short)}: the job asks for it, installing")
        wanted = [pin for pin in lock("asked") if pin.name in chosen]
        if "datasets" in chosen:
            wanted += [pin for pin in lock("hub") if _installed(pin.name) is None]
        paths.insert(0, str(_packages(wanted, folder, "asked")))
        _first(paths[:1])
    for wheel in wheels:
        added = _wheel(wheel, folder, paths, pins, say)
        paths = added + paths
        _first(added)
    return paths


def torch_found() -> tuple[str, str | None]:
    """Torch's version and the CUDA version that it was built for, without importing it.
    Errors: `Unfit` when it is absent or outside of the tested range."""
    low, high = (".".join(map(str, bound)) for bound in (TORCH[0], (2, TORCH[1][1] - 1)))
    allowed = f"the trainer runs on torch {low} to {high}: use an image that has it"
    advice = f"{allowed} (docker/Dockerfile builds one)"
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise Unfit(f"torch is not installed for {sys.executable}; {advice}")
    try:
        facts = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    except OSError as error:
        raise Unfit(f"torch in {Path(spec.origin).parent} is damaged: {error}; {advice}") from error
    found = str(facts.get("__version__", "of no known version"))
    if not TORCH[0] <= _numbers(found)[:2] < TORCH[1]:
        raise Unfit(f"torch {found} is installed; {advice}")
    return found, facts.get("cuda")


def asked(job: Mapping[str, Any]) -> set[str]:
    """What of `ASKED` the stages of a job (as JSON has it) need, or do better with."""
    found: set[str] = set()
    for stage in job.get("stages") or ():
        model = stage.get("model") or {}
        found.update(package for package, _ in required(stage) if package in ASKED)
        if model.get("float8") == "auto":  # off, with a line, where it is not there
            found.add("torchao")
        if (stage.get("export") or {}).get("format") == "gguf":  # some tokenizers need it
            found.add("sentencepiece")
    return found


def check(job: Mapping[str, Any]) -> None:
    """Errors: `Unfit` when a package that one of the job's stages requires cannot be imported: told
    before the stages ahead of it have cost anything. A dry run multiplies nothing in float8, and
    reads nothing from the hub."""
    for stage in job["stages"]:
        for package, key in required(stage):
            if job.get("dry_run") and ("float8" in key or package == "datasets"):
                continue
            if importlib.util.find_spec(package.replace("-", "_")) is None:
                fix = f'pip install "{source_of(package)}"'
                raise Unfit(f"stage {stage['id']}: {key} needs {package}: {fix}")


def lacking(gpu: bool) -> list[str]:
    """What of `DIRECT` is missing here or too old, each in a few words."""
    return _short({name: DIRECT[name] for name in DIRECT if gpu or name not in _GPU_ONLY})


def _short(needed: Mapping[str, tuple[int, ...]]) -> list[str]:
    short = []
    for name, least in needed.items():
        found = _installed(name)
        if found is None:
            short.append(f"{name} is missing")
        elif _numbers(found)[: len(least)] < least:
            short.append(f"{name} {found} is older than {'.'.join(map(str, least))}")
    return short


def lock(name: str) -> list[Pin]:
    """The pins of `locks/<name>.txt` for this Python; `-r OTHER.txt` is followed."""
    text = (_LOCKS / f"{name}.txt").read_text(encoding="utf-8").replace("\\\n", " ")
    pins: list[Pin] = []
    for line in text.splitlines():
        if line.startswith("-r "):
            pins += lock(line[3:].strip().removesuffix(".txt"))
            continue
        match = _PIN.match(line)
        versions = _FOR_PYTHON.findall(line)
        if match and (not versions or _python() in versions):
            pins.append(Pin(match[1], match[2], line.strip()))
    return pins


def _packages(pins: list[Pin], folder: Path, name: str = "packages") -> Path:
    """`pins`, whole, in a folder of their own. The whole lock and not only what is missing: its
    versions were tested together, next to the image's they were not."""
    if _python() not in PYTHONS:
        raise Unfit(
            f"packages are missing, and are pinned for Python {', '.join(PYTHONS)} only, not "
            f"{_python()}; use an image that has them (docker/Dockerfile builds one)"
        )
    target, staging = folder / name, folder / f".{name}"
    if target.is_dir():  # a boot before this one: the rename below was its last word
        return target
    if failed := _install(pins, staging):
        kind = Unreachable if _OUTAGE.search(failed) else Unfit
        raise kind(f"cannot install what the trainer needs: {failed}")
    staging.replace(target)
    return target


def _wheel(
    wheel: Mapping[str, Any], folder: Path, paths: list[str], pins: list[Pin], say: Say
) -> list[str]:
    """The folders that one wheel adds: its own, and one for what it needs and the lock has."""
    name = str(wheel["name"])
    target = folder / "wheels" / re.sub(r"[^A-Za-z0-9._-]", "-", name)
    try:
        shutil.rmtree(target, ignore_errors=True)
        file = _fetched(str(wheel["url"]), str(wheel["sha256"]), folder / "downloads")
        if failed := _pip(target, [str(file)]):
            raise _WheelFailed(f"cannot be installed: {failed}")
        file.unlink()
        added = [str(target)]
        if needed := _needed(target, pins):
            beside = target.with_name(f"{target.name}-needs")
            if failed := _install(needed, beside):
                raise _WheelFailed(f"needs {needed[0].name}, which cannot be installed: {failed}")
            added.append(str(beside))
        _try_import(_module(name, target), [*added, *paths])
    except (_WheelFailed, OSError) as error:
        shutil.rmtree(target, ignore_errors=True)
        instead = " (attention: auto takes torch's own)" if _plain(name) == "flash-attn" else ""
        say(f"warning: wheel {name} {error}; training goes on without it{instead}")
        return []
    say(f"environment: wheel {name} is installed and can be imported")
    return added


class _WheelFailed(Exception):
    """Why a wheel is not used: the rest of a sentence that begins with its name."""


def _fetched(url: str, sha256: str, folder: Path) -> Path:
    """The wheel as a local file under its own name, its sha256 checked."""
    folder.mkdir(parents=True, exist_ok=True)
    name = urllib.parse.unquote(urllib.parse.urlsplit(url).path.rpartition("/")[2])
    target = folder / name
    scheme = url.partition("://")[0] if "://" in url else ""
    try:
        if scheme in ("https", "http"):
            _download(url, target)
        elif scheme in ("", "file"):
            path = urllib.parse.unquote(url.removeprefix("file://")) if scheme else url
            target = folder / Path(path).name
            shutil.copyfile(path, target)
        else:
            from trainer.store import open_store

            parent, _, key = url.rpartition("/")
            target = folder / key
            open_store(parent).get_file(key, target)
    except Exception as error:  # whatever the clients raise, it is the same news
        raise _WheelFailed(f"cannot be read from {url}: {_one_line(error)}") from error
    with target.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != sha256.lower():
        target.unlink()
        raise _WheelFailed(
            f"from {url} is not the one that was planned: its sha256 is "
            f"{digest.hexdigest()[:12]}..., not {sha256[:12]}..."
        )
    return target


def _download(url: str, target: Path) -> None:
    """Read over HTTP; what may pass is tried again, because without its wheel a run is slower for
    all of its hours."""
    for wait in (*_WAITS, None):
        try:
            with urllib.request.urlopen(url, timeout=300) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, _CHUNK)
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
            code = getattr(error, "code", 500)
            if wait is None or (code < 500 and code not in (408, 429)):
                raise
            time.sleep(wait)


def _needed(target: Path, pins: Iterable[Pin]) -> list[Pin]:
    """What the wheel in `target` requires, this environment lacks, and the lock has."""
    required: set[str] = set()
    for found in metadata.distributions(path=[str(target)]):
        for text in found.requires or ():
            match = _REQUIREMENT.match(text)
            if match and "extra ==" not in text and _installed(match[0]) is None:
                required.add(_plain(match[0]))
    return [pin for pin in pins if _plain(pin.name) in required]


def _module(name: str, target: Path) -> str:
    """What to import to see whether the wheel works: the module of its name, or else the first."""
    own = _plain(name).replace("-", "_")
    modules = [
        path.name.partition(".")[0]
        for path in sorted(target.iterdir(), key=lambda path: (not path.is_dir(), path.name))
        if path.suffix in (".py", ".so") or (path.is_dir() and path.name.isidentifier())
    ]
    modules = [module for module in modules if module not in ("bin", "__pycache__")]
    if not modules:
        raise _WheelFailed("holds no module")
    return own if own in modules else modules[0]


def _try_import(module: str, paths: list[str]) -> None:
    """In a fresh process: a library built for another torch may end the process that loads it."""
    given = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", f"import {module}"]
    ended = _run(command, {**os.environ, "PYTHONPATH": given})
    if ended.returncode:
        raise _WheelFailed(f"cannot be imported: {_last_line(ended.stdout, ended.returncode)}")


def _install(pins: Iterable[Pin], target: Path) -> str:
    """Install `pins` by their hashes into the new folder `target`: why it failed, or empty."""
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    listed = target.with_name(f"{target.name}.txt")
    listed.write_text("".join(f"{pin.text}\n" for pin in pins))
    return _pip(target, ["--require-hashes", "--only-binary=:all:", "-r", str(listed)])


def _pip(target: Path, what: list[str]) -> str:
    """`pip install` into `target`, without dependencies: why it failed, or empty."""
    command = [
        sys.executable, "-m", "pip", "install", "--no-deps", "--no-input", "--quiet",
        "--disable-pip-version-check", "--retries", _RETRIES, "--target", str(target), *what,
    ]  # fmt: skip
    inherited = {key: value for key, value in os.environ.items() if key not in _NOT_FOR_PIP}
    ended = _run(command, inherited)
    if not ended.returncode:
        return ""
    outages = [line for line in ended.stdout.splitlines() if _OUTAGE.search(line)]
    # After an outage pip says that there is no such package; of a hash it says what is so.
    if outages and "DO NOT MATCH THE HASHES" not in ended.stdout:
        return _one_line(outages[-1].removeprefix("WARNING: ").removeprefix("ERROR: "))
    return _last_line(ended.stdout, ended.returncode)


def _run(command: list[str], given: dict[str, str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, env=given, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", timeout=_PATIENCE,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, f"no end after {_PATIENCE:g} s")


def _last_line(output: str, code: int) -> str:
    """The line that explains: pip's last `ERROR:`, else the last one."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return _one_line((errors or lines or [f"exit code {code}"])[-1])


def _one_line(error: object) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 300 else f"{words[:297]}..."


def _first(paths: list[str]) -> None:
    sys.path[:0] = paths
    importlib.invalidate_caches()


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers: 2.9.0a0+5 is (2, 9, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _plain(name: str) -> str:
    """A project's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _python() -> str:
    return f"{sys.version_info[0]}.{sys.version_info[1]}"
