"""Commands about the foundations: plan, up, destroy, status, export, set-secret.

They turn a recipe into what `infra` declares, ask, and say what happened. The engine is
`infra.stack`; Pulumi and its clients are loaded here, when a command needs them.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from infra import changes as words
from infra import engine_cli, errors, google
from launcher import api, console, foundations, shipped
from launcher.errors import Denied, Exit, HeldElsewhere, LaunchError, UsageError

if TYPE_CHECKING:
    from infra.changes import Change, Step
    from infra.google import Foundations
    from infra.stack import Stack
    from launcher.recipe import Loaded

_SIGNS = {"create": "+", "update": "~", "replace": "±", "delete": "-", "leave": "-", "adopt": "+"}
_DOING = {
    "create": ("creating", "created"), "update": ("updating", "updated"),
    "replace": ("replacing", "replaced"), "delete": ("deleting", "deleted"),
    "leave": ("leaving", "left"), "adopt": ("adopting", "adopted"),
}  # fmt: skip


class Interrupted(LaunchError):
    """Ctrl-C while the engine worked."""

    code = Exit.INTERRUPTED


class MayRemain(LaunchError):
    """A destroy that did not come to its end."""

    code = Exit.LEAKED


def plan(recipe: str, *, yes: bool, as_json: bool) -> int:
    """Preview; creates an empty state on first use, and nothing in the cloud."""
    f, stack = _opened(recipe, yes=yes, as_json=as_json)
    with _signals(recipe):
        changes = stack.preview()
        seen = stack.status()
    pending = seen.pending if seen is not None else ()
    if as_json:
        facts = {"changes": _json(f, changes), "pending": list(pending), "missing": list(f.missing)}
        console.document({**_where(stack), **facts})
        return Exit.OK
    _show(f, changes, pending, console.say)
    return Exit.OK


def up(recipe: str, *, yes: bool, unlock: bool, as_json: bool) -> int:
    """Recover, preview, ask, update; adopt what the cloud has already."""
    f, stack = _opened(recipe, yes=yes, as_json=as_json)
    with _signals(recipe):
        _settle(stack, yes=yes, unlock=unlock)
        changes = stack.preview()
        if not as_json:
            _show(f, changes, (), console.notice)
        if any(change.change in ("delete", "leave") for change in changes):
            console.notice(
                f"what {f.name} does not name goes; other recipes with its bucket may need that"
            )
        adopted: list[str] = []
        if any(change.change != "same" for change in changes):
            refusal = f"{recipe}: this changes the cloud, and there is no terminal to ask on"
            if not yes and not console.confirm("Do it?", refusal):
                console.notice("nothing was changed")
                return Exit.OK
            adopted = _made(f, stack, yes=yes, unlock=unlock)
        outputs = dict(stack.outputs())
    if as_json:
        facts = {"changes": _json(f, changes), "adopted": adopted, "outputs": outputs}
        console.document({**_where(stack), **facts})
        return Exit.OK
    for key, value in sorted(outputs.items()):
        console.say(f"{key}: {', '.join(value) if isinstance(value, list) else value}")
    return Exit.OK


def destroy(recipe: str, *, yes: bool, unlock: bool, as_json: bool) -> int:
    """Preview, have the bucket's name typed, delete. Errors: `MayRemain` when it did not end."""
    f, stack = _opened(recipe, yes=yes, as_json=as_json)
    changes: Sequence[Change] = ()
    with _signals(recipe):
        known = stack.status() is not None
        if known:
            _settle(stack, yes=yes, unlock=unlock)
            changes = stack.preview(destroy=True)
    if known:
        if not as_json:
            _show(f, changes, (), console.notice)
        if not _typed(f.bucket or f.project, yes):
            console.notice("nothing was deleted")
            return Exit.OK
        with _signals(recipe, destroying=True):
            _past_lock(stack, stack.destroy, yes=yes, unlock=unlock)
    left = [change.name for change in _ordered(f, changes) if change.change == "leave"]
    if as_json:
        console.document({**_where(stack), "changes": _json(f, changes), "left": left})
        return Exit.OK
    console.say("nothing is left of it" if known else f"{stack.name}: nothing was made")
    if "bucket" in left:
        console.notice(f"but the bucket: gs://{f.bucket} and all in it stay, and cost as before")
        if not f.retain_bucket:
            console.notice("it was made to stay; `launch infra up` takes note of retain_bucket")
    if any(name.startswith("service-") for name in left):
        console.notice(f"the APIs of {f.project} stay on: others may use them")
    return Exit.OK


