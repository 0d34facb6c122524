"""Where a recipe's values come from: files, the files they extend, and `--set`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Optional

from launcher.positions import MAX_BYTES, Node, Position, Problems, merge, parse
from trainer.config import nearest


def beside(named: Node) -> str:
    """The path that `named` (the value of `extends:` or `recipe:`) means: from its own file on."""
    folder = Path(named.at.where).parent if named.at.line else Path()
    return str(folder / str(named.value))


class Sources:
    """Reads trees; problems are appended to `problems`. `unread` holds the positions of values
    that could not be read at all, about which no more needs to be said; `defaults` those values of
    `${VAR:-value}` that stood in for a variable."""

    def __init__(self, environ: Mapping[str, str], problems: Problems) -> None:
        self.environ, self.problems = environ, problems
        self.unread: set[Position] = set()
        self.defaults: dict[str, str] = {}

    def file(self, shown: str, asked: Position, chain: tuple[str, ...]) -> Optional[Node]:
        """The tree of the file `shown` over what it extends. Problems with opening it stand at
        `asked`; `chain` holds the files that led here."""
        text = self._text(shown, asked)
        if text is None:
            return None
        real = Path(shown).resolve()
        before = len(self.problems)
        tree = self._parse(text, Position(shown, 1, 1, folder=str(real.parent)))
        if tree is not None and not isinstance(tree.value, dict):
            if len(self.problems) == before:
                empty = "empty; a recipe starts with `launch: 1`"
                self._wrong(tree.at, empty if tree.value is None else "not a mapping of keys")
            return None
        return tree and self._extended(tree, (*chain, str(real)))

    def overridden(self, tree: Node, overrides: Iterable[str]) -> tuple[Node, list[Node]]:
        """`tree` with every `a.b=c` applied, and the values, each at `--set a.b`."""
        values = []
        for text in overrides:
            name, equals, written = text.partition("=")
            keys = name.strip().split(".")
            if not name.isprintable():
                self._wrong(Position("--set"), "a key with characters that cannot be shown")
                continue
            at = Position(f"--set {name.strip()}", folder=str(Path.cwd()))
            if not equals or not all(keys):
                self._wrong(at, "expected KEY=VALUE, such as train.lr=1e-4")
                continue
            value = self._parse(written, at)
            if value is not None:
                value = replace(value, key=at)
                tree = self._put(tree, keys, value, ())
                values.append(value)
        return tree, values

    def _parse(self, text: str, start: Position) -> Optional[Node]:
        before = len(self.problems)
        tree = parse(text, start, self.environ, self.problems, self.defaults)
        self.unread |= {at for at, _ in self.problems[before:]}
        return tree

    def _text(self, shown: str, asked: Position) -> Optional[str]:
        raw = self._bytes(Path(shown), asked, "" if asked.where == shown else f"{shown}: ")
        if raw is None:
            return None
        try:
            return raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            start = raw.rfind(b"\n", 0, error.start) + 1
            column = len(raw[start : error.start].decode("utf-8", "replace")) + 1
            at = Position(shown, raw.count(b"\n", 0, error.start) + 1, column)
            self._wrong(at, "not UTF-8; save the file in that encoding")
            return None

    def _bytes(self, path: Path, asked: Position, prefix: str) -> Optional[bytes]:
        try:
            if not path.exists():
                self._wrong(asked, f"{prefix}no such file{_near(path)}")
            elif not path.is_file():
                self._wrong(asked, f"{prefix}not a file; name a recipe (a .yaml file)")
            elif path.stat().st_size > MAX_BYTES:
                self._wrong(asked, f"{prefix}larger than {MAX_BYTES} bytes: not a recipe")
            else:
                return path.read_bytes()
        except OSError as error:
            self._wrong(asked, f"{prefix}cannot be read: {error.strerror}")
        except (ValueError, RuntimeError):
            self._wrong(asked, f"{prefix}not the name of a file")
        return None

    def _extended(self, tree: Node, chain: tuple[str, ...]) -> Optional[Node]:
        base = tree.get("extends")
        if base is None:
            return tree
        if not isinstance(base.value, str) or not base.value:
            self._wrong(base.at, "extends: expected the path of another recipe")
            return None
        target = beside(base)
        if str(Path(target).resolve()) in chain:
            names = " -> ".join(Path(path).name for path in (*chain, target))
            self._wrong(base.at, f"extends: goes in a circle: {names}")
            return None
        below = self.file(target, base.at, chain)
        return merge(below, tree) if below is not None else None

    def _put(self, node: Node, keys: list[str], value: Node, done: tuple[str, ...]) -> Node:
        """`node` with `value` at `keys`; mappings grow, a list takes an index or a stage's id."""
        if not keys:
            return value
        here = ".".join(done) or "the recipe"
        if isinstance(node.value, list):
            index = _index(node, keys[0])
            if index is None:
                self._wrong(value.at, f"no entry '{keys[0]}' in {here}; {_entries(node, keys[0])}")
                return node
            children = list(node.items)
            children[index] = self._put(children[index], keys[1:], value, (*done, keys[0]))
            return replace(node, value=children)
        if not isinstance(node.value, dict) and node.value is not None:
            self._wrong(value.at, f"{here} is a single value and has no '{keys[0]}'")
            return node
        found = dict(node.map)
        if len(keys) == 1 and value.value is None:
            found.pop(keys[0], None)
        else:
            child = found.get(keys[0], Node({}, value.at, value.at))
            found[keys[0]] = self._put(child, keys[1:], value, (*done, keys[0]))
        return replace(node, value=found)

    def _wrong(self, at: Position, what: str) -> None:
        self.problems.append((at, what))


def _near(path: Path) -> str:
    names = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    near = nearest(path.name, names).replace("allowed:", "there are:")
    return f"; {near}" if names else ""


def _index(node: Node, key: str) -> Optional[int]:
    for index, child in enumerate(node.items):
        if key == str(index) or (child.get("id") or child).value == key:
            return index
    return None


def _entries(node: Node, key: str) -> str:
    ids = [str(child.map["id"].value) for child in node.items if "id" in child.map]
    names = ids or [str(index) for index in range(len(node.items))]
    return nearest(key, names) if names else "it is empty"
