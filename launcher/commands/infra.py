"""Commands about the foundations: plan, up, destroy, status, export, set-secret.

They turn a recipe into what `infra` declares, ask, and say what happened. The stack behind them is
in `infra_stack` beside this file.
"""

from __future__ import annotations

import getpass
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from infra import by_hand, engine_cli, errors, google, sharing, state_files
from infra.changes import kind_of
from launcher import api, console, foundations, shipped
from launcher.commands import infra_stack as engine
from launcher.commands.recipes import called
from launcher.errors import Exit, UsageError

if TYPE_CHECKING:
    from infra.changes import Change
    from infra.google import Declared, Foundations
    from infra.sharing import Declarations
    from infra.stack import Stack, Status
    from infra.state_files import Holder
    from launcher.recipe import Loaded

_SIGNS = {"create": "+", "update": "~", "replace": "±", "delete": "-", "leave": "-", "adopt": "+"}


def plan(recipe: str, overrides: Sequence[str] = (), *, yes: bool, as_json: bool) -> int:
    """Preview; creates an empty state on first use, and nothing in the cloud. Without the engine,
    and before it is fetched: what the recipe declares."""
    given = called(recipe, overrides, None)
    loaded, f = engine.declared(recipe, overrides)
    cli = engine.present()
    if cli is None:
        if not as_json:
            _say_declared(f)
        cli = engine.fetched(given, yes=yes, why="; it finds out what of this is there already")
    stack = engine.driven(loaded, f, cli)
    with engine.signals(f"launch infra up {given}"):
        found, seen = engine.look(stack, f)
        shown = _Shown(f, seen, stack.preview(seen.applying(f)))
    if as_json:
        facts = {**shown.to_json(), "pending": list(found.pending) if found is not None else [],
                 "running": _running(found), "missing": list(f.missing),
                 "notes": loaded.notes()}  # fmt: skip
        console.document({**_where(stack), **facts})
        return Exit.OK
    shown.say(console.say)
    _say_open(found, given, console.say)
    return Exit.OK


def up(
    recipe: str, overrides: Sequence[str] = (), *, yes: bool, unlock: bool, as_json: bool
) -> int:
    """Recover, preview, ask, update; adopt what the cloud has already."""
    given = called(recipe, overrides, None)
    f, stack = engine.opened(recipe, overrides, yes=yes, making=True)
    with engine.signals(f"launch infra up {given}"):
        engine.settle(stack, yes=yes, unlock=unlock)
        _, seen = engine.look(stack, f)
        shown = _Shown(f, seen, stack.preview(seen.applying(f)))
        if not as_json:
            shown.say(console.notice)
        adopted: list[str] = []
        agreed = True
        if not shown.differing:
            engine.note(f, seen, stack, yes=yes, unlock=unlock)
        elif agreed := _agreed(given, yes):
            adopted = engine.make(f, seen, stack, yes=yes, unlock=unlock)
    if as_json:
        facts = {**shown.to_json(), "done": agreed, "adopted": adopted,
                 "outputs": google.outputs(f)}  # fmt: skip
        console.document({**_where(stack), **facts})
        return Exit.OK
    if not agreed:
        console.notice("nothing was changed")
        return Exit.OK
    _say_staying(shown.staying)
    _say_outputs(google.outputs(f))
    return Exit.OK


