"""What blocks keep and compute again, and blocks that are compiled: the same gradients."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tests.trainer.conftest import in_folder
from tests.trainer.gradients import CPU, rows
from tests.trainer.test_loop import lines
from trainer import blocks
from trainer.config import Adapter, Architecture, ConfigError, Model, StageConfig
from trainer.models import load_model, load_tokenizer
from trainer.objectives.next_token import NextToken
from trainer.step import backward, normalisers, prepare

SMALL = Architecture(hidden_size=32, layers=2, heads=4, kv_heads=2, intermediate_size=64)
Run = Callable[..., Any]


class Products(TorchDispatchMode):
    """Counts matrix products, and fused attention's."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = self.attention = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.matrix += function.name() in ("aten::mm", "aten::addmm")
        self.attention += function.name() == "aten::_scaled_dot_product_flash_attention_for_cpu"
        return function(*args, **(kwargs or {}))


def made(
    tokenizer: str, how: Any, folder: Path, architecture: Architecture = SMALL, **plan: Any
) -> Any:
    config = Model(
        init="random", tokenizer=tokenizer, architecture=architecture, gradient_checkpointing=how
    )
    if plan:
        if not (folder / "config.json").exists():
            load_model(config, load_tokenizer(tokenizer), CPU, 1).save_pretrained(folder)
        config = Model(name=str(folder), tokenizer=tokenizer, gradient_checkpointing=how, **plan)
    return load_model(config, load_tokenizer(tokenizer), CPU, 1)


def gradient(model: Any, tokenizer: str, texts: str, precision: str = "fp32") -> Any:
    """The gradient of four packed rows, and the products that it took."""
    runtime, objective = CPU.at(precision), NextToken()
    batches = prepare(objective, [rows(tokenizer, texts, True).batch([0, 1, 2, 3])], runtime, 0)
    with Products() as products:
        backward(model, objective, batches, normalisers(batches, runtime), runtime)
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(grads), products


