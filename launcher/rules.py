"""What may stand together in a recipe, beyond types: each rule yields (path of a key, message)."""

from __future__ import annotations

import glob
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from launcher import backends, code, hardware, shapes, wheels
from launcher.positions import Node, Problems, looks_secret
from launcher.references import Written, reference_problems, references
from launcher.spec import Gate, Stage
from trainer import phases
from trainer.config import TRAINING, KeyPath, Problem, nearest, preference_problems, to_dict
from trainer.config_objectives import packed_for_server
from trainer.config_train import refused
from trainer.store import BUCKET_NAME, BUCKET_SPELLING

STAGE_REFERENCE = re.compile(r"\$\{stage:([^}]*)\}")
#: What comes with the trainer and holds what these stages read.
_BUILTIN = {
    "dpo": ("python-preferences",),
    "ipo": ("python-preferences",),
    "grpo": ("python-questions", "digits"),
}
#: What each backend can be asked for; backends that are not listed judge for themselves.
CAPACITY = {"local": ("standard",), "vertex": ("spot", "standard", "flex")}
_CLOUD = {"vertex": "gcp"}
_FLOAT8 = 8.9  # compute capability from which a GPU multiplies in float8 (Ada)
_NO_SINKS = ("flash_attention_2", "flash_attention_3", "varlen", "sdpa")
_SECRET = re.compile(
    r"env://[A-Za-z_][A-Za-z0-9_]*|secret-manager://[a-z][a-z0-9:.-]*/[A-Za-z0-9_-]+"
    r"(?:/[A-Za-z0-9_-]+)?"
)
_DATA = (".jsonl", ".txt")  # what trainer.data reads
_BUCKET = re.compile(rf"(gs|s3)://{BUCKET_NAME}(/.*)?")
_STORE = re.compile(r"(gs|s3)://([^/]*)")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET_FORMS = "env://NAME or secret-manager://PROJECT/NAME"


def reachable(stage_id: str, needs: Mapping[str, Collection[str]]) -> set[str]:
    """Every stage that `stage_id` waits for, through any number of `needs`."""
    found: set[str] = set()
    todo = list(needs.get(stage_id, ()))
    while todo:
        step = todo.pop()
        if step not in found:
            found.add(step)
            todo.extend(needs.get(step, ()))
    return found


def stage_problems(
    stage: Stage,
    earlier: Collection[str],
    known: Sequence[str],
    complete: bool,
    written: Written,
) -> Iterator[Problem]:
    """Problems of one stage. `earlier`: stages it can reach; `known`: all ids, in order;
    `complete`: nothing was left out because of problems of its own; `written`: by other stages."""
    yield from _hardware(stage)
    yield from wheels.problems(stage.hardware)
    if complete:
        yield from _training(stage)
        yield from _kernels(stage)
    yield from _references(stage, earlier, known)
    yield from reference_problems(stage, earlier, written)
    yield from _schemes(stage)
    for index, gate in enumerate(stage.gate):
        for key, what in _gate(gate, stage, earlier, known):
            yield ("gate", index, key), what
    if stage.hardware.backend == "local":
        yield from _local_data(stage)
    if stage.hardware.backend == "vertex":
        yield from _cloud_data(stage)


