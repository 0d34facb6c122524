"""The command `sweep`: list what no live run owns, ask, delete."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from launcher import api, console, sweeping
from launcher.errors import Exit, Leaked, UsageError
from launcher.sweeping import Stray


def sweep(*, everyone: bool, yes: bool, as_json: bool) -> int:
    """Exit code 0 when nothing is left; otherwise `Leaked`, with the commands."""
    env = api.env()
    found = sweeping.find(env, everyone)
    if not as_json:
        for line in _table(found, env.clock.now()):
            console.say(line)
    left: Leaked | None = None
    deleted = found if found and _sure(found, env.owner, everyone, yes, as_json) else []
    try:
        sweeping.delete(env, deleted)
        if found and not deleted:
            left = sweeping.leaked(found)
    except Leaked as leak:
        left = leak
    if as_json:
        rows = [stray.to_json() for stray in found]
        commands = left.commands if left is not None else []
        console.document({"found": rows, "left": _names(left), "commands": commands})
        return int(Exit.LEAKED if left is not None else Exit.OK)
    if left is not None:
        raise left
    gone = f"deleted {len(found)}: " if found else ""
    console.say(f"{gone}nothing carries your label that no live run owns")
    return int(Exit.OK)


def _sure(found: Sequence[Stray], owner: str, everyone: bool, yes: bool, as_json: bool) -> bool:
    """`--yes` answers for what is one's own. What is others' takes the word `yes`, typed here."""
    others = sorted({stray.found.owner for stray in found} - {owner})
    if everyone and others:
        if as_json:
            return False
        if not console.can_ask():
            raise UsageError(
                f"{', '.join(others)} may miss what this deletes, and there is no terminal",
                "`launch sweep --everyone` on a terminal, where somebody types yes",
            )
        sys.stderr.write(f"Delete what belongs to {', '.join(others)} too? Type yes: ")
        sys.stderr.flush()
        return sys.stdin.readline().strip() == "yes"
    if yes or as_json:
        return yes
    refusal = f"{len(found)} would be deleted, and there is no terminal to ask on"
    return console.confirm(f"Delete {len(found)}?", refusal)


def _table(found: Sequence[Stray], now: float) -> list[str]:
    rows = [
        (
            stray.found.ref.name,
            stray.found.ref.place,
            stray.found.owner,
            _ago(stray.found.created, now),
            _ago(stray.found.bills_since, now),
            stray.doubt or stray.command,
        )
        for stray in found
    ]
    headers = ("NAME", "PLACE", "OWNER", "AGE", "BILLS FOR", "DELETED BY HAND WITH")
    return console.columns(headers, rows) if rows else []


def _ago(since: float | None, now: float) -> str:
    return "-" if since is None else console.duration(now - since)


def _names(left: Leaked | None) -> list[str]:
    return [] if left is None else [ref.name for ref in left.refs]
