"""The trainer as a reproducible, content-addressed archive.

The name is the sha256 of the tar inside: the tar is the same, byte by byte, on any machine for the
same sources, while compressed bytes depend on the compressor's version. That is bzip2: on sources
it is three quarters of gzip's size, whose window is 32 KiB, as fast, and in the standard library.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from launcher.errors import LaunchError
from launcher.home import Unwritable, unwritable
from trainer.store import StoreError, atomic_write

#: Largest archive, compressed: it is carried in job requests' companions and read at every start.
LIMIT = 300 * 1000


@dataclass(frozen=True)
class Bundle:
    """`path` of the `.tar.bz2`; `sha256` and `bytes` of the tar inside it."""

    path: Path
    sha256: str
    bytes: int


def build(home: Path, package: Optional[Path] = None) -> Bundle:
    """The bundle of the installed `trainer` package (or of the folder `package`), in
    `home/bundles`; one that is there and whole is kept. Errors: `LaunchError` over `LIMIT` bytes or
    when it cannot be written."""
    tar = archive(package or _installed())
    digest = hashlib.sha256(tar).hexdigest()
    path = place(home, digest)
    bundle = Bundle(path, digest, len(tar))
    if whole(path, digest):
        return bundle
    small = compressed(tar)
    if len(small) > LIMIT:
        raise LaunchError(f"the trainer's bundle is {len(small)} bytes; at most {LIMIT}")
    store(path, small)
    return bundle


def archive(package: Path) -> bytes:
    """A tar of the package's sources."""
    return packed((name, path.read_bytes()) for name, path in sorted(_sources(package)))


def packed(files: Iterable[tuple[str, bytes]]) -> bytes:
    """A tar of (name, content), in that order: no times, no owners, fixed modes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in files:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o644
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def place(home: Path, sha256: str, like: str = "") -> Path:
    """Where the archive of this name is; `like`: a name of its kind (older runs: `.tar.gz`)."""
    return home / "bundles" / f"{sha256}{kind(like)}"


def kind(name: str) -> str:
    """How an archive of this name is packed."""
    return ".tar.gz" if name.endswith(".tar.gz") else ".tar.bz2"


def compressed(tar: bytes) -> bytes:
    """What is stored of a tar. Errors: `LaunchError` where this Python lacks bzip2."""
    return _bz2().compress(tar)  # type: ignore[no-any-return]


def store(path: Path, content: bytes) -> None:
    """Write an archive. Errors: `Unwritable`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, content)
    except StoreError as error:
        raise Unwritable(f"cannot write the bundle: {error}") from error
    except OSError as error:
        raise unwritable(path.parent, error) from error


def whole(path: Path, digest: str) -> bool:
    """Whether the archive is there, and the tar in it has this sha256."""
    try:
        unpack = gzip.decompress if kind(path.name) == ".tar.gz" else _bz2().decompress
        return hashlib.sha256(unpack(path.read_bytes())).hexdigest() == digest
    except (OSError, EOFError, ValueError, zlib.error):
        return False


def _bz2() -> Any:
    try:
        import bz2
    except ImportError as error:
        raise LaunchError(
            "this Python was built without bz2, which the trainer is packed with",
            "use another Python, or build it again where libbz2's headers are (libbz2-dev)",
        ) from error
    return bz2


def _sources(package: Path) -> list[tuple[str, Path]]:
    files = [*package.rglob("*.py"), *package.glob("locks/*.txt")]
    files = [path for path in files if not path.name.startswith(".")]  # editors' own
    return [(f"{package.name}/{path.relative_to(package).as_posix()}", path) for path in files]


def _installed() -> Path:
    import trainer

    return Path(trainer.__file__).parent
