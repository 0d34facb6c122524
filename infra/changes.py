"""What the engine says while it works, as changes of resources and as reasons of failures."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: The engine's steps -> the words shown. A replacement is told in several steps.
_WORDS = {
    "same": "same", "create": "create", "update": "update", "delete": "delete",
    "replace": "replace", "create-replacement": "replace", "delete-replaced": "replace",
    "import": "adopt", "import-replacement": "replace", "read": "same",
    "read-replacement": "same", "refresh": "same", "discard": "delete",
    "discard-replaced": "replace", "remove-pending-replace": "same",
}  # fmt: skip
_TAGS = re.compile(r"<\{%.*?%\}>")
_EXISTS = re.compile(
    r"\b409\b|already exists|already own it|alreadyExists|already being used", re.I
)
_ACCESS = re.compile(
    r"\b40[13]\b|permission.?denied|default credentials|invalid_grant|unauthenticated|"
    r"\b(?:429|50[0-4])\b|connection refused|no such host|timed? ?out|deadline exceeded",
    re.I,
)


@dataclass(frozen=True)
class Change:
    """One resource: `name` in the program, `kind` as module.Type, `change` one of create, update,
    replace, delete, leave (deleted from the state only), adopt, same; `because`: the inputs that
    differ (of a replacement: those that force it)."""

    name: str
    kind: str
    change: str
    because: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name, "kind": self.kind, "change": self.change,
            "because": list(self.because),
        }  # fmt: skip


@dataclass(frozen=True)
class Step:
    """Progress: `state` is started, done or failed."""

    change: Change
    state: str


class Collector:
    """Reads events of one operation. `tell` gets steps that change something, as they come."""

    def __init__(self, tell: Callable[[Step], None]) -> None:
        self._tell = tell
        self._changes: dict[str, Change] = {}
        self._reasons: dict[str, list[str]] = {}
        self._failed: list[str] = []

    def see(self, event: Any) -> None:
        """One `pulumi.automation.EngineEvent`."""
        if event.resource_pre_event:
            self._step(event.resource_pre_event.metadata, "started")
        if event.res_outputs_event:
            self._step(event.res_outputs_event.metadata, "done")
        if event.res_op_failed_event:
            self._failed.append(event.res_op_failed_event.metadata.urn)
            self._step(event.res_op_failed_event.metadata, "failed")
        said = event.diagnostic_event
        if said and said.severity == "error":
            self._reasons.setdefault(said.urn or "", []).append(one_line(said.message))

    @property
    def changes(self) -> tuple[Change, ...]:
        """Every resource once, in the order of the engine."""
        return tuple(self._changes.values())

    def failures(self) -> list[tuple[str, str]]:
        """(name in the program, reason in one line) of what was refused; the name is "" for what
        belongs to no resource."""
        own = [urn for urn in dict.fromkeys([*self._failed, *self._reasons]) if _resource(urn)]
        told = [(name_of(urn), "; ".join(self._reasons.get(urn, ["refused"]))) for urn in own]
        if told:
            return told
        return [("", text) for texts in self._reasons.values() for text in texts]

    def _step(self, metadata: Any, state: str) -> None:
        if not _resource(metadata.urn):
            return
        known = self._changes.get(metadata.urn)
        word = _WORDS.get(metadata.op.value, metadata.op.value)
        if known is not None and known.change in ("replace", "leave"):
            word = known.change
        elif word == "delete" and _stays(metadata.old):
            word = "leave"
        differs = metadata.keys if word == "replace" else metadata.diffs
        because = tuple(differs or (metadata.detailed_diff if word != "create" else ()) or ())
        if known is not None and not because:
            because = known.because
        change = Change(name_of(metadata.urn), kind_of(metadata.type), word, because)
        self._changes[metadata.urn] = change
        if word != "same":
            self._tell(Step(change, state))


def exists_already(reason: str) -> bool:
    """Whether the cloud refused to create something because it is there."""
    return bool(_EXISTS.search(reason))


def is_access(reason: str) -> bool:
    """Whether it is about credentials, roles or reaching the service, not about the inputs."""
    return bool(_ACCESS.search(reason))


def name_of(urn: str) -> str:
    return urn.rpartition("::")[2]


def kind_of(type_token: str) -> str:
    """`gcp:storage/bucket:Bucket` -> `storage.Bucket`."""
    package, _, rest = type_token.partition(":")
    module, _, name = rest.partition(":")
    short = module.partition("/")[0]
    return f"{short}.{name}" if package and short and name else type_token


def one_line(text: str) -> str:
    """A message of the engine without its colours, in one line of at most 400 characters."""
    words = " ".join(_TAGS.sub("", text).split())
    words = re.sub(r"^\d+ errors? occurred: \* ", "", words)
    return words if len(words) <= 400 else f"{words[:397]}..."


def _stays(old: Any) -> bool:
    """Whether a deletion leaves it in the cloud: by the option of every resource that says so, or
    by that of an API, which is not switched off."""
    inputs = (old.inputs or {}) if old is not None else {}
    return old is not None and (old.retain_on_delete or inputs.get("disableOnDestroy") is False)


def _resource(urn: str) -> bool:
    """Not the stack itself, nor a provider: those cost nothing and say nothing to the user."""
    kind = urn.split("::")[-2].rpartition("$")[2] if urn.count("::") >= 2 else ""
    return bool(kind) and kind != "pulumi:pulumi:Stack" and not kind.startswith("pulumi:providers:")
