"""The engine's command line, `pulumi`: found on PATH or under $LAUNCH_HOME, else fetched once.

The archive comes from its makers' site with the file of checksums they publish beside it; nothing
that was downloaded runs before its sha256 is the one in that file.
"""

from __future__ import annotations

import fcntl
import hashlib
import platform
import re
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Optional
from urllib.error import HTTPError, URLError

from infra.errors import EngineError

#: Where the makers publish `pulumi-vX.Y.Z-SYSTEM-MACHINE.tar.gz` and `pulumi-X.Y.Z-checksums.txt`.
SITE = "https://get.pulumi.com/releases/sdk"
#: Versions whose arguments and events this was written for: from the first that sends its events
#: over a socket, to the end of that major version.
OLDEST, BELOW = (3, 206, 0), (4, 0, 0)
_TIMEOUT = 60.0
_CHUNK = 1 << 20
_VERSION = re.compile(r"^v?(\d+)\.(\d+)\.(\d+)")
_SYSTEMS = {"Linux": "linux", "Darwin": "darwin"}
_MACHINES = {"x86_64": "x64", "amd64": "x64", "aarch64": "arm64", "arm64": "arm64"}


@dataclass(frozen=True)
class Cli:
    """An executable and the version that it says it is."""

    path: Path
    version: str


def wanted() -> str:
    """The version to install: that of the installed Python package, with which it is released."""
    return metadata.version("pulumi")


def find(home: Path, environ: Mapping[str, str]) -> Optional[Cli]:
    """The `pulumi` of PATH when its version is one we know, else the one below `home`
    ($LAUNCH_HOME/infra), else None."""
    for path in (_on_path(environ), _place(home, wanted()) / "bin" / "pulumi"):
        if path is not None and path.is_file() and (cli := _known(path, environ)):
            return cli
    return None


def passed_over(environ: Mapping[str, str]) -> Optional[str]:
    """Why the `pulumi` of PATH is not used, in a line for the user; None: there is none, or it
    is."""
    path = _on_path(environ)
    if path is None:
        return None
    version = _version(path, environ)
    if version is not None and OLDEST <= version < BELOW:
        return None
    says = f"is {_dots(version)}" if version is not None else "does not tell its version"
    return f"{path} {says}: launch needs {_dots(OLDEST)} or newer, and older than {_dots(BELOW)}"


def install(
    home: Path, environ: Mapping[str, str], say: Callable[[str], None], site: str = SITE
) -> Cli:
    """Fetch, verify and unpack the command line below `home`; `say` gets lines of progress.
    Errors: `EngineError`, with what to do by hand."""
    version = wanted()
    system, machine = _SYSTEMS.get(platform.system()), _MACHINES.get(platform.machine().lower())
    if system is None or machine is None:
        raise EngineError(
            f"there is no pulumi {version} for {platform.system()} on {platform.machine()}",
            "install one by hand that `pulumi version` answers, and put it on PATH",
        )
    name = f"pulumi-v{version}-{system}-{machine}.tar.gz"
    place = _place(home, version)
    by_hand = (
        f"where there is a network: fetch {site}/{name}, unpack it, and put its folder `pulumi` on "
        f"PATH here, or move it to {place / 'bin'}"
    )
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=".fetch-") as scratch:
            listed = _fetch_text(f"{site}/pulumi-{version}-checksums.txt")
            expected = _checksum(listed, name)
            archive = Path(scratch) / name
            actual = _fetch(f"{site}/{name}", archive, say)
            if actual != expected:
                raise EngineError(
                    f"{site}/{name}: its sha256 is {actual}, published is {expected}",
                    "try again later; nothing of it was run",
                )
            unpacked = Path(scratch) / "new"
            unpacked.mkdir()
            _unpack(archive, unpacked / "bin")
            _settle(unpacked, place, environ)
    except (OSError, tarfile.TarError) as error:
        away = isinstance(error, URLError) and not isinstance(error, HTTPError)
        why = getattr(error, "reason", error) if away else error
        raise EngineError(f"pulumi {version} could not be installed: {why}", by_hand) from error
    cli = _known(place / "bin" / "pulumi", environ)
    if cli is None:
        raise EngineError(f"{place / 'bin' / 'pulumi'} does not run", by_hand)
    say(f"installed pulumi {cli.version} in {place}")
    return cli


