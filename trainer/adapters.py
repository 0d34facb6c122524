"""Low-rank adapters through PEFT: attached to a model, written, and read in PEFT's own format.

A checkpoint of an adapter holds `adapter_config.json`, which names the base model, and
`adapter_model.safetensors`; nothing of the base. PEFT is imported on use.
"""

from __future__ import annotations

import json
import re
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

from torch import Tensor, nn

from trainer import copies
from trainer.checkpoint import CheckpointError, resolve
from trainer.config import Adapter, ConfigError, nearest

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
#: Letters of an error of a library that are shown.
_LONG = 200
#: Ends of names of linear layers inside the blocks that are no projections: routers of experts.
ROUTERS = ("router", "gate", "shared_expert_gate")


def attach(model: Any, adapter: Adapter, base: str, saved: Optional[Path] = None) -> Any:
    """`model`, frozen, with adapters at `adapter.targets`; the wrapper serves what the model does.
    `base`: the model reference, which checkpoints name. `saved`: a checkpoint to take the weights
    from. Errors: `ConfigError` for targets that are not there; RuntimeError when what PEFT made
    trainable is not what the shapes say."""
    from peft import LoraConfig, get_peft_model

    layers = target_layers(model, adapter)
    experts = target_experts(model, adapter)
    whole = adapter.alpha == int(adapter.alpha)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=int(adapter.alpha) if whole else adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=_targets(model, layers, adapter),
        target_parameters=_ending(model, experts) or None,
        base_model_name_or_path=resolve(base),
    )
    expected = expected_count(layers, adapter.rank, experts)
    try:
        with _without_warnings():
            wrapped = get_peft_model(model, config)
    except ValueError as error:  # some targets go only together
        raise ConfigError(f"model.adapter.targets: {one_line(error)}") from error
    found = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    if found != expected:
        raise RuntimeError(
            f"the adapter has {found:,} trainable parameters, its shapes say {expected:,}"
        )
    if saved is not None:
        _restore(wrapped, saved, adapter)
    return wrapped


def target_layers(model: Any, adapter: Adapter) -> dict[str, tuple[int, int]]:
    """Names of the layers to be adapted -> (inputs, outputs), of the language model alone: what
    else there is, such as a vision tower, never runs here. `auto`: the linear layers inside its
    blocks, so never embeddings or the head. Errors: `ConfigError`."""
    head, runs = model.get_output_embeddings(), language_model(model)
    inside = projections(model)
    if adapter.targets == "auto":
        if not inside:
            raise ConfigError("model.adapter.targets: found no linear layers; name them")
        return inside
    linear = {
        name: _shape(module)
        for name, module in model.named_modules()
        if is_linear(module) and (module is head or name.startswith(runs))
    }
    outside = {name for name, module in model.named_modules() if module is head}
    found: dict[str, tuple[int, int]] = {}
    for target in adapter.targets:
        hits = [name for name in linear if name == target or name.endswith(f".{target}")]
        if outside & set(hits):
            raise ConfigError(f"model.adapter.targets: '{target}' is the output head; leave it out")
        if not hits:
            near = nearest(target, _ends(inside))
            raise ConfigError(f"model.adapter.targets: no linear layer '{target}'; {near}")
        found.update({name: linear[name] for name in hits})
    return found


def projections(model: Any) -> dict[str, tuple[int, int]]:
    """Names of the linear layers inside the blocks of the language model, but for routers ->
    (inputs, outputs)."""
    runs, blocks = language_model(model), _blocks(model)
    return {
        name: _shape(module)
        for name, module in model.named_modules()
        if is_linear(module)
        and name.startswith(runs)
        and name.startswith(blocks)
        and name.rpartition(".")[2] not in ROUTERS
    }


def target_experts(model: Any, adapter: Adapter) -> dict[str, tuple[int, int, int]]:
    """Names of the tensors of experts to be adapted -> (experts, inputs, outputs): all there are,
    or none where they are not asked for. Errors: `ConfigError` when there are none to adapt."""
    if not adapter.experts:
        return {}
    found = fused_experts(model)
    if not found:
        raise ConfigError(
            "model.adapter.experts: this model has no experts that are one tensor; leave it out"
            " (experts that are linear layers are among `targets: auto`)"
        )
    return found


def fused_experts(model: Any) -> dict[str, tuple[int, int, int]]:
    """Names of the parameters of the language model's blocks that hold the weights of all experts
    of a layer, [experts, in, out] or [experts, out, in] -> (experts, inputs, outputs)."""
    runs, blocks = language_model(model), _blocks(model)
    found: dict[str, tuple[int, int, int]] = {}
    for path, module in model.named_modules():
        if "expert" not in path or not path.startswith(blocks) or not path.startswith(runs):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3:
                experts, one, other = parameter.shape
                turned = getattr(module, "is_transposed", False)  # PEFT asks the same
                found[f"{path}.{name}"] = (experts, *((one, other) if turned else (other, one)))
    return found


