"""What stands between this machine and a run: rows of pass, warn, fail, skip, each with its fix.

Reads only (and tries whether $LAUNCH_HOME takes a file); imports none of the packages it looks for.
"""

from __future__ import annotations

import functools
import platform
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from launcher import backends
from launcher.backends.base import CanExamine, Check, Env
from launcher.errors import LaunchError

if TYPE_CHECKING:
    from launcher.recipe import Loaded
    from launcher.spec import Recipe

_NEEDED = (3, 10)
_GIB = 1024**3
#: Extra of the distribution -> (module, distribution) that it brings. Not nvidia-ml-py, of `train`:
#: without it some figures of a GPU are left out, and all else works.
_EXTRAS = {
    "train": (
        ("torch", "torch"),
        ("transformers", "transformers"),
        ("tokenizers", "tokenizers"),
        ("safetensors", "safetensors"),
        ("numpy", "numpy"),
        ("tensorboard", "tensorboard"),
        ("peft", "peft"),
        ("huggingface_hub", "huggingface-hub"),
    ),
    "quantize": (
        ("torchao", "torchao"),
        ("bitsandbytes", "bitsandbytes"),
        ("gguf", "gguf"),
        ("sentencepiece", "sentencepiece"),
    ),
    "hub": (("datasets", "datasets"),),
    "tracking": (("mlflow", "mlflow-skinny"), ("wandb", "wandb")),
    "google": (
        ("google.auth", "google-auth"),
        ("requests", "requests"),
        ("google.cloud.storage", "google-cloud-storage"),
        ("google.cloud.aiplatform", "google-cloud-aiplatform"),
        ("google.cloud.secretmanager", "google-cloud-secret-manager"),
    ),
    "s3": (("boto3", "boto3"),),
    "kubernetes": (("kubernetes", "kubernetes"),),
    "infra": (("pulumi", "pulumi"), ("pulumi_gcp", "pulumi-gcp")),
    "rehearse": (
        ("google.cloud.aiplatform", "google-cloud-aiplatform"),
        ("google.cloud.tpu_v2", "google-cloud-tpu"),
        ("google.cloud.logging", "google-cloud-logging"),
        ("google.cloud.secretmanager", "google-cloud-secret-manager"),
    ),
}
#: The extra that a backend cannot do without on this machine.
_EXTRA_OF = {"local": "train", "vertex": "google"}
#: Seconds for the wheels of a recipe to be looked up in their mirrors; for all that asks others.
_WHEELS, _SECONDS = 8.0, 12.0


def examine(
    env: Env,
    recipe: Optional[Path] = None,
    overrides: Sequence[str] = (),
    on: Optional[str] = None,
) -> Iterator[Check]:
    """Rows about Python, $LAUNCH_HOME, disk, extras, tools, then the recipe (when given, with its
    `--set` and `--on`), what it will write, its memory, secrets and wheels, and the backends it
    uses (without a recipe: `local`)."""
    from launcher import abreast, doctor_tools

    yield _python()
    yield _home(env.home)
    yield _disk(env.home)
    loaded, rows = _recipe(recipe, overrides, on) if recipe else (None, [])
    used = {s.hardware.backend for s in loaded.recipe.stages} if loaded else {"local"}
    needed = {_EXTRA_OF[name] for name in used if name in _EXTRA_OF}
    for extra, packages in _EXTRAS.items():
        yield _extra(extra, packages, needed=extra in needed)
    ask: dict[str, Callable[[], list[Check]]] = {
        "tools": lambda: list(doctor_tools.rows(used, env.environ)),
        "recipe": lambda: list(_of_recipe(loaded, env)) if loaded else [],
    }
    for name in sorted(used):
        ask[name] = functools.partial(_backend, name, env, loaded)
    for name, found in abreast.ask(ask, _SECONDS).items():
        if name == "recipe":
            yield from rows
        if isinstance(found, abreast.Late):
            yield Check(name, "warn", str(found), "try again in a while")
        elif isinstance(found, Exception):
            raise found
        else:
            yield from found


def _python() -> Check:
    version = platform.python_version()
    detail = f"{version} at {sys.executable}"
    if sys.version_info < _NEEDED:
        return Check("python", "fail", detail, "install Python 3.10 or newer")
    return Check("python", "pass", detail)


def _home(home: Path) -> Check:
    """Writable, or creatable: the nearest folder that exists decides."""
    place = home
    while not place.exists() and place != place.parent:
        place = place.parent
    what = "is not a folder"
    if place.is_dir():
        try:  # rights alone do not tell of a read-only or a full disk
            with tempfile.TemporaryFile(dir=place) as file:
                file.write(b"launch")
            return Check("launch home", "pass", f"{home} is writable")
        except OSError as error:
            what = f"cannot be written ({error.strerror or error})"
    fix = "set LAUNCH_HOME to a folder that you can write to"
    return Check("launch home", "fail", f"{home}: {place} {what}", fix)


def _disk(home: Path) -> Check:
    place = home
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    detail = f"{free / 1e9:.1f} GB free on the disk of {home}"
    fix = "free space, or set LAUNCH_HOME to a larger disk: checkpoints are kept there"
    if free < _GIB // 4:
        return Check("disk", "fail", detail, fix)
    return Check("disk", "warn" if free < 5 * _GIB else "pass", detail, fix)


