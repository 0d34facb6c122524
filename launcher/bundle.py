"""The trainer as a reproducible, content-addressed archive.

The name is the sha256 of the tar inside the gzip: the tar is the same, byte by byte, on any machine
for the same sources, while compressed bytes depend on the version of zlib.
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
from typing import Optional

from launcher.errors import LaunchError
from launcher.home import Unwritable, unwritable
from trainer.store import StoreError, atomic_write

#: Largest archive, compressed: it is carried in job requests' companions and read at every start.
LIMIT = 300 * 1000


@dataclass(frozen=True)
class Bundle:
    """`path` of the `.tar.gz`; `sha256` and `bytes` of the tar inside it."""

    path: Path
    sha256: str
    bytes: int


def build(home: Path, package: Optional[Path] = None) -> Bundle:
    """The bundle of the installed `trainer` package (or of the folder `package`), in
    `home/bundles`; one that is there and whole is kept. Errors: `LaunchError` over `LIMIT` bytes or
    when it cannot be written."""
    tar = archive(package or _installed())
    digest = hashlib.sha256(tar).hexdigest()
    path = home / "bundles" / f"{digest}.tar.gz"
    bundle = Bundle(path, digest, len(tar))
    if whole(path, digest):
        return bundle
    small = gzip.compress(tar, compresslevel=9, mtime=0)
    if len(small) > LIMIT:
        raise LaunchError(f"the trainer's bundle is {len(small)} bytes; at most {LIMIT}")
    store(path, small)
    return bundle


def archive(package: Path) -> bytes:
    """A tar of the package's sources, those of a kind together: it compresses better."""
    sources = sorted(_sources(package), key=lambda source: (source[1].suffix, source[0]))
    return packed((name, path.read_bytes()) for name, path in sources)


def packed(files: Iterable[tuple[str, bytes]]) -> bytes:
    """A tar of (name, content), in that order: no times, no owners, fixed modes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in files:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o644
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


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
        return hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest() == digest
    except (OSError, EOFError, zlib.error):
        return False


def _sources(package: Path) -> list[tuple[str, Path]]:
    files = [*package.rglob("*.py"), *package.glob("locks/*.txt")]
    files = [path for path in files if not path.name.startswith(".")]  # editors' own
    return [(f"{package.name}/{path.relative_to(package).as_posix()}", path) for path in files]


def _installed() -> Path:
    import trainer

    return Path(trainer.__file__).parent
