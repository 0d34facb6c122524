"""What a run will take: the work of a step, how much is read, hours and dollars."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher import amount, answers, api, cli, console, forecast, hardware, measured, shapes, speed
from launcher.backends.base import Offer
from launcher.commands import drive
from launcher.errors import Exit, RecipeErrors
from launcher.fit import Change, Memory, Part
from launcher.forecast import Forecast
from launcher.spec import Budget, Expected, Recipe, Stage
from tests.launcher.recorded import Recorder
from trainer.config import (
    Adapter,
    Data,
    Distill,
    Grpo,
    Model,
    Phase,
    Sdce,
    Source,
    Targets,
    Train,
    to_dict,
)

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = shapes.Shape(512, 64, 2, 4, 2, 16, 128, True)
BIG = shapes.Shape(512, 128, 3, 4, 4, 32, 256, False)
LLAMA_1B = shapes.of_reference("meta-llama/Llama-3.2-1B", Path())
LLAMA_8B = shapes.of_reference("meta-llama/Llama-3.1-8B", Path())


def stage(**changes: Any) -> Stage:
    plain: dict[str, Any] = {
        "id": "s", "stage": "pretrain", "model": Model(name="a/b"),
        "data": Data(sequence_length=128), "train": Train(steps=100, micro_batch=4, accumulate=2),
    }  # fmt: skip
    return Stage(**{**plain, **changes})


def offer(rate: float | None, capacity: Any = "standard") -> Offer:
    return Offer("vertex", "here", "L4:1", capacity, rate, "a table")


def flops(model: Model, shape: shapes.Shape = SMALL, **changes: Any) -> float:
    work = speed.work(stage(model=model, **changes), shape)
    return work.flops / work.tokens


# The work of a step.


@pytest.mark.parametrize(
    "model",
    [
        Model(name="a/b"),
        Model(name="a/b", freeze=("model.embed_tokens.weight", "model.layers.0.*")),
        Model(name="a/b", freeze=("lm_head.*",)),
        Model(name="a/b", adapter=Adapter(rank=4)),
        Model(name="a/b", adapter=Adapter(rank=8, targets=("q_proj", "down_proj"))),
    ],
    ids=["all", "freeze", "freeze the head", "adapter", "adapter of two"],
)
@pytest.mark.parametrize("shape", [SMALL, BIG], ids=["tied", "untied"])
def test_the_flops_are_those_that_the_trainer_counts(model: Model, shape: shapes.Shape) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from trainer import adapters, freeze
    from trainer.throughput import flops_per_token

    made: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
            intermediate_size=shape.intermediate, tie_word_embeddings=shape.tied,
        )
    )  # fmt: skip
    if model.adapter is not None:
        made = adapters.attach(made, model.adapter, "a/b")
    if model.freeze:
        freeze.freeze(made, model.freeze)
    assert speed.training_flops(shape, model, 100) == flops_per_token(made, 100)
    learns = sum(p.numel() for p in made.parameters() if p.requires_grad)
    assert speed.learned(shape, model) == learns


def test_adapters_of_experts_cost_their_gradient_and_a_sum_in_each_pass() -> None:
    shape = shapes.of_reference("openai/gpt-oss-20b", Path())
    assert shape is not None
    attention = Model(name="a/b", adapter=Adapter(rank=8))
    experts = Model(name="a/b", adapter=Adapter(rank=8, experts=True))
    weights = 24 * 3 * 2880 * 2880  # of one expert, in all blocks
    more = speed.training_flops(shape, experts, 64) - speed.training_flops(shape, attention, 64)
    assert more == 2 * 4 * weights  # 6 a weight instead of 4, of the four that a token meets

    def in_a_step(model: Model) -> float:
        return speed.work(stage(model=model), shape).flops

    whole, tokens = stage(model=experts), speed.work(stage(model=experts), shape).tokens
    sums = 3 * whole.train.accumulate * 2 * 8 * 32 * weights
    assert in_a_step(experts) - in_a_step(attention) == pytest.approx(more * tokens + sums)


def test_checkpointing_adds_a_forward_pass_of_the_blocks() -> None:
    plain, recomputed = flops(Model(name="a/b")), flops(Model("a/b", gradient_checkpointing=True))
    assert recomputed - plain == speed.forward_flops(SMALL, 128, head=False)
    assert speed.forward_flops(SMALL, 128) - speed.forward_flops(SMALL, 128, head=False) == (
        2 * SMALL.vocabulary * SMALL.hidden
    )


def test_selective_checkpointing_repeats_no_product() -> None:
    selective = Model("a/b", gradient_checkpointing="selective")
    assert flops(selective) == flops(Model("a/b"))
    plain, some = (speed.work(stage(model=model), SMALL) for model in (Model("a/b"), selective))
    assert some.elements > plain.elements


def test_a_curriculum_has_as_many_tokens_over_a_shorter_context() -> None:
    whole = Data(sequence_length=128)
    shorter = Data(sequence_length=128, curriculum=(Phase(32, 0.5), Phase(64, 0.75)))
    mean = Data(sequence_length=64)  # 0.5 * 32 + 0.25 * 64 + 0.25 * 128
    long, short, even = (speed.work(stage(data=data), SMALL) for data in (whole, shorter, mean))
    assert short.tokens == long.tokens == 2 * even.tokens
    assert short.flops / short.tokens == even.flops / even.tokens < long.flops / long.tokens
    read = [amount.of_stage(stage(data=data), 1) for data in (whole, shorter)]
    assert (read[0].tokens, read[0].steps) == (read[1].tokens, read[1].steps)
    assert "rows of 32 tokens until 50%, 64 until 75%, then 128" in read[1].how[-1]


def test_a_teacher_adds_two_flops_a_parameter_and_stored_answers_none() -> None:
    alone = speed.work(stage(), SMALL)
    online = speed.work(stage(stage="kd", kd=Distill(teacher="a/t")), SMALL, BIG)
    stored = speed.work(stage(stage="kd", kd=Distill(mode="precompute", targets="t")), SMALL)
    matrices = BIG.parameters - BIG.vocabulary * BIG.hidden - (2 * BIG.layers + 1) * BIG.hidden
    attention = 4 * BIG.layers * BIG.heads * BIG.head_dim * 128
    assert (online.flops - alone.flops) / alone.tokens == 2 * matrices + attention
    assert stored.flops == alone.flops
    targets = speed.work(stage(stage="targets", model=None, train=None, targets=Targets("a/t")),
                         None, BIG)  # fmt: skip
    assert targets.flops / targets.tokens == 2 * matrices + attention
    with pytest.raises(ValueError, match="teacher's shape is not known"):
        speed.work(stage(stage="kd", kd=Distill(teacher="a/t")), SMALL)
    guided = stage(stage="sdce", sdce=Sdce("a/s"))
    assert speed.work(guided, SMALL, BIG) == online
    assert speed.work(stage(stage="sdce", sdce=Sdce(loss="standard")), SMALL) == alone
    with pytest.raises(ValueError, match="surrogate's shape is not known"):
        speed.work(guided, SMALL)


def test_only_the_experts_that_a_token_meets_count() -> None:
    mixture = shapes.Shape(512, 64, 2, 4, 4, 16, 128, True, 8, 2, "mixtral")
    all_of_them = replace(mixture, experts_per_token=8)
    idle = 2 * 6 * 3 * 64 * 128  # layers, experts, matrices of each
    assert speed.forward_flops(all_of_them, 1) - speed.forward_flops(mixture, 1) == 2 * idle


def test_calibration_finds_the_costs_that_explain_the_times() -> None:
    costs = speed.Costs(1e-11, 2e-9, 3e-4)
    cases = [
        stage(data=Data(sequence_length=length), train=Train(steps=1, micro_batch=rows))
        for length, rows in ((16, 1), (512, 2), (64, 32))
    ]
    works = [speed.work(one, shape) for one, shape in zip(cases, (SMALL, BIG, SMALL))]
    found = speed.calibrated([(work, costs.seconds(work)) for work in works])
    assert found.seconds(works[0]) == pytest.approx(costs.seconds(works[0]), rel=1e-3)
    assert found.flop == pytest.approx(costs.flop, rel=0.05)
    assert min(found.flop, found.element, found.call) >= 0


# Efficiency.


def test_every_row_says_where_it_comes_from_and_when() -> None:
    with (REPOSITORY / "launcher" / "data" / "efficiency.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        known = {kind.name for kind in hardware.KINDS} | {"nvidia", "tpu"}
        assert row["kind"] in known and row["basis"] in ("measured", "published", "assumed")
        assert row["source"] and row["date"][:2] == "20" and 0 < float(row["efficiency"]) < 1
    assert any(row["basis"] == "published" for row in rows)


def test_published_speeds_come_out_as_they_were_published() -> None:
    assert LLAMA_1B is not None and LLAMA_8B is not None
    h100 = hardware.parse("H100:1").kind
    full = speed.efficiency(h100, "full", LLAMA_8B.parameters, 16384)
    each = speed.training_flops(LLAMA_8B, Model(name="x"), 8192)
    assert full is not None and full.basis == "published"
    assert full.value * 989e12 / each == pytest.approx(5762, rel=0.01)
    kd = speed.efficiency(h100, "kd", LLAMA_1B.parameters, 32768)
    each = speed.training_flops(LLAMA_1B, Model(name="x"), 1024)
    each += speed.forward_flops(LLAMA_1B, 1024)
    assert kd is not None and kd.basis == "published"
    assert kd.value * 989e12 / each == pytest.approx(32 * 1024 / 1.224, rel=0.01)


def test_where_nothing_is_published_it_is_called_assumed_and_small_models_are_slower() -> None:
    l4 = hardware.parse("L4:1").kind
    large, small = (speed.efficiency(l4, "full", n, 4096) for n in (8e9, 1e7))
    assert large is not None and small is not None and large.value > 4 * small.value
    assert (large.basis, small.basis) == ("assumed", "assumed")
    far = speed.efficiency(hardware.parse("H100:1").kind, "full", 1e7, 512)
    assert far is not None and far.basis == "assumed" and far.value < 0.15
    assert speed.efficiency(hardware.parse("cpu:1").kind, "full", 1e9, 512) is None


# How much is read.


def test_steps_of_packed_rows_are_a_number_of_tokens() -> None:
    read = amount.of_stage(stage(), workers=2)
    assert (read.steps, read.rows, read.tokens) == (100, 1600, 1600 * 128)
    until = amount.of_stage(stage(train=Train(steps=100, micro_batch=4, until=10)), 1)
    assert (until.steps, until.tokens) == (10, 40 * 128)
    auto = amount.of_stage(stage(train=Train(steps=10, micro_batch="auto", global_batch=32)), 4)
    assert auto.rows == 320


def test_epochs_of_local_files_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("x" * 399 + "\n" + "y" * 399 + "\n")
    (tmp_path / "b.txt").write_text("z" * 1200)
    data = Data(train=(Source(path=str(tmp_path)),), sequence_length=50)
    read = amount.of_stage(stage(data=data, train=Train(epochs=2, micro_batch=2)), 1)
    assert (read.examples, read.tokens, read.steps, read.about) == (6, 1000, 10, True)
    assert any("4 bytes a token: assumed" in line for line in read.how)
    some = Data(train=(Source(path=str(tmp_path / "*.jsonl")),), sequence_length=50)
    assert amount.of_stage(stage(data=some, train=Train(epochs=1)), 1).examples == 2
    half = Data(train=(replace(data.train[0], share=0.5),), sequence_length=50)
    assert amount.of_stage(stage(data=half, train=Train(epochs=2)), 1).tokens == 500


def test_a_large_file_is_counted_by_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amount, "_COUNTED", 4000)
    (tmp_path / "a.jsonl").write_text(("x" * 39 + "\n") * 1000)
    held = amount.count(stage(data=Data(train=(Source(path=str(tmp_path / "a.jsonl")),))))
    assert held.examples == 1000 and held.about and held.how.startswith("about 1,000 documents")


def test_limited_batches_are_all_that_a_pass_reads() -> None:
    """trainer/stages.py cuts the rows first, and takes whole steps then."""
    told = Expected(examples=1_000_000, tokens_per_example=64)
    few = Train(epochs=2, micro_batch=4, accumulate=2, limit_batches=3)
    read = amount.of_stage(stage(train=few, forecast=told), 2)
    assert (read.rows, read.steps) == (2 * 3 * 4 * 2, 3)
    assert read.tokens == read.rows * 128 and read.examples == 2 * read.rows
    assert "of which train.limit_batches leaves 48 rows" in read.how[0]
    more = replace(few, limit_batches=10**9)
    assert amount.of_stage(stage(train=more, forecast=told), 2).tokens == 2 * 64e6
    auto = Train(epochs=1, micro_batch="auto", global_batch=32, limit_batches=5)
    assert amount.of_stage(stage(train=auto, forecast=told), 4).rows == 5 * 32
    padded = Data(sequence_length=128, packing=False)
    for tokens in (None, 64):
        held = Expected(examples=1_000_000, tokens_per_example=tokens)
        read = amount.of_stage(stage(train=few, data=padded, forecast=held), 2)
        assert (read.rows, read.steps) == (48, 3)


def test_the_last_step_of_the_epochs_is_whole() -> None:
    told, train = Expected(examples=33, tokens_per_example=128), Train(epochs=1, micro_batch=8)
    assert amount.of_stage(stage(train=train, forecast=told), 1).steps == 5


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (Source(path="gs://b/x.jsonl"), "gs://b/x.jsonl is not counted from here"),
        (Source(builtin="python-reference"), "python-reference is not counted from here"),
        (Source(path="/nowhere/at/all.jsonl"), "no documents that can be counted"),
        (Source(path="/x.jsonl", weight=2.0), "data.train has weights"),
    ],
)
def test_what_cannot_be_counted_is_said_with_what_to_give(source: Source, why: str) -> None:
    data = Data(train=(source,), sequence_length=128)
    read = amount.of_stage(stage(data=data, train=Train(epochs=1)), 1)
    assert read.tokens is None and why in read.unknown and "give forecast." in read.unknown
    told = Expected(examples=1000, tokens_per_example=64)
    known = amount.of_stage(stage(data=data, train=Train(epochs=3), forecast=told), 1)
    assert known.tokens == 192_000 and not known.unknown


def test_rows_that_are_not_packed_need_the_length_of_an_example() -> None:
    data = Data(sequence_length=128, packing=False)
    read = amount.of_stage(stage(data=data), 1)
    assert read.tokens is None and "forecast.tokens_per_example" in read.unknown
    told = Expected(tokens_per_example=500)
    assert amount.of_stage(stage(data=data, forecast=told), 1).tokens == 800 * 128, "cut at a row"


@pytest.mark.parametrize(
    ("block", "what"),
    [
        ("{examples_per_hour: [7200, 4800]}", "must be two numbers, the lower first"),
        ("{examples_per_hour: [4800]}", "must be two numbers, the lower first"),
        ("{examples: 0}", "must be at least 1"),
        ("{example: 5}", "examples"),
        ("{tokens_per_second: 5}", "allowed: examples, examples_per_hour, tokens_per_example"),
    ],
)
def test_a_forecast_block_that_makes_no_sense_is_an_error(block: str, what: str) -> None:
    with pytest.raises(RecipeErrors, match=what):
        api.validate(REPOSITORY / "recipes" / "kd_h100.yaml", [f"forecast={block}"])


def test_stages_of_a_pipeline_take_the_block_from_the_top(tmp_path: Path) -> None:
    text = (REPOSITORY / "recipes" / "kd_l4_precompute.yaml").read_text()
    (tmp_path / "kd_l4.yaml").write_text((REPOSITORY / "recipes" / "kd_l4.yaml").read_text())
    (tmp_path / "r.yaml").write_text(text + "\nforecast: {examples: 7}\n")
    first, second = api.validate(tmp_path / "r.yaml").recipe.stages
    assert first.forecast == Expected(examples=100_000, tokens_per_example=1000)
    assert second.forecast == Expected(examples=7)


# Hours and dollars.


def of(one: Stage, *offers: Offer, home: Path = Path("/nowhere")) -> Forecast:
    return forecast.of_stage(Recipe("r", (one,)), one, offers, home)


def test_500_000_examples_three_times_are_208_to_312_hours_and_over_520_dollars() -> None:
    """The H100 run that its own documents put at 8 to 12 hours and 20 to 30 dollars."""
    told = Expected(examples=500_000, examples_per_hour=(4800, 7200))
    one = stage(train=Train(epochs=3), forecast=told)
    found = of(one, offer(2.50))
    assert found.hours == (pytest.approx(208.3, abs=0.1), 312.5)
    assert found.usd == (pytest.approx(520.8, abs=0.1), 781.25)
    assert found.basis == "given"
    assert any("1,500,000 examples / 4,800 to 7,200 an hour" in line for line in found.explain)


def test_dollars_are_those_of_the_cheapest_and_of_the_dearest_offer() -> None:
    assert forecast.dollars((10, 20), [offer(1.0, "spot"), offer(3.0)]) == (10, 60)
    assert forecast.dollars((10, 20), [offer(1.0), offer(None)]) is None, "never guessed"
    assert forecast.dollars(None, [offer(1.0)]) is None


def test_a_computed_speed_gives_hours_and_says_what_it_rests_on() -> None:
    one = stage(
        model=Model(name="meta-llama/Llama-3.1-8B", precision="bf16"),
        data=Data(sequence_length=8192), train=Train(steps=1000, micro_batch=2),
    )  # fmt: skip
    one = replace(one, hardware=replace(one.hardware, backend="vertex", accelerator="H100:8"))
    found = of(one, offer(10.0))
    assert found.tokens == 1000 * 16 * 8192 and found.basis == "published"
    assert found.tokens_per_second == pytest.approx(8 * 5762, rel=0.01)
    assert found.hours is not None and found.usd is not None
    assert found.hours[0] == pytest.approx(found.tokens / (8 * 5762) / 3600, rel=0.01)
    text = "\n".join(found.explain)
    assert "8,030,261,248 parameters" in text and "torchtitan" in text


@pytest.mark.parametrize(
    ("accelerator", "model", "why"),
    [
        ("L4:1", Model(name="nobody/knows"), "the model's shape is not known"),
        ("T4:1", Model(name="meta-llama/Llama-3.2-1B"), "the peak of T4 in fp16 is not known"),
        ("L4:1", Model(name="meta-llama/Llama-3.2-1B", precision="fp32"), "in fp32 is not known"),
    ],
)
def test_a_speed_that_cannot_be_had_is_unknown_with_the_reason(
    accelerator: str, model: Model, why: str
) -> None:
    one = stage(model=model)
    one = replace(one, hardware=replace(one.hardware, backend="vertex", accelerator=accelerator))
    found = of(one, offer(1.0))
    assert found.hours is None and found.usd is None and any(why in w for w in found.unknown)


def reinforced(accelerator: str = "H100:1", **changes: Any) -> Stage:
    """Of 4 x 4 prompts of up to 512 tokens with 8 answers of 512 in a step."""
    settings = {"rewards": ("r:f",), "group": 8, "max_new_tokens": 512, **changes.pop("grpo", {})}
    plain: dict[str, Any] = {
        "model": Model(name="meta-llama/Llama-3.2-1B"), "data": Data(sequence_length=1024),
        "train": Train(steps=100, micro_batch=4, accumulate=4),
    }  # fmt: skip
    one = stage(stage="grpo", grpo=Grpo(**settings), **{**plain, **changes})
    backend = "local" if accelerator.startswith("cpu") else "vertex"
    return replace(one, hardware=replace(one.hardware, backend=backend, accelerator=accelerator))


def test_grpo_takes_the_time_of_its_draws_and_of_what_is_learned() -> None:
    assert LLAMA_1B is not None
    found = of(reinforced(), offer(10.0))
    assert found.tokens == 100 * 16 * 8 * 1024 and found.steps == 100
    assert found.basis == "assumed" and found.hours is not None
    # 512 tokens of 16 blocks that Python asks for one after another, in 4 draws.
    drawing = 4 * 512 * 16 / (25.5 * 32)
    learning = 16 * 8 * 1024 * flops(Model(name="a/b"), LLAMA_1B, data=Data(sequence_length=1024))
    learning /= 989e12 * 0.29
    assert found.hours[0] * 3600 == pytest.approx(100 * (drawing + learning), rel=0.02)
    text = "\n".join(found.explain)
    assert "GB/s x 70%, assumed" in text and "what grpo.rewards take comes on top" in text
    # The same answers for two steps are drawn half as often, and read once more.
    twice = of(reinforced(grpo={"iterations": 2}), offer(10.0))
    assert twice.hours is not None and twice.hours[0] < 0.6 * found.hours[0]
    # A reference reads every answer.
    with_reference = of(reinforced(grpo={"beta": 0.1}), offer(10.0))
    assert with_reference.hours is not None and with_reference.hours[0] > found.hours[0]


def test_a_large_models_weights_are_read_for_every_token_of_a_slow_memory() -> None:
    """8 B weights of 2 bytes at 70% of 300 GB/s, whatever the number of answers, beside what their
    keys and values take; as many are drawn at once as there is memory for."""
    assert LLAMA_8B is not None
    adapter = Model(name="meta-llama/Llama-3.1-8B", adapter=Adapter(rank=16))
    few, many = (
        answers.drawing(
            reinforced("L4:1", model=adapter), hardware.parse("L4:1"), {"model": LLAMA_8B}, once,
            "lora",
        )[0]
        for once in (1, 32)
    )  # fmt: skip
    read = 2 * (LLAMA_8B.parameters - 128256 * 4096) / (300e9 * 0.7)
    assert few > 512 * read and many < 3 * few
    found = of(reinforced("L4:1", model=adapter, grpo={"group": 64}), offer(1.0))
    (line,) = (line for line in found.explain if "answers at once" in line)
    assert "32 draw(s) of 32 answers at once" in line


def test_what_cannot_be_said_of_grpos_time_is_unknown_with_the_reason(tmp_path: Path) -> None:
    server = {"rollouts": "vllm", "vllm_server": "http://h:1"}
    for one, why in (
        (reinforced(grpo=server), "how fast the vLLM server answers is not known"),
        (reinforced("T4:1"), "the peak of T4 in fp16 is not known"),
        (reinforced(train=Train(epochs=1, micro_batch=4)), "give forecast.examples"),
    ):
        found = of(one, offer(1.0))
        assert found.hours is None and any(why in reason for reason in found.unknown)
    given = reinforced(grpo=server, forecast=Expected(examples_per_hour=(1600, 3200)))
    assert of(given, offer(1.0)).hours == (0.5, 1.0)  # of prompts
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "1234567890"}\n' * 32)  # 24 bytes: 6 tokens
    local = reinforced(
        data=Data(train=(Source(path=str(path)),), sequence_length=1024),
        train=Train(epochs=2, micro_batch=4), grpo={"iterations": 3},
    )  # fmt: skip
    read = of(local, offer(1.0))
    assert read.steps == 2 * 32 // 4 * 3
    assert read.tokens == pytest.approx(read.steps * 4 * 8 * (512 + 25 / 4))


def test_a_stage_that_trains_as_long_as_another_takes_its_hours() -> None:
    one = stage(id="b", train=Train(seconds_of="${stage:a}"))
    before = {"a": Forecast("a", "kd", hours=(2.0, 3.0))}
    recipe = Recipe("r", (stage(id="a"), one))
    found = forecast.of_stage(recipe, one, [offer(1.0)], Path("/nowhere"), before)
    assert found.hours == (2.0, 3.0)


def test_the_budget_says_at_which_step_it_ends_the_run() -> None:
    one = Forecast("s", "pretrain", steps=2000, hours=(20.0, 20.0))
    pairs = [(one, [offer(0.5, "spot"), offer(2.0)])]
    (note,) = forecast.of_run(pairs, Budget(hours=10)).notes
    assert note == (
        "budget.hours (10) ends s at step ~1,000 of 2,000: it is expected to take up to 20 h"
    )
    (note,) = forecast.of_run(pairs, Budget(usd=30)).notes
    assert note.startswith("budget.usd (30) at 2.00 USD/h (standard) ends s at step ~1,500 of")
    assert forecast.of_run(pairs, Budget(usd=40, hours=20)).notes == ()
    two = [(replace(one, stage="t", hours=(6.0, 6.0)), [offer(0.5)]), *pairs]
    (note,) = forecast.of_run(two, Budget(hours=16)).notes
    assert "ends s at step ~1,000" in note, "what came before it has used some"


def test_a_run_is_as_unknown_as_its_least_known_stage() -> None:
    known, unknown = Forecast("a", "kd", hours=(1.0, 2.0), usd=(1, 2)), Forecast("b", "kd")
    whole = forecast.of_run([(known, []), (Forecast("t", "tokenizer"), [])], Budget())
    assert whole.hours == (1.0, 2.0) and whole.usd == (1, 2)
    partly = forecast.of_run([(known, []), (unknown, [])], Budget())
    assert partly.hours is None and partly.unknown == ("the time of b is not known",)


@pytest.mark.parametrize(
    ("hours", "text"),
    [
        ((0.001, 0.001), "3.6 s"), ((0.05, 0.1), "3 to 6 min"), ((12.44, 12.44), "12.4 h"),
        ((208.3, 312.5), "208 to 312 h"), ((1.0, 1.0), "1 h"),
    ],
)  # fmt: skip
def test_hours_are_written_with_three_digits(hours: tuple[float, float], text: str) -> None:
    assert forecast.hours_text(hours) == text


# This user's own runs.


def recorded(home: Path, recipe: Recipe, speeds: list[float], number: int = 1) -> str:
    """A finished run of `recipe`, whose first stage logged these rows a second."""
    it = Recorder(home, number=number, stages=((recipe.stages[0].id, "pretrain"),))
    record = json.loads((it.root / "journal" / "00000001.json").read_text())
    for folder in (it.root, it.place):
        changed = json.dumps({**record, "recipe": to_dict(recipe)})
        (folder / "journal" / "00000001.json").write_text(changed)
    (it.place / "summary.json").write_text("{}")
    lines = [
        {"kind": "step", "global_step": step, "attempt": 1, "examples_per_sec": rows}
        for step, rows in enumerate(speeds, 1)
    ]
    (it.root / "metrics").mkdir(parents=True)
    (it.root / "metrics" / "0001.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return it.name


def test_a_run_of_the_same_work_is_believed_more_than_arithmetic(tmp_path: Path) -> None:
    one = stage(model=Model(name="meta-llama/Llama-3.2-1B"))
    name = recorded(tmp_path, Recipe("r", (one,)), [1.0, 9.0, 10.0, 11.0])
    found = of(one, offer(1.0), home=tmp_path)
    assert (found.basis, found.source) == ("measured", f"in {name}")
    assert found.tokens_per_second == 10.0 * 128
    longer = replace(one, train=Train(steps=7777, micro_batch=4, accumulate=2))
    assert of(longer, offer(1.0), home=tmp_path).source == f"in {name}"
    other = replace(one, data=Data(sequence_length=256))
    assert of(other, offer(1.0), home=tmp_path).source != f"in {name}"
    larger = replace(one, model=Model(name="meta-llama/Llama-3.1-8B"))
    assert of(larger, offer(1.0), home=tmp_path).source != f"in {name}"


def test_steps_that_draw_and_steps_that_do_not_are_measured_together(tmp_path: Path) -> None:
    """Of four steps on the same answers one draws them: most steps are faster than the run."""
    one = reinforced(grpo={"iterations": 4})
    recorded(tmp_path, Recipe("r", (one,)), [1.0, *[4.0, 40.0, 40.0, 40.0] * 5])
    found = of(one, offer(1.0), home=tmp_path)
    assert found.basis == "measured" and found.hours is not None
    assert found.hours[0] * 3600 == pytest.approx(100 * 16 * (1 / 4 + 3 / 40) / 4)


def test_a_run_whose_rows_were_others_is_not_believed(tmp_path: Path) -> None:
    """Rows that are not packed are as long as the texts; a resume may have changed the batch."""
    data = Data(train=(Source(path="short.jsonl"),), sequence_length=128, packing=False)
    one = stage(model=Model(name="meta-llama/Llama-3.2-1B"), data=data)
    name = recorded(tmp_path, Recipe("r", (one,)), [9.0] * 5)
    models = shapes.of_stage(one, (one,), Path())
    found = measured.like(one, models, tmp_path)
    assert found is not None and found.run == name
    longer = replace(one, data=replace(data, train=(Source(path="long.jsonl"),)))
    assert measured.like(longer, models, tmp_path) is None
    (journal,) = (tmp_path / "runs").glob(f"*{name[-6:]}/journal")
    resumed = {"kind": "resumed", "overrides": [], "recipe": to_dict(Recipe("r", (one,)))}
    (journal / "00000009.json").write_text(json.dumps(resumed))
    assert measured.like(one, models, tmp_path) is not None
    resumed["overrides"] = ["train.micro_batch=64"]
    (journal / "00000009.json").write_text(json.dumps(resumed))
    assert measured.like(one, models, tmp_path) is None


def test_a_measured_run_read_its_examples_cut_at_the_length_of_a_row(tmp_path: Path) -> None:
    data = Data(train=(Source(path="long.jsonl"),), sequence_length=128, packing=False)
    told = Expected(tokens_per_example=512)
    one = stage(model=Model(name="meta-llama/Llama-3.2-1B"), data=data, forecast=told)
    recorded(tmp_path, Recipe("r", (one,)), [8.0] * 5)
    found = of(one, offer(1.0), home=tmp_path)
    assert found.basis == "measured" and found.hours is not None
    assert found.hours[0] == pytest.approx(100 * 8 / 8.0 / 3600), "800 rows at 8 a second"


def test_a_run_with_too_few_steps_or_a_damaged_record_does_not_count(tmp_path: Path) -> None:
    one = stage(model=Model(name="meta-llama/Llama-3.2-1B"))
    recipe = Recipe("r", (one,))
    recorded(tmp_path, recipe, [9.0, 9.0])
    name = recorded(tmp_path, recipe, [9.0] * 5, number=2)
    models = shapes.of_stage(one, (one,), Path())
    found = measured.like(one, models, tmp_path)
    assert found is not None and found.run == name
    for file in (tmp_path / "runs").glob(f"*{name[-6:]}/**/00000001.json"):
        file.write_text('{"pretrain"')
    assert measured.like(one, models, tmp_path) is None


# The plan, and what `up` makes of it.


def misfit(size: float, weights: float) -> Forecast:
    parts = (Part("weights", weights * 2**30, ""), Part("rest", (size - weights) * 2**30, ""))
    memory = Memory(parts, 22.5 * 2**30)
    smaller = Memory((Part("weights", 19.8 * 2**30, ""),), 22.5 * 2**30)
    change = Change("checkpointing", ("model.gradient_checkpointing=true",), smaller)
    return Forecast("kd", "kd", memory, (change,), steps=10, hours=(1.0, 1.0))


def test_a_surrogate_larger_than_the_device_is_refused_as_a_teacher_is() -> None:
    small, large = Model(name="meta-llama/Llama-3.2-1B"), "meta-llama/Llama-3.1-70B"
    plain = stage(stage="sdce", model=small, sdce=Sdce("meta-llama/Llama-3.2-1B"))
    on_l4 = replace(plain, hardware=replace(plain.hardware, accelerator="L4:1"))
    assert forecast.hopeless(of(on_l4, offer(1.0))) is None
    said = forecast.hopeless(of(replace(on_l4, sdce=Sdce(large)), offer(1.0)))
    assert said is not None and "the weights alone are" in said[0]
    teacher = replace(on_l4, stage="kd", sdce=None, kd=Distill(teacher=large))
    assert forecast.hopeless(of(teacher, offer(1.0))) is not None


def with_forecast(monkeypatch: pytest.MonkeyPatch, made: Forecast) -> None:
    monkeypatch.setattr(forecast, "of_stage", lambda *given, **more: made)


def test_the_plan_says_what_does_not_fit_and_the_change_that_makes_it_fit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LAUNCH_HOME", str(tmp_path))
    with_forecast(monkeypatch, misfit(31.2, 16.1))
    assert cli.run(["plan", "kd-l4"]) == Exit.OK
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("  memory: 31.2 of 22.5 GiB: does not fit")
    assert lines[at + 1] == "    fits with: --set model.gradient_checkpointing=true: 19.8 GiB"


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert cli.run(["plan", *words]) == Exit.OK
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100 or "--explain" in words
    return lines


def test_explain_names_up_to_three_changes_and_what_they_change(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LAUNCH_HOME", str(tmp_path))
    monkeypatch.setattr(forecast.fit, "changes", lambda *given: tuple(
        Change(f"way {n}", (f"train.micro_batch={n}",), Memory((), 1.0), "" if n < 2 else "slow")
        for n in (1, 2, 3, 4)
    ))  # fmt: skip
    lines = planned(capsys, "kd-l4", "--explain")
    at = lines.index("  it would fit with way 1: 0 MiB")
    assert lines[at + 1 : at + 3] == [
        "    the training stays the same", "    --set train.micro_batch=1",
    ]  # fmt: skip
    assert sum("it would fit with" in line for line in lines) == 3
    assert "      --explain has other ways" in lines


def test_places_without_a_price_do_not_hide_the_dollars_of_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LAUNCH_HOME", str(tmp_path))
    lines = planned(capsys, "kd-h100", "--set", "hardware.places=[us-central1, us-east4]")
    where = "USD where the price is known; not known in us-central1"
    assert f"expected: 3.16 h, 13.48 to 34.67 {where}" in lines
    assert f"cost: price unknown, at most 60.00 {where} (12 h)" in lines
    lines = planned(capsys, "kd-h100", "--set", "hardware.places=[us-central1]")
    assert any("expected: 3.16 h, at a price that is not known" in line for line in lines)
    assert any("at most an unknown sum" in line for line in lines)


def test_a_capacity_without_a_price_is_named_where_another_has_one() -> None:
    places = [offer(1.0), offer(None, "spot"), replace(offer(None), place="there")]
    assert forecast.unpriced(places) == ("here (spot)", "there")
    one = Forecast("s", "kd", hours=(2.0, 3.0))
    whole = forecast.of_run([(one, places)], Budget())
    assert (whole.usd, whole.usd_priced) == (None, (2.0, 3.0))
    two = forecast.of_run([(one, places), (one, [offer(None)])], Budget())
    assert two.usd_priced is None, "one of the jobs has no price anywhere"
    assert forecast.of_run([(one, [offer(1.0)])], Budget()).unpriced == ()


def test_a_model_that_is_not_known_is_named_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LAUNCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    lines = planned(capsys, "kd-a100", "--set", "model.name=some/model")
    at = lines.index("  memory: not known: the shape of some/model is not known on this machine")
    assert lines[at + 1] == "    fetch it: hf download some/model config.json"
    (absent,) = shapes.absent(stage(model=Model(name="some/model")), {}, Path())
    assert absent.remedy.endswith("or name a local folder: model.name"), "that one runs here"
    folder = tmp_path / "gemma"
    folder.mkdir()
    (absent,) = shapes.absent(stage(model=Model(name=str(folder))), {}, Path())
    assert absent.remedy == "its folder has no config.json that can be read: put it there"
    (folder / "config.json").write_text('{"model_type": "gemma3"}')
    (absent,) = shapes.absent(stage(model=Model(name=str(folder))), {}, Path())
    assert "of the family gemma3, which launch cannot count" in absent.why
    (absent,) = shapes.absent(stage(model=Model(name="gs://b/model")), {}, Path())
    assert "forecast.examples_per_hour" in absent.remedy
    assert shapes.absent(stage(), {"model": SMALL}, Path()) == ()


def test_small_parts_are_in_mib_and_tiny_ones_are_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LAUNCH_HOME", str(tmp_path))
    text = "\n".join(planned(capsys, "quickstart", "--explain"))
    assert "MiB weights" in text and " 0.0 GiB" not in text
    assert "more below 1 MiB each" in text and " 0 MiB" not in text


def test_a_name_with_a_sha256_is_short_in_the_text_and_whole_in_the_document(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LAUNCH_HOME", str(tmp_path))
    (line,) = [x for x in planned(capsys, "kd-l4") if "gcs_object" in x and "bundles" in x]
    digest = line.rpartition("/")[2].removesuffix(".tar.bz2")
    assert cli.run(["plan", "kd-l4", "--json"]) == Exit.OK
    (job,) = json.loads(capsys.readouterr().out)["jobs"]
    whole = job["intents"][0]["name"].rpartition("/")[2].removesuffix(".tar.bz2")
    assert len(digest) == 12 and len(whole) == 64 and whole.startswith(digest)


def test_a_change_is_written_as_a_shell_takes_it() -> None:
    import shlex

    memory = Memory((), None)
    for setting in ("a.b=1", "model.freeze=[]", 'model.freeze=["model.embed_tokens.*"]'):
        words = forecast.settings(Change("", (setting,), memory))
        assert shlex.split(words) == ["--set", setting]


def test_up_asks_with_the_misfit_in_the_question(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LAUNCH_HOME", str(tmp_path))
    with_forecast(monkeypatch, misfit(31.2, 16.1))
    asked: list[str] = []

    def no(question: str, refusal: str) -> bool:
        asked.append(question)
        return False

    monkeypatch.setattr(console, "confirm", no)
    assert cli.run(["up", "kd-l4"]) == Exit.OK
    assert asked == ["kd does not fit, by the forecast. Start it?"]


def test_with_yes_a_misfit_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Started(Exception):
        pass

    def up(*given: Any, **more: Any) -> None:
        raise Started

    monkeypatch.setenv("LAUNCH_HOME", str(tmp_path))
    monkeypatch.setattr(api, "up", up)
    with_forecast(monkeypatch, misfit(31.2, 16.1))
    with pytest.raises(Started):
        drive.up("kd-l4", (), None, detach=True, yes=True, new=False, as_json=True)
    assert "warning: kd does not fit, by the forecast." in capsys.readouterr().err


def test_weights_that_alone_exceed_the_device_are_refused_also_with_yes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LAUNCH_HOME", str(tmp_path))
    with_forecast(monkeypatch, misfit(31.2, 23.0))
    assert cli.run(["up", "kd-l4", "--yes"]) == Exit.USAGE
    said = capsys.readouterr().err
    assert "kd: the weights alone are 23.0 GiB, and a device has 22.5" in said
    assert "it fits with --set model.gradient_checkpointing=true" in said
    assert not (tmp_path / "runs").exists()


def test_the_plan_of_a_shipped_recipe_says_hours_and_dollars_and_explains_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LAUNCH_HOME", str(tmp_path))
    assert cli.run(["plan", "kd-h100", "--explain"]) == Exit.OK
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert any(line.startswith("  time: 131 million tokens at ") for line in lines)
    spot = next(line for line in lines if line.startswith("  place us-east4"))
    assert "spot: 4.27 USD/h, " in spot and spot.endswith(" USD in all") and len(spot) < 100
    assert any(line.startswith("expected: ") for line in lines)
    assert text.count("skypilot-catalog") == 1, "the whole source once, and only here"
    assert "GFLOP a token" in text and "come on top" in text
    plan = api.plan(REPOSITORY / "recipes" / "kd_h100.yaml")
    facts = json.loads(json.dumps(plan.to_json()))
    (one,) = facts["jobs"][0]["forecasts"]
    assert one["hours"] == facts["forecast"]["hours"] and one["tokens"] == 131_072_000


def test_where_every_offer_is_too_dear_no_price_is_called_unknown_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LAUNCH_HOME", str(tmp_path))
    assert cli.run(["plan", "kd-l4", "--set", "budget.usd_per_hour=0.01"]) == Exit.BUDGET
    said = capsys.readouterr().out
    assert "cost:" not in said and "\ncannot start: job 0: the cheapest offer is 0.44 USD" in said
    assert "h, at a price that is not known, if nothing is preempted" in said


def test_the_worked_example_of_the_documentation_is_what_the_command_prints(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shlex

    monkeypatch.setenv("LAUNCH_HOME", str(tmp_path))
    page = (REPOSITORY / "docs" / "forecast.md").read_text()
    block = page[page.index("launch plan kd-h100 --set") :].partition("```")[0]
    command, _, shown = block.partition("\n\n")
    assert cli.run(shlex.split(command)[1:]) == Exit.OK
    printed = capsys.readouterr().out.splitlines()
    wanted = [line for line in shown.splitlines() if line.strip()]
    assert wanted and set(wanted) <= set(printed)
    assert any("208 to 312 h" in line and "521 to 781 USD" in line for line in wanted)
