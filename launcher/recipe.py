"""From a recipe file to `spec.Recipe`.

Everything that is wrong is found in one reading and reported together, each with its position.
`sources` reads files and `--set`, `drafts` merges the stages, `rules` judges what may stand
together; the types are those of `spec` and `trainer.config`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Optional

from launcher import drafts, rewards, rules
from launcher.drafts import NAME_RULE, Draft, absolute
from launcher.errors import RecipeErrors
from launcher.positions import Node, Position, Problems, locate, looks_secret, plain
from launcher.sources import Sources
from launcher.spec import NAME, Budget, Code, Infra, Notify, Recipe, Retry, Stage
from trainer.config import STAGES, KeyPath, Problem, build, dotted, missing_blocks, to_dict

VERSION = 1


@dataclass(frozen=True)
class Loaded:
    """`canonical` is the resolved recipe as JSON-able data, `fingerprint` the sha256 of it without
    `infra`, `defaults` what stood in for variables that are not set (`${VAR:-default}`), `written`
    each stage's tree, for the positions of what is found wrong with it later."""

    recipe: Recipe
    canonical: dict[str, Any]
    fingerprint: str
    path: Path
    defaults: Mapping[str, str] = field(default_factory=dict)
    written: Mapping[str, Node] = field(default_factory=dict, repr=False, compare=False)

    def notes(self) -> list[str]:
        """What a reader of the plan should know about it: a line per default that is in use."""
        text = json.dumps(self.canonical, ensure_ascii=False)
        return [
            f"{name} is not set; the recipe says '{value}'"
            for name, value in self.defaults.items()
            if value in text
        ]