def _settle(unpacked: Path, place: Path, environ: Mapping[str, str]) -> None:
    """Rename `unpacked` to `place`. One that runs there wins: another install was faster, and its
    launch may be using it by now. A damaged one is moved aside, beside `unpacked`."""
    with (place.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        if _known(place / "bin" / "pulumi", environ) is not None:
            return
        if place.exists():
            place.rename(unpacked.with_name("damaged"))
        unpacked.rename(place)


def _place(home: Path, version: str) -> Path:
    return home / "pulumi" / "versions" / version


def _known(path: Path, environ: Mapping[str, str]) -> Optional[Cli]:
    """The command line at `path`, if it runs and is of a version that we know."""
    version = _version(path, environ)
    if version is None or not OLDEST <= version < BELOW:
        return None
    return Cli(path, _dots(version))


def _on_path(environ: Mapping[str, str]) -> Optional[Path]:
    found = shutil.which("pulumi", path=environ.get("PATH"))
    return Path(found) if found else None


def _version(path: Path, environ: Mapping[str, str]) -> Optional[tuple[int, ...]]:
    """What the executable at `path` says that it is; None: nothing, or it does not run."""
    try:
        done = subprocess.run(
            [path, "version"],
            env={**environ, "PULUMI_SKIP_UPDATE_CHECK": "true"},
            capture_output=True, text=True, errors="replace", timeout=_TIMEOUT, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    found = _VERSION.match(done.stdout.strip())
    return tuple(map(int, found.groups())) if found is not None else None


def _dots(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _fetch_text(url: str) -> str:
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
        return bytes(answer.read()).decode()


def _checksum(listed: str, name: str) -> str:
    """The sha256 of `name` in lines of `<sha256>  <file>`."""
    for line in listed.splitlines():
        words = line.split()
        if len(words) == 2 and words[1].lstrip("*") == name:
            return words[0].lower()
    raise EngineError(f"the published checksums do not name {name}", "put a pulumi on PATH")


def _fetch(url: str, target: Path, say: Callable[[str], None]) -> str:
    """Write what `url` holds to `target`; its sha256. A line at the start and every tenth."""
    digest = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer, target.open("wb") as out:
        length = int(answer.headers.get("Content-Length") or 0)
        size = f"{length / 1e6:.0f} MB" if length else "size unknown"
        say(f"fetching {url} ({size})")
        done = shown = 0
        for chunk in _chunks(answer):
            out.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            tenth = 10 * done // length if length else done // (20 * _CHUNK)
            if tenth > shown:
                shown = tenth
                say(f"  {done / 1e6:.0f} MB" + (f" of {size}" if length else ""))
        if length and done != length:
            raise OSError(f"{url}: the connection ended after {done} of {length} bytes")
    return digest.hexdigest()


def _chunks(answer: IO[bytes]) -> Iterator[bytes]:
    return iter(lambda: answer.read(_CHUNK), b"")


def _unpack(archive: Path, folder: Path) -> None:
    """The plain files `pulumi/NAME` of the archive, as executables; anything else stays out."""
    folder.mkdir()
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts
            if not member.isfile() or len(parts) != 2 or parts[0] != "pulumi" or ".." in parts:
                continue
            source = tar.extractfile(member)
            assert source is not None  # it is a plain file
            with (folder / parts[1]).open("wb") as out:
                shutil.copyfileobj(source, out)
            (folder / parts[1]).chmod(0o755)