@pytest.mark.parametrize("plan", [{}, {"adapter": Adapter(rank=4)}], ids=["full", "adapter"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_selective_checkpointing_repeats_no_product(
    plan: Any, precision: str, tokenizer: str, texts: str, tmp_path: Path
) -> None:
    found = {
        how: gradient(made(tokenizer, how, tmp_path, **plan), tokenizer, texts, precision)
        for how in (False, True, "selective")
    }
    plain, every, some = (found[how] for how in (False, True, "selective"))
    assert torch.equal(plain[0], every[0]) and torch.equal(plain[0], some[0])
    assert every[1].matrix > plain[1].matrix and every[1].attention == 2 * plain[1].attention
    # Beside an adapter, checkpointing asks for the gradient of the embeddings' result: through q,
    # k and v of the first block, and through the A of each.
    more = 6 if plan else 0
    assert (some[1].matrix, some[1].attention) == (plain[1].matrix + more, plain[1].attention)


class Storages(TorchDispatchMode):
    """Every storage that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, int]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        results = function(*args, **(kwargs or {}))
        for one in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(one, torch.Tensor):
                storage = one.untyped_storage()
                self.made.append((StorageWeakRef(storage), storage.nbytes()))
        return results

    def alive(self) -> int:
        """Bytes of those that are still held."""
        return sum({ref.cdata: size for ref, size in self.made if not ref.expired()}.values())


def test_selective_checkpointing_keeps_less_than_all_and_more_than_nothing(
    tokenizer: str, texts: str, tmp_path: Path
) -> None:
    """Bytes that a forward pass leaves for the backward pass."""
    kept = {}
    for how in (False, True, "selective"):
        model = made(tokenizer, how, tmp_path)
        batch = prepare(NextToken(), [rows(tokenizer, texts, True).batch([0])], CPU, 0)[0]
        with Storages() as storages:
            output = model.get_decoder()(
                input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
            )
        kept[how] = storages.alive()
        del output
    assert kept[True] < 0.9 * kept["selective"] < 0.8 * kept[False]


@pytest.fixture
def fresh() -> Iterator[None]:
    """No compiled code of another test; compiled here and not in further processes, and without
    vectors, of which torch would first try what this processor has: that takes most of the time."""
    from torch._inductor import config

    torch._dynamo.reset()
    with config.patch({"compile_threads": 1, "cpp.simdlen": 1}):
        yield
    torch._dynamo.reset()


def names(folder: Path) -> set[str]:
    (path,) = (folder / "checkpoints").glob("step-4/model.safetensors")
    with safe_open(path, "pt") as file:
        return set(file.keys())


@pytest.fixture
def as_it_is(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are taken and differentiated as ever, and then run as they are: no C++ is made."""
    from torch._dynamo.backends.debugging import aot_eager
    from torch._inductor import compile_fx

    def run_as_it_is(graph: Any, examples: Any, *arguments: Any, **named: Any) -> Any:
        return aot_eager(graph, examples)

    monkeypatch.setattr(compile_fx, "compile_fx", run_as_it_is)


@pytest.mark.parametrize(
    ("how", "plan"), [(True, {}), ("selective", {"adapter": Adapter(rank=4, targets=("q_proj",))})],
    ids=["full", "adapter"],
)  # fmt: skip
def test_compiled_blocks_have_the_gradients_of_plain_ones(
    how: Any, plan: Any, tokenizer: str, texts: str, tmp_path: Path, as_it_is: None
) -> None:
    """With what they compute again, and batches of two shapes."""

    def grads(model: Any) -> torch.Tensor:
        objective = NextToken()
        for count in (4, 2):
            batches = prepare(objective, [rows(tokenizer, texts, True).batch(range(count))], CPU, 0)
            backward(model, objective, batches, normalisers(batches, CPU), CPU)
        found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return torch.cat(found)

    one_layer = replace(SMALL, layers=1)
    plain = grads(made(tokenizer, how, tmp_path, architecture=one_layer, **plan))
    model = made(tokenizer, how, tmp_path, architecture=one_layer, **plan)
    before = list(model.state_dict())
    blocks.compile_blocks(model, packing=True)
    torch.testing.assert_close(grads(model), plain, rtol=1e-5, atol=1e-6)
    assert list(model.state_dict()) == before
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] >= 1 and not counters["graph_break"]


@pytest.mark.slow  # half a minute of g++
def test_compiled_blocks_train_the_same_under_the_same_names(
    stage: StageConfig, run_stage: Run, tmp_path: Path, fresh: None
) -> None:
    assert stage.model is not None
    model = replace(stage.model, architecture=replace(SMALL, layers=1), gradient_checkpointing=True)
    stage = replace(stage, model=model, data=replace(stage.data, validation=()))
    compiled = replace(stage, model=replace(model, compile=True))
    settings: dict[str, Any] = {"steps": 4, "save_every": 2}
    run_stage(in_folder(stage, tmp_path / "plain", **settings))
    said = run_stage(in_folder(compiled, tmp_path / "parts", **settings, until=2)).lines
    assert any("each block is compiled as it first runs" in line for line in said)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    run_stage(in_folder(compiled, tmp_path / "parts", **settings), attempt=2)
    losses, gradients = (
        [[line[name] for line in lines(tmp_path / folder, "step")] for folder in ("plain", "parts")]
        for name in ("train_loss", "grad_norm")
    )
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert gradients[1] == pytest.approx(gradients[0], rel=1e-4)
    assert names(tmp_path / "parts") == names(tmp_path / "plain")


def test_an_error_of_the_compiler_names_the_key(
    tokenizer: str, texts: str, tmp_path: Path, fresh: None
) -> None:
    from torch._inductor import config

    model = made(tokenizer, False, tmp_path)
    blocks.compile_blocks(model, packing=True)
    absent = {"cpp.cxx": (str(tmp_path / "absent"),), "force_disable_caches": True}
    with (
        config.patch(absent),
        pytest.raises(ConfigError, match=r"model\.compile: torch could not compile") as raised,
    ):
        model(torch.zeros((1, 8), dtype=torch.int64), use_cache=False)
    assert "\n" not in str(raised.value) and "compile: false" in str(raised.value)


def test_a_decoder_without_blocks_is_refused() -> None:
    from transformers import LlamaConfig

    class Odd(torch.nn.Module):
        config = LlamaConfig()

        def get_decoder(self) -> torch.nn.Module:
            return torch.nn.Linear(2, 2)

    with pytest.raises(ConfigError, match="Odd has no list of blocks"):
        blocks.compile_blocks(Odd(), packing=True)


def test_a_word_that_is_no_way_to_recompute_is_refused() -> None:
    from trainer.config import build

    problems: list[Any] = []
    build(Model, json.loads('{"name": "a", "gradient_checkpointing": "half"}'), (), problems)
    assert problems == [
        (("gradient_checkpointing",), "expected 'selective' or true or false, got 'half'")
    ]
