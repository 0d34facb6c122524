"""The passphrase that the engine encrypts its state with: never empty, never shown, never lost.

The environment's wins (PULUMI_CONFIG_PASSPHRASE, PULUMI_CONFIG_PASSPHRASE_FILE), as with the
engine's own command line; else it is made once at random and kept in a file of mode 0600.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from infra.errors import Passphrase

WORD, FILE = "PULUMI_CONFIG_PASSPHRASE", "PULUMI_CONFIG_PASSPHRASE_FILE"


def place(home: Path) -> Path:
    return home / "passphrase"


def variables(home: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """What the engine needs in its environment beside what it inherits; names a file, holds no
    secret. Errors: `Passphrase` where there is none, or an empty or unprotected one."""
    if WORD in environ:
        if not environ[WORD]:
            raise Passphrase(f"{WORD} is empty", f"unset {WORD}, or give it its value")
        return {}
    if FILE in environ:
        _check(Path(environ[FILE]), FILE)
        return {}
    kept = place(home)
    if not kept.exists():
        raise Passphrase(
            "the state of these foundations exists, but the passphrase it was made with is not "
            f"here: {kept} is missing",
            f"set {WORD} or {FILE}, or copy that file from the machine that made the state",
        )
    _check(kept, "the passphrase")
    if kept.stat().st_mode & 0o077:
        raise Passphrase(f"{kept}: others can read it", f"chmod 600 {kept}")
    return {FILE: str(kept)}


def ensure(home: Path, environ: Mapping[str, str], shared: bool) -> bool:
    """Make one where neither the environment nor `home` has any. True: it was made now. Errors:
    `Passphrase` for a state that is `shared`: one that only this machine has would be lost with it.
    """
    if WORD in environ or FILE in environ or place(home).exists():
        return False
    if shared:
        raise Passphrase(
            "the state is in a bucket, for others to use too, and there is no passphrase for it",
            f"choose one, keep it where all who use the state can read it, and set {FILE} to its "
            f"file, or {WORD}",
        )
    home.mkdir(parents=True, exist_ok=True)
    temporary = home / f".passphrase.{secrets.token_hex(4)}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, secrets.token_urlsafe(32).encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    try:
        os.link(temporary, place(home))  # whole or not at all, and never over another one
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def _check(path: Path, what: str) -> None:
    try:
        text = path.read_text().strip()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise Passphrase(f"{what}: {path}: {why}", f"set {FILE} to a file that holds it") from error
    if not text:
        raise Passphrase(f"{what}: {path} is empty", "restore it from a copy")