def status(recipe: str, *, refresh: bool, yes: bool, as_json: bool) -> int:
    """What the state says, and with `refresh` what the cloud says of it."""
    f, stack = _opened(recipe, yes=yes, as_json=as_json)
    with _signals(recipe):
        seen = stack.status()
        drift = stack.drift() if refresh and seen is not None else ()
    differs = [change for change in drift if change.change != "same"]
    if as_json:
        facts: dict[str, Any] = {"made": seen is not None, "missing": list(f.missing)}
        if seen is not None:
            facts |= {"resources": seen.resources, "outputs": seen.outputs,
                      "pending": list(seen.pending), "updated": seen.updated}  # fmt: skip
            facts |= {"drift": _json(f, differs)} if refresh else {}
        console.document({**_where(stack), **facts})
        return Exit.OK
    if seen is None:
        console.say(f"{stack.name}: nothing was made; launch infra up {recipe}")
        return Exit.OK
    console.say(f"{stack.name}: {seen.resources} resources; state: {stack.state}")
    if seen.updated is not None:
        last = seen.updated
        console.say(f"last: {last['kind']} {last['result']}, {last['endTime'] or 'not ended'}")
    for key, value in sorted(seen.outputs.items()):
        console.say(f"{key}: {', '.join(value) if isinstance(value, list) else value}")
    for operation in seen.pending:
        console.say(f"unknown: {operation} was interrupted; launch infra up {recipe} finds out")
    if refresh:
        for change in differs:
            gone = change.change == "delete"
            what = "is gone" if gone else f"differs in {', '.join(change.because) or 'something'}"
            console.say(f"drift: {change.name} {what}")
        if not differs:
            console.say("drift: none")
    return Exit.OK


def export(recipe: str, *, to: Optional[str], as_json: bool) -> int:
    """Write a project that declares the same, without launch."""
    from infra.export import write

    loaded, f = _declared(recipe)
    folder = Path(to or f"infra-{loaded.recipe.name}")
    stack = _library("infra.stack")
    try:
        written = write(f, folder, project=stack.PROJECT, stack=_stack_name(f))
    except FileExistsError as error:
        raise UsageError(str(error), "--to names another folder") from error
    if as_json:
        console.document({"written": [str(file) for file in written]})
        return Exit.OK
    for file in written:
        console.say(f"wrote {file}")
    return Exit.OK


def set_secret(
    recipe: str, name: str, *, from_env: Optional[str], from_file: Optional[str], as_json: bool
) -> int:
    """One new version of a secret; its value is never on a command line."""
    from launcher import secrets

    env = api.env()
    f = foundations.of_recipe(api.validate(shipped.find(recipe)).recipe, env.environ)
    if name not in f.secrets:
        known = ", ".join(f.secrets) or "none"
        raise UsageError(
            f"{recipe} names no secret '{name}' of project {f.project}; it names: {known}",
            f"add `secrets: {{VARIABLE: secret-manager://{f.project}/{name}}}` to the recipe",
        )
    if from_env is not None and from_file is not None:
        raise UsageError("--from-env and --from-file: give one of them")
    if from_env is not None:
        value = secrets.from_variable(from_env, name, env.environ)
    elif from_file is not None:
        value = secrets.from_file(Path(from_file), name)
    else:
        value = _asked(name) if console.can_ask() else secrets.from_stream(sys.stdin.buffer, name)
    version = secrets.set_value(f.project, name, value, env.environ)
    if as_json:
        console.document({"project": f.project, "secret": name, "version": version})
    else:
        console.say(f"{google.secret_uri(f, name)}: version {version}")
    return Exit.OK


