"""Recipes that share a stack: what each declares, so that an update for one leaves others alone.

The declarations lie in the stack's outputs, and are written there before anything is made: whatever
an interrupted update leaves behind is known to be of that recipe. An update for one recipe declares
what that one says, and holds what the others declare as the state has it. (An update of a part of
the stack by targets would do neither: it skips what the parts depend on.)

Beside them lie the names of what was there before and was adopted: another stack, or a person, may
need it, so it stays in the cloud when it is destroyed, or no longer declared.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any, Union, get_args, get_origin, get_type_hints

from infra.errors import Unreadable
from infra.google import (
    ACCOUNT_ROLE,
    BUCKET,
    PROJECT_ROLE,
    REPOSITORY_ROLE,
    SECRET_ROLE,
    SERVICE,
    Declared,
    Foundations,
    outputs,
    registered,
    resources,
)

#: The output that has the declarations, {recipe: text}, and the version of those texts.
OUTPUT, VERSION = "recipes", 1
#: The output that has the names of the resources that were adopted.
BEFORE = "there_before"
#: Grants on what other stacks may have too; the bucket is this stack's alone.
_SHARED_ROLES = (PROJECT_ROLE, ACCOUNT_ROLE, SECRET_ROLE, REPOSITORY_ROLE)
#: What has a rule of its own for staying: `retain_bucket`, and an API is never switched off.
_OWN_RULE = (BUCKET, SERVICE)

#: Recipe -> what it declares; behind the first, what it declared before, for as long as something
#: of that may be there. Never empty.
Records = Mapping[str, tuple[Foundations, ...]]


@dataclass(frozen=True)
class Update:
    """A program for the engine: declares `declared` and exports `exports`, `hold` and `adopt` as of
    `google.registered`."""

    declared: tuple[Declared, ...]
    exports: Mapping[str, Any]
    adopt: Collection[str]
    hold: tuple[str, ...]

    def __call__(self) -> None:
        registered(self.declared, self.exports, self.adopt, self.hold)()


@dataclass(frozen=True)
class Declarations:
    """What the recipes of a stack declare, the names of the resources that its state has, and of
    those that were adopted."""

    records: Records
    there: frozenset[str]
    before: frozenset[str] = frozenset()

    def adopting(self, names: Collection[str]) -> Declarations:
        """These, with `names` among what was there before."""
        return replace(self, before=self.before.union(names))

    def stays(self, one: Declared) -> bool:
        """Whether `one` stays in the cloud because it was there before, or may have been: the
        service takes a grant that is there without a word, so one between what was there before
        counts as that."""
        if one.type_token in _OWN_RULE:
            return False
        between = [name for name in one.after if not name.startswith("service-")]
        granted = one.type_token in _SHARED_ROLES and bool(between)
        return one.name in self.before or (granted and self.before.issuperset(between))

    def staying(self, *more: Foundations) -> list[Declared]:
        """What the recipes and `more` declare and `stays`, each once."""
        of = [*more, *(f for records in self.records.values() for f in records)]
        found = {one.name: one for f in of for one in resources(f) if self.stays(one)}
        return list(found.values())

    def applying(self, f: Foundations, adopt: Collection[str] = ()) -> Update:
        """What makes `f` so and changes nothing that only others declare. What `f` no longer
        names goes, unless another names it. `adopt` as of `google.program`."""
        others = self.others(f.name)
        said = (f, *_newest(others))
        return self._update(resources(f), others, said, self._with(f), adopt)

    def noting(self, f: Foundations) -> Update:
        """What writes down that `f` is declared, and changes nothing else. It runs before
        `applying`, and after, when something that `f` no longer names is gone."""
        records = self._with(f)
        return self._update((), records, _newest(self.records), records)

    def noted(self, f: Foundations) -> bool:
        return self.records == self._with(f)

    def leaving(self, name: str) -> Update:
        """What deletes that which only recipe `name` declares. The declaration stays, so that an
        interrupted one can be gone on with; `forgetting` comes after it."""
        others = self.others(name)
        return self._update((), others, _newest(others), self.records)

    def forgetting(self, name: str) -> Update:
        others = self.others(name)
        return self._update((), others, _newest(others), others)

    def others(self, name: str) -> Records:
        """The declarations of every recipe but `name`."""
        return {other: self.records[other] for other in sorted(self.records) if other != name}

    def alone(self, name: str) -> list[str]:
        """Resources in the state that recipe `name` declares, and no other recipe."""
        shared = _names(self.others(name))
        return [one for one in _names({name: self.records[name]})
                if one in self.there and one not in shared]  # fmt: skip

    def otherwise(self, f: Foundations) -> dict[str, list[str]]:
        """Resources of `f` -> the other recipes that declare them with other inputs."""
        own = {one.name: one for one in resources(f)}
        found: dict[str, list[str]] = {}
        for other, (declared, *_) in self.others(f.name).items():
            for one in resources(declared):
                mine = own.get(one.name)
                if mine and (mine.inputs, mine.retain) != (one.inputs, one.retain):
                    found.setdefault(one.name, []).append(other)
        return found

    def unknown(self, *more: Foundations) -> list[str]:
        """Resources in the state that neither a recipe nor `more` declares: an update would delete
        them, and nobody said so."""
        known = {one.name for f in more for one in resources(f)}.union(_names(self.records))
        return sorted(self.there - known)

    def _with(self, f: Foundations) -> Records:
        """The declarations with `f` as its recipe's newest. An older one stays while the state has
        something that nobody else names: a deletion that failed is still its recipe's."""
        named = {one.name for one in resources(f)}.union(_names(self.others(f.name)))
        left = self.there - named
        older = (old for old in self.records.get(f.name, ())
                 if old != f and left.intersection(_names({f.name: (old,)})))  # fmt: skip
        return {**self.records, f.name: (f, *older)}

    def _update(
        self,
        declared: Sequence[Declared],
        held: Records,
        said: Sequence[Foundations],
        noted: Records,
        adopt: Collection[str] = (),
    ) -> Update:
        kept = list(self._held(held, {one.name for one in declared}))
        exports = {**_merged(said), OUTPUT: written(noted)}
        if before := sorted(self.before.intersection(_names(noted))):
            exports[BEFORE] = before
        made = [replace(one, retain=True) if self.stays(one) else one for one in declared]
        return Update((*made, *kept), exports, adopt, tuple(one.name for one in kept))

    def _held(self, records: Records, taken: set[str]) -> Iterator[Declared]:
        """What `records` declare and the state has, each once, without what is in `taken`."""
        seen = set(taken)
        for one in (one for of in records.values() for f in of for one in resources(f)):
            if one.name in self.there and one.name not in seen:
                after = tuple(name for name in one.after if name in seen)
                yield replace(one, after=after, retain=one.retain or self.stays(one))
                seen.add(one.name)


