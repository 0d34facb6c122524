"""The user's own code (`code:`): rewards, formatters and the like, as an archive beside the
trainer's. Which files, what never travels, and the archive's place in a recipe.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from launcher.bundle import Bundle, compressed, packed, store, whole
from launcher.bundle import place as archive_place
from launcher.errors import UsageError
from launcher.spec import Code
from trainer.config import to_dict

if TYPE_CHECKING:
    from launcher.recipe import Loaded

#: Bytes of all files together: code is small, and what is large is data.
LIMIT = 5 * 1000 * 1000
IGNORE = ".launchignore"
#: Never sent, whatever `include` says: what a machine makes itself, and what is nobody else's.
_NEVER = ("__pycache__", "*.pyc", "node_modules", "venv", "*.egg-info")
#: In small letters; names are compared without regard to case.
_SECRETS = ("*.pem", "*.key", "*.p12", "*.pfx", "*.env", "id_rsa*", "id_ed25519*", "id_ecdsa*",
            "*credentials*.json", "service-account*.json", "service_account*.json")  # fmt: skip

#: Modules that the trainer imports. The user's folder comes before them on PYTHONPATH, so one of
#: its own by such a name would be imported instead, by all others too.
_IMPORTED = {
    *sys.stdlib_module_names, "trainer", "torch", "numpy", "transformers", "tokenizers", "jinja2",
    "safetensors", "huggingface_hub", "datasets", "peft", "accelerate", "yaml", "regex", "requests",
    "tqdm", "packaging", "filelock", "triton", "torchao", "bitsandbytes", "trl", "vllm",
} - {"test", "this", "antigravity"}  # fmt: skip


class Wrong(ValueError):
    """What is wrong with a `code` block, and with which of its keys."""

    def __init__(self, key: str, what: str) -> None:
        super().__init__(what)
        self.key = key


def files(code: Code) -> dict[str, Path]:
    """Name in the archive -> file, sorted. Errors: `Wrong`."""
    root = Path(code.path)
    if not root.is_dir():
        raise Wrong("path", f"no such folder: {root}")
    ignored = _ignored(root)
    found: dict[str, Path] = {}
    for name, path in _below(root, ignored, code.include):
        if path.is_symlink():
            raise Wrong("include", f"{name} is a link, which does not travel; copy what it is")
        if not path.is_file():  # a pipe would be waited for
            raise Wrong("include", f"{name} is no plain file; narrow `include`")
        found[name] = path
    if not found:
        raise Wrong("include", f"no file below {root} fits {', '.join(code.include)}")
    _refuse_shadows(found)
    sizes = {name: path.stat().st_size for name, path in found.items()}
    if (total := sum(sizes.values())) > LIMIT:
        largest = max(sizes, key=lambda name: sizes[name])
        raise Wrong(
            "include",
            f"{len(found)} files of {total:,} bytes in all, at most {LIMIT:,}; the largest is"
            f" {largest}: narrow `include`, or name it in {root / IGNORE}",
        )
    return dict(sorted(found.items()))


def resolved(loaded: Loaded, home: Path) -> Loaded:
    """`loaded` with the sha256 and the size of its code, whose archive is then in `home/bundles`,
    and with a fingerprint of both. One that has a sha256 stays as it is, while the archive is there
    or the files still are what they were. Errors: `UsageError`, `LaunchError`, `Unwritable`."""
    code = loaded.recipe.code
    if code is None:
        return loaded
    if code.sha256 is None or not whole(place(code, home), code.sha256):
        code = _built(code, home)
    recipe = replace(loaded.recipe, code=code)
    digest = hashlib.sha256(f"{loaded.fingerprint}\n{code.sha256}".encode()).hexdigest()
    return replace(loaded, recipe=recipe, canonical=to_dict(recipe), fingerprint=digest)


def archive(code: Code) -> bytes:
    """The tar of the user's files. Errors: `UsageError`."""
    try:
        return packed((name, path.read_bytes()) for name, path in files(code).items())
    except Wrong as error:
        raise UsageError(f"code.{error.key}: {error}") from error
    except OSError as error:
        raise UsageError(f"code: cannot read {error.filename}: {error.strerror}") from error


def shipped(code: Code, home: Path, like: str = "") -> dict[str, Any]:
    """The key `code` of a boot specification; `like`: as `place`. Errors: `ValueError` for one not
    resolved."""
    if code.sha256 is None or code.bytes is None:
        raise ValueError("the recipe's code is not resolved yet")
    return {"url": str(place(code, home, like)), "sha256": code.sha256, "bytes": code.bytes}


def line(code: Code) -> str:
    """What a plan says of it."""
    return f"code of {code.path} travels with the run (sha256 {str(code.sha256)[:12]}...)"


