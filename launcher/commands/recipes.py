"""Commands about recipes and this machine: plan, validate, init, recipes, schema, doctor."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from launcher import api, console, shipped
from launcher.errors import Exit, LaunchError, UsageError

if TYPE_CHECKING:
    from launcher.difference import Difference

#: The comparison of a plan that there is no run to compare with.
NOTHING: dict[str, Any] = {"against": None, "changes": [], "unchanged": 0, "requests": {}}


def plan(
    recipe: str,
    overrides: Sequence[str],
    on: Optional[str],
    *,
    explain: bool = False,
    against: Optional[str] = None,
    as_json: bool,
) -> int:
    ready = api.Prepared(shipped.find(recipe), overrides, on)
    planned, differs = ready.plan, _difference(ready, against)
    if differs is not None and differs.in_place and differs.blocks():
        planned = replace(planned, refusal=None)  # of a run that starts now: `up` starts none
    if as_json:
        compared = NOTHING if differs is None else differs.to_json()
        console.document({**planned.to_json(), **compared})
    else:
        for line in (*planned.lines(), *(planned.explanation() if explain else ())):
            console.say(line)
        for line in () if differs is None else differs.lines(called(recipe, overrides, on)):
            console.say(line)
    return planned.refusal.exit_code if planned.refusal is not None else Exit.OK


def validate(recipe: str, overrides: Sequence[str], on: Optional[str], *, as_json: bool) -> int:
    path = shipped.find(recipe)
    loaded = api.validate(path, overrides, on)
    notes = [*loaded.notes(), *api.untold(loaded, api.env())]
    if as_json:
        console.document(
            {"path": str(path), "fingerprint": loaded.fingerprint, "recipe": loaded.canonical,
             "notes": notes}
        )  # fmt: skip
        return Exit.OK
    names = ", ".join(stage.id for stage in loaded.recipe.stages)
    console.say(f"{path}: valid; stages: {names}")
    for note in notes:
        console.say(f"note: {note}")
    return Exit.OK


def init(name: str, path: Optional[str], *, as_json: bool) -> int:
    written = shipped.init(name, None if path is None else Path(path), into=_is_folder(path))
    if as_json:
        console.document({"recipe": str(written[0]), "written": [str(file) for file in written]})
        return Exit.OK
    for file in written:
        console.say(f"wrote {file}")
    console.notice(f"next: launch plan {shlex.quote(str(written[0]))}")
    return Exit.OK


def listing(*, as_json: bool) -> int:
    found = shipped.recipes()
    if as_json:
        facts = [
            {"name": r.name, "path": str(r.path), "does": r.description, "needs": r.needs,
             "costs": r.costs}
            for r in found
        ]  # fmt: skip
        console.document({"recipes": facts})
        return Exit.OK
    for recipe in found:
        console.say(console.paint(recipe.name, "bold"))
        for label, text in (
            ("", recipe.description),
            ("needs: ", recipe.needs),
            ("costs: ", recipe.costs),
        ):
            for line in console.wrapped(label + text) if text else ():
                console.say(f"  {line}")
    console.notice("launch up NAME runs one; launch init NAME copies it here, to change it")
    return Exit.OK


def schema() -> int:
    from launcher.schema import json_schema

    console.say(json.dumps(json_schema(), indent=2))
    return Exit.OK


def doctor(
    recipe: Optional[str],
    overrides: Sequence[str] = (),
    on: Optional[str] = None,
    *,
    as_json: bool,
) -> int:
    from launcher.doctor import examine

    if recipe is None and (overrides or on is not None):
        raise UsageError("--set and --on change a recipe, and none is given",
                         "launch doctor RECIPE --set KEY=VALUE")  # fmt: skip
    rows = list(examine(api.env(), shipped.find(recipe) if recipe else None, overrides, on))
    failing = {row.name for row in rows if row.result == "fail"}
    if as_json:
        console.document(
            {
                "ok": not failing,
                "checks": [
                    {"name": r.name, "result": r.result, "detail": r.detail, "fix": r.fix}
                    for r in rows
                ],
            }
        )
    else:
        for line in console.checks(rows):
            console.say(line)
    if failing == {"recipe"}:
        return Exit.USAGE
    return Exit.ACCESS if failing else Exit.OK


def called(recipe: str, overrides: Sequence[str], on: Optional[str]) -> str:
    """The recipe with its options, as a command line names it."""
    words = [recipe, *(f"--set {shlex.quote(text)}" for text in overrides)]
    return " ".join([*words, *([f"--on {on}"] if on is not None else [])])


def _difference(ready: api.Prepared, against: Optional[str]) -> Optional[Difference]:
    """None also where a live run cannot be read: that is said, and the plan stands without it."""
    try:
        return api.difference(ready, against=against)
    except LaunchError as error:
        if against is not None:
            raise
        console.notice(f"not compared with a live run: {error}")
        return None


def _is_folder(path: Optional[str]) -> bool:
    return path is not None and path.endswith("/")
