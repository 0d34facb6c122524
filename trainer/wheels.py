"""Wheels that a job brings along, such as flash-attn: fetched, checked, installed into folders of
their own. Training can do without them, so whatever goes wrong is one line and no error.
"""

from __future__ import annotations

import hashlib
import shutil
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from trainer.boot import Spec
from trainer.store import StoreError, open_store

_REQUEST_SECONDS = 60.0
_WAITS = (1.0, 4.0)
#: Runs a command to its end within so many seconds: its exit code and the last thing it said.
Run = Callable[[Sequence[str], float], tuple[int, str]]
#: Calls it, while somebody watches.
Wait = Callable[[Callable[[], None]], None]
_SECONDS = 600.0


class WheelError(Exception):
    """One line: what keeps a wheel from being used."""


def install(spec: Spec, run: Run, wait: Wait, warn: Callable[[str], None]) -> list[str]:
    """Install the wheels of the specification, each into `<work>/wheels/<name>`; the folders of
    those that can be imported, for PYTHONPATH."""
    folders = []
    for wheel in spec.raw.get("wheels") or []:
        name = str(wheel.get("name")) if isinstance(wheel, dict) else str(wheel)
        try:
            folders.append(str(_install(spec, wheel, run, wait)))
        except (WheelError, StoreError, OSError) as error:
            what = str(error).splitlines()[0] if str(error) else type(error).__name__
            warn(f"warning: wheel {name}: {what}; training goes on without it")
    return folders


def _install(spec: Spec, wheel: Mapping[str, str], run: Run, wait: Wait) -> Path:
    if not isinstance(wheel, dict) or not all(
        isinstance(wheel.get(key), str) for key in ("name", "url", "sha256")
    ):
        raise WheelError("expected name, url and sha256")
    name, url = wheel["name"], wheel["url"]
    module = name.replace("-", "_")
    if not module.isidentifier():
        raise WheelError("its name is no module's")
    folder: Path = spec.work / "wheels" / module
    shutil.rmtree(folder, ignore_errors=True)
    # pip reads the tags in the name of the file.
    path = spec.work / "wheels" / Path(urllib.parse.unquote(url)).name
    path.parent.mkdir(parents=True, exist_ok=True)
    wait(lambda: _fetch(url, path))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != wheel["sha256"]:
        raise WheelError(f"{url}: sha256 is {found[:12]}..., expected {wheel['sha256'][:12]}...")
    pip = [spec.python, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet",
           "--disable-pip-version-check", "--root-user-action=ignore",
           "--target", str(folder), str(path)]  # fmt: skip
    code, said = run(pip, _SECONDS)
    path.unlink(missing_ok=True)
    if code:
        shutil.rmtree(folder, ignore_errors=True)
        raise WheelError(f"cannot be installed: {said or f'pip ended with {code}'}")
    look = f"import sys; sys.path.insert(0, {str(folder)!r}); import {module}"
    code, said = run([spec.python, "-c", look], _SECONDS)
    if code:  # half a package would be found and fail later
        shutil.rmtree(folder, ignore_errors=True)
        raise WheelError(f"cannot be imported: {said or f'python ended with {code}'}")
    return folder


def _fetch(url: str, path: Path) -> None:
    """Errors: `WheelError`, `StoreError`, `OSError`."""
    scheme = url.partition("://")[0]
    if scheme == "https":
        _download(url, path)
    elif "://" not in url or scheme in ("file", "gs", "s3"):
        base, _, name = url.rpartition("/")
        open_store(base or "/").get_file(name, path)
    else:
        raise WheelError(f"{url}: allowed: https://, gs://, s3://, a path")


def _download(url: str, path: Path) -> None:
    for wait in (*_WAITS, None):
        try:
            answer = urllib.request.urlopen(url, timeout=_REQUEST_SECONDS)
            with answer, path.open("wb") as file:
                shutil.copyfileobj(answer, file)
            return
        except OSError as error:  # urllib's are
            code = getattr(error, "code", 500)
            if wait is None or (code < 500 and code != 429):
                reason = getattr(error, "reason", None) or error
                raise WheelError(f"{url}: cannot be fetched: {reason}") from error
            time.sleep(wait)