def recipe_problems(
    used: Collection[str], top: Mapping[str, Any], secrets: Node
) -> Iterator[Problem]:
    """Problems between the backends `used` and what the recipe says once, at its top."""
    artifacts = top.get("artifacts")
    text, board = artifacts or "", top.get("tensorboard")
    if (wrong_name := misspelt(text)) is not None:
        yield ("artifacts",), wrong_name
    for key, value in (("artifacts", text), ("tensorboard", board or "")):
        if wrong := set(re.findall(r"\{[^}]*\}?", value)) - {"{run}"}:
            yield (key,), f"{min(wrong)} is not known; only {{run}} is filled in"
    if board is not None and not _BUCKET.fullmatch(board):
        yield ("tensorboard",), misspelt(board) or "write gs://BUCKET/FOLDER or s3://BUCKET/FOLDER"
    elif board is not None and not _BUCKET.fullmatch(text):
        yield (
            ("tensorboard",),
            "is where a run with `artifacts` in a bucket copies its event files to; name a bucket "
            "there, or leave this out",
        )
    if "vertex" in used and not text.startswith("gs://"):
        yield ("artifacts",), "backend 'vertex' needs a bucket: gs://BUCKET/FOLDER/{run}"
    if "local" in used and "://" in text.removeprefix("file://"):
        yield ("artifacts",), "backend 'local' writes to a folder of this machine, or leave it out"
    for name, node in secrets.map.items():
        reference = str(node.value)
        if not _SECRET.fullmatch(reference):
            continue
        if "local" in used and not reference.startswith("env://"):
            yield ("secrets", name), "backend 'local' reads secrets from env://NAME only"
        if "vertex" in used and not reference.startswith("secret-manager://"):
            yield (
                ("secrets", name),
                "a Vertex AI job reads secret-manager://PROJECT/NAME only: "
                "its environment is shown to everybody who may list jobs",
            )
    if top.get("code") is not None and (found := code.problem(top["code"])) is not None:
        yield ("code", found[0]), found[1]
    for name in top.get("env") or ():
        if not _VARIABLE.fullmatch(name):
            yield ("env", name), "is not the name of a variable"


def misspelt(uri: str) -> Optional[str]:
    """What is wrong with the name of the bucket in a URI; None: nothing, or it is no bucket."""
    found = _STORE.match(uri)
    if found is None or _BUCKET.fullmatch(uri):
        return None
    return f"'{found[2]}' cannot be the name of a bucket: {BUCKET_SPELLING}"


def secret_problems(secrets: Node, env: Node) -> Problems:
    """Secrets must be references. The messages never repeat a value."""
    problems: Problems = []
    if not isinstance(secrets.value, dict) and secrets.value is not None:
        problems.append((secrets.at, f"secrets: expected a mapping of NAME to {_SECRET_FORMS}"))
    for name, node in secrets.map.items():
        if not _VARIABLE.fullmatch(name):
            problems.append(
                (node.key or node.at, "secrets: this key is not the name of a variable")
            )
        elif not isinstance(node.value, str) or not _SECRET.fullmatch(node.value):
            problems.append((node.at, f"secrets.{name}: must be a reference: {_SECRET_FORMS}"))
    for name, node in env.map.items():
        if looks_secret(name):
            what = f"env.{name}: looks like a secret; move it to `secrets`, as {_SECRET_FORMS}"
            problems.append((node.key or node.at, what))
    return problems


def _hardware(stage: Stage) -> Iterator[Problem]:
    asked, at = stage.hardware, "hardware"
    for what in _accelerator(stage):
        yield (at, "accelerator"), what
    if (what_machine := _machine(stage)) is not None:
        yield (at, "vertex", "machine"), what_machine
    # Those installed beside ours are looked for only where they are needed: it takes 10 ms.
    if asked.backend not in backends.BACKENDS and asked.backend not in backends.names():
        near = nearest(asked.backend, backends.names())
        yield (at, "backend"), f"no backend '{asked.backend}'; {near}"
        return
    for block in ("local", "vertex"):
        if getattr(asked, block) is not None and block != asked.backend:
            yield (at, block), f"belongs to backend '{block}', but the backend is '{asked.backend}'"
    for index, capacity in enumerate(asked.capacity):
        allowed = CAPACITY.get(asked.backend, (capacity,))
        if capacity not in allowed:
            what = f"backend '{asked.backend}' has no '{capacity}' capacity; allowed: "
            yield (at, "capacity", index), what + ", ".join(allowed)
    if asked.backend == "local" and asked.nodes > 1:
        yield (at, "nodes"), "backend 'local' is one machine; ask for workers instead: cpu:2"
    if asked.backend == "local" and asked.places:
        yield (at, "places"), "backend 'local' has one place: this machine"