def load(
    path: str | Path,
    overrides: Iterable[str] = (),
    on: Optional[str] = None,
    environ: Optional[Mapping[str, str]] = None,
) -> Loaded:
    """Read the recipe at `path`. `overrides` are the `a.b=c` of `--set`, `on` replaces the backend
    and drops what only the old one understands, `environ` (default: the process's) fills `${VAR}`.
    Errors: `RecipeErrors`, every problem of the recipe, sorted by position."""
    problems: Problems = []
    sources = Sources(os.environ if environ is None else environ, problems)
    written: dict[str, Node] = {}
    recipe = _read(sources, str(path), overrides, on, written)
    if recipe is None or problems:
        raise RecipeErrors(list(dict.fromkeys(f"{at}: {what}" for at, what in sorted(problems))))
    canonical = to_dict(recipe)
    # A run is the same whoever may look at its bucket.
    run = {key: value for key, value in canonical.items() if key != "infra"}
    text = json.dumps(run, sort_keys=True, separators=(",", ":"), allow_nan=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Loaded(recipe, canonical, digest, Path(path), sources.defaults, written)


def _read(
    sources: Sources,
    path: str,
    overrides: Iterable[str],
    on: Optional[str],
    written: dict[str, Node],
) -> Optional[Recipe]:
    tree = sources.file(path, Position(path), ())
    if tree is None:
        return None
    tree, values = sources.overridden(tree, overrides)
    tree, stages = drafts.draft(tree, path, sources)
    if on is not None:
        tree, stages = drafts.place_on(on, tree, stages)
    if "pipeline" in tree.map:
        _without_effect(values, tree, stages, sources.problems)
    typed = [_stage(stage, stages, sources) for stage in stages]
    written.update((stage.id, stage.node) for stage in stages)
    return _whole(tree, [stage for stage in typed if stage is not None], stages, sources)


def _without_effect(
    values: list[Node], tree: Node, stages: list[Draft], problems: Problems
) -> None:
    """A `--set` that every stage overrides would otherwise be dropped in silence. What a later
    `--set` says of a stage is no such surprise."""
    rest = [node for key, node in tree.map.items() if key not in drafts.SHARED]
    told = _options([*rest, *(stage.node for stage in stages)]) | {at for at, _ in problems}
    keys = [value.at.where.removeprefix("--set ") for value in values]
    for number, (key, value) in enumerate(zip(keys, values)):
        if value.value is not None and value.at not in told:
            if any(_of_a_stage(later, key) for later in keys[number + 1 :]):
                continue
            what = f"has no effect: every stage says otherwise; use pipeline.ID.{key}"
            problems.append((value.at, what))


def _of_a_stage(specific: str, general: str) -> bool:
    """Whether `pipeline.ID.a.b` says of a stage what `a.b`, or a part of it, says of all."""
    pipeline, *words = specific.split(".")
    pairs = zip(words[1:], general.split("."))
    return pipeline == "pipeline" and len(words) > 1 and all(one == other for one, other in pairs)


def _options(nodes: Iterable[Node]) -> set[Position]:
    """Positions of options (not of files) anywhere below `nodes`."""
    found: set[Position] = set()
    for node in nodes:
        if not node.at.line:
            found.add(node.at)
        found |= _options([*node.map.values(), *node.items])
    return found


def _stage(draft: Draft, stages: list[Draft], sources: Sources) -> Optional[Stage]:
    """The typed stage, None when something is wrong with it. The rules are tried on those blocks
    that are sound, so that one reading tells everything."""
    node, before = draft.node, len(sources.problems)
    if draft.kind is not None:
        for block in missing_blocks(draft.kind, node.map):
            sources.problems.append((draft.at, f"stage '{draft.kind}' needs a `{block}` block"))
    if "stage" not in node.map:
        return None
    data = {**plain(node), "id": draft.id, "needs": draft.needs}
    found: list[Problem] = []
    stage: Optional[Stage] = build(Stage, data, (), found)
    _report(found, node, sources)
    if stage is None:
        stage = build(Stage, {"stage": STAGES[0], **_sound(data, found)}, (), [])
    if stage is not None:
        earlier = rules.reachable(draft.id, {d.id: d.needs for d in stages})
        known, complete = [d.id for d in stages], len(sources.problems) == before
        written = drafts.written(stages)
        found = list(rules.stage_problems(stage, earlier, known, complete, written))
        _report(found, node, sources)
    return stage if len(sources.problems) == before else None


def _sound(data: Mapping[str, Any], found: Iterable[Problem]) -> dict[str, Any]:
    """The stage without the keys that `found` blames; a block that is wrong without them too is
    left out, and so are `hardware` and `gate`, which mean something else without one key."""
    kept = {key: deepcopy(value) for key, value in data.items()}
    for path, _ in found:
        if path[0] in ("hardware", "gate") or len(path) < 2 or not isinstance(path[-1], str):
            kept.pop(str(path[0]), None)
            continue
        holder: Any = kept
        for part in path[:-1]:
            inside = isinstance(holder, Mapping) and part in holder
            listed = isinstance(holder, list) and isinstance(part, int) and part < len(holder)
            holder = holder[part] if inside or listed else None
        if isinstance(holder, dict):
            holder.pop(path[-1], None)
    still: list[Problem] = []
    build(Stage, {"stage": STAGES[0], **kept}, (), still)
    wrong = {path[0] for path, _ in still}
    return {key: value for key, value in kept.items() if key not in wrong}


def _whole(
    tree: Node, typed: list[Stage], stages: list[Draft], sources: Sources
) -> Optional[Recipe]:
    _version_and_name(tree, sources.problems)
    top: dict[str, Any] = {}
    for key, kind in (("description", str), ("budget", Budget), ("retry", Retry),
                      ("env", Mapping[str, str]), ("artifacts", str),
                      ("tensorboard", str), ("infra", Infra), ("code", Code),
                      ("notify", tuple[Notify, ...])):  # fmt: skip
        node = tree.get(key)
        if node is not None and node.value is not None:
            found: list[Problem] = []
            top[key] = build(kind, plain(node), (key,), found)
            found = [(path, _untold(path, what)) for path, what in found]
            _report((p for p in found if not looks_secret(str(p[0][-1]))), tree, sources)
    if top.get("code") is not None:
        top["code"] = replace(top["code"], path=absolute(top["code"].path, tree.map["code"].at))
    if tree.get("code") is None or top.get("code") is not None:  # a wrong one is told already
        nodes = {draft.id: draft.node for draft in stages}
        for stage in typed:
            _report(rewards.problems(stage, top.get("code")), nodes[stage.id], sources)
    empty = Node({}, tree.at)
    secrets, env = tree.get("secrets") or empty, tree.get("env") or empty
    sources.problems += rules.secret_problems(secrets, env)
    _report(rules.recipe_problems(drafts.backends_of(stages), top, secrets), tree, sources)
    if sources.problems:
        return None
    if "://" not in top.get("artifacts", "://"):
        top["artifacts"] = absolute(top["artifacts"], tree.map["artifacts"].at)
    top["secrets"] = plain(secrets) or {}
    return Recipe(name=plain(tree)["name"], stages=tuple(typed), **top)


def _version_and_name(tree: Node, problems: Problems) -> None:
    version, name = tree.get("launch"), tree.get("name")
    if version is None:
        problems.append((tree.at, f"missing key `launch`; write `launch: {VERSION}`"))
    elif version.value != VERSION or isinstance(version.value, bool):
        what = f"launch: this version reads recipes of version {VERSION}, not {plain(version)!r}"
        problems.append((version.at, what))
    if name is None:
        problems.append((tree.at, "missing key `name`"))
    elif not isinstance(name.value, str) or not NAME.fullmatch(name.value):
        problems.append((name.at, f"name: {plain(name)!r} is not a name; {NAME_RULE}"))


def _untold(path: KeyPath, what: str) -> str:
    """What is wrong, without the value where that is the address of a webhook."""
    told = path[0] == "notify" and "webhook" in path and what.startswith("expected")
    return "expected env://NAME or secret-manager://PROJECT/NAME" if told else what


def _report(found: Iterable[Problem], node: Node, sources: Sources) -> None:
    for path, what in found:
        at = locate(node, path, of_key=what.startswith("unknown key"))
        if at not in sources.unread:
            sources.problems.append((at, _say(path, what)))


def _say(path: KeyPath, what: str) -> str:
    if what.startswith("expected"):
        what = re.sub(r"got None$", "got null", what)
        if re.match(r"expected a string, got (-?[\d.]|True|False)", what):
            what += "; write it in quotes"
    return f"{dotted(path)}: {what}" if path else what