def language_model(model: Any) -> str:
    """The prefix of the names of all that lies in the part that reads text: `model.` or
    `model.language_model.`; empty when that is the model itself."""
    decoder = model.get_decoder()
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    return f"{name}." if name else ""


def left_out(model: nn.Module) -> list[str]:
    """A line about the experts that `attach` did not reach: most of such a model, and named
    targets pass over it when the experts are one tensor."""
    sizes = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if ".lora_" not in name
    }
    frozen = {n: s for n, s in sizes.items() if ".experts." in n and ".base_layer." not in n}
    if not frozen:
        return []
    count, whole = sum(frozen.values()), sum(sizes.values())
    fused = any(p.ndim == 3 for name, p in model.named_parameters() if name in frozen)
    how = "; model.adapter.experts: true adapts them" if fused else ""
    said = f"{count:,} parameters ({count / whole:.0%} of the model)"
    return [f"adapter: the experts stay frozen, {said}{how}"]


def expected_count(
    layers: dict[str, tuple[int, int]],
    rank: int,
    experts: Optional[dict[str, tuple[int, int, int]]] = None,
) -> int:
    """Parameters of the adapters: A [rank, in] and B [out, rank] for every layer, and for each
    expert of every tensor of `experts`."""
    fused = (count * (inputs + outputs) for count, inputs, outputs in (experts or {}).values())
    return rank * (sum(map(sum, layers.values())) + sum(fused))


def adapted_tensors(model: Any) -> set[str]:
    """The names, in the base model, of the tensors that the adapter of `model` changes: a B that is
    all zeros, as before the first step, changes nothing."""
    found = attached(model)
    return {name for name, part in found.items() if bool(part.lora_B["default"].weight.any())}


def attached(model: Any) -> dict[str, Any]:
    """The names, in the base model, of all tensors that have an adapter -> PEFT's module there."""
    found = {}
    for path, module in model.named_modules():
        if "default" in getattr(module, "lora_B", ()):
            plain = path.removeprefix("base_model.model.").replace(".base_layer", "")
            found[f"{plain}.{getattr(module, 'parameter_name', 'weight')}"] = module
    return found


def is_adapter(folder: str | Path) -> bool:
    """Whether a local folder holds an adapter and not a model."""
    at = Path(folder)
    return (at / CONFIG).is_file() and not (at / "config.json").is_file()


def fetch(reference: str) -> str:
    """The folder of an adapter: that of a model reference, or the Hub's files in the local cache.
    Errors: `ConfigError` when it is in neither place."""
    name = resolve(reference)
    if Path(name).is_dir():
        return name
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(name))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot fetch the adapter '{reference}': {one_line(error)}") from error


