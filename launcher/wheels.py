"""Which built packages (wheels) a job installs beside the image's own: chosen when it is planned.

A wheel such as flash-attn's is built for one Python, one torch, one CUDA and one C++ ABI, and its
file name says so. The recipe says what the image has; `problems` judges what it names, `resolved`
chooses from a mirror (`mirrors.py`) and puts name and sha256 into the recipe, so that every attempt
of the run installs the very same file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Optional

from launcher import hardware
from launcher.errors import RecipeErrors
from launcher.spec import Environment, Hardware, Wheel
from trainer.config import KeyPath, Problem, dotted, to_dict

if TYPE_CHECKING:
    from launcher.positions import Node
    from launcher.recipe import Loaded

#: Torch that the trainer runs on, as trainer/environment.py checks it in the job.
TORCH = (2, 9), (2, 16)
#: The lowest compute capability of a project's kernels. flash-attn 2: its README, Ampere or newer.
CAPABILITY = {"flash-attn": 8.0}
#: What a job's file system may name; a machine in a cloud cannot read the others.
_REMOTE = ("gs://", "s3://", "https://")
_MACHINE = "x86_64"
_SHOWN = 4
# Local versions are compared as PEP 440 normalises them: lower case.
_CUDA, _TORCH, _ABI = (
    re.compile(r"(?:^|[^a-z])cu(\d{2,4})"), re.compile(r"torch(\d+\.\d+)"),
    re.compile(r"cxx11abi(true|false)"),
)  # fmt: skip
_ADDRESS = re.compile(r"[a-z0-9]+://[^/]*@|[a-z0-9]+://[^?#]*[?#]")


@dataclass(frozen=True)
class Built:
    """A wheel by its file name. `says` is what its local version tells: torch, cuda, abi."""

    file: str
    name: str
    version: Any  # packaging.version.Version
    build: tuple[Any, ...]
    tags: frozenset[Any]
    says: dict[str, str]


def problems(asked: Hardware) -> Iterator[Problem]:
    """What is wrong with the environment that a stage asks for; no file and nobody is asked."""
    wanted = asked.environment
    if wanted is None:
        return
    at: KeyPath = ("hardware", "environment")
    if asked.backend == "local":
        yield at, "backend 'local' uses the Python that is there; install what it lacks with pip"
    if wanted.torch and not TORCH[0] <= _numbers(wanted.torch)[:2] < TORCH[1]:
        low, high = _dots(TORCH[0]), f"{TORCH[1][0]}.{TORCH[1][1] - 1}"
        yield (*at, "torch"), f"the trainer runs on torch {low} to {high}, not on {wanted.torch}"
    missing = [key for key in ("python", "torch", "cuda") if getattr(wanted, key) is None]
    names: list[str] = []
    for index, wheel in enumerate(wanted.wheels):
        here = (*at, "wheels", index)
        if wheel.name in names:
            yield (*here, "name"), f"there is already a wheel '{wheel.name}'"
        names.append(wheel.name)
        if missing:
            words = ", ".join(f"`{key}`" for key in missing)
            yield here, f"needs {words} in hardware.environment: what the image has decides"
        yield from _wheel_problems(wheel, wanted, asked, here)


def resolved(loaded: Loaded) -> Loaded:
    """`loaded` with every wheel as one file with its sha256. Mirrors are read for those that are
    not; a recipe without such wheels asks nobody. The fingerprint stays that of the recipe as
    written. Errors: `RecipeErrors`, all that fit nothing, with positions; those of reading."""
    from launcher import mirrors

    found: list[str] = []
    known: dict[tuple[Environment, Wheel], Optional[Wheel]] = {}
    stages = []
    for stage in loaded.recipe.stages:
        wanted = stage.hardware.environment
        if wanted is None or all(map(_exact, wanted.wheels)):
            stages.append(stage)
            continue
        chosen = []
        for index, wheel in enumerate(wanted.wheels):
            key = (replace(wanted, wheels=()), wheel)
            if key not in known:
                try:
                    known[key] = _resolve(wheel, wanted, mirrors)
                except ValueError as error:
                    known[key] = None
                    at: KeyPath = ("hardware", "environment", "wheels", index, "source")
                    where = _position(loaded.written.get(stage.id), at, loaded)
                    found.append(f"{where}: {dotted(at)}: {error}")
            chosen.append(known[key] or wheel)
        environment = replace(wanted, wheels=tuple(chosen))
        stages.append(replace(stage, hardware=replace(stage.hardware, environment=environment)))
    if found:
        raise RecipeErrors(found)
    recipe = replace(loaded.recipe, stages=tuple(stages))
    if recipe == loaded.recipe:
        return loaded
    return replace(loaded, recipe=recipe, canonical=to_dict(recipe))


def shipped(wanted: Optional[Environment]) -> list[dict[str, str]]:
    """The wheels of a boot specification. Errors: `ValueError` for one that is not resolved."""
    wheels = wanted.wheels if wanted else ()
    for wheel in wheels:
        if not _exact(wheel):
            raise ValueError(f"wheel {wheel.name} from {wheel.source} is not resolved yet")
    return [{"name": w.name, "url": w.source, "sha256": str(w.sha256)} for w in wheels]


def lines(job: int, wanted: Optional[Environment]) -> list[str]:
    """What a plan says of the wheels of a job."""
    return [
        f"job {job} installs {wheel.name} from {wheel.source} (sha256 {str(wheel.sha256)[:12]}...)"
        for wheel in (wanted.wheels if wanted else ())
    ]


def is_remote(source: str) -> bool:
    """Whether a machine in a cloud can read this address; otherwise it is a path here."""
    return source.startswith(_REMOTE)


def read_name(file: str) -> Built:
    """A wheel's file name, taken apart. Errors: `ValueError` for one that is no wheel's."""
    from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

    try:
        name, version, build, tags = parse_wheel_filename(file)
    except InvalidWheelFilename as error:
        raise ValueError(f"{file} is not the name of a wheel") from error
    local = version.local or ""
    says = {
        what: match[1]
        for what, pattern in (("cuda", _CUDA), ("torch", _TORCH), ("abi", _ABI))
        if (match := pattern.search(local))
    }
    return Built(file, canonicalize_name(name), version, build, frozenset(tags), says)


def mismatches(built: Built, image: Environment) -> list[str]:
    """Why a wheel does not fit the image, each in a few words. What its name does not say is not
    judged. CUDA's minor versions are compatible upwards: a wheel may be older than the image."""
    found = []
    if not built.tags & _supported(image):
        found.append("/".join(sorted(map(str, built.tags))[:2]))
    says = built.says
    if "torch" in says and _numbers(says["torch"]) != _numbers(str(image.torch))[:2]:
        found.append(f"torch {says['torch']}")
    if "cuda" in says and not _cuda_fits(says["cuda"], str(image.cuda)):
        found.append(f"CUDA {_cuda_words(says['cuda'])}")
    if "abi" in says and (says["abi"] == "true") != image.cxx11_abi:
        found.append(f"C++11 ABI {says['abi']}")
    return found