def read(stack_outputs: Mapping[str, Any]) -> dict[str, tuple[Foundations, ...]]:
    """The declarations in a stack's outputs. Errors: `Unreadable` for what is not just that."""
    found = stack_outputs.get(OUTPUT, {})
    if not isinstance(found, Mapping):
        raise _unreadable(f"{found!r} is no mapping")
    return {name: _of_text(name, text) for name, text in found.items()}


def adopted(stack_outputs: Mapping[str, Any]) -> frozenset[str]:
    """The names in a stack's outputs of what was there before. Errors: `Unreadable`."""
    found = stack_outputs.get(BEFORE, [])
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise _unreadable(f"{BEFORE}: {found!r} is no list of names")
    return frozenset(found)


def written(records: Records) -> dict[str, str]:
    """The output for `records`. Texts, for the engine knows no whole numbers and drops nulls."""
    return {
        name: json.dumps({"version": VERSION, "declares": [asdict(f) for f in of]}, sort_keys=True)
        for name, of in sorted(records.items())
    }


def _of_text(name: str, text: Any) -> tuple[Foundations, ...]:
    try:
        told = json.loads(text)
    except (TypeError, ValueError) as error:
        raise _unreadable(f"{name}: {error}") from error
    version = told.get("version") if isinstance(told, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise Unreadable(
            f"the state has a declaration of recipe {name} by a newer launch (version {version}; "
            f"this one reads {VERSION})",
            "use that launch; nothing was changed",
        )
    if version != VERSION:
        raise _unreadable(f"{name}: no version")
    try:
        of: tuple[Foundations, ...] = _built(tuple[Foundations, ...], told.get("declares"), name)
    except _Wrong as error:
        raise _unreadable(str(error)) from error
    if not of or any(f.name != name for f in of):
        raise _unreadable(f"{name}: not a declaration of {name}")
    return of


def _unreadable(what: str) -> Unreadable:
    return Unreadable(
        f"the state's declarations of recipes are damaged: {what}",
        "restore the state (the engine keeps copies in .pulumi/backups); nothing was changed",
    )


class _Wrong(Exception):
    """A value that is not of its type: where, and what it is."""


def _built(hint: Any, value: Any, at: str) -> Any:
    """`value`, plain JSON, as the type `hint`; nothing is converted or left out."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Union:
        return None if value is None else _built(inner[0], value, at)
    if origin is tuple:
        items = enumerate(_is(list, value, at))
        return tuple(_built(inner[0], item, f"{at}[{index}]") for index, item in items)
    if origin is not None:
        return {k: _built(inner[1], v, f"{at}.{k}") for k, v in _is(dict, value, at).items()}
    if not is_dataclass(hint):
        return _is(hint, value, at)
    given = _is(dict, value, at)
    known = {one.name for one in fields(hint)}
    for key in given.keys() ^ known:
        raise _Wrong(f"{at}.{key}: {'unknown' if key in given else 'missing'}")
    kind: Any = hint
    types = get_type_hints(kind)
    return kind(**{key: _built(types[key], item, f"{at}.{key}") for key, item in given.items()})


def _is(kind: type, value: Any, at: str) -> Any:
    if type(value) is not kind:
        raise _Wrong(f"{at}: {value!r} is not {kind.__name__}")
    return value


def _names(records: Records) -> dict[str, None]:
    """Every resource that `records` name, once, in order."""
    return {one.name: None for of in records.values() for f in of for one in resources(f)}


def _newest(records: Records) -> tuple[Foundations, ...]:
    return tuple(of[0] for of in records.values())


def _merged(declared: Sequence[Foundations]) -> dict[str, Any]:
    """The outputs of several: lists together, of the rest the first one's."""
    merged: dict[str, Any] = {}
    for f in declared:
        for key, value in outputs(f).items():
            before = merged.setdefault(key, value)
            if isinstance(value, list):
                merged[key] = list(dict.fromkeys([*before, *value]))
    return merged