def _accelerator(stage: Stage) -> Iterator[str]:
    asked = stage.hardware
    try:
        accelerator = hardware.parse(asked.accelerator)
    except ValueError as error:
        yield str(error)
        return
    kind, cloud = accelerator.kind, _CLOUD.get(asked.backend)
    if asked.backend == "local" and kind.vendor == "tpu":
        yield f"backend 'local' runs on cpu:N and NVIDIA GPUs, not on '{asked.accelerator}'"
    if cloud is None:
        return
    if kind.name not in hardware.kinds(cloud):
        allowed = ", ".join(hardware.kinds(cloud))
        yield f"backend '{asked.backend}' has no '{kind.name}'; allowed: {allowed}"
    elif hardware.machine(accelerator, cloud) is None:
        allowed = ", ".join(f"{kind.name}:{n}" for n in hardware.counts(kind, cloud))
        yield f"no machine of '{asked.backend}' holds {accelerator}; allowed: {allowed}"


def _machine(stage: Stage) -> Optional[str]:
    """Why the machine that the recipe names cannot carry the accelerator that it asks for."""
    asked = stage.hardware
    named, cloud = asked.vertex.machine if asked.vertex else None, _CLOUD.get(asked.backend)
    if not named or cloud is None:
        return None
    try:
        accelerator = hardware.parse(asked.accelerator)
    except ValueError:  # told already
        return None
    held = hardware.held_by(named, cloud)
    if not held or any(
        kind == accelerator.kind.name and count in (0, accelerator.count) for kind, count in held
    ):
        return None
    carries = " or ".join(f"{kind}:{count}" if count else kind for kind, count in held)
    fit = hardware.machine(accelerator, cloud)
    fix = f"leave it out ({fit} is taken then)" if fit else "leave it out"
    return f"{named} carries {carries}, but hardware.accelerator is {accelerator}; {fix}"


def _training(stage: Stage) -> Iterator[Problem]:
    model, train, data = stage.model, stage.train, stage.data
    trains = stage.stage in ("tokenizer", "targets", *TRAINING)
    if trains and not data.train:
        yield ("data", "train"), f"stage '{stage.stage}' needs at least one source"
    if stage.stage == "evaluate" and not data.validation:
        yield ("data", "validation"), "stage 'evaluate' needs at least one source"
    if stage.stage in TRAINING and model and not (model.name or model.architecture):
        yield ("model",), "needs a `name`, or `init: random` with an `architecture`"
    if train is not None and train.steps is not None and train.warmup >= max(1, train.steps):
        what = f"{train.warmup:g} steps of warm-up leave nothing of {train.steps} steps"
        yield ("train", "warmup"), what
    if (wrong := phases.problem(stage)) is not None:
        yield wrong
    if train is not None and train.evaluate_every > 0 and not data.validation:
        yield ("train", "evaluate_every"), "there is nothing to evaluate on: no `data.validation`"
    length = data.sequence_length
    if stage.grpo is not None and stage.grpo.max_new_tokens >= length:
        what = f"leave no room for a prompt in data.sequence_length {length}"
        yield ("grpo", "max_new_tokens"), f"{stage.grpo.max_new_tokens} tokens {what}"
    same = stage.kd and model and model.name and stage.kd.teacher == model.name
    if same and model and model.init == "pretrained":
        yield ("kd", "teacher"), "is the student itself: its targets would teach nothing"
    again = stage.sdce and model and model.name and stage.sdce.surrogate == model.name
    if again and model and model.init == "pretrained":
        yield ("sdce", "surrogate"), "is the model itself: its targets would teach nothing"
    if stage.stage in ("dpo", "ipo"):
        yield from _no_pairs(stage)
    if stage.preference and model:
        for key, what in preference_problems(stage.stage, stage.preference, model):
            yield ("preference", key), what
    if train is not None and (what := refused(stage.stage, train.parallel, model)):
        yield ("train", "parallel"), what
    yield from _together(stage)


