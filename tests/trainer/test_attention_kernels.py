"""Our attention functions against the library's eager attention, on models of real families, with
packed rows. On a CPU flex runs uncompiled, and varlen on kernels that `flash_on_cpu` brings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.trainer import flash_on_cpu
from tests.trainer.test_trial import CPU, LEAKY, WINDOW, tiny
from trainer import adapters, attention, attention_kernels, float8, trial
from trainer.batch import Batch
from trainer.config import Adapter, ConfigError, Model
from trainer.models import hidden_states
from trainer.runtime import Runtime

FP32 = Runtime(CPU, "fp32")
WIDE = {"hidden_size": 64, "head_dim": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": WIDE,  # four heads share two keys and values
    "gemma3_text": {**WIDE, **WINDOW, "query_pre_attn_scalar": 4},  # a window, a scale of its own
    "qwen3_moe": {**WIDE, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
}


@pytest.fixture
def flash() -> Iterator[list[tuple[int, ...]]]:
    with flash_on_cpu.registered() as calls:
        yield calls


@pytest.fixture
def flex_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch refuses flex's gradient on a CPU, where its reference computes it all the same."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)


def rows() -> Batch:
    """Three rows of 12 tokens: three documents, one, and two with padding behind."""
    lengths = [(5, 4, 3), (12,), (6, 4, 2)]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    ids = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(0))
    targets = ids.roll(-1, 1)
    targets[2, 10:] = -100
    return Batch(ids, positions, targets).to(CPU)


def on(kind: str, name: str, **extra: Any) -> Any:
    model = tiny(name, **extra)
    model.set_attn_implementation(attention.pick_attention(model.config, kind))
    assert attention.kind_of(model) == kind
    return model


def gradients(model: Any, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Hidden states, and the gradients of a sum over them with unequal weights."""
    hidden = hidden_states(model, batch)
    weights = torch.linspace(-1, 1, hidden.numel()).view_as(hidden)
    (hidden * weights).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return hidden.detach(), found


def assert_as_eager(kind: str, name: str, **extra: Any) -> dict[str, torch.Tensor]:
    hidden, found = gradients(on(kind, name, **extra), rows())
    wanted_hidden, wanted = gradients(on("eager", name, **extra), rows())
    torch.testing.assert_close(hidden, wanted_hidden, rtol=1e-5, atol=1e-5)
    assert found.keys() == wanted.keys()
    for parameter, gradient in wanted.items():
        size = float(gradient.abs().max())
        assert float((found[parameter] - gradient).abs().max()) < 1e-5 * max(size, 1.0), parameter
    return found


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.usefixtures("flex_gradient")
def test_flex_gives_what_eager_attention_gives(name: str) -> None:
    assert_as_eager("flex", name, **FAMILIES[name])


@pytest.mark.usefixtures("flex_gradient")
def test_flex_has_sinks_and_their_gradient() -> None:
    """Documents in rows of their own: this family builds its masks without positions."""
    found = assert_as_eager("flex", "gpt_oss", **{**LEAKY["gpt_oss"], **WIDE})
    sinks = [gradient for name, gradient in found.items() if name.endswith(".sinks")]
    assert len(sinks) == 2 and all(float(gradient.abs().min()) > 0 for gradient in sinks)


@pytest.mark.usefixtures("flex_gradient")
def test_flex_caps_scores() -> None:
    capped = {**WIDE, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 4}
    assert_as_eager("flex", "vaultgemma", **capped)
    plain, _ = gradients(on("flex", "vaultgemma", **{**capped, "attn_logit_softcapping": None}),
                         rows())  # fmt: skip
    other, _ = gradients(on("flex", "vaultgemma", **capped), rows())
    assert float((plain - other).abs().max()) > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
def test_varlen_gives_what_eager_attention_gives(name: str, flash: list[tuple[int, ...]]) -> None:
    assert_as_eager("varlen", name, **FAMILIES[name])
    assert flash == [(0, 5, 9, 12, 24, 30, 34, 36)] * 2  # once a layer


def test_varlen_computes_in_the_dtype_of_autocast(flash: list[tuple[int, ...]]) -> None:
    runtime = Runtime(CPU, "bf16")
    with runtime.autocast(), torch.no_grad():
        found, wanted = (
            hidden_states(on(kind, "llama", **WIDE), rows()).float() for kind in ("varlen", "eager")
        )
    assert float((found - wanted).norm() / wanted.norm()) < 2e-2
    assert flash