def choose(wheel: Wheel, image: Environment, files: Sequence[str]) -> str:
    """The newest of `files` that is this project (and version) and fits; of two builds the one
    that says more about itself. Errors: `ValueError`, with what there is and what was wanted."""
    from packaging.utils import canonicalize_name

    own = []
    for file in files:
        try:
            built = read_name(file)
        except ValueError:
            continue
        if built.name == canonicalize_name(wheel.name):
            own.append(built)
    if wheel.version:
        right = [built for built in own if built.version.public == wheel.version]
        if own and not right:
            versions = ", ".join(sorted({built.version.public for built in own}, reverse=True))
            raise ValueError(f"{wheel.source} has {wheel.name} {versions}, not {wheel.version}")
        own = right
    if not own:
        raise ValueError(f"{wheel.source} has no wheel of {wheel.name} ({len(files)} wheels)")
    judged = [(mismatches(built, image), built) for built in own]
    fitting = [built for wrong, built in judged if not wrong]
    if fitting:
        return max(fitting, key=_preference).file
    judged.sort(key=lambda one: (len(one[0]), one[1].file))
    shown = "; ".join(f"{built.file} ({', '.join(wrong)})" for wrong, built in judged[:_SHOWN])
    more = f"; and {len(judged) - _SHOWN} more" if len(judged) > _SHOWN else ""
    raise ValueError(f"no wheel of {wheel.name} for {_image(image)} in {wheel.source}; it has "
                     f"{shown}{more}")  # fmt: skip


def _preference(built: Built) -> tuple[Any, ...]:
    from packaging.version import Version

    cuda = int(built.says.get("cuda", "0").ljust(3, "0"))
    return Version(built.version.public), len(built.says), cuda, built.build, built.file