def _together(stage: Stage) -> Iterator[Problem]:
    """What the trainer would refuse on the machine: servers, and sources without what the stage
    reads."""
    if stage.grpo is not None and stage.grpo.rollouts == "vllm" and (many := _workers(stage)) > 1:
        what = f"vllm serves one worker, here there are {many}; take one, or `generate`"
        yield ("grpo", "rollouts"), what
    if stage.grpo is not None and (packed := packed_for_server(stage.grpo, stage.model)):
        yield ("grpo", "rollouts"), packed
    if (fit := _BUILTIN.get(stage.stage)) is None:
        return
    for key in ("train", "validation"):
        for index, source in enumerate(getattr(stage.data, key)):
            if source.builtin not in (None, *fit):
                what = f"'{source.builtin}' holds nothing for stage '{stage.stage}'; take "
                yield ("data", key, index, "builtin"), what + " or ".join(fit)


def _workers(stage: Stage) -> int:
    """The processes that train: one for each accelerator; 1 where the recipe says no number."""
    try:
        return hardware.parse(stage.hardware.accelerator).count * stage.hardware.nodes
    except ValueError:  # said where it is written
        return 1


def _no_pairs(stage: Stage) -> Iterator[Problem]:
    """Sources of a stage that reads pairs, which say themselves that they hold none."""
    pairs = ("auto", "preference", None)
    for key in ("train", "validation"):
        for index, source in enumerate(getattr(stage.data, key)):
            at = ("data", key, index)
            if source.format not in pairs:
                what = f"'{source.format}' holds no pairs, which stage '{stage.stage}' needs; "
                yield (*at, "format"), what + "take preference, or leave it out"


def _kernels(stage: Stage) -> Iterator[Problem]:
    """What a model asks of a GPU, and the recipe's accelerator does not have."""
    try:
        kind = hardware.parse(stage.hardware.accelerator).kind
    except ValueError:  # said where it is written
        return
    model = stage.model
    if model is None:
        return
    wanted, asked = model.attention, f"hardware.accelerator is {stage.hardware.accelerator}"
    lowest = {"flash_attention_2": 8.0, "flash_attention_3": 9.0, "varlen": 8.0, "flex": 8.0}
    if kind.capability < lowest.get(wanted, 0) or (
        wanted == "flash_attention_3" and kind.capability != 9.0
    ):
        needs = "an H100 or H200" if wanted == "flash_attention_3" else (
            f"a GPU of compute capability {lowest[wanted]} or higher")  # fmt: skip
        yield ("model", "attention"), f"'{wanted}' needs {needs}; {asked}; take auto or sdpa"
    elif wanted in _NO_SINKS and _has_sinks(model.name):
        what = (
            f"'{wanted}' leaves out the attention sinks of {model.name}, or gives them no gradient"
        )
        yield ("model", "attention"), f"{what}; take auto, flex or eager"
    if model.float8 not in ("off", "auto") and kind.capability < _FLOAT8:
        yield (
            ("model", "float8"),
            f"'{model.float8}' needs a GPU of compute capability {_FLOAT8} or higher, such as L4 "
            f"or H100; {asked}; take off or auto",
        )


def _has_sinks(name: Optional[str]) -> bool:
    """Whether it is a gpt-oss, as far as is known here."""
    found = shapes.of_reference(name, Path()) if name and "${" not in name else None
    return found is not None and found.family == "gpt_oss"


def _references(stage: Stage, earlier: Collection[str], known: Sequence[str]) -> Iterator[Problem]:
    blocks = to_dict(stage)
    for path, text in _strings(blocks, ()):
        for name in STAGE_REFERENCE.findall(text):
            if path[0] in ("hardware", "gate"):
                yield path, "`${stage:ID}` belongs in model, data, train, kd and evaluate"
            elif len(known) == 1:
                yield path, f"there is no pipeline, so no stage '{name}'"
            elif (what := _unreachable(name, stage.id, earlier, known)) is not None:
                yield path, what