def destroy(
    recipe: str, overrides: Sequence[str] = (), *, forget: Optional[str], yes: bool, unlock: bool,
    as_json: bool,
) -> int:  # fmt: skip
    """Preview, have the bucket's name typed, delete what only this recipe (or `forget`, of the same
    bucket) declares; of the last recipe, all. Errors: `MayRemain` when it did not end."""
    f, stack = engine.opened(recipe, overrides, yes=yes)
    name = forget or f.name
    again = f"launch infra destroy {called(recipe, overrides, None)}" + (
        f" --forget {forget}" if forget else ""
    )
    changes: Sequence[Change] = ()
    with engine.signals(again):
        engine.settle(stack, yes=yes, unlock=unlock)
        found, seen = engine.look(stack, f)
        others = list(seen.others(name))
        known = found is not None and (name in seen.records or not others)
        if forget and forget not in seen.records:
            raise UsageError(f"{stack.name} has no recipe {forget}; it has: {_listed(seen)}")
        if known:
            changes = stack.preview(seen.leaving(name) if others else None)
    shown = _Shown(seen.records.get(name, (f,))[0], seen, changes, going=True)
    done = known
    if known:
        if not as_json:
            shown.say(console.notice)
        done = engine.typed(f.bucket or f.project, yes)
    if done:
        with engine.signals(again, destroying=True):
            engine.unmake(name, seen, stack, yes=yes, unlock=unlock)
    left = [change.name for change in shown.differing if change.change == "leave"]
    if as_json:
        facts = {**shown.to_json(), "done": done, "left": left, "others": others,
                 "there_before": [one.name for one in shown.staying]}  # fmt: skip
        console.document({**_where(stack), **facts})
    elif known and not done:
        console.notice("nothing was deleted")
    elif not known:
        of = f" for {name}; it has: {', '.join(others)}" if others else ""
        console.say(f"{stack.name}: nothing was made{of}")
    else:
        _say_left(f, name, others, left)
        _say_staying(shown.staying)
    return Exit.OK


def status(
    recipe: str, overrides: Sequence[str] = (), *, refresh: bool, yes: bool, as_json: bool
) -> int:
    """What the state says, and with `refresh` what the cloud says of it; without the engine, what
    is known without it."""
    given = called(recipe, overrides, None)
    loaded, f = engine.declared(recipe, overrides)
    cli = engine.present()
    if cli is None and not yes:
        return _status_unread(loaded, f, given, as_json)
    stack = engine.driven(loaded, f, cli or engine.fetched(given, yes=yes))
    with engine.signals(f"launch infra up {given}"):
        found = stack.status()
        seen = engine.declarations(found)
        last = stack.last_update()
        drift = stack.drift() if refresh and found is not None else ()
    differs = [change for change in drift if change.change != "same"]
    facts: dict[str, Any] = {"made": found is not None, "missing": list(f.missing)}
    if found is None:
        if as_json:
            console.document({**_where(stack), **facts})
        else:
            console.say(f"{stack.name}: nothing was made; launch infra up {given}")
        return Exit.OK
    ours = (sharing.OUTPUT, sharing.BEFORE)
    outputs = {key: value for key, value in found.outputs.items() if key not in ours}
    before = [one.name for one in seen.staying() if one.name in seen.before]
    alone = {name: seen.alone(name) for name in sorted(seen.records)}
    if as_json:
        facts |= {"resources": len(found.resources), "outputs": outputs, "recipes": alone,
                  "unknown": seen.unknown(), "pending": list(found.pending),
                  "running": _running(found), "there_before": before,
                  "updated": last}  # fmt: skip
        facts |= {"drift": [change.to_json() for change in differs]} if refresh else {}
        console.document({**_where(stack), **facts})
        return Exit.OK
    console.say(f"{stack.name}: {len(found.resources)} resources; state: {stack.state}")
    if last is not None:
        console.say(f"last: {last['kind']} {last['result']}, {last['endTime'] or 'not ended'}")
    _say_outputs(outputs)
    _say_recipes(alone)
    if before:
        console.say(f"there before: {', '.join(before)}; a destroy leaves that")
    for one in seen.unknown():
        console.say(f"no recipe declares {one}")
    _say_open(found, given, console.say)
    if refresh:
        _say_drift(differs)
    return Exit.OK


def export(recipe: str, overrides: Sequence[str] = (), *, to: Optional[str], as_json: bool) -> int:
    """Write a project that declares the same, without launch; beside the stack where others share
    that, for an update of it by this project would delete what is theirs."""
    from infra.export import write

    loaded, f = engine.declared(recipe, overrides)
    folder = Path(to or f"infra-{loaded.recipe.name}")
    stack = engine.stack_name(f)
    with engine.signals(f"launch infra export {called(recipe, overrides, None)}"):
        others = _sharing(loaded, f)
    own = engine.stack_name(f, own=f.name) if others else stack
    try:
        written = write(f, folder, project=engine.library("infra.stack").PROJECT, stack=own)
    except OSError as error:
        what = str(error)
        if error.strerror:
            what = f"{error.filename or folder}: cannot be written: {error.strerror}"
        raise UsageError(what, "--to names another folder") from error
    if others:
        console.notice(
            f"{stack} also has what {', '.join(others)} declared: that is not in this project, "
            f"which has a stack of its own, {own}"
        )
    if as_json:
        document = {"written": [str(file) for file in written], "stack": own, "others": others}
        console.document(document)
        return Exit.OK
    for file in written:
        console.say(f"wrote {file}")
    return Exit.OK