def _asked(name: str) -> str:
    import getpass

    return getpass.getpass(f"value of {name} (not shown): ")


def _declared(recipe: str) -> tuple[Loaded, Foundations]:
    """The recipe and its foundations, checked. Errors: `UsageError` with every problem."""
    loaded = api.validate(shipped.find(recipe))
    f = foundations.of_recipe(loaded.recipe, api.env().environ)
    _library("infra.stack")
    if wrong := google.problems(f):
        raise UsageError("\n".join(wrong), "correct the recipe; nothing was changed")
    return loaded, f


def _opened(recipe: str, *, yes: bool, as_json: bool) -> tuple[Foundations, Stack]:
    """The foundations and their stack, with a command line to drive it."""
    loaded, f = _declared(recipe)
    here = api.env()
    home = here.home / "infra"
    with _signals(recipe):
        cli = engine_cli.find(home, here.environ) or _installed(home, here.environ, yes)
    settings = loaded.recipe.infra
    stack = _library("infra.stack").Stack(
        _stack_name(f), google.program(f), cli, home, here.environ,
        state=settings.state if settings is not None else None,
        say=console.notice, tell=_progress,
    )  # fmt: skip
    return f, stack


def _stack_name(f: Foundations) -> str:
    name: str = _library("infra.stack").name(f.project, f.bucket or f.name)
    return name


def _library(module: str) -> Any:
    """A module that needs the extra. Errors: `UsageError` without it."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # else it writes of connections that end
    try:
        importlib.import_module("pulumi_gcp")
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"launch infra needs Pulumi's Python packages: {error}",
            "pip install 'launch-llm[infra]'",
        ) from error


def _installed(home: Path, environ: Any, yes: bool) -> engine_cli.Cli:
    """Install the command line; never without a word."""
    version = engine_cli.wanted()
    console.notice(
        f"pulumi {version} is not on this machine (size: some 100 MB or more; later it fetches its "
        "provider for Google Cloud, which is larger)"
    )
    refusal = f"pulumi {version} would be fetched from {engine_cli.SITE}"
    if not yes and not console.confirm(f"Fetch it into {home}?", refusal):
        raise UsageError(refusal, "or put a pulumi of your own on PATH")
    return engine_cli.install(home, environ, console.notice)


def _settle(stack: Stack, *, yes: bool, unlock: bool) -> None:
    """Find out what an interrupted update left open, and say so."""
    for operation in _past_lock(stack, stack.settle, yes=yes, unlock=unlock):
        console.notice(f"was interrupted while {operation}: asked the cloud what there is")


def _made(f: Foundations, stack: Stack, *, yes: bool, unlock: bool) -> list[str]:
    """Update until nothing that is there already is in the way. Returns what was adopted."""
    adopted: list[str] = []
    while True:
        program = google.program(f, adopted) if adopted else None
        try:
            _past_lock(stack, partial(stack.up, program), yes=yes, unlock=unlock)
            break
        except errors.Failed as failed:
            found = [name for name in failed.existing if name not in adopted]
            if not found or not _may_adopt(found, yes):
                raise
            adopted += found
    if adopted:  # as they are so far; now as the recipe has them
        stack.up()
    return adopted


def _may_adopt(found: Sequence[str], yes: bool) -> bool:
    listed = ", ".join(found)
    console.notice(f"there already: {listed}")
    if yes:
        console.notice("adopting: from now on `launch infra` keeps and deletes it with the rest")
        return True
    refusal = f"{listed}: would be adopted, and there is no terminal to ask on"
    return console.confirm("Adopt it, to be kept and deleted with the rest?", refusal)


def _past_lock(stack: Stack, work: Callable[[], Any], *, yes: bool, unlock: bool) -> Any:
    """`work()`; with `--unlock`, and a yes, once more after breaking the lock in its way."""
    try:
        return work()
    except errors.Locked as lock:
        if not unlock:
            raise
        console.notice(str(lock))
        refusal = f"{lock}; breaking its lock needs a yes"
        question = "Break the lock? Two updates at once damage the state."
        if not yes and not console.confirm(question, refusal):
            raise
    stack.unlock()
    return work()


def _typed(name: str, yes: bool) -> bool:
    if yes:
        return True
    if not console.can_ask():
        raise UsageError(
            f"this deletes what {name} was made with, and there is no terminal to ask on",
            "add --yes to go on without being asked",
        )
    sys.stderr.write(f"Delete it? Type {name}: ")
    sys.stderr.flush()
    return sys.stdin.readline().strip() == name


@contextmanager
def _signals(recipe: str, destroying: bool = False) -> Iterator[None]:
    """Turn the errors of `infra` into the launcher's, with their exit codes."""
    again = f"launch infra {'destroy' if destroying else 'up'} {recipe}"
    try:
        yield
    except errors.Locked as error:
        hint = f"wait for it; if it is surely gone: {again} --unlock"
        raise HeldElsewhere(str(error), hint) from error
    except errors.Passphrase as error:
        raise Denied(str(error), error.hint) from error
    except errors.Stopped as error:
        what = "unlocks the state, asks the cloud what there is, and goes on"
        hint = f"{again}  {what if error.killed else 'goes on'}"
        raise (MayRemain if destroying else Interrupted)(str(error), hint) from error
    except errors.Failed as error:
        hint = f"what was done before is recorded; when this is put right: {again}"
        if destroying:
            raise MayRemain(str(error), hint) from error
        kind = Denied if words.is_access(str(error)) else UsageError
        raise kind(str(error), hint) from error
    except errors.EngineError as error:
        raise Denied(str(error), error.hint) from error


