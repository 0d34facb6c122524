"""YAML with a position for every key and value. What a recipe means is `recipe`'s business.

`parse` reads YAML 1.2's core schema (1e-4 is a number, `on` and 12:30 are strings, no dates) into
a tree of `Node`s; trees are merged, edited and turned into plain data, and keep their positions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Optional, Union

import yaml

from trainer.config import KeyPath

MAX_BYTES = 1_000_000
_MAX_NODES = 20_000  # aliases can unfold a small file into billions of values
_MAX_DEPTH = 60


@dataclass(frozen=True, order=True)
class Position:
    """`where` is a file as the user named it, or an option such as `--set train.lr` (line 0)."""

    where: str
    line: int = 0
    column: int = 0
    folder: str = ""  # what relative paths written here start from

    def __str__(self) -> str:
        return f"{self.where}:{self.line}:{self.column}" if self.line else self.where


Scalar = Union[None, bool, int, float, str]
Problems = list[tuple[Position, str]]


@dataclass(frozen=True)
class Node:
    """A value and where it stands; `key` is the position of the key that holds it."""

    value: Union[Scalar, dict[str, Node], list[Node]]
    at: Position
    key: Optional[Position] = None

    @property
    def map(self) -> dict[str, Node]:
        return self.value if isinstance(self.value, dict) else {}

    @property
    def items(self) -> list[Node]:
        return self.value if isinstance(self.value, list) else []

    def get(self, *path: str) -> Optional[Node]:
        """The node under `path`, None when any part of it is absent."""
        node: Optional[Node] = self
        for part in path:
            node = node.map.get(part) if node is not None else None
        return node


def parse(
    text: str,
    start: Position,
    environ: Mapping[str, str],
    problems: Problems,
    defaults: Optional[dict[str, str]] = None,
) -> Optional[Node]:
    """The tree of one YAML document, variables expanded; None when there is none to work with.
    `start` gives `where` and `folder`; with `line` 0 every node has that same position. Defaults
    that stood in for a variable are added to `defaults`."""
    loader = _Loader(text) if _readable(text, start, problems) else None
    if loader is None:
        return None
    try:
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = error.problem or "cannot be read"
        if what.startswith("but ") and error.context:
            what = f"{error.context}, {what}"
        problems.append((_at(start, mark), f"not valid YAML: {what}{_hint(text, mark)}"))
        return None
    except (ValueError, OverflowError) as error:  # escapes beyond Unicode
        problems.append((_at(start, loader.get_mark()), f"not valid YAML: {error}"))
        return None
    if root is None:
        return Node(None, _at(start, None))
    return _Reader(start, environ, problems, {} if defaults is None else defaults).node(root, ())


def plain(node: Node) -> Any:
    """The value without positions."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value


def merge(base: Node, over: Node) -> Node:
    """`over` on top of `base`: mappings merge key by key, null removes a key of `base`, and
    anything else (lists too) replaces what was there."""
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    merged = dict(base.value)
    for key, child in over.value.items():
        if key in merged and child.value is None:
            del merged[key]
        else:
            merged[key] = merge(merged[key], child) if key in merged else child
    return replace(over, value=merged)


def locate(node: Node, path: KeyPath, of_key: bool = False) -> Position:
    """The position of the value (or key) at `path`, or of the deepest part of it that exists."""
    at = node.at
    for part in path:
        child: Optional[Node] = None
        if isinstance(part, str):
            child = node.map.get(part)
        elif part < len(node.items):
            child = node.items[part]
        if child is None:
            return at
        node, at = child, (child.key if of_key else None) or child.at
    return at


