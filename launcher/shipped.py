"""The recipes that come with the product: found in a checkout and in a wheel, listed, copied."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from launcher.errors import UsageError

#: In a wheel the recipes are data of the package `launcher`; in a checkout they lie beside it.
_PACKAGE = Path(__file__).resolve().parent
_HEADER = re.compile(r"^# (Needs|Costs): (.*)$")
_DESCRIPTION = re.compile(r"^description: *(.*)$", re.MULTILINE)
_OTHER_FILE = re.compile(
    r"""^\s*(?:-\s*)?(?:\{.*?)?\b(?:extends|recipe):\s*["']?([\w./-]+\.ya?ml)"""
)


@dataclass(frozen=True)
class Shipped:
    name: str
    path: Path
    description: str
    needs: str
    costs: str


def folder() -> Path:
    """Where the shipped recipes are. Errors: `UsageError` for a broken installation."""
    for place in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes"):
        if any(place.glob("*.yaml")):
            return place
    raise UsageError(
        f"the shipped recipes are neither in {_PACKAGE} nor beside it",
        "install launch-llm again, or give the path of a recipe file",
    )


def names() -> list[str]:
    """`kd_l4.yaml` is called `kd-l4`."""
    return sorted(path.stem.replace("_", "-") for path in folder().glob("*.yaml"))


def recipes() -> list[Shipped]:
    """All of them with what their headers say."""
    return [_described(name) for name in names()]


def find(text: str) -> Path:
    """The recipe file that `text` means: a path, or the name of a shipped recipe. A path that does
    not exist is returned as it is: reading it gives the error. Errors: `UsageError`, near name."""
    path = Path(text)
    if path.exists() or path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        return path
    return _shipped(text)


def init(name: str, to: Optional[Path] = None, into: bool = False) -> list[Path]:
    """Copy the shipped recipe `name`, and the files it builds on, to the file `to` (default: here;
    a folder, or `into`: into it). What it builds on and is there already, unchanged, stays: recipes
    that share a base can be copied into one folder. Returns the paths written, the recipe first.
    Never overwrites: `UsageError`."""
    source = _shipped(name)
    target = to or Path(source.name)
    if target.is_dir() or into:
        target = target / source.name
    if target.exists():
        raise UsageError(f"{target} exists already", f"give another path: launch init {name} PATH")
    copies = {target: source}
    for other in _builds_on(source):
        base = target.parent / other
        if base == target:
            raise UsageError(
                f"{name} builds on a file named {other}, so its copy cannot have that name",
                f"give another path: launch init {name} PATH",
            )
        if not base.exists():
            copies[base] = source.parent / other
        elif not _same_text(base, source.parent / other):
            raise UsageError(
                f"{base} exists already, and is not the one that {name} builds on",
                f"give another folder: launch init {name} FOLDER/",
            )
    for path, original in copies.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x") as handle:
            handle.write(original.read_text())
    return list(copies)


def _same_text(path: Path, other: Path) -> bool:
    return path.is_file() and path.read_bytes() == other.read_bytes()


def _shipped(name: str) -> Path:
    from trainer.config import nearest

    known = names()
    wanted = name.replace("_", "-")
    if wanted not in known:
        raise UsageError(
            f"no recipe '{name}'; {nearest(wanted, known)}",
            "`launch recipes` lists those that come with launch; a path to a file works too",
        )
    return next(p for p in folder().glob("*.yaml") if p.stem.replace("_", "-") == wanted)


def _described(name: str) -> Shipped:
    """`description:` and the paragraphs of the header that start with `# Needs:` or `# Costs:`."""
    path = _shipped(name)
    text = path.read_text()
    found: dict[str, list[str]] = {}
    paragraph: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        header = _HEADER.match(line)
        if header:
            paragraph = found.setdefault(header[1], [])
            paragraph.append(header[2])
        elif re.match(r"^#   \S", line):  # indented: the paragraph goes on
            paragraph.append(line[1:].strip())
        else:
            paragraph = []
    words = {key: " ".join(lines).rstrip(".") for key, lines in found.items()}
    description = _DESCRIPTION.search(text)
    does = description[1].strip("\"'") if description else ""
    return Shipped(name, path, does, words.get("Needs", ""), words.get("Costs", ""))


def _builds_on(recipe: Path) -> list[str]:
    """Names of the files that a recipe extends or runs, and those that they do."""
    found: list[str] = []
    waiting = [recipe.name]
    while waiting:
        text = (recipe.parent / waiting.pop()).read_text()
        for line in text.splitlines():
            other = _OTHER_FILE.match(line)
            if other and other[1] not in found and (recipe.parent / other[1]).exists():
                found.append(other[1])
                waiting.append(other[1])
    return found
