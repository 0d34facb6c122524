"""Will it fit: the memory of one device, what it is made of, and what would make it fit. How well
the numbers agree with what torch counts is tests/trainer/test_memory_model.py's business."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher import fit, hardware, recipe, shapes, speed
from launcher.fit import sharding
from launcher.fit.memory import step_of
from launcher.fit.parts import usable
from launcher.fit.step import _moments
from launcher.spec import Hardware, Stage, Vertex
from trainer.config import (
    Adapter,
    Data,
    Distill,
    Evaluate,
    Grpo,
    KeepLogits,
    Merge,
    Model,
    Preference,
    Sdce,
    Targets,
    Train,
)

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
ONE_B, EIGHT_B = "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B"
SHAPES = {
    name: shape
    for name in (ONE_B, EIGHT_B)
    if (shape := shapes.of_reference(name, Path("/nowhere"))) is not None
}
L4, A100, H100 = (hardware.parse(name) for name in ("L4", "A100-40GB", "H100"))


def sft(name: str = ONE_B, length: int = 2048, rows: Any = 4, **model: Any) -> Stage:
    train = Train(steps=1, micro_batch=rows, global_batch=64 if rows == "auto" else None)
    made = Model(name=name, **{"precision": "bf16", **model})
    return Stage("s", "sft", model=made, data=Data(sequence_length=length), train=train)


def of(stage: Stage, accelerator: hardware.Accelerator = H100, nodes: int = 1) -> fit.Memory:
    found = fit.memory(stage, accelerator, nodes, shapes.of_stage(stage, (stage,), Path()))
    assert found is not None
    return found


def parts(memory: fit.Memory) -> dict[str, float]:
    return {part.name: part.bytes for part in memory.parts}


def test_an_8b_adapter_at_2048_fits_an_a100_of_40_gb_and_not_an_l4() -> None:
    stage = sft(EIGHT_B, rows=1, adapter=Adapter(rank=16))
    on_a100, on_l4 = of(stage, A100), of(stage, L4)
    assert parts(on_a100)["weights"] == pytest.approx(16.06e9, rel=1e-3)
    assert parts(on_a100)["adapter"] == 4 * 41_943_040
    assert on_a100.fits and on_a100.margin == pytest.approx(7.6e9, abs=0.3e9)
    assert on_l4.fits is False and on_l4.margin == pytest.approx(-10.8e9, abs=0.3e9)
    # Its weights alone would fit, and with checkpointing all of it does.
    changes = fit.changes(stage, L4, 1, shapes.of_stage(stage, (stage,), Path()))
    assert changes[0].settings == ("model.gradient_checkpointing=true",)
    assert changes[0].memory.margin == pytest.approx(4e9, abs=1e9)


def test_full_training_takes_sixteen_bytes_a_parameter_and_more() -> None:
    found = of(sft(rows=1, length=256))
    number = SHAPES[ONE_B].parameters
    assert parts(found)["weights"] == 4 * number
    assert parts(found)["optimizer"] == 8 * number
    assert found.allocated > 16 * number
    assert found.bytes == pytest.approx(sum(parts(found).values()))
    assert found.allocated < found.bytes


def test_frozen_parameters_have_no_moments() -> None:
    stage = sft(freeze=("model.embed_tokens.*",))
    table = SHAPES[ONE_B].vocabulary * SHAPES[ONE_B].hidden
    assert parts(of(stage))["optimizer"] == 8 * (SHAPES[ONE_B].parameters - table)
    by_the_other_name = sft(freeze=("lm_head.*",))  # tied
    assert parts(of(by_the_other_name)) == parts(of(stage))


def test_an_online_teacher_lies_beside_the_student_and_a_stored_one_does_not() -> None:
    plain = sft(rows=1)
    online = replace(plain, stage="kd", kd=Distill(teacher=EIGHT_B))
    stored = replace(plain, stage="kd", kd=Distill(mode="precompute", targets="answers"))
    near = replace(online, kd=Distill(teacher=EIGHT_B, keep_logits=KeepLogits()))
    assert parts(of(online))["teacher"] == 2 * SHAPES[EIGHT_B].parameters
    assert "teacher" not in parts(of(stored))
    assert of(plain).bytes < of(stored).bytes < of(online).bytes < of(near).bytes
    assert parts(of(near))["start"] == 2 * SHAPES[ONE_B].parameters


def test_fp32_where_the_card_has_no_bf16() -> None:
    stage = sft(EIGHT_B, adapter=Adapter(), precision="auto")
    weights = SHAPES[EIGHT_B].parameters
    assert parts(of(stage, hardware.parse("T4")))["weights"] == 4 * weights
    assert parts(of(stage, L4))["weights"] == 2 * weights


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 64),
    length=st.sampled_from([128, 1024, 4096]),
    adapter=st.booleans(),
    checkpointing=st.booleans(),
    precision=st.sampled_from(["bf16", "fp32"]),
)
def test_more_rows_take_no_less_and_checkpointing_no_more(
    rows: int, length: int, adapter: bool, checkpointing: bool, precision: str
) -> None:
    def taken(rows: int, checkpointing: bool) -> float:
        stage = sft(
            length=length, rows=rows, precision=precision, gradient_checkpointing=checkpointing,
            adapter=Adapter() if adapter else None,
        )  # fmt: skip
        found = of(stage)
        assert all(part.bytes > 0 for part in found.parts)
        return found.bytes

    assert taken(rows, checkpointing) <= taken(2 * rows, checkpointing)
    assert taken(rows, checkpointing) < taken(512 * rows, checkpointing)
    assert taken(2 * rows, True) <= taken(2 * rows, False) * 1.001


def test_micro_batch_auto_counts_as_one_row_and_says_so() -> None:
    stage = sft(rows="auto")
    found = of(stage)
    assert any("auto" in note for note in found.notes)
    assert (
        found.bytes == of(replace(stage, train=Train(steps=1, micro_batch=1, accumulate=2))).bytes
    )


def test_micro_batch_auto_keeps_what_the_teacher_says_of_all_its_rows() -> None:
    cut = sft(rows=1)
    assert cut.train is not None
    online = replace(cut, stage="kd", kd=Distill(teacher=EIGHT_B))
    eight = replace(online, train=replace(cut.train, accumulate=8))
    auto = replace(online, train=Train(steps=1, micro_batch="auto", global_batch=64))
    eight_workers = hardware.parse("H100:8")
    assert of(auto, eight_workers).bytes == of(eight, eight_workers).bytes
    assert of(auto).bytes > of(auto, eight_workers).bytes


def test_several_workers_add_what_they_exchange_through() -> None:
    assert of(sft(), hardware.parse("H100:8")).bytes - of(sft()).bytes == pytest.approx(0.5e9)


@pytest.mark.parametrize(
    ("stage", "why"),
    [
        (Stage("m", "merge", merge=Merge(adapter="a")), "on the CPU"),
        (sft("someone/unheard-of"), "shape of model is not known"),
        (Stage("t", "targets", targets=Targets(teacher="x/y")), "shape of teacher"),
    ],
)
def test_what_is_not_known_is_said_and_not_guessed(stage: Stage, why: str) -> None:
    known = shapes.of_stage(stage, (stage,), Path())
    assert fit.memory(stage, L4, 1, known) is None
    assert why in str(fit.unknown(stage, L4, known))
    assert fit.changes(stage, L4, 1, known) == ()


def test_reading_models_takes_the_largest_once() -> None:
    stage = Stage("e", "evaluate", evaluate=Evaluate(models={"a": ONE_B, "b": EIGHT_B}))
    found = of(stage)
    assert parts(found)["weights"] == 2 * SHAPES[EIGHT_B].parameters
    targets = Stage("t", "targets", targets=Targets(teacher=EIGHT_B, micro_batch=4))
    assert of(targets, L4).fits


def test_a_cpus_memory_is_not_known() -> None:
    found = of(sft(), hardware.parse("cpu:1"))
    assert (found.limit, found.margin, found.fits) == (None, None, None)
    assert parts(found)["weights"] == 4 * SHAPES[ONE_B].parameters


@pytest.mark.parametrize("kind", [k for k in hardware.KINDS if k.vendor == "nvidia"])
def test_a_process_can_use_a_little_less_than_the_card_has(kind: hardware.Kind) -> None:
    found = usable(kind)
    assert found is not None
    assert 0.9 < found / (kind.memory_gib * 2**30) < 1


def test_a_checkpoint_holds_weights_and_moments() -> None:
    def size(stage: Stage) -> Any:
        return fit.checkpoint_bytes(stage, shapes.of_stage(stage, (stage,), Path()))

    assert size(sft()) == 12 * SHAPES[ONE_B].parameters
    assert size(sft(adapter=Adapter(rank=16))) == 12 * 11_272_192
    assert size(Stage("m", "merge", merge=Merge(adapter="a"))) is None


def test_each_change_is_one_setting_that_gives_the_memory_it_says() -> None:
    path = RECIPES / "kd_l4.yaml"
    (stage,) = recipe.load(path).recipe.stages
    known = shapes.of_stage(stage, (stage,), RECIPES)
    changes = fit.changes(stage, hardware.parse(stage.hardware.accelerator), 1, known)
    assert [change.what for change in changes] == ["an adapter of rank 16", "A100-40GB:1"]
    for change in changes:
        (changed,) = recipe.load(path, change.settings).recipe.stages
        accelerator = hardware.parse(changed.hardware.accelerator)
        found = fit.memory(changed, accelerator, 1, shapes.of_stage(changed, (changed,), RECIPES))
        assert found == change.memory
        assert found.fits


def test_an_adapter_beside_experts_is_of_attention_alone() -> None:
    """`targets: auto` reaches no experts (trainer/adapters.py)."""
    stage = sft("openai/gpt-oss-20b", rows=1, gradient_checkpointing=True)
    found = fit.changes(stage, H100, 1, shapes.of_stage(stage, (stage,), Path()))
    settings = next(c.settings for c in found if "model.adapter.rank=16" in c.settings)
    assert not any("targets" in setting or "nf4" in setting for setting in settings)
    auto = sft("openai/gpt-oss-20b", rows=1, gradient_checkpointing=True, adapter=Adapter(rank=16))
    assert of(auto).bytes == next(c.memory.bytes for c in found if c.settings == settings)


@pytest.mark.parametrize(
    ("adapter", "count"),
    [(Adapter(rank=64), 31_850_496), (Adapter(rank=64, experts=True), 739_639_296)],
)
def test_the_adapters_of_gpt_oss_20b_are_counted_as_the_trainer_does(
    adapter: Adapter, count: int
) -> None:
    stage = sft("openai/gpt-oss-20b", rows=1, adapter=adapter, gradient_checkpointing=True)
    memory = of(stage)
    assert parts(memory)["adapter"] == 4 * count and parts(memory)["optimizer"] == 8 * count
    known = shapes.of_stage(stage, (stage,), Path())
    assert fit.checkpoint_bytes(stage, known) == 12 * count
    assert stage.model is not None
    assert speed.learned(known["model"], stage.model) == count
    # W + B A of one block's 32 experts, in 16 bits, and its gradient.
    whole = 2 * 32 * 3 * 2880 * 2880
    name = "experts with adapters"
    assert parts(memory).get(name, 0) == (whole if adapter.experts else 0)
    plain = of(replace(stage, model=replace(stage.model, gradient_checkpointing=False)))
    assert parts(plain).get(name, 0) == (24 * whole if adapter.experts else 0)


@pytest.mark.parametrize(
    ("name", "adapter", "said"),
    [
        ("openai/gpt-oss-20b", Adapter(quantization="nf4"), "the job will refuse nf4"),
        (ONE_B, Adapter(experts=True), "the job will refuse model.adapter.experts"),
    ],
)
def test_what_the_job_will_refuse_is_said_before(name: str, adapter: Adapter, said: str) -> None:
    assert any(said in note for note in of(sft(name, rows=1, adapter=adapter)).notes)
    assert not any("refuse" in note for note in of(sft(name, rows=1, adapter=Adapter())).notes)


def test_a_base_of_4_bits_is_counted_to_the_byte(tmp_path: Path) -> None:
    from tests.trainer.test_adapters_families import tiny
    from tests.trainer.test_qlora import NF4, SIZE, loaded
    from trainer import quantized
    from trainer.data.tokenizer import byte_tokenizer

    tiny("llama", **SIZE).save_pretrained(tmp_path)
    byte_tokenizer(tmp_path)
    model = loaded(str(tmp_path), str(tmp_path))
    held = sum(
        quantized._bytes(p) if quantized.is_nf4(p) else p.nbytes
        for name, p in model.named_parameters() if ".lora_" not in name
    )  # fmt: skip
    stage = sft(str(tmp_path), adapter=NF4, precision="fp32")
    assert parts(of(stage))["weights"] == held
    assert parts(of(stage))["adapter"] == 4 * sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


def test_an_8b_on_4_bits_fits_where_an_adapter_alone_does_not() -> None:
    t4 = hardware.parse("T4")
    stage = replace(sft(EIGHT_B, rows=1, length=1024), hardware=Hardware(accelerator="T4:1"))
    (change,) = changes_of(stage)
    assert change.settings == ("model.adapter.rank=16", "model.adapter.quantization=nf4")
    assert "4 bits" in change.what and "rounded to 4 bits" in change.effect
    # 6.98 G weights in blocks at 0.516 bytes, 1.05 G of embedding and head at 2.
    assert parts(change.memory)["weights"] == pytest.approx(
        0.5159 * 6.979e9 + 2 * 1.051e9, rel=1e-3
    )
    assert not of(sft(EIGHT_B, rows=1, length=1024, gradient_checkpointing=True,
                      adapter=Adapter()), t4).fits  # fmt: skip
    own = replace(
        sft(EIGHT_B, rows=1, length=1024, adapter=Adapter(rank=8)), hardware=stage.hardware
    )
    (change,) = changes_of(own)
    assert change.settings[0] == "model.adapter.quantization=nf4"


def test_the_largest_micro_batch_that_fits_keeps_the_global_batch() -> None:
    stage = sft(rows=64, length=1024)
    (first, *_) = fit.changes(stage, H100, 1, shapes.of_stage(stage, (stage,), Path()))
    rows = int(first.settings[0].rpartition("=")[2])
    assert first.settings == (f"train.micro_batch={rows}", f"train.accumulate={64 // rows}")
    twice = replace(stage, train=Train(steps=1, micro_batch=2 * rows, accumulate=32 // rows))
    assert first.memory.fits and not of(twice).fits


def test_where_nothing_alone_is_enough_the_smallest_combination() -> None:
    stage = replace(sft(rows=64, length=4096), hardware=Hardware(accelerator="L4:1"))
    known = shapes.of_stage(stage, (stage,), Path())
    changes = fit.changes(stage, L4, 1, known, prefix="pipeline.s.")
    assert [change.what.partition(" and ")[0] for change in changes] == [
        "frozen embeddings", "an adapter of rank 16",
    ]  # fmt: skip
    for change in changes:
        assert all(setting.startswith("pipeline.s.") for setting in change.settings)
        assert len(change.settings) > 1 and change.memory.fits
    (_, checkpointing, rows, accumulate) = changes[0].settings
    assert checkpointing == "pipeline.s.model.gradient_checkpointing=true"
    number = int(rows.removeprefix("pipeline.s.train.micro_batch="))
    assert accumulate == f"pipeline.s.train.accumulate={64 // number}"


def on_vertex(stage: Stage, **more: Any) -> Stage:
    return replace(stage, hardware=Hardware(backend="vertex", accelerator="L4:1", **more))


def changes_of(stage: Stage) -> tuple[fit.Change, ...]:
    accelerator = hardware.parse(stage.hardware.accelerator)
    return fit.changes(stage, accelerator, 1, shapes.of_stage(stage, (stage,), Path()))


def test_a_whole_8b_on_an_l4_gets_the_cheap_changes_before_a_dear_machine() -> None:
    stage = on_vertex(sft(EIGHT_B, rows=1), capacity=("spot", "standard"))
    adapter, larger = changes_of(stage)
    assert adapter.settings == ("model.adapter.rank=16", "model.gradient_checkpointing=true")
    assert f"{adapter.memory.bytes / 2**30:.1f}" == "17.7"
    assert adapter.effect == "only the adapter learns, not the model"
    assert larger.settings[0] == "hardware.accelerator=B200:8"
    assert "37.75 USD/h" in larger.effect, "an H200:8 costs more"


def test_more_devices_share_the_rows_of_a_step() -> None:
    train = Train(steps=1, micro_batch=2, accumulate=16)
    stage = on_vertex(replace(sft(EIGHT_B), train=train))
    larger = changes_of(stage)[-1]
    words = dict(setting.split("=") for setting in larger.settings)
    count = hardware.parse(words["hardware.accelerator"]).count
    rows = int(words.get("train.micro_batch", 2)) * int(words["train.accumulate"]) * count
    assert count == 8 and rows == 32 and "as many rows in a step" in larger.effect
    single = on_vertex(replace(sft(EIGHT_B), train=Train(steps=1, micro_batch=1)))
    assert "8 times the rows in a step" in changes_of(single)[-1].effect


def test_what_keeps_the_training_the_same_comes_first_and_together_only_where_needed() -> None:
    adapter = Adapter(rank=16)
    either = sft(EIGHT_B, rows=4, length=1024, adapter=adapter)
    found = fit.changes(either, A100, 1, shapes.of_stage(either, (either,), Path()))
    assert [change.what for change in found] == [
        "2 rows in a micro-batch, of the same 4 in a step", "gradient checkpointing",
    ]  # fmt: skip
    assert not any(change.effect for change in found)
    both = sft(EIGHT_B, rows=32, length=2048, adapter=adapter)
    (one,) = fit.changes(both, L4, 1, shapes.of_stage(both, (both,), Path()))
    keys = [setting.partition("=")[0] for setting in one.settings]
    assert keys == ["model.gradient_checkpointing", "train.micro_batch", "train.accumulate"]
    assert one.effect == ""


def test_where_selective_checkpointing_is_not_enough_the_whole_one_is_proposed() -> None:
    stage = sft(EIGHT_B, rows=8, gradient_checkpointing="selective")
    h200 = hardware.parse("H200")
    (first, *_) = fit.changes(stage, h200, 1, shapes.of_stage(stage, (stage,), Path()))
    assert of(stage, h200).fits is False
    assert first.settings == ("model.gradient_checkpointing=true",)
    assert first.memory.fits and first.effect == ""
    whole = sft(EIGHT_B, rows=64, length=4096, gradient_checkpointing=True)
    known = shapes.of_stage(whole, (whole,), Path())
    assert of(whole, h200).fits is False
    assert not any("model.gradient_checkpointing=true" in change.settings
                   for change in fit.changes(whole, h200, 1, known))  # fmt: skip


def test_the_checkpointing_that_repeats_no_product_comes_before_that_which_repeats_all() -> None:
    stage, h100 = sft(EIGHT_B, rows=4), hardware.parse("H100:8")
    known = shapes.of_stage(stage, (stage,), Path())
    settings = [change.settings for change in fit.changes(stage, h100, 1, known)]
    assert of(stage, h100).fits is False
    assert ("model.gradient_checkpointing=selective",) in settings
    assert ("model.gradient_checkpointing=true",) not in settings


def test_selective_checkpointing_keeps_the_products_of_the_experts_that_a_token_meets() -> None:
    def kept(kind: Any) -> float:
        stage = sft("openai/gpt-oss-20b", rows=1, adapter=Adapter(), gradient_checkpointing=kind)
        return parts(of(stage))["activations"]

    # Of 24 blocks q, k, v and o, what their adapters add, and A's results; and of four experts
    # gate, up and down, 2880 wide.
    each = 2 * (2 * (4096 + 2 * 512 + 2880) + 4 * 16 + 4 * 3 * 2880)
    assert kept("selective") - kept(True) == pytest.approx(2048 * 24 * each)


def test_a_machine_of_the_recipes_places_comes_before_a_slightly_cheaper_one_elsewhere() -> None:
    stage = sft(EIGHT_B, rows=1, adapter=Adapter(rank=16), gradient_checkpointing=False)
    near = changes_of(on_vertex(stage, places=("us-central1",), capacity=("spot",)))[-1]
    assert near.settings == ("hardware.accelerator=A100-40GB:1",)
    away = changes_of(on_vertex(stage, places=("us-east4",), capacity=("spot",)))[-1]
    settings = dict(setting.split("=") for setting in away.settings)
    assert settings["hardware.accelerator"] in ("A100-80GB:1", "A100-40GB:1")
    assert settings["hardware.places"].startswith("[us-")
    own = changes_of(on_vertex(stage, usd_per_hour=9.0))[-1]
    assert "hardware.usd_per_hour=null" in own.settings, "that was the price of the L4"


def test_a_larger_accelerator_has_a_machine_on_that_backend() -> None:
    vertex = Hardware(backend="vertex", accelerator="L4:1", vertex=Vertex(machine="g2-standard-8"))
    stage = replace(sft(EIGHT_B, rows=1, length=1024, init="random"), hardware=vertex)
    (change,) = fit.changes(stage, L4, 1, shapes.of_stage(stage, (stage,), Path()))
    assert change.settings == (
        "hardware.accelerator=H200:8", "hardware.vertex.machine=a3-ultragpu-8g",
    )  # fmt: skip
    assert change.memory.fits
    here = replace(stage, hardware=Hardware(accelerator="L4:1"))
    assert fit.changes(here, L4, 1, shapes.of_stage(here, (here,), Path())) == ()


# The other objectives.


def test_pairs_take_what_fine_tuning_takes_and_their_gradient_comes_late() -> None:
    plain = sft()
    for stage in ("dpo", "ipo"):
        found = of(replace(plain, stage=stage))
        assert found.bytes == of(plain).bytes
        assert found.moment == "the backward pass of the loss"


def test_a_surrogate_lies_beside_the_model_and_says_a_few_tokens_or_all() -> None:
    plain = sft(rows=1)
    few = replace(plain, stage="sdce", sdce=Sdce(surrogate=EIGHT_B, k=30))
    whole = replace(plain, stage="sdce", sdce=Sdce(surrogate=EIGHT_B, loss="kl"))
    alone = replace(plain, stage="sdce", sdce=Sdce(loss="standard"))
    named = "targets of the surrogate"
    assert parts(of(few))["surrogate"] == 2 * SHAPES[EIGHT_B].parameters
    assert parts(of(few))[named] == 2048 * 31 * 12
    assert named not in parts(of(whole)) and "hidden states of the surrogate" in parts(of(whole))
    assert of(alone).bytes == of(plain).bytes < of(few).bytes < of(whole).bytes
    gone = shapes.of_stage(alone, (alone,), Path())
    assert "shape of surrogate" in str(fit.unknown(few, H100, gone))


def test_a_large_surrogate_reads_at_the_peak() -> None:
    small = sft("Qwen/Qwen3-0.6B", rows=16, gradient_checkpointing=True)
    stage = replace(small, stage="sdce", sdce=Sdce(surrogate="meta-llama/Llama-3.1-70B"))
    known = shapes.of_stage(stage, (stage,), Path())
    other = replace(SHAPES[EIGHT_B], hidden=16384, intermediate=53248, layers=1, vocabulary=1000)
    found = fit.memory(stage, H100, 1, {**known, "teacher": other})
    assert found is not None and found.moment == "the surrogate's forward pass"


def test_answers_are_counted_at_their_full_length_and_that_is_said() -> None:
    grpo = Grpo(rewards=("r:f",), group=8, max_new_tokens=256)
    stage = replace(sft(rows=2, gradient_checkpointing=True), stage="grpo", grpo=grpo)
    found = of(stage)
    alike = of(sft(rows=16, gradient_checkpointing=True))
    assert found.bytes == alike.bytes
    assert any("2 prompts x 8 answers" in note for note in found.notes)
    # 16 layers x 8 heads x 64 numbers: an fp32 key and a 16-bit value for each.
    cache = 16 * 2048 * 16 * 8 * 64 * 6 / 2**30
    assert any(f"{cache:.1f} GiB of keys and values" in note for note in found.notes)
    near = of(replace(stage, grpo=replace(grpo, beta=0.1)))
    assert near.bytes - found.bytes == pytest.approx(2 * SHAPES[ONE_B].parameters)
    adapter = replace(stage, model=replace(stage.model, adapter=Adapter()))
    assert of(adapter).bytes == of(replace(adapter, grpo=replace(grpo, beta=0.1))).bytes


# What several workers share.


def shared(stage: Stage, parallel: Any = "fsdp") -> Stage:
    return replace(stage, train=replace(stage.train, parallel=parallel))


def test_workers_share_weights_gradients_and_moments() -> None:
    stage, eight = sft(EIGHT_B, rows=1, length=1024), hardware.parse("H100:8")
    number = SHAPES[EIGHT_B].parameters
    found = parts(of(shared(stage), eight))
    assert found["weights"] == 4 * number / 8 and found["optimizer"] == number
    outside = 2 * 128256 * 4096 + 4096
    assert found["embeddings and head"] == 4 * outside
    assert parts(of(shared(stage), eight, nodes=2))["optimizer"] == number / 2
    teacher = replace(shared(stage), stage="kd", kd=Distill(teacher=EIGHT_B))
    assert parts(of(teacher, eight))["teacher"] == 2 * number, "what is only read stays whole"


def moments_of(stage: Stage, workers: int) -> dict[str, dict[str, float]]:
    """What each moment of a step has beside what is held all the time."""
    known = shapes.of_stage(stage, (stage,), Path())
    step = step_of(stage, hardware.parse(f"H100:{workers}"), 1, known)
    return {name: {part.name: part.bytes for part in parts} for name, parts in _moments(step)}


def test_a_block_is_gathered_while_the_next_one_arrives_and_the_last_one_is_summed() -> None:
    """torch.distributed.fsdp prefetches one block in the backward pass, and keeps the input of one
    reduce-scatter."""
    stage = shared(sft(EIGHT_B, rows=1, length=512, gradient_checkpointing=True))
    found, outside = moments_of(stage, 8), 2 * 128256 * 4096 + 4096
    block = (SHAPES[EIGHT_B].parameters - outside) / 32
    last, second = found["the last block's backward pass"], found["block 31's backward pass"]
    first = found["the first block's backward pass"]
    assert last["gathered blocks"] == second["gathered blocks"] == 2 * 2 * block
    assert first["gathered blocks"] == 2 * block
    assert "sum of one block" not in last and second["sum of one block"] == 4 * block
    assert second["gradients of one block"] == 2 * 4096 * 14336, "of down_proj, the first of them"
    assert found["the end of block 31's backward pass"]["gradients of one block"] == 2 * block
    assert second["gradients"] == 4 * block / 8 and first["gradients"] == 31 * 4 * block / 8
    end, sums = found["the end of the backward pass"], found["the sum over workers"]
    table = 4 * 128256 * 4096
    assert end["gradient of the head"] == end["gradient of the embedding"] == table
    assert end["sum of one block"] == 4 * block and end["gradients"] == 32 * 4 * block / 8
    assert sums["gradients of embeddings and head"] == 8 * outside
    assert sums["gradients"] == 4 * SHAPES[EIGHT_B].parameters / 8
    begin = found["the beginning of the forward pass"]
    assert begin["buffer of embeddings and head"] == begin["embeddings and head"] == 4 * outside
    assert begin["gathered blocks"] == 2 * 2 * block
    alone = moments_of(stage, 1)["the last block's backward pass"]
    assert alone["gathered blocks"] == 2 * block, "one worker gathers from nobody"


def test_adapters_of_a_shared_model_cast_nothing() -> None:
    """A and B are gathered in 16 bits, so that PEFT need not cast their inputs to fp32."""
    stage = sft(EIGHT_B, rows=1, gradient_checkpointing=True, adapter=Adapter(rank=16))
    name, again = "the last block's backward pass", "activations of one block"
    whole, part = moments_of(shared(stage, "ddp"), 8)[name], moments_of(shared(stage), 8)[name]
    # Inputs of k, v, o and up are others', too; at the peak four widths of the MLP, not 6.5.
    assert whole[again] - part[again] == 2048 * 2 * 4 * 4096
    assert part["backward pass"] == 2048 * 4 * (4096 + 14336)
    assert whole["backward pass"] == 2048 * (8.3 * 4096 + 6.5 * 14336)
    few = shared(sft(EIGHT_B, rows=1, gradient_checkpointing=True,
                     adapter=Adapter(rank=16, targets=("v_proj", "up_proj"))))  # fmt: skip
    less = (part[again] - moments_of(few, 8)[name][again]) / 2048
    assert less == 2 * 14336 + 2 * 16 * 5, "q's input is v's, gate's is up's; down's is not kept"


def test_auto_shards_where_the_trainer_would() -> None:
    from trainer import parallel

    assert sharding.SHARE == parallel.SHARE
    stage, eight = sft(EIGHT_B, rows=1, length=1024), hardware.parse("H100:8")
    assert of(stage, eight).bytes == of(shared(stage), eight).bytes
    assert any("8 workers share the model (fsdp: whole," in n for n in of(stage, eight).notes)
    whole = of(shared(stage, "ddp"), eight)
    assert parts(whole)["weights"] == 4 * SHAPES[EIGHT_B].parameters
    assert not any("share the model" in note for note in whole.notes)
    for other in (sft(), sft(EIGHT_B, rows=1, adapter=Adapter(quantization="nf4"))):
        assert of(other, eight).bytes == of(shared(other, "ddp"), eight).bytes
    grpo = replace(stage, stage="grpo", grpo=Grpo(rewards=("r:f",)))
    assert parts(of(grpo, eight))["weights"] == 4 * SHAPES[EIGHT_B].parameters
    packed = shared(sft(rows=1, adapter=Adapter(quantization="nf4")))
    assert any("will refuse train.parallel" in note for note in of(packed, eight).notes)


def test_sharing_the_model_is_proposed_where_it_makes_a_stage_fit() -> None:
    stage = shared(sft(EIGHT_B, rows=1, length=1024), "ddp")
    hard = replace(stage, hardware=Hardware(accelerator="H100:8"))
    (first, *_) = changes_of(hard)
    assert first.settings == ("train.parallel=fsdp",) and first.effect == ""
    assert first.memory.fits and of(hard, hardware.parse("H100:8")).fits is False
    alone = changes_of(replace(stage, hardware=Hardware(accelerator="H100:1")))
    assert not any("train.parallel=fsdp" in change.settings for change in alone)


def test_where_sharing_is_not_enough_smaller_steps_come_with_it() -> None:
    stage = shared(sft(EIGHT_B, rows=32, length=2048), "ddp")
    (first, *_) = changes_of(replace(stage, hardware=Hardware(accelerator="H100:8")))
    assert first.settings[0] == "train.parallel=fsdp" and len(first.settings) > 1
    assert first.memory.fits and first.effect == ""


def test_float8_takes_its_casts_and_saves_nothing() -> None:
    plain = of(sft(EIGHT_B, rows=1, length=512, gradient_checkpointing=True))
    cast = of(sft(EIGHT_B, rows=1, length=512, gradient_checkpointing=True, float8="torchao"))
    assert parts(cast)["weights"] == parts(plain)["weights"]
    assert plain.bytes <= cast.bytes and any("float8 saves no memory" in n for n in cast.notes)


def test_the_reference_reads_all_pairs_once_or_with_each_step() -> None:
    once = replace(sft(), stage="dpo")
    each = replace(once, preference=Preference(reference="adapter"))
    shape = SHAPES[ONE_B]
    forward = speed.forward_flops(shape, 2048)
    step = speed.work(once, shape)
    assert speed.reference_share(once, shape) == pytest.approx(forward * step.tokens / step.flops)
    assert 0.3 < speed.reference_share(once, shape) < 0.35, "2 of 6, but for what attention takes"
    assert speed.reference_share(each, shape) == speed.reference_share(sft(), shape) == 0
    assert speed.work(each, shape).flops - step.flops == pytest.approx(forward * step.tokens)
