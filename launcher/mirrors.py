"""Folders of wheels: in a bucket, behind HTTPS, on this machine. What is there, and its sha256."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional, TypeVar

from launcher.errors import BadRequest, Denied, LaunchError, Transient

_SUMS = "SHA256SUMS"
_LINE = re.compile(r"^([0-9a-fA-F]{64})[ \t]+\*?(?:\./)?(\S.*?)\s*$", re.M)
_ALONE = re.compile(r"\s*([0-9a-fA-F]{64})(?:\s|$)")
_LONGEST = 20_000_000  # bytes of an index page or a list of sums
_TIMEOUT = 60.0
_T = TypeVar("_T")


@dataclass(frozen=True)
class Mirror:
    """`files`: the address of each wheel by its name. `told`: sha256 that the listing itself
    gives. `read` reads a text beside a wheel: (the wheel's address, the text's name)."""

    files: Mapping[str, str]
    read: Callable[[str, str], Optional[str]]
    told: Mapping[str, str] = field(default_factory=dict)

    def sha256(self, file: str) -> Optional[str]:
        """From the listing, from `SHA256SUMS` in the wheel's folder, or from `FILE.sha256`; of a
        wheel on this machine, computed. None: nothing tells it."""
        address = self.files[file]
        if file in self.told:
            return self.told[file]
        if "://" not in address:
            return _digest(Path(address))
        sums = self.read(address, _SUMS) or ""
        found: dict[str, str] = {
            name.rpartition("/")[2]: digest for digest, name in _LINE.findall(sums)
        }
        if file in found:
            return found[file]
        alone = _ALONE.match(self.read(address, f"{file}.sha256") or "")
        return alone[1] if alone else None


def listed(source: str) -> Mirror:
    """The mirror at `source`. Errors: `ValueError` for a folder that is not there; `Denied`,
    `Transient`, `BadRequest` when it cannot be read."""
    if source.startswith("https://"):
        return _page(source)
    if "://" in source:
        return _bucket(source)
    folder = Path(source)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {source}")
    return Mirror({path.name: str(path) for path in folder.rglob("*.whl")}, _read_beside)


def one_file(source: str, file: str) -> Mirror:
    """A mirror of which the one wheel `file`, at `source`, is named. Errors: `ValueError` for a
    path without a file."""
    if "://" not in source and not Path(source).is_file():
        raise ValueError(f"there is no file {source}")
    return Mirror({file: source}, _read_beside)


def _bucket(source: str) -> Mirror:
    from trainer import store

    root = source.rstrip("/")
    keys = _asked(root, lambda: store.open_store(root).list("")) or []
    wheels = {key.rpartition("/")[2]: f"{root}/{key}" for key in keys if key.endswith(".whl")}
    return Mirror(wheels, _read_beside)


def _page(source: str) -> Mirror:
    """A page of links: a web server's own listing, or an index as PEP 503 describes it, whose
    links may end in `#sha256=...`."""
    from html.parser import HTMLParser
    from urllib.parse import unquote, urldefrag, urljoin

    files: dict[str, str] = {}
    told: dict[str, str] = {}

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, Optional[str]]]) -> None:
            link = dict(attrs).get("href") if tag == "a" else None
            address, fragment = urldefrag(urljoin(base, link or ""))
            name = unquote(address.rpartition("/")[2])
            if link and name.endswith(".whl") and address.startswith("https://"):
                files[name] = address
                if fragment.startswith("sha256="):
                    told[name] = fragment.removeprefix("sha256=")

    base = source.rstrip("/") + "/"
    text = _get(base)
    if text is None:
        raise ValueError(f"there is no page {base}")
    Links().feed(text)
    return Mirror(files, _read_beside, told)


def _read_beside(wheel: str, name: str) -> Optional[str]:
    """The text `name` in the folder of a wheel; None: there is none."""
    from trainer import store

    folder = wheel.rpartition("/")[0]
    if wheel.startswith("https://"):
        from urllib.parse import quote

        return _get(f"{folder}/{quote(name)}")
    data = _asked(folder, lambda: store.open_store(folder).get_bytes(name))
    return None if data is None else data.decode("utf-8", "replace")


def _asked(where: str, read: Callable[[], _T]) -> Optional[_T]:
    """What a store answers, None for what is not there; its errors as ours."""
    from trainer import store

    try:
        return read()
    except store.NotFound:
        return None
    except store.Denied as error:
        raise Denied(
            f"wheels: {error}", "docs/vertex.md lists the roles that are needed"
        ) from error
    except store.Transient as error:
        raise Transient(f"wheels: {error}") from error
    except store.StoreError as error:
        raise BadRequest("hardware.environment.wheels", f"{where}: {error}") from error
    except ImportError as error:
        raise BadRequest(
            "python packages", f"{error.name or error} cannot be imported",
            "pip install 'launch-llm[google]' for gs://, [s3] for s3://",
        ) from error  # fmt: skip


def _get(url: str) -> Optional[str]:
    """A page as text; None for 404 and 410."""
    import urllib.error
    import urllib.request

    what = "hardware.environment.wheels"
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
            data: bytes = answer.read(_LONGEST)
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):
            return None
        if error.code in (401, 403):
            raise Denied(f"{what}: {url}: {error}", "name a mirror that may be read") from error
        raise _unread(error.code, url, error) from error
    except OSError as error:  # URLError, a timeout, a cut connection
        raise Transient(f"{what}: {url} cannot be read: {error}") from error
    return data.decode("utf-8", "replace")


def _unread(code: int, url: str, error: Exception) -> LaunchError:
    what = "hardware.environment.wheels"
    if code >= 500 or code == 429:
        return Transient(f"{what}: {url}: {error}")
    return BadRequest(what, f"{url}: {error}")


def _digest(path: Path) -> str:
    import hashlib

    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
