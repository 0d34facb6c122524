"""Stages as trees, before they are typed: what a pipeline's entries inherit, `--on`, and
relative paths."""

from __future__ import annotations

import os.path
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional

from launcher import backends
from launcher.positions import Node, Position, Problems, merge
from launcher.references import Written
from launcher.sources import Sources, beside
from launcher.spec import NAME
from trainer.config import NEEDS, STAGES, TRAINING, nearest

#: Blocks of a stage; in a pipeline they may be written once, at the top.
BLOCKS = (
    "model", "data", "train", "kd", "sdce", "preference", "grpo", "targets", "tokenizer",
    "evaluate", "merge", "export", "smoke",
)  # fmt: skip
SHARED = (*BLOCKS, "hardware", "forecast")
#: Keys of a recipe, and of an entry of its pipeline.
TOP = ("launch", "name", "description", "extends", "stage", "pipeline", "gate", "infra",
       "budget", "retry", "env", "secrets", "code", "artifacts", "tensorboard", "notify",
       *SHARED)  # fmt: skip
ENTRY = ("id", "stage", "recipe", "needs", "gate", *SHARED)
NAME_RULE = "write a lower-case letter, then at most 39 of a-z, 0-9 and -"
#: Folders that the artifact root needs for itself (docs/contracts.md).
_RESERVED = ("attempts", "control", "journal", "logs")


@dataclass(frozen=True)
class Draft:
    """One stage: `node` holds what it inherits and says, `at` is where it is written, `kind` its
    stage name when that is a known one."""

    id: str
    node: Node
    at: Position
    kind: Optional[str] = None
    needs: tuple[str, ...] = ()


def draft(tree: Node, path: str, sources: Sources) -> tuple[Node, list[Draft]]:
    """The stages of the recipe `tree` of the file `path`, and the tree with the `env` and
    `secrets` of the recipes that its pipeline names."""
    unknown_keys(tree, TOP, sources.problems)
    pipeline = tree.get("pipeline")
    if pipeline is not None:
        return _pipeline(tree, pipeline, path, sources)
    stage = tree.get("stage")
    if stage is None:
        sources.problems.append((tree.at, "missing key `stage` (or `pipeline`)"))
        return tree, []
    keys = {key: tree.map[key] for key in (*SHARED, "stage", "gate") if key in tree.map}
    own = {key for key, node in keys.items() if not node.at.line or _written_in(path, node)}
    return tree, [_fitted(str(stage.value), replace(tree, value=keys), own, tree.at, sources)]


def place_on(on: str, tree: Node, stages: list[Draft]) -> tuple[Node, list[Draft]]:
    """`--on`: another backend. Places, the price and the block of the old backend go; what `--set`
    gave stays. On `local`: one node, standard capacity, `cpu:1` unless the recipe says another
    `cpu:N`, artifacts under $LAUNCH_HOME instead of a bucket, and secrets of Secret Manager from
    environment variables of the same name."""
    at = Position(f"--on {on}")
    placed = []
    for stage in stages:
        hardware = stage.node.get("hardware") or Node({}, at, at)
        moved = replace(hardware, value=_moved(hardware, on, at))
        keys = {**stage.node.map, "hardware": moved}
        placed.append(replace(stage, node=replace(stage.node, value=keys)))
    if on != "local":
        return tree, placed
    keys = dict(tree.map)
    for key in ("artifacts", "tensorboard"):
        if (node := keys.get(key)) and node.at.line and "://" in str(node.value):
            del keys[key]
    secrets = keys.get("secrets")
    if secrets is not None and isinstance(secrets.value, dict):
        here = {name: _from_environment(name, node) for name, node in secrets.map.items()}
        keys["secrets"] = replace(secrets, value=here)
    return replace(tree, value=keys), placed


def backends_of(stages: list[Draft]) -> set[str]:
    """The backends that the stages name."""
    named = (stage.node.get("hardware", "backend") for stage in stages)
    return {str(node.value) if node is not None else "local" for node in named}


def written(stages: list[Draft]) -> Written:
    """What the stages write that others may name: folders of exports, adapters, GGUF files,
    and what each is."""
    exports = ((stage.id, stage.node.get("export", "to")) for stage in stages)
    folders = {i: str(to.value) for i, to in exports if to is not None and to.value is not None}
    adapters = (stage for stage in stages if stage.kind in TRAINING)
    trained = ((stage.id, stage.node.get("model", "adapter")) for stage in adapters)
    formats = ((stage.id, stage.node.get("export", "format")) for stage in stages)
    files = {i for i, node in formats if node is not None and node.value == "gguf"}
    with_adapter = {i for i, node in trained if node is not None and node.value}
    kinds = {stage.id: stage.kind for stage in stages if stage.kind is not None}
    return Written(folders, with_adapter, files, kinds)


def absolute(text: str, at: Position) -> str:
    """A path written at `at`, from the folder of its file (of `--set`: the working directory)."""
    expanded = Path.home() / text[2:] if text.startswith("~/") else Path(text)
    return os.path.normpath(Path(at.folder or Path.cwd()) / expanded)