def _extra(extra: str, packages: Sequence[tuple[str, str]], needed: bool) -> Check:
    missing = [distribution for module, distribution in packages if not _present(module)]
    if not missing:
        versions = ", ".join(f"{d} {_version(d)}" for _, d in packages)
        return Check(f"extra {extra}", "pass", versions)
    detail = f"not installed: {', '.join(missing)}"
    fix = f"pip install 'launch-llm[{extra}]'"
    return Check(f"extra {extra}", "fail" if needed else "skip", detail, fix)


def _recipe(
    path: Path, overrides: Sequence[str], on: Optional[str]
) -> tuple[Optional[Loaded], list[Check]]:
    """The recipe, unless it is invalid, and a row about its validity."""
    from launcher import api

    try:
        loaded = api.validate(path, overrides, on)
    except LaunchError as problem:
        lines = str(problem).splitlines()
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        given = shlex.quote(str(path))
        again = " ".join([given, *(f"--set {shlex.quote(text)}" for text in overrides),
                          *([f"--on {on}"] if on is not None else [])])  # fmt: skip
        fix = f"`launch validate {again}` lists all of them" if more else problem.hint
        return None, [Check("recipe", "fail", lines[0] + more, fix)]
    stages = loaded.recipe.stages
    names = ", ".join(stage.id for stage in stages)
    rows = [Check("recipe", "pass", f"{path}: {names}")]
    fix = "set it in the environment, or the key with --set, unless that is what you mean"
    rows += [Check("recipe", "warn", note, fix) for note in loaded.notes()]
    return loaded, rows


def _of_recipe(loaded: Loaded, env: Env) -> Iterator[Check]:
    """What the recipe brings along, wherever it runs."""
    from launcher import api, doctor_disk, doctor_memory

    yield from doctor_memory.rows(loaded.recipe, env.home)
    yield from doctor_disk.rows(loaded.recipe, loaded.path.absolute().parent, env)
    yield from _packages(loaded.recipe)
    for name, source in loaded.recipe.secrets.items():
        variable = source.removeprefix("env://")
        if variable != source and not env.environ.get(variable):
            detail = f"{name} is taken from the variable {variable}, which is not set"
            yield Check("secret", "fail", detail, f"export {variable}=...")
    for note in api.untold(loaded, env):
        fix = "set the variable, or install the program, where `launch up` is called"
        yield Check("notify", "warn", note.removeprefix("notify: "), fix)
    if any(s.hardware.environment and s.hardware.environment.wheels for s in loaded.recipe.stages):
        yield _wheels(loaded)


def _packages(recipe: Recipe) -> Iterator[Check]:
    """What single stages cannot do without, of those that run in this Python. In a cloud the image
    counts, beside which a job installs most of it; another interpreter is not looked into."""
    from trainer.config import to_dict
    from trainer.packages import required, source_of

    for stage in recipe.stages:
        hardware = stage.hardware
        if hardware.backend != "local" or (hardware.local and hardware.local.python):
            continue
        for package, key in required(to_dict(stage)):
            found = _present(package.replace("-", "_"))
            detail = f"{stage.id}: {key} needs {package}" + ("" if found else ": not installed")
            fix = "" if found else f"pip install '{source_of(package)}'"
            yield Check("package", "pass" if found else "fail", detail, fix)


def _wheels(loaded: Loaded) -> Check:
    """Whether every wheel of hardware.environment can be found, and fits what the image has."""
    from launcher import abreast, wheels

    found = abreast.ask({"": lambda: wheels.resolved(loaded)}, _WHEELS)[""]
    if isinstance(found, abreast.Late):
        return Check("wheels", "warn", f"the mirror gives {found}", "try again in a while")
    if isinstance(found, LaunchError):
        lines = str(found).splitlines()
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        fix = found.hint or "`launch plan` names what there is and what is wanted"
        return Check("wheels", "fail", lines[0] + more, fix)
    if isinstance(found, Exception):
        raise found
    wanted = {w for s in found.recipe.stages if s.hardware.environment
              for w in s.hardware.environment.wheels}  # fmt: skip
    told = sorted(f"{w.name} {w.version or ''} ({str(w.sha256)[:12]}...)" for w in wanted)
    return Check("wheels", "pass", ", ".join(told))


def _backend(name: str, env: Env, loaded: Optional[Loaded]) -> list[Check]:
    found = []
    try:
        backend = backends.load(name)
        rows = backend.check(env)
        if loaded is not None and isinstance(backend, CanExamine):
            rows = backend.examine(loaded.recipe, env)
        for row in rows:
            found.append(Check(f"{name}: {row.name}", row.result, row.detail, row.fix))
    except LaunchError as problem:
        found.append(Check(name, "fail", str(problem), problem.hint))
    except ImportError as problem:
        found.append(Check(name, "fail", str(problem), f"pip install 'launch-llm[{name}]'"))
    return found


def _present(module: str) -> bool:
    try:
        return util.find_spec(module) is not None
    except (ImportError, ValueError):  # the parent package is missing, or broken
        return False


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "(version unknown)"