def set_secret(
    recipe: str, name: str, overrides: Sequence[str] = (), *, from_env: Optional[str],
    from_file: Optional[str], as_json: bool,
) -> int:  # fmt: skip
    """One new version of a secret; its value is never on a command line."""
    from launcher import secrets

    env = api.env()
    loaded = api.validate(shipped.find(recipe), overrides)
    for note in loaded.notes():
        console.notice(f"note: {note}")
    f = foundations.of_recipe(loaded.recipe, env.environ)
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
    elif console.can_ask():
        value = getpass.getpass(f"value of {name} (not shown): ")
    else:
        value = secrets.from_stream(sys.stdin.buffer, name)
    version = secrets.set_value(f.project, name, value, env.environ)
    if as_json:
        console.document({"project": f.project, "secret": name, "version": version})
    else:
        console.say(f"{google.secret_uri(f, name)}: version {version}")
    return Exit.OK


class _Shown:
    """Changes of a stack as those of recipe `f`, which is `going` when it is destroyed: what others
    declare and what stays is theirs."""

    def __init__(
        self, f: Foundations, seen: Declarations, changes: Sequence[Change], going: bool = False
    ) -> None:
        self._f, self._seen, self._going = f, seen, going
        order = {one.name: number for number, one in enumerate(google.resources(f))}
        # The engine works on several at once, in no order.
        ordered = sorted(changes, key=lambda one: (order.get(one.name, len(order)), one.name))
        own = () if going else order
        self._changes = [one for one in ordered if one.change != "same" or one.name in own]
        self._more = len(ordered) - len(self._changes)
        self.differing = [one for one in self._changes if one.change != "same"]
        left = {one.name for one in self.differing if one.change == "leave"}
        #: What goes from the state and stays in the cloud, for it was there before.
        self.staying = [one for one in seen.staying(f) if one.name in left]
        altered = {one.name for one in self.differing if one.change in ("update", "replace")}
        self._otherwise = {
            name: others for name, others in seen.otherwise(f).items() if name in altered
        }

    def to_json(self) -> dict[str, Any]:
        changes = [
            {**one.to_json(), "otherwise_in": self._otherwise.get(one.name, [])}
            for one in self._changes
        ]
        return {"changes": changes}

    def say(self, say: Callable[[str], None]) -> None:
        """Everything that would change, then how much would not, then what has to be there."""
        before = {one.name for one in self.staying}
        rows = [
            (f"{_SIGNS.get(one.change, '?')} {one.change}", one.kind,
             f"{one.name} (was there before)" if one.name in before else one.name, self._why(one))
            for one in self.differing
        ]  # fmt: skip
        headers = ("CHANGE", "KIND", "NAME", "BECAUSE OF")
        shown = len(headers) if any(row[-1] for row in rows) else len(headers) - 1
        for line in console.columns(headers[:shown], [row[:shown] for row in rows]) if rows else ():
            say(line)
        same = len(self._changes) - len(self.differing)
        should = "" if self._going else f", {same} as they should be"
        left = sum(one.change == "leave" for one in self.differing)
        stay = f", {left} that stay" if left else ""
        say(f"{len(self.differing) - left} to change{should}{stay}")
        if self._more:
            others = ", ".join(self._seen.others(self._f.name))
            say(f"{self._more} more stay as they are, for {others}")
        for line in () if self._going else self._f.missing:
            say(f"not made here: {line}")

    def _why(self, one: Change) -> str:
        others = self._otherwise.get(one.name)
        because = ", ".join(one.because)
        return f"{because}; otherwise in {', '.join(others)}" if others else because


def _say_declared(f: Foundations) -> None:
    """What is known before the engine looks."""
    rows = [(kind_of(one.type_token), one.name) for one in google.resources(f)]
    for line in console.columns(("KIND", "NAME"), rows):
        console.say(line)
    console.say(f"{len(rows)} declared; which of them are there is not known yet")
    for line in f.missing:
        console.say(f"not made here: {line}")