def unknown_keys(node: Node, allowed: tuple[str, ...], problems: Problems) -> None:
    for key, child in node.map.items():
        if key in allowed:
            continue
        top = allowed is ENTRY and key in TOP
        what = (
            "belongs to the top of the recipe" if top else f"unknown key; {nearest(key, allowed)}"
        )
        problems.append((child.key or child.at, f"{key}: {what}"))


def _pipeline(tree: Node, pipeline: Node, path: str, sources: Sources) -> tuple[Node, list[Draft]]:
    for key in ("stage", "gate"):
        if (node := tree.get(key)) is not None:
            what = f"{key}: belongs to an entry of `pipeline`, since there is one"
            sources.problems.append((node.key or node.at, what))
    if not pipeline.items:
        sources.problems.append((pipeline.at, "pipeline: expected a list of stages"))
    stages: list[Draft] = []
    for entry in pipeline.items:
        if not isinstance(entry.value, dict):
            what = "pipeline: expected a mapping with `id` and `stage`"
            sources.problems.append((entry.at, what))
            continue
        sub = _sub_recipe(entry, path, sources)
        below = {key: node for key, node in sub.map.items() if key in ("env", "secrets")}
        tree = merge(Node(below, tree.at), tree)
        stages.append(_entry(entry, sub, tree, sources))
    stages = _identified(pipeline, stages, sources.problems)
    _unused_blocks(tree, stages, sources.problems)
    return tree, stages


def _sub_recipe(entry: Node, path: str, sources: Sources) -> Node:
    """What the entry's `recipe:` file says; empty without one."""
    named, empty = entry.get("recipe"), Node({}, entry.at)
    if named is None:
        return empty
    if not isinstance(named.value, str) or not named.value:
        sources.problems.append((named.at, "recipe: expected the path of a recipe file"))
        return empty
    sub = sources.file(beside(named), named.at, (str(Path(path).resolve()),)) or empty
    unknown_keys(sub, TOP, sources.problems)
    if "pipeline" in sub.map:
        what = f"recipe: {named.value} is a pipeline; a pipeline cannot hold another"
        sources.problems.append((named.at, what))
    return sub


def _entry(entry: Node, sub: Node, tree: Node, sources: Sources) -> Draft:
    """The entry over its recipe file over the blocks at the top."""
    unknown_keys(entry, ENTRY, sources.problems)
    shared = Node({key: tree.map[key] for key in SHARED if key in tree.map}, entry.at)
    merged = merge(merge(shared, replace(sub, key=None)), entry)
    keys = {k: v for k, v in merged.map.items() if k in (*SHARED, "stage", "gate")}
    if "stage" not in keys and "recipe" not in entry.map:
        sources.problems.append((entry.at, "missing key `stage` (or `recipe`)"))
    name = entry.get("id")
    node = Node(keys, entry.at)
    own = {*entry.map, *sub.map}
    return _fitted(str(name.value) if name else "", node, own, entry.at, sources)


def _fitted(name: str, node: Node, own: set[str], at: Position, sources: Sources) -> Draft:
    """Without the blocks that the stage has no use for: written for this very stage (`own`) they
    are problems, inherited they are dropped. A null block counts as absent."""
    present = {key: child for key, child in node.map.items() if child.value is not None}
    kind = present["stage"].value if "stage" in present else None
    if not isinstance(kind, str) or kind not in STAGES:
        return Draft(name, _resolved(replace(node, value=present)), at)
    takes = NEEDS[kind][0] | NEEDS[kind][1]
    for block in BLOCKS:
        if block not in present or block in takes:
            continue
        child = present.pop(block)
        if block in own:
            what = f"stage '{kind}' takes no `{block}`; it takes: {', '.join(sorted(takes))}"
            sources.problems.append((child.key or child.at, what))
    return Draft(name, _resolved(replace(node, value=present)), at, kind)


def _identified(pipeline: Node, stages: list[Draft], problems: Problems) -> list[Draft]:
    """Ids are names, each once; `needs` names earlier stages, by default the one before."""
    entries = [entry for entry in pipeline.items if isinstance(entry.value, dict)]
    done: list[Draft] = []
    for entry, stage in zip(entries, stages):
        node, seen = entry.get("id"), [earlier.id for earlier in done]
        at = node.at if node is not None else entry.at
        if node is None:
            problems.append((at, "missing key `id`"))
        elif not isinstance(node.value, str) or not NAME.fullmatch(node.value):
            problems.append((at, f"id: {node.value!r} is not a name; {NAME_RULE}"))
        elif node.value in _RESERVED:
            problems.append((at, f"id: a run keeps folders of its own: {', '.join(_RESERVED)}"))
        elif node.value in seen:
            problems.append((at, f"id: there is already a stage '{node.value}'"))
        needs = _needs(entry, stage.id, seen, [other.id for other in stages], problems)
        done.append(replace(stage, needs=needs))
    return done


