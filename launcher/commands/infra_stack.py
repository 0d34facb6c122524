"""The stack behind the commands about foundations: opened, asked about, updated, and its errors
told as the launcher's, with their exit codes. Pulumi and its clients are loaded here."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from infra import changes as words
from infra import engine_cli, errors, google, sharing, state_files
from launcher import api, console, foundations, shipped
from launcher.commands.recipes import called
from launcher.errors import Denied, Exit, HeldElsewhere, LaunchError, UsageError

if TYPE_CHECKING:
    from infra.changes import Step
    from infra.google import Foundations
    from infra.sharing import Declarations, Update
    from infra.stack import Stack, Status
    from launcher.recipe import Loaded

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


def declared(recipe: str, overrides: Sequence[str] = ()) -> tuple[Loaded, Foundations]:
    """The recipe and its foundations, checked; what it takes for granted is said. Errors:
    `UsageError` with every problem."""
    loaded = api.validate(shipped.find(recipe), overrides)
    for note in loaded.notes():
        console.notice(f"note: {note}")
    f = foundations.of_recipe(loaded.recipe, api.env().environ)
    library("infra.stack")
    if wrong := google.problems(f):
        raise UsageError("\n".join(wrong), "correct the recipe; nothing was changed")
    return loaded, f


def opened(
    recipe: str, overrides: Sequence[str] = (), *, yes: bool, making: bool = False
) -> tuple[Foundations, Stack]:
    """The foundations and their stack, with a command line to drive it, fetched if need be. Errors:
    `UsageError`; when `making`, also for names that stand in for variables that are not set."""
    loaded, f = declared(recipe, overrides)
    if making:
        foundations.refuse_placeholders(loaded, f)
    cli = present() or fetched(called(recipe, overrides, None), yes=yes)
    return f, driven(loaded, f, cli)


def present() -> Optional[engine_cli.Cli]:
    """The command line, where this machine has it."""
    here = api.env()
    return engine_cli.find(here.home / "infra", here.environ)


def fetched(given: str, *, yes: bool, why: str = "") -> engine_cli.Cli:
    """The command line, fetched now; never without a word. `given`: the recipe with its options;
    `why` it is needed, for who does not agree."""
    here = api.env()
    with signals(f"launch infra plan {given}"):
        return _installed(here.home / "infra", here.environ, yes, why)


def state_of(loaded: Loaded) -> str:
    """Where the state of a recipe's stack lies."""
    here, settings = api.env(), loaded.recipe.infra
    chosen = settings.state if settings is not None else None
    return state_files.url(here.home / "infra", here.environ, chosen)


def driven(loaded: Loaded, f: Foundations, cli: engine_cli.Cli) -> Stack:
    """The stack of `f`, driven by `cli`."""
    here, settings = api.env(), loaded.recipe.infra
    made: Stack = library("infra.stack").Stack(
        stack_name(f), cli, here.home / "infra", here.environ,
        state=settings.state if settings is not None else None,
        say=console.notice, tell=_progress,
    )  # fmt: skip
    return made


def stack_name(f: Foundations, own: str = "") -> str:
    """The stack that the recipes of the bucket share; with `own`, one beside it."""
    bucket = f.bucket or f.name
    name: str = library("infra.stack").name(f.project, f"{bucket}.{own}" if own else bucket)
    return name


def library(module: str) -> Any:
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


def declarations(found: Optional[Status]) -> Declarations:
    """What a state says of its recipes; of none, nothing."""
    if found is None:
        return sharing.Declarations({}, frozenset())
    there = frozenset(found.resources)
    # What was noted and not adopted in the end is not there; should it be, it is found once more.
    before = sharing.adopted(found.outputs) & there
    return sharing.Declarations(sharing.read(found.outputs), there, before)


def look(stack: Stack, f: Foundations) -> tuple[Optional[Status], Declarations]:
    """What the state says. Errors: `UsageError` for resources in it that neither its recipes nor
    `f` declare: no update goes on, for it would delete them."""
    found = stack.status()
    seen = declarations(found)
    if unknown := seen.unknown(f):
        raise UsageError(
            f"the state of {stack.name} has what no recipe declares: {', '.join(unknown)}",
            "name it in the recipe, or take it out of the state with `pulumi state delete`; "
            "nothing was changed",
        )
    return found, seen


def settle(stack: Stack, *, yes: bool, unlock: bool) -> None:
    """Find out what an interrupted update left open, and say so."""
    for operation in past_lock(stack, stack.settle, yes=yes, unlock=unlock):
        console.notice(f"was interrupted while {operation}: asked the cloud what there is")