def _status_unread(loaded: Loaded, f: Foundations, given: str, as_json: bool) -> int:
    """The status that takes no engine: it is not worth a download to look."""
    name, state = engine.stack_name(f), engine.state_of(loaded)
    made, holder = state_files.made(state, name), state_files.running(state, name)
    missing = f"pulumi {engine_cli.wanted()} is not on this machine"
    if as_json:
        running = None if holder is None else vars(holder)
        console.document(
            {
                "stack": name,
                "state": state,
                "made": made,
                "running": running,
                "missing": list(f.missing),
                "unread": missing if made is not False else None,
            }
        )
        return Exit.OK
    if made is False:
        console.say(f"{name}: nothing was made here yet; state: {state}; launch infra up {given}")
        return Exit.OK
    what = "there is a state" if made else "whether anything was made is not known"
    console.say(f"{name}: {what}; state: {state}")
    if holder is not None:
        console.say(_update_runs(holder))
    console.notice(f"what it holds is not known: {missing}; put one on PATH, or add --yes to have "
                   "it fetched (some 100 MB, once)")  # fmt: skip
    return Exit.OK


def _say_open(found: Optional[Status], given: str, say: Callable[[str], None]) -> None:
    """What is going on, or what an interruption left open."""
    if found is None:
        return
    if found.running is not None:
        say(_update_runs(found.running))
        return
    for operation in found.pending:
        say(f"unknown: {operation} was interrupted; launch infra up {given} finds out")


def _update_runs(holder: Holder) -> str:
    return f"an update runs since {holder.since} (process {holder.pid} on {holder.host})"


def _running(found: Optional[Status]) -> Optional[dict[str, Any]]:
    return None if found is None or found.running is None else vars(found.running)


def _say_staying(staying: Sequence[Declared]) -> None:
    for one in staying:
        command = by_hand.deletion(one)
        console.notice(f"left {one.name}: it was there before; `{command}` deletes it")


def _agreed(recipe: str, yes: bool) -> bool:
    refusal = f"{recipe}: this changes the cloud, and there is no terminal to ask on"
    return yes or console.confirm("Do it?", refusal)


def _sharing(loaded: Loaded, f: Foundations) -> list[str]:
    """The other recipes of the stack, as far as this machine can tell."""
    here = api.env()
    try:
        cli = engine_cli.find(here.home / "infra", here.environ)
        found = engine.driven(loaded, f, cli).status() if cli is not None else None
        return list(engine.declarations(found).others(f.name))
    except errors.Stopped:
        raise
    except errors.EngineError as error:
        console.notice(f"whether other recipes share the stack is not known: {error}")
        return []


def _say_outputs(outputs: Mapping[str, Any]) -> None:
    for key, value in sorted(outputs.items()):
        console.say(f"{key}: {', '.join(value) if isinstance(value, list) else value}")


def _say_recipes(alone: Mapping[str, Sequence[str]]) -> None:
    """The recipes of a stack, and where it has several, what only each of them declares."""
    for name, own in alone.items():
        if len(alone) == 1:
            console.say(f"recipe {name}")
            return
        console.say(f"recipe {name}: {len(own)} declared by it alone")
        for one in own:
            console.say(f"  {one}")


def _say_left(f: Foundations, name: str, others: Sequence[str], left: Collection[str]) -> None:
    if others:
        console.say(
            f"nothing is left of what only {name} declared; the rest stays for {', '.join(others)}"
        )
    else:
        console.say("nothing is left of it")
    if "bucket" in left:
        console.notice(f"but the bucket: gs://{f.bucket} and all in it stay, and cost as before")
        if not f.retain_bucket:
            console.notice("it was made to stay; `launch infra up` takes note of retain_bucket")
    if any(one.startswith("service-") for one in left):
        console.notice(f"the APIs of {f.project} stay on: others may use them")


def _say_drift(differs: Sequence[Change]) -> None:
    for change in differs:
        gone = change.change == "delete"
        what = "is gone" if gone else f"differs in {', '.join(change.because) or 'something'}"
        console.say(f"drift: {change.name} {what}")
    if not differs:
        console.say("drift: none")


def _listed(seen: Declarations) -> str:
    return ", ".join(sorted(seen.records)) or "none"


def _where(stack: Stack) -> dict[str, Any]:
    return {"stack": stack.name, "state": stack.state}