def _needs(
    entry: Node, own: str, seen: list[str], known: list[str], problems: Problems
) -> tuple[str, ...]:
    node = entry.get("needs")
    if node is None:
        return tuple(seen[-1:])
    if not isinstance(node.value, list):
        problems.append((node.at, "needs: expected a list of stage ids"))
        return ()
    for child in node.items:
        if child.value == own:
            problems.append((child.at, "needs: a stage cannot wait for itself"))
        elif child.value in known and child.value not in seen:
            problems.append((child.at, f"needs: stage '{child.value}' comes later"))
        elif child.value not in seen:
            near = nearest(str(child.value), seen) if seen else "it is the first stage"
            problems.append((child.at, f"needs: no earlier stage {child.value!r}; {near}"))
    return tuple(str(child.value) for child in node.items if child.value in seen)


def _unused_blocks(tree: Node, stages: list[Draft], problems: Problems) -> None:
    if any(stage.kind is None for stage in stages):
        return
    taken = {block for stage in stages for needed in NEEDS[str(stage.kind)] for block in needed}
    for block in BLOCKS:
        node = tree.get(block)
        if node is not None and block not in taken:
            problems.append((node.key or node.at, f"{block}: no stage of the pipeline takes it"))


def _written_in(path: str, node: Node) -> bool:
    return node.key is not None and node.key.where == path


def _moved(hardware: Node, on: str, at: Position) -> dict[str, Node]:
    keys = dict(hardware.map)
    before = keys["backend"].value if "backend" in keys else "local"
    if before != on:
        foreign = {"places", "usd_per_hour", *backends.names()} - {on}
        if on == "local":
            foreign |= {"capacity", "nodes", "environment"}
            accelerator = keys.get("accelerator")
            if accelerator is None or not str(accelerator.value).startswith("cpu"):
                foreign.add("accelerator")
        keys = {k: v for k, v in keys.items() if k not in foreign or not v.at.line}
    return {**keys, "backend": Node(on, at, at)}


def _from_environment(name: str, node: Node) -> Node:
    from_manager = isinstance(node.value, str) and node.value.startswith("secret-manager://")
    return replace(node, value=f"env://{name}") if from_manager and node.at.line else node


def _resolved(node: Node) -> Node:
    """Gates as a list; relative paths made absolute. Data paths are files; of model names only
    those that begin with `./`, `../` or `~/`, since `org/name` is a name on the hub."""
    keys = dict(node.map)
    if "gate" in keys and isinstance(keys["gate"].value, dict):
        keys["gate"] = replace(keys["gate"], value=[keys["gate"]])
    references = {
        "model": dict.fromkeys(("name", "tokenizer"), _model_path),
        "kd": {"teacher": _model_path, "targets": _data_path, "logits_dir": _data_path},
        "sdce": {"surrogate": _model_path},
        "targets": {"teacher": _model_path},
        "merge": dict.fromkeys(("adapter", "base"), _model_path),
        "export": {"model": _model_path},
        "train": {"resume": _data_path},
    }
    for block, changes in references.items():
        if block in keys:
            keys[block] = _change(keys[block], changes)
    if "evaluate" in keys:
        every = dict.fromkeys((keys["evaluate"].get("models") or node).map, _model_path)
        keys["evaluate"] = _change(keys["evaluate"], {"models": lambda m: _change(m, every)})
    if "export" in keys:
        keys["export"] = _change(keys["export"], {"to": _export_path})
    if "data" in keys:
        files = {"train": _source_paths, "validation": _source_paths, "chat_template": _template}
        keys["data"] = _change(keys["data"], files)
    if "hardware" in keys:
        listed = {"environment": lambda n: _change(n, {"wheels": _wheel_paths})}
        keys["hardware"] = _change(keys["hardware"], listed)
    return replace(node, value=keys)


def _change(node: Node, changes: Mapping[str, Callable[[Node], Node]]) -> Node:
    if not isinstance(node.value, dict):
        return node
    found = {k: changes[k](child) if k in changes else child for k, child in node.value.items()}
    return replace(node, value=found)


def _source_paths(node: Node) -> Node:
    if not isinstance(node.value, list):
        return node
    paths = {"path": _data_path, "manifest": _data_path, "hf": _hub_folder}
    return replace(node, value=[_change(source, paths) for source in node.value])


def _wheel_paths(node: Node) -> Node:
    if not isinstance(node.value, list):
        return node
    return replace(node, value=[_change(wheel, {"source": _data_path}) for wheel in node.value])


def _hub_folder(node: Node) -> Node:
    return _change(node, {"name": _model_path})


def _template(node: Node) -> Node:
    return node if node.value == "chatml" else _data_path(node)


def _data_path(node: Node) -> Node:
    text = node.value
    if not isinstance(text, str) or not text or "://" in text or "${stage:" in text:
        return node
    return replace(node, value=absolute(text, node.at))


def _export_path(node: Node) -> Node:
    hub = isinstance(node.value, str) and node.value.startswith("hub:")
    return node if hub else _data_path(node)


def _model_path(node: Node) -> Node:
    text = node.value
    if not isinstance(text, str) or not text.startswith(("./", "../", "~/")):
        return node
    return replace(node, value=absolute(text, node.at))