def make(f: Foundations, seen: Declarations, stack: Stack, *, yes: bool, unlock: bool) -> list[str]:
    """Note what `f` declares, then update until nothing that is there already is in the way.
    Returns what was adopted."""
    adopted: list[str] = []
    note(f, seen, stack, yes=yes, unlock=unlock)
    while True:
        try:
            _run(stack, seen.applying(f, adopted), yes=yes, unlock=unlock)
            break
        except errors.Failed as failed:
            found = [name for name in failed.existing if name not in adopted]
            if not found or not _may_adopt(found, yes):
                raise
            adopted += found
            # Written down before it is done, beside what this update has made so far.
            seen = declarations(stack.status()).adopting(adopted)
            _run(stack, seen.noting(f), yes=yes, unlock=unlock)
    if adopted:  # as they are so far; now as the recipe has them
        _run(stack, seen.applying(f), yes=yes, unlock=unlock)
    made = declarations(stack.status())
    if not made.noted(f):  # what went is not its any more
        _run(stack, made.noting(f), yes=yes, unlock=unlock)
    return adopted


def note(f: Foundations, seen: Declarations, stack: Stack, *, yes: bool, unlock: bool) -> None:
    """Write into the state what `f` declares, where it does not say so."""
    _unchanged(stack, seen)
    if not seen.noted(f):
        _run(stack, seen.noting(f), yes=yes, unlock=unlock)


def unmake(name: str, seen: Declarations, stack: Stack, *, yes: bool, unlock: bool) -> None:
    """Delete what only recipe `name` declares, then its declaration; of the last recipe, all."""
    _unchanged(stack, seen)
    if not seen.others(name):
        past_lock(stack, stack.destroy, yes=yes, unlock=unlock)
        return
    _run(stack, seen.leaving(name), yes=yes, unlock=unlock)
    _run(stack, seen.forgetting(name), yes=yes, unlock=unlock)


def past_lock(stack: Stack, work: Callable[[], Any], *, yes: bool, unlock: bool) -> Any:
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


def typed(name: str, yes: bool) -> bool:
    """Whether the user typed `name` to have it deleted."""
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
def signals(again: str, destroying: bool = False) -> Iterator[None]:
    """Turn the errors of `infra` into the launcher's; `again` is the command that goes on."""
    try:
        yield
    except errors.Locked as error:
        hint = f"wait for it; if it is surely gone: {again} --unlock"
        raise HeldElsewhere(str(error), hint) from error
    except errors.Passphrase as error:
        raise Denied(str(error), error.hint) from error
    except errors.Unreadable as error:
        raise UsageError(str(error), error.hint) from error
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


def _run(stack: Stack, update: Update, *, yes: bool, unlock: bool) -> None:
    past_lock(stack, partial(stack.up, update), yes=yes, unlock=unlock)


def _unchanged(stack: Stack, seen: Declarations) -> None:
    """Errors: `HeldElsewhere` where another recipe's update came since `look`: what it declared
    would be taken for nobody's."""
    if declarations(stack.status()) != seen:
        raise HeldElsewhere(
            f"another update has changed what the recipes of {stack.name} declare",
            "the same command once more sees that; nothing was changed",
        )


def _installed(home: Path, environ: Mapping[str, str], yes: bool, why: str) -> engine_cli.Cli:
    version = engine_cli.wanted()
    if (unfit := engine_cli.passed_over(environ)) is not None:
        console.notice(unfit)
    console.notice(
        f"pulumi {version} is not on this machine (size: some 100 MB or more; later it fetches its "
        "provider for Google Cloud, which is larger)"
    )
    refusal = f"pulumi {version} would be fetched from {engine_cli.SITE}"
    if not yes and not console.can_ask():
        raise UsageError(
            f"{refusal}{why}",
            "add --yes to have it fetched, once, or put a pulumi of your own on PATH",
        )
    if not yes and not console.confirm(f"Fetch it into {home}?", refusal):
        raise UsageError(f"{refusal}{why}", "or put a pulumi of your own on PATH")
    return engine_cli.install(home, environ, console.notice)


def _may_adopt(found: Sequence[str], yes: bool) -> bool:
    listed = ", ".join(found)
    console.notice(f"there already: {listed}")
    if yes:
        console.notice(
            "adopting: from now on it is as the recipe says, and a destroy leaves it where it is"
        )
        return True
    refusal = f"{listed}: would be adopted, and there is no terminal to ask on"
    return console.confirm("Adopt it, to be as the recipe says? A destroy will leave it.", refusal)


def _progress(step: Step) -> None:
    change = step.change
    doing, done = _DOING.get(change.change, (change.change, f"{change.change} done:"))
    if step.state != "failed":  # why it failed is told at the end, once
        console.notice(f"{done if step.state == 'done' else doing} {change.name}")