def base_of(folder: str | Path) -> str:
    """The model that an adapter folder names. Errors: `ConfigError` when it names none."""
    path = Path(folder) / CONFIG
    try:
        base = json.loads(path.read_text()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if not isinstance(base, str) or not base:
        raise ConfigError(f"{path}: names no base model")
    return copies.here(base)


def tensors(model: Any) -> dict[str, Tensor]:
    """The tensors of the adapter of `model`, by their names in a file of PEFT."""
    from peft import get_peft_model_state_dict

    # Told not to save embeddings: otherwise PEFT asks the Hub whether their size has changed.
    return dict(get_peft_model_state_dict(model, save_embedding_layers=False))


def save(model: Any, folder: Path, values: Optional[dict[str, Tensor]] = None) -> None:
    """Write the adapter of `model` as PEFT would. `values`: in place of the tensors it has now."""
    from safetensors.torch import save_file

    state = tensors(model) if values is None else values
    written = {name: value.detach().cpu().contiguous() for name, value in sorted(state.items())}
    save_file(written, folder / WEIGHTS, metadata={"format": "pt"})
    config = model.peft_config["default"].to_dict()
    config["inference_mode"] = True
    # Of a copy, its origin: the adapter will be read where the copy is elsewhere.
    base = config.get("base_model_name_or_path")
    config["base_model_name_or_path"] = copies.origin(base) if isinstance(base, str) else base
    text = json.dumps(config, indent=2, sort_keys=True, default=sorted)
    (folder / CONFIG).write_text(text + "\n")


def load(base: Any, folder: str | Path) -> Any:
    """`base` with the adapter of `folder`, to be read. Errors: `ConfigError` where they differ:
    PEFT leaves out what it finds no place for, with a warning."""
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        with _without_warnings():
            model = PeftModel.from_pretrained(base, str(folder), is_trainable=False)
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise ConfigError(
            f"cannot load the adapter '{folder}': {_another_base(error) or trouble(folder, error)}"
        ) from error
    if (Path(folder) / WEIGHTS).is_file():
        theirs = {name for name in _names(Path(folder) / WEIGHTS) if ".lora_" in name}
        differ = sorted(theirs ^ {name for name in tensors(model) if ".lora_" in name})
        if differ:
            where = "has no place here" if differ[0] in theirs else "is not in it"
            raise ConfigError(
                f"cannot load the adapter '{folder}': it was made for another base model:"
                f" {differ[0]} {where} ({len(differ)} such tensors)"
            )
    return model


def trouble(name: str | Path, error: Exception) -> str:
    """Why `error` came of reading the model or adapter `name`, in one line: libraries take a folder
    that is not there for a name of the Hub, and do not say which file is cut off."""
    from safetensors import SafetensorError, safe_open

    folder = Path(name)
    if str(name).startswith(("/", "./", "../", "~")) and not folder.is_dir():
        return "no such folder"
    if folder.is_dir() and not any(folder.iterdir()):
        return "the folder is empty"
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (OSError, SafetensorError) as damage:
            return f"{path.name} is damaged ({damage}); fetch or write it again"
    return one_line(error)


def one_line(error: Exception) -> str:
    """What an error of a library says: its first line, with those after it, up to `_LONG` letters,
    while it ends with a colon; its class when it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    text, *rest = lines
    while rest and text.endswith(":"):
        text = textwrap.shorten(f"{text} {rest.pop(0)}", max(_LONG, len(text)), placeholder=" ...")
    return text


def _another_base(error: Exception) -> Optional[str]:
    """One line, when `error` is that the layers of an adapter and those of its base differ."""
    about = "it was made for another base model: "
    shapes = re.search(
        r"size mismatch for (\S+): .*?Size\((\[.*?\])\) from .*?Size\((\[.*?\])\)", str(error)
    )
    if shapes:
        name, theirs, ours = shapes.groups()
        return f"{about}{name} is {theirs} in the adapter, {ours} here"
    return about + one_line(error) if "not found in the base model" in str(error) else None


def _names(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return list(file.keys())


def _restore(model: Any, saved: Path, adapter: Adapter) -> None:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    state: dict[str, Tensor] = load_file(saved / WEIGHTS)
    ours = {name: tuple(value.shape) for name, value in tensors(model).items()}
    theirs = {name: tuple(value.shape) for name, value in state.items()}
    if ours != theirs:
        name = min(n for n in {*ours, *theirs} if ours.get(n) != theirs.get(n))
        raise CheckpointError(
            f"{saved}: its adapter is not that of model.adapter ({name} is {theirs.get(name)}"
            f" there, {ours.get(name)} here); resume with the settings it was started with"
        )
    scale = json.loads((saved / CONFIG).read_text()).get("lora_alpha", adapter.alpha)
    if scale != adapter.alpha:  # in no tensor: the same ones would count more or less
        raise CheckpointError(
            f"{saved}: its adapter is not that of model.adapter (alpha is {scale:g} there,"
            f" {adapter.alpha:g} here); resume with the settings it was started with"
        )
    set_peft_model_state_dict(model, state)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer."""
    # GPT-2 and its kin keep linear layers as `Conv1D`, with the weight the other way round.
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _shape(module: Any) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return int(module.weight.shape[0]), int(module.weight.shape[1])


def _blocks(model: Any) -> tuple[str, ...]:
    """Prefixes of the names of what lies in the model's repeated blocks."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    return tuple(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ) or ("\0",)


def _targets(model: nn.Module, layers: dict[str, Any], adapter: Adapter) -> list[str]:
    """What PEFT is told: ends of names, as people write them, where these match `layers` and no
    others, else their whole names (a vision tower has a `q_proj` as well)."""
    short = sorted(_ends(layers) if adapter.targets == "auto" else adapter.targets)
    ends = tuple(f".{end}" for end in short)
    hits = {name for name, _ in model.named_modules() if name in short or name.endswith(ends)}
    return short if hits == layers.keys() else sorted(layers)


def _ending(model: nn.Module, experts: dict[str, Any]) -> list[str]:
    """The same of tensors of experts: `mlp.experts.down_proj` where this names no others."""
    short = sorted({".".join(name.split(".")[-3:]) for name in experts})
    ends = tuple(f".{end}" for end in short)
    hits = {name for name, _ in model.named_parameters() if name.endswith(ends)}
    return short if hits == experts.keys() else sorted(experts)


def _ends(layers: dict[str, tuple[int, int]]) -> set[str]:
    return {name.rpartition(".")[2] for name in layers}


@contextmanager
def _without_warnings() -> Iterator[None]:
    """PEFT calls what this Transformers has renamed, and says aloud how it reads a Conv1D."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