class _Loader(yaml.SafeLoader):
    """SafeLoader with the core schema of YAML 1.2, a limit on nesting, and no tags."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(
                problem=f"tags are not allowed ({event.tag})", problem_mark=event.start_mark
            )
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"nested deeper than {_MAX_DEPTH} levels", problem_mark=event.start_mark
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_STRING, _PREFIX = "tag:yaml.org,2002:str", "tag:yaml.org,2002:"
_CORE = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}
_Loader.yaml_implicit_resolvers = {}
for _name, (_pattern, _first) in _CORE.items():
    _Loader.add_implicit_resolver(_PREFIX + _name, re.compile(rf"(?:{_pattern})\Z"), _first)


class _Reader:
    """Turns PyYAML's nodes into ours, and collects what is wrong with them."""

    def __init__(
        self,
        start: Position,
        environ: Mapping[str, str],
        problems: Problems,
        defaults: dict[str, str],
    ) -> None:
        self.start, self.environ, self.problems = start, environ, problems
        self.defaults = defaults
        self.count = 0

    def node(self, raw: yaml.Node, parents: tuple[int, ...]) -> Node:
        at = _at(self.start, raw.start_mark)
        self.count += 1
        if id(raw) in parents:
            return self._wrong(at, "an anchor that contains itself")
        if self.count > _MAX_NODES:
            if self.count == _MAX_NODES + 1:
                self.problems.append((at, f"more than {_MAX_NODES} values: too many for a recipe"))
            return Node(None, at)
        if isinstance(raw, yaml.MappingNode):
            return self._mapping(raw, at, (*parents, id(raw)))
        if isinstance(raw, yaml.SequenceNode):
            return Node([self.node(child, (*parents, id(raw))) for child in raw.value], at)
        return self._scalar(raw, at)

    def _mapping(self, raw: yaml.MappingNode, at: Position, parents: tuple[int, ...]) -> Node:
        found: dict[str, Node] = {}
        for raw_key, raw_value in raw.value:
            key_at = _at(self.start, raw_key.start_mark)
            value = self.node(raw_value, parents)
            if not isinstance(raw_key, yaml.ScalarNode) or raw_key.tag != _STRING:
                self._wrong(key_at, "a key must be a string (write it in quotes)")
                continue
            key = raw_key.value
            if _unprintable(key):
                self._wrong(key_at, f"a key with characters that cannot be shown: {key!a}")
            elif key == "<<":
                self._wrong(key_at, "merge keys (<<) are not part of YAML 1.2; use `extends:`")
            elif key in found:
                first = found[key].key
                self._wrong(key_at, f"duplicate key '{key}'; first on line {first and first.line}")
            else:
                found[key] = replace(value, key=key_at)
        return Node(found, at)

    def _scalar(self, raw: yaml.Node, at: Position) -> Node:
        text, tag = str(raw.value), str(raw.tag)
        if tag == _STRING and "$" in text:
            text = expand(text, self.environ, at, self.problems, self.defaults)
            if (
                getattr(raw, "style", None) is None
            ):  # unquoted: what comes out is read like any other plain scalar
                tag = _resolve(text)
        try:
            value = _construct(tag, text)
        except ValueError:
            return self._wrong(at, "a whole number beyond 64 bits")
        if isinstance(value, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
            return self._wrong(at, "holds a character that is not text (NUL or half a surrogate)")
        if isinstance(value, str) and _LOGIN.search(value):
            return self._wrong(at, f"holds a password in a URL, {_KEPT}")
        return Node(value, at)

    def _wrong(self, at: Position, what: str) -> Node:
        self.problems.append((at, what))
        return Node(None, at)


_LOOKS_SECRET = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY)$")
_LOGIN = re.compile(r"://[^/\s:@]*:[^/\s]+@")
_KEPT = (
    "and a recipe is written down in many places; name it in `secrets`, and the job has it as a "
    "variable"
)
_REFERENCE = re.compile(r"\$\$\{|\$\{(?:([A-Za-z_][A-Za-z0-9_]*)(:-[^}]*)?\}|(stage:[^}]*\})|)")


def expand(
    text: str,
    environ: Mapping[str, str],
    at: Position,
    problems: Problems,
    defaults: dict[str, str],
) -> str:
    """`text` with `${VAR}` and `${VAR:-default}` filled from `environ`; `$${` is a literal `${`,
    `${stage:ID}` stays. A variable that is undefined or looks secret is a problem at `at`; a
    default that was taken is added to `defaults`."""

    def fill(match: re.Match[str]) -> str:
        name, default, stage = match.groups()
        if match[0] == "$${":
            return "${"
        if stage:
            return match[0]
        if name is None:
            problems.append(
                (at, "`${` without a name; write ${VAR}, ${VAR:-default}, ${stage:ID} or $${")
            )
            return match[0]
        if looks_secret(name):
            problems.append((at, f"${{{name}}} looks like a secret, {_KEPT}"))
            return ""
        value = environ.get(name)
        if default is not None and not value:  # as in a shell, :- also stands in for an empty value
            value = defaults[name] = default[2:]
        if value is None:
            problems.append(
                (at, f"${{{name}}} is not set; set {name} or write ${{{name}:-default}}")
            )
            return ""
        return value

    return _REFERENCE.sub(fill, text)


def looks_secret(name: str) -> bool:
    """Whether a variable of this name holds something that nobody else should read."""
    return _LOOKS_SECRET.search(name.upper()) is not None


def _resolve(text: str) -> str:
    for name, (pattern, _) in _CORE.items():
        if re.fullmatch(pattern, text):
            return _PREFIX + name
    return _STRING


def _construct(tag: str, text: str) -> Scalar:
    kind = tag.removeprefix(_PREFIX)
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        number = int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        if not -(2**63) <= number < 2**63:
            raise ValueError
        return number
    if kind == "float":
        return float(re.sub(r"\.(?=[in])", "", text.lower()))  # Python writes .inf as inf
    return text


def _readable(text: str, start: Position, problems: Problems) -> bool:
    """PyYAML's reader reports characters without a line; look for them here."""
    bad = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if bad is None:
        return True
    line = text.count("\n", 0, bad.start()) + 1
    column = bad.start() - (text.rfind("\n", 0, bad.start()) + 1) + 1
    at = replace(start, line=line, column=column) if start.line else start
    problems.append((at, f"not valid YAML: character {bad.group()!a} is not allowed"))
    return False


def _unprintable(text: str) -> bool:
    return not text.isprintable()


def _hint(text: str, mark: Optional[yaml.Mark]) -> str:
    lines = text.splitlines()
    line = lines[mark.line] if mark is not None and mark.line < len(lines) else ""
    if "${" in line:
        return '; inside { } and [ ] write "${VAR}" in quotes'
    return "; indent with spaces" if "\t" in line else ""


def _at(start: Position, mark: Optional[yaml.Mark]) -> Position:
    if not start.line:
        return start
    line, column = (mark.line, mark.column) if mark is not None else (0, 0)
    return replace(start, line=line + 1, column=column + 1)