def _wheel_problems(
    wheel: Wheel, image: Environment, asked: Hardware, at: KeyPath
) -> Iterator[Problem]:
    from packaging.utils import canonicalize_name

    name = canonicalize_name(wheel.name)
    if _ADDRESS.match(wheel.source):
        yield (
            (*at, "source"),
            "holds a password, a signature or a fragment, which the journal would show; name a "
            "bucket or a plain address",
        )
    elif "://" in wheel.source and not is_remote(wheel.source):
        yield (*at, "source"), f"expected one of {', '.join(_REMOTE)} or a path of this machine"
    least = CAPABILITY.get(name)
    if least is not None and (kind := _kind(asked)) is not None:
        if kind.vendor != "nvidia":
            yield (*at, "name"), f"{wheel.name} runs on NVIDIA GPUs, not on {kind.name}"
        elif kind.capability < least:
            yield (
                (*at, "name"),
                f"{wheel.name} needs a GPU of compute capability {least} or higher; {kind.name} "
                f"has {kind.capability}",
            )
    if not wheel.source.endswith(".whl"):
        return
    try:
        built = read_name(_file_of(wheel.source))
    except ValueError as error:
        yield (*at, "source"), str(error)
        return
    if built.name != name:
        yield (*at, "source"), f"is a wheel of {built.name}, not of {wheel.name}"
    if wheel.version and built.version.public != wheel.version:
        yield (*at, "version"), f"the wheel that `source` names is {built.version.public}"
    if image.python and image.torch and image.cuda and (wrong := mismatches(built, image)):
        yield (*at, "source"), f"is built for {', '.join(wrong)}; the image has {_image(image)}"


def _resolve(wheel: Wheel, image: Environment, mirrors: Any) -> Wheel:
    """Errors: `ValueError`, the words after the position; those of reading."""
    if _exact(wheel):
        return wheel
    if wheel.source.endswith(".whl"):
        file = _file_of(wheel.source)
        mirror = mirrors.one_file(wheel.source, file)
    else:
        mirror = mirrors.listed(wheel.source)
        file = choose(wheel, image, list(mirror.files))
    sha256 = wheel.sha256 or mirror.sha256(file)
    if sha256 is None:
        raise ValueError(
            f"nothing tells the sha256 of {file}: put SHA256SUMS or {file}.sha256 beside it, or "
            "write `sha256` here"
        )
    version = read_name(file).version.public
    return replace(wheel, source=mirror.files[file], version=version, sha256=sha256.lower())


def _exact(wheel: Wheel) -> bool:
    return wheel.source.endswith(".whl") and wheel.sha256 is not None


def _supported(image: Environment) -> frozenset[Any]:
    """The tags of wheels that the image's Python takes, as PEP 425 and PEP 600 define them."""
    from packaging.tags import compatible_tags, cpython_tags

    python = _numbers(str(image.python))[:2]
    major, minor = _numbers(image.glibc)[:2]
    platforms = [f"manylinux_{major}_{n}_{_MACHINE}" for n in range(minor, 4, -1)]
    old = (("manylinux2014", 17), ("manylinux2010", 12), ("manylinux1", 5))
    platforms += [f"{name}_{_MACHINE}" for name, least in old if minor >= least]
    platforms.append(f"linux_{_MACHINE}")
    own = f"cp{python[0]}{python[1]}"
    found = set(cpython_tags(python, [own], platforms))
    return frozenset(found | set(compatible_tags(python, own, platforms)))


def _cuda_fits(built: str, image: str) -> bool:
    """`12` fits any 12.x, `128` (12.8) the image's 12.8 and later ones of 12."""
    has = _numbers(image)
    major, minor = int(built[:2]), int(built[2:] or 0)
    return major == has[0] and (len(has) < 2 or minor <= has[1])


def _cuda_words(built: str) -> str:
    return f"{built[:2]}.{built[2:]}" if len(built) > 2 else built


def _image(image: Environment) -> str:
    abi = "" if image.cxx11_abi else "out"
    return (
        f"Python {image.python}, torch {image.torch}, CUDA {image.cuda}, with{abi} C++11 ABI, "
        f"glibc {image.glibc}, {_MACHINE}"
    )


def _kind(asked: Hardware) -> Optional[hardware.Kind]:
    try:
        return hardware.parse(asked.accelerator).kind
    except ValueError:  # told already
        return None


def _position(node: Optional[Node], at: KeyPath, loaded: Loaded) -> Any:
    from launcher.positions import locate

    return loaded.path if node is None else locate(node, at)


def _file_of(source: str) -> str:
    from urllib.parse import unquote

    return unquote(source.rpartition("/")[2])


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def _dots(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