def _progress(step: Step) -> None:
    change = step.change
    doing, done = _DOING.get(change.change, (change.change, f"{change.change} done:"))
    if step.state != "failed":  # why it failed is told at the end, once
        console.notice(f"{done if step.state == 'done' else doing} {change.name}")


def _show(
    f: Foundations, changes: Sequence[Change], pending: Sequence[str], say: Callable[[str], None]
) -> None:
    """Everything that would change, then how much would not, then what has to be there."""
    differing = [change for change in _ordered(f, changes) if change.change != "same"]
    rows = [
        (f"{_SIGNS.get(one.change, '?')} {one.change}", one.kind, one.name, ", ".join(one.because))
        for one in differing
    ]
    headers = ("CHANGE", "KIND", "NAME", "BECAUSE OF")
    shown = len(headers) if any(one.because for one in differing) else len(headers) - 1
    for line in console.columns(headers[:shown], [row[:shown] for row in rows]) if rows else ():
        say(line)
    left = sum(one.change == "leave" for one in differing)
    same = len(changes) - len(differing)
    stay = f", {left} that stay" if left else ""
    say(f"{len(differing) - left} to change, {same} as they should be{stay}")
    for operation in pending:
        say(f"unknown: {operation} was interrupted; `launch infra up` finds out")
    for line in f.missing:
        say(f"not made here: {line}")


def _ordered(f: Foundations, changes: Sequence[Change]) -> list[Change]:
    """In the order of the declaration, and what is not declared (any more) behind it: the engine
    works on several at once, in no order."""
    order = {one.name: number for number, one in enumerate(google.resources(f))}
    return sorted(changes, key=lambda change: (order.get(change.name, len(order)), change.name))


def _where(stack: Stack) -> dict[str, Any]:
    return {"stack": stack.name, "state": stack.state}


def _json(f: Foundations, changes: Sequence[Change]) -> list[dict[str, Any]]:
    return [change.to_json() for change in _ordered(f, changes)]