def place(code: Code, home: Path, like: str = "") -> Path:
    """Where the archive of resolved code is; if it is not there, of the kind of the name `like`.
    Older runs have packed theirs as `.tar.gz`, and their files may have changed since."""
    found = [archive_place(home, str(code.sha256), name) for name in (like, "", ".tar.gz")]
    return next((path for path in found if path.exists()), found[0])


def _built(code: Code, home: Path) -> Code:
    tar = archive(code)
    digest = hashlib.sha256(tar).hexdigest()
    if code.sha256 not in (None, digest):
        raise UsageError(
            f"code.sha256: the files of {code.path} are {digest[:12]}..., not"
            f" {str(code.sha256)[:12]}...",
            "leave `sha256` out to take them as they are",
        )
    made = Bundle(archive_place(home, digest), digest, len(tar))
    if not whole(made.path, digest):
        store(made.path, compressed(tar))
    return replace(code, sha256=digest, bytes=len(tar))


def _refuse_shadows(names: Collection[str]) -> None:
    """Errors: `Wrong` for a module that the trainer would import in place of another."""
    for name in names:
        top, _, rest = name.partition("/")
        module = top.removesuffix(".py") if not rest else top
        if module == "trainer" and (rest or top.endswith(".py")):
            raise Wrong("include", f"{name}: the module `trainer` is launch's own; rename it")
        if module in _IMPORTED and (f"{top}/__init__.py" in names if rest else top != module):
            raise Wrong(
                "include",
                f"{name} would be imported in place of the module `{module}`; rename it, move it"
                f" into a folder, or name it in {IGNORE}",
            )


def _below(
    root: Path, ignored: Sequence[str], includes: Sequence[str]
) -> Iterator[tuple[str, Path]]:
    """What is to travel: files, and folders that are links, as `NAME/`. Hidden ones never do: they
    hold settings and secrets. Folders that no pattern can reach are not looked into."""
    wanted = [_pattern(text) for text in includes]
    begins = [_begins(text) for text in includes]
    for folder, folders, names in os.walk(root):
        here = Path(folder).relative_to(root)
        kept = [
            name
            for name in sorted(folders)
            if any(all(a == b for a, b in zip((*here.parts, name), begin)) for begin in begins)
            and not _left_out((here / name).as_posix(), ignored)
        ]
        folders[:] = [name for name in kept if not (Path(folder) / name).is_symlink()]
        at = "" if here == Path() else f"{here.as_posix()}/"
        links = [f"{name}/" for name in kept if name not in folders]
        for name in (*links, *sorted(names)):
            fits = any(pattern.fullmatch(at + name) for pattern in wanted)
            if fits and (name in links or not _left_out(at + name, ignored)):
                yield at + name, Path(folder) / name


def _left_out(name: str, ignored: Sequence[str]) -> bool:
    last = name.rpartition("/")[2]
    if last.startswith(".") or any(fnmatchcase(last, p) for p in _NEVER):
        return True
    if any(fnmatchcase(last.lower(), p) for p in _SECRETS):
        return True
    return any(
        _pattern(p.lstrip("/")).fullmatch(name if "/" in p.rstrip("/") else last) for p in ignored
    )


def _ignored(root: Path) -> list[str]:
    """Patterns of `.launchignore`: one a line, of a name at any depth or, with a slash, of a path
    from its folder. Errors: `Wrong`."""
    try:
        lines = (root / IGNORE).read_text().splitlines()
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise Wrong("path", f"cannot read {root / IGNORE}: {error}") from error
    wanted = [text for line in lines if (text := line.strip()) and not text.startswith("#")]
    if odd := next((text for text in wanted if text.startswith("!")), None):
        raise Wrong("path", f"{root / IGNORE}: {odd}: nothing is taken back in; use `include`")
    return wanted


def _begins(text: str) -> list[str]:
    """The folders that a pattern names before its first sign that stands for others."""
    parts = text.removeprefix("./").rstrip("/").split("/")
    return list(itertools.takewhile(lambda part: not re.search(r"[*?]", part), parts))


def _pattern(text: str) -> re.Pattern[str]:
    """`*` and `?` within a name, `**` over folders; a folder's name stands for all below it."""
    text = text.removeprefix("./").rstrip("/")
    written = ""
    for part in re.split(r"(\*\*/|\*\*|\*|\?)", text):
        written += {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(
            part, re.escape(part)
        )
    return re.compile(f"{written}(?:/.*)?")


def problem(code: Code) -> Optional[tuple[str, str]]:
    """(key, what is wrong) as far as the files say; one that names its archive is not asked."""
    try:
        if code.sha256 is None:
            files(code)
    except Wrong as error:
        return error.key, str(error)
    return None