def test_borders_are_taken_on_the_host_and_only_where_they_are_needed() -> None:
    batch = rows()
    assert attention.decoder_inputs(on("eager", "llama", **WIDE), batch).keys() == {
        "input_ids", "position_ids"
    }  # fmt: skip
    given = attention.decoder_inputs(on("varlen", "llama", **WIDE), batch)
    assert given["input_ids"].shape == (1, 36)
    assert given["cu_seq_lens_q"].tolist() == [0, 5, 9, 12, 24, 30, 34, 36]
    assert given["max_length_q"] == 12 and given["cu_seq_lens_k"] is given["cu_seq_lens_q"]
    batch.position_ids = batch.position_ids.to("meta")  # nobody may wait for it
    again = attention.decoder_inputs(on("varlen", "llama", **WIDE), batch)
    assert torch.equal(again["cu_seq_lens_q"], given["cu_seq_lens_q"])


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", ["flex", "varlen"])
def test_the_trial_passes_on_both(kind: str, packing: bool, flash: list[tuple[int, ...]]) -> None:
    for precision in ("fp32", "bf16"):
        for name in ("llama", "gemma3_text"):
            model = on(kind, name, **FAMILIES[name])
            if kind == "varlen" and precision == "fp32":
                assert attention.needs_16_bits(model)
                continue
            trial.check(model, Runtime(CPU, precision), name, packing=packing)
            assert attention.kind_of(model) == kind
    assert bool(flash) == (kind == "varlen")


def test_a_kernel_that_passes_over_sinks_or_borders_fails_the_trial(
    flash: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    oss = tiny("gpt_oss", **LEAKY["gpt_oss"])
    oss.get_decoder().config._attn_implementation = "sdpa"  # takes sinks, and leaves them out
    with pytest.raises(ConfigError, match=r"attention on sdpa is not what .*: eager$"):
        trial.check(oss, FP32, "m", packing=False)
    assert attention.kind_of(oss) == "sdpa"
    model = on("varlen", "llama", **WIDE)

    def one_document(positions: torch.Tensor) -> tuple[torch.Tensor, int]:
        return torch.tensor([0, positions.numel()], dtype=torch.int32), positions.numel()

    monkeypatch.setattr(attention, "documents", one_document)
    with torch.no_grad():
        assert trial.leak(model, Runtime(CPU, "bf16"), packing=True) > 0.1


@pytest.mark.parametrize(
    ("function", "asked", "words"),
    [
        (attention_kernels.varlen, {"s_aux": torch.zeros(2)}, "varlen has no attention sinks"),
        (attention_kernels.varlen, {"softcap": 30.0}, "varlen has no capped scores"),
        (attention_kernels.varlen, {"dropout": 0.1}, "varlen has no dropout"),
        (attention_kernels.flex, {"dropout": 0.1}, "flex has no dropout"),
        (attention_kernels.flex, {"position_bias": torch.ones(1)}, "flex has no position bias"),
        (attention_kernels.flex, {}, "the model makes its own masks"),
    ],
)
def test_what_a_function_does_not_have_is_refused(
    function: Any, asked: dict[str, Any], words: str
) -> None:
    q = torch.zeros(1, 2, 4, 16)
    given = {"attention_mask": None, **asked}
    with pytest.raises(ConfigError, match=rf"^model\.attention: {words}"):
        function(torch.nn.Linear(1, 1).train(), q, q, q, **given)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@pytest.mark.parametrize("kind", ["flex", "varlen"])
def test_text_is_generated_as_on_eager_attention(
    kind: str, name: str, flash: list[tuple[int, ...]]
) -> None:
    """Two questions, the shorter one padded at its left; then one alone."""
    ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    ours, eager = (on(way, name, **FAMILIES[name]).eval() for way in (kind, "eager"))
    for given in (ids, mask), (ids[:1], mask[:1]):
        found, wanted = (
            model.generate(given[0], attention_mask=given[1], **options) for model in (ours, eager)
        )
        assert found.shape[1] == 13 and torch.equal(found, wanted)
    assert bool(flash) == (kind == "varlen")


@pytest.mark.usefixtures("flex_gradient", "flash")
@pytest.mark.parametrize("kind", ["flex", "varlen"])
def test_borders_and_masks_reach_layers_that_are_computed_twice_and_adapters(kind: str) -> None:
    found = []
    for again in (False, True):
        model = on(kind, "llama", **WIDE)
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        model = adapters.attach(model.train(), Adapter(rank=2), "base")
        for parameter in adapters.tensors(model).values():
            torch.nn.init.normal_(parameter, std=0.1)
        hidden, gradient = gradients(model, rows())
        found.append((hidden, gradient))
        assert gradient and all(".lora_" in name for name in gradient)
    assert torch.equal(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():
        assert torch.equal(gradient, found[1][1][name]), name
    batch = rows()
    given = attention.decoder_inputs(model, batch)
    assert ("cu_seq_lens_q" in given) == (kind == "varlen")


@pytest.mark.slow
@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("narrow", [False, True])
def test_blocks_may_be_compiled_around_both(narrow: bool) -> None:
    """With varlen and emulated float8, without a compiler of machine code; a second batch has other
    borders."""
    plan = Model(name="m", float8="torchao" if narrow else "off")
    found = []
    for compiled in (False, True):
        torch.compiler.reset()
        model = on("varlen", "llama", **WIDE)
        float8.convert(model, plan, FP32, tokens=36, steady=False, emulate=True)
        if compiled:
            for block in model.model.layers:
                block.compile(backend="aot_eager", fullgraph=True)
        whole = rows()
        assert whole.host is not None
        half = whole.host.split()[1].to(CPU)
        found.append([*gradients(model, whole), gradients(model, half)[0]])
    for plain, made in zip(*found):
        torch.testing.assert_close(made, plain, rtol=1e-5, atol=1e-5)