def _unreachable(
    name: str, own: str, earlier: Collection[str], known: Sequence[str]
) -> Optional[str]:
    if name in earlier:
        return None
    if name == own:
        return f"stage '{name}' is this one"
    if name not in known:
        return f"no stage '{name}'; {nearest(name, earlier or known)}"
    if known.index(name) > known.index(own):
        return f"stage '{name}' comes later"
    return f"stage '{name}' is not among those this one waits for; add it to `needs`"


def _strings(value: Any, at: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    if isinstance(value, str):
        yield at, value
    elif isinstance(value, dict):
        for key, child in value.items():
            yield from _strings(child, (*at, key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _strings(child, (*at, index))


def _gate(
    gate: Gate, stage: Stage, earlier: Collection[str], known: Sequence[str]
) -> Iterator[tuple[str, str]]:
    labels = set(stage.evaluate.models) if stage.evaluate else set()
    for key in ("metric", "below", "above"):
        name = getattr(gate, key)
        owner, dot, _ = (name or "").partition(".")
        if name is not None and not name.strip("."):
            yield key, "is empty; name a metric such as val_loss or STAGE.val_loss"
        elif dot and owner not in {stage.id, *labels, *earlier}:
            what = _unreachable(owner, stage.id, earlier, known) if owner in known else None
            yield (
                key,
                what or f"no stage '{owner}'; {nearest(owner, {stage.id, *labels, *earlier})}",
            )
    if gate.min is not None and gate.max is not None and gate.min > gate.max:
        yield "min", f"no number is at least {gate.min:g} and at most {gate.max:g}"
    if gate.by < 0:
        yield "by", "must not be negative"
    if gate.by and gate.below is None and gate.above is None:
        yield "by", "is the margin of `below` or `above`; neither is given"


def _local_data(stage: Stage) -> Iterator[Problem]:
    for path, given in _data_files(stage):
        text = given.removeprefix("file://")
        if not text or "://" in text or "${" in text:
            continue
        place = Path(text)
        if glob.has_magic(text):
            if (what := _unmatched(place)) is not None:
                yield path, what
            continue
        try:
            there, folder = place.exists(), place.is_dir()
        except (OSError, ValueError):
            there = folder = False
        if not there:
            yield path, f"no such file or folder: {text}"
        elif path[-1] == "path" and not folder and place.suffix not in _DATA:
            yield path, f"{text} is no data file: name a folder, a .jsonl or a .txt file"


def _unmatched(pattern: Path) -> Optional[str]:
    try:
        if pattern.exists() or any(
            Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor)))
        ):
            return None
    except (OSError, ValueError) as error:  # `**` beside other letters, before Python 3.13
        return f"{pattern} cannot be matched: {error}"
    return f"no file matches {pattern}"


def _schemes(stage: Stage) -> Iterator[Problem]:
    """URIs that no job can read."""
    seconds = stage.train.seconds_of if stage.train is not None else None
    of_train = [(("train", "seconds_of"), seconds)] if seconds is not None else []
    for path, text in (*_data_files(stage), *references(stage), *of_train):
        if "://" in text and not text.startswith("file://") and not _BUCKET.fullmatch(text):
            forms = "write gs://BUCKET/NAME, s3://BUCKET/NAME or a path"
            yield path, f"cannot read {text}: {misspelt(text) or forms}"


def _cloud_data(stage: Stage) -> Iterator[Problem]:
    for path, text in _data_files(stage):
        if text and "${stage:" not in text and not _BUCKET.fullmatch(text):
            yield path, "a Vertex AI job cannot read this machine's files; write gs://BUCKET/..."


def _data_files(stage: Stage) -> Iterator[tuple[KeyPath, str]]:
    """(path of the key, what it says) of all that `data` reads from files."""
    for key in ("train", "validation"):
        for index, source in enumerate(getattr(stage.data, key)):
            for name in ("path", "manifest"):
                if (given := getattr(source, name)) is not None:
                    yield ("data", key, index, name), given
    if stage.data.chat_template not in (None, "chatml"):
        yield ("data", "chat_template"), str(stage.data.chat_template)
