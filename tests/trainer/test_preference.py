"""Stages `dpo` and `ipo`: the losses by hand and by TRL, pairs that do not see each other, the
reference that is asked once, and what preference training does on a task that is known."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax, logsigmoid

from tests.trainer import gradients
from tests.trainer.conftest import in_folder
from trainer import reference
from trainer.batch import Batch
from trainer.config import (
    Adapter,
    Architecture,
    ConfigError,
    Data,
    Hub,
    Model,
    Preference,
    Source,
    StageConfig,
    Train,
)
from trainer.data import DataError
from trainer.data.chat import view_of
from trainer.data.pairs import build_pairs
from trainer.data.stream import Rows
from trainer.evaluate import Left, held_out
from trainer.models import load_tokenizer
from trainer.objectives.preference import Prefer
from trainer.reference import Known, answer_logprobs, number_answers, precompute
from trainer.shrink import shrink
from trainer.step import backward, normalisers, prepare

KINDS: list[tuple[Any, Preference]] = [
    ("dpo", Preference(beta=0.2)),
    ("dpo", Preference(beta=0.5, label_smoothing=0.2)),
    ("ipo", Preference(beta=0.3)),
    ("dpo", Preference(beta=0.2, sft_weight=0.7)),
]


def quiet(line: str) -> None:
    del line


def logprobs(model: Any, batch: Batch) -> torch.Tensor:
    """Of the answers of one batch on the CPU."""
    copy = batch.to(torch.device("cpu"))
    number_answers(copy)
    with torch.no_grad():
        return answer_logprobs(model, copy)


def known_by(model: Any, rows: Rows, tmp_path: Path) -> Known:
    return precompute(
        tmp_path, [rows], lambda: model, gradients.CPU, about={}, micro_batch=4, say=quiet
    )


def alone(rows: Rows, chunk: int) -> Batch:
    """The row of one answer and nothing else."""
    start, length = int(rows.chunks.starts[chunk]), int(rows.chunks.lengths[chunk])
    tokens = torch.from_numpy(rows.chunks.tokens[start : start + length + 1]).long()
    assert rows.chunks.learned is not None
    learned = torch.from_numpy(rows.chunks.learned[start + 1 : start + length + 1])
    targets = tokens[1:].masked_fill(~learned, -100)
    positions = torch.arange(length)
    return Batch(*(t.unsqueeze(0) for t in (tokens[:-1], positions, targets)))


@pytest.fixture
def packed(tokenizer: str, texts: str) -> Rows:
    return gradients.pairs(tokenizer, texts, packing=True)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_answer_in_a_packed_row_has_the_log_probability_that_it_has_alone(
    attention: str, packed: Rows, tokenizer: str
) -> None:
    model = gradients.model(tokenizer, torch.float32, seed=1).eval()
    model.set_attn_implementation(attention)
    assert len(packed) < 48 / 2, "nothing was packed"
    for row in range(3):
        together = logprobs(model, packed.batch([row]))
        for nth, chunk in enumerate(packed.packing[row].tolist()):
            found = logprobs(model, alone(packed, chunk))
            assert torch.allclose(together[nth], found[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_loss_and_gradient_are_those_of_the_formula(
    kind: Any, settings: Preference, packed: Rows, tokenizer: str, tmp_path: Path
) -> None:
    """Written out in float64, one answer at a time."""
    policy, start = (gradients.model(tokenizer, torch.float64, seed=seed) for seed in (1, 2))
    pairs, nll, tokens = [], torch.zeros((), dtype=torch.float64), 0
    for pair in range(len(packed.chunks) // 2):
        sides = []
        for chunk in (2 * pair, 2 * pair + 1):
            batch = alone(packed, chunk)
            ids, at = batch.targets[0], batch.targets[0] >= 0
            both = []
            for model in (policy, start.requires_grad_(False)):
                table = log_softmax(model(input_ids=batch.input_ids).logits[0], dim=-1)
                both.append(table[at].gather(1, ids[at].unsqueeze(1)).sum())
            if chunk % 2 == 0:
                nll, tokens = nll - both[0], tokens + int(at.sum())
            ratio = both[0] - both[1]
            sides.append(ratio / at.sum() if kind == "ipo" else ratio)
        margin, beta, e = sides[0] - sides[1], settings.beta, settings.label_smoothing
        if kind == "ipo":
            pairs.append((margin - 1 / (2 * beta)) ** 2)
        else:
            pairs.append(-(1 - e) * logsigmoid(beta * margin) - e * logsigmoid(-beta * margin))
    wanted = torch.stack(pairs).mean() + settings.sft_weight * nll / tokens
    wanted.backward()
    by_hand = flat(policy)
    policy.zero_grad()
    known = known_by(start, packed, tmp_path)
    total = ours(Prefer(kind, settings, gradients.CPU, known), policy, packed)
    assert total == pytest.approx(float(wanted.detach()), rel=1e-9)
    assert float((flat(policy) - by_hand).norm() / by_hand.norm()) < 1e-8


def ours(objective: Prefer, policy: Any, rows: Rows) -> float:
    """The loss of all rows as one step; the gradient is then the policy's."""
    group = [rows.batch(range(0, len(rows), 2)), rows.batch(range(1, len(rows), 2))]
    batches = prepare(objective, group, gradients.CPU, 0)
    done = backward(policy, objective, batches, normalisers(batches, gradients.CPU), gradients.CPU)
    return float(done.total)


def flat(model: Any) -> torch.Tensor:
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])


@pytest.mark.parametrize(("kind", "settings"), KINDS[:3])
def test_loss_and_gradient_are_those_of_trl(
    kind: Any, settings: Preference, tokenizer: str, tmp_path: Path
) -> None:
    """DPOTrainer's own loss on the same pairs, with its own pass of the reference model. Its `ipo`
    divides by the number of an answer's tokens, as here. Its `sigmoid` knows no label smoothing;
    its `aot` has that term, and where a batch is one pair it sorts nothing."""
    pytest.importorskip("datasets")
    pytest.importorskip("trl", reason="TRL is not installed")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    words = "Preference is learned from pairs of answers, of which one was chosen. "
    records = [
        {"prompt": words[: 9 + i], "chosen": words[i : 2 * i + 5], "rejected": words[7 : 22 - i]}
        for i in range(1, 7)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    policy, start = (gradients.model(tokenizer, torch.float32, seed=seed) for seed in (1, 2))
    smoothed = settings.label_smoothing > 0
    arguments = DPOConfig(
        output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, report_to="none",
        loss_type="ipo" if kind == "ipo" else "aot" if smoothed else "sigmoid",
        label_smoothing=settings.label_smoothing, beta=settings.beta, max_length=None,
        per_device_train_batch_size=1 if smoothed else 6, gradient_checkpointing=False,
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = DPOTrainer(
        policy, start, args=arguments, train_dataset=Dataset.from_list(records),
        processing_class=load_tokenizer(tokenizer),
    )  # fmt: skip
    batches, wanted = list(trainer.get_train_dataloader()), 0.0
    for batch in batches:
        loss = trainer.compute_loss(trainer.model, batch) / len(batches)
        loss.backward()
        wanted += float(loss.detach())
    theirs = flat(policy)
    policy.zero_grad()
    rows = pairs_in(path, tokenizer)
    total = ours(
        Prefer(kind, settings, gradients.CPU, known_by(start, rows, tmp_path)), policy, rows
    )
    assert total == pytest.approx(wanted, rel=1e-4)
    assert float((flat(policy) - theirs).norm() / theirs.norm()) < 1e-3


def pairs_in(path: Path, tokenizer: str) -> Rows:
    tokens = load_tokenizer(tokenizer)
    view = view_of(Data(), "dpo", tokens)
    sources = (Source(path=str(path)),)
    return build_pairs(sources, tokens, sequence_length=128, packing=True, view=view)


@pytest.fixture
def taste(tmp_path: Path) -> tuple[str, str]:
    """Files of pairs, to learn from and held out: after random letters, A is preferred to B."""
    random_letters = random.Random(0)
    paths = []
    for name, count in (("train", 160), ("heldout", 60)):
        lines = []
        for _ in range(count):
            prompt = "".join(random_letters.choices("cdefghijklmnop", k=6))
            tail = "".join(random_letters.choices("qrst", k=2))
            pair = {"prompt": prompt, "chosen": "A" + tail, "rejected": "B" + tail}
            lines.append(json.dumps(pair) + "\n")
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("".join(lines))
    return str(paths[0]), str(paths[1])


@pytest.fixture
def prefers(tmp_path: Path, tokenizer: str, taste: tuple[str, str]) -> StageConfig:
    """A stage `dpo` of a tiny model with dropout."""
    train, held_out = taste
    shape = Architecture(
        hidden_size=32, layers=1, heads=2, intermediate_size=64, dropout=0.1, kv_heads=2
    )
    return StageConfig(
        id="prefer",
        stage="dpo",
        output=str(tmp_path / "out"),
        model=Model(init="random", tokenizer=tokenizer, architecture=shape),
        data=Data(
            train=(Source(path=train),), validation=(Source(path=held_out),), sequence_length=96
        ),
        train=Train(steps=30, micro_batch=4, lr=3e-3, warmup=3, log_every=1, report_to=()),
        preference=Preference(beta=0.5),
    )


def steps_of(folder: str) -> list[dict[str, Any]]:
    """The lines of the metrics, in order."""
    parts = sorted((Path(folder) / "metrics").glob("*.jsonl"))
    return [json.loads(line) for part in parts for line in part.read_text().splitlines()]


def test_dpo_learns_which_answer_is_preferred_and_held_out_pairs_show_it(
    prefers: StageConfig, run_stage: Callable[..., Any]
) -> None:
    settings = {"steps": 60, "evaluate_every": 30}
    outcome = run_stage(in_folder(prefers, Path(prefers.output), **settings))
    first, *_, last = [x for x in steps_of(prefers.output) if x["kind"] == "step"]
    assert first["train_loss"] == pytest.approx(np.log(2), abs=0.02)
    assert 0.3 <= first["accuracy"] <= 0.7
    assert outcome.evaluation["val_accuracy"] > 0.9 and outcome.evaluation["val_margin"] > 1.0
    assert outcome.evaluation["val_loss"] < 0.4 and outcome.evaluation["val_count"] == 60
    assert last["rewards_chosen"] > last["rewards_rejected"]
    words = [line for line in outcome.lines if line.startswith("step 60/60")]
    assert "accuracy" in words[0] and "margin" in words[0]


def test_the_mean_margin_of_ipo_comes_to_one_over_two_beta(
    prefers: StageConfig, run_stage: Callable[..., Any]
) -> None:
    config = replace(prefers, stage="ipo", preference=Preference(beta=0.5))
    outcome = run_stage(in_folder(config, Path(prefers.output), steps=100, min_lr_ratio=0.0))
    assert outcome.evaluation["val_margin"] == pytest.approx(1.0, rel=0.1)
    assert outcome.evaluation["val_accuracy"] == 1.0


def test_a_run_that_is_resumed_ends_bit_for_bit_alike_and_asks_the_reference_once(
    prefers: StageConfig, tmp_path: Path, run_stage: Callable[..., Any]
) -> None:
    calm, paused, lost = (in_folder(prefers, tmp_path / name, steps=6) for name in "abc")
    said = run_stage(calm).lines
    assert any(line.startswith("reference: the starting model reads") for line in said)
    for config in (paused, lost):
        run_stage(in_folder(config, Path(config.output), until=3))
    kept = Path(paused.output) / reference.NAME
    before = kept.read_bytes()
    again = run_stage(paused).lines
    assert "reference: 440 answers, from reference.npz" in again and kept.read_bytes() == before
    # Where the file is gone, it is the starting model that is asked again, not the checkpoint.
    (Path(lost.output) / reference.NAME).unlink()
    again = run_stage(lost).lines
    assert any("parameters, read in again" in line for line in again)
    for config in (paused, lost):
        assert weights(config) == weights(calm)


def weights(config: StageConfig) -> bytes:
    return (Path(config.output) / "checkpoints" / "step-6" / "model.safetensors").read_bytes()


def test_the_adapter_switched_off_is_the_reference_that_is_computed_before(
    prefers: StageConfig, tmp_path: Path, run_stage: Callable[..., Any]
) -> None:
    base = in_folder(prefers, tmp_path / "base", steps=2)
    run_stage(replace(base, stage="pretrain", preference=None, data=plain_text(base.data)))
    model = Model(name=base.output, adapter=Adapter(rank=4))
    found = []
    ways: tuple[Any, ...] = ("adapter", "precompute")
    for way in ways:
        assert prefers.preference is not None
        plan = replace(prefers.preference, reference=way)
        config = replace(prefers, model=model, preference=plan)
        run_stage(in_folder(config, tmp_path / way, steps=6))
        assert (tmp_path / way / reference.NAME).exists() == (way == "precompute")
        found.append([x for x in steps_of(str(tmp_path / way)) if x["kind"] in ("step", "eval")])
    for one, other in zip(*found):
        of_step = ("train_loss", "margin", "accuracy", "grad_norm")
        for name in of_step if one["kind"] == "step" else ("val_loss", "val_margin"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
    assert abs(found[0][-1]["val_margin"]) > 1e-3, "nothing was learned"


def test_what_is_frozen_of_an_adapter_stays_so_when_it_was_switched_off(
    packed: Rows, tokenizer: str
) -> None:
    from trainer import adapters

    model = gradients.model(tokenizer, torch.float32, seed=1)
    wrapped = adapters.attach(model, Adapter(rank=2, dropout=0.5), "base").train()
    for name, parameter in wrapped.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
        elif "lora_B" in name:
            torch.nn.init.normal_(parameter)
    before = {name: p.requires_grad for name, p in wrapped.named_parameters()}
    batch = packed.batch([0]).to(torch.device("cpu"))
    number_answers(batch)
    found = reference.without_adapter(wrapped, batch)
    assert {name: p.requires_grad for name, p in wrapped.named_parameters()} == before
    assert any(before.values()) and wrapped.training and not found.requires_grad
    base = gradients.model(tokenizer, torch.float32, seed=1).eval()
    assert torch.equal(found, logprobs(base, packed.batch([0])))
    with torch.no_grad():
        assert not torch.allclose(found, answer_logprobs(wrapped, batch), atol=0.1)


def plain_text(data: Data) -> Data:
    def text(source: Source) -> Source:
        return replace(source, format="text", field="chosen")

    return replace(data, train=tuple(map(text, data.train)), validation=())


@pytest.mark.parametrize("stage", ["dpo", "ipo"])
def test_settings_that_do_not_go_together_are_refused_by_the_trainer_too(
    stage: Any, prefers: StageConfig, run_stage: Callable[..., Any]
) -> None:
    plan = Preference(reference="adapter") if stage == "dpo" else Preference(label_smoothing=0.1)
    with pytest.raises(ConfigError, match=r"^stage prefer: preference\.(reference|label_smooth)"):
        run_stage(replace(prefers, stage=stage, preference=plan))


class Counting:
    """How often a model was asked for, and the sizes of the batches that it read."""

    def __init__(self, model: Any, fits: int = 1 << 30) -> None:
        self.model, self.asked, self.sizes = model, 0, list[int]()

        def before(module: Any, inputs: Any) -> None:
            self.sizes.append(len(inputs[0]))
            if len(inputs[0]) > fits:
                raise torch.OutOfMemoryError("CUDA out of memory (injected)")

        model.get_input_embeddings().register_forward_pre_hook(before)

    def __call__(self) -> Any:
        self.asked += 1
        return self.model


def ask(
    folder: Path, rows: list[Rows], start: Any, about: Optional[dict[str, Any]] = None, **more: Any
) -> tuple[dict[int, float], list[str]]:
    said: list[str] = []
    options = {"about": about or {"precision": "fp32"}, "micro_batch": 4, "say": said.append}
    return precompute(folder, rows, start, gradients.CPU, **options, **more).values, said


def test_only_answers_that_are_not_known_are_asked_for(
    packed: Rows, tokenizer: str, texts: str, tmp_path: Path
) -> None:
    start = Counting(gradients.model(tokenizer, torch.float32, seed=2))
    some = packed.first(3)
    first, _ = ask(tmp_path, [some], start)
    assert start.asked == 1 and len(first) == len(some.packing.items)
    unpacked = gradients.pairs(tokenizer, texts, packing=False)
    seen = len(start.sizes)
    more, _ = ask(tmp_path, [unpacked, packed], start)
    assert {key: more[key] for key in first} == first, "what was known stays"
    left = len(unpacked) - len(first) // 2 + len(packed) - 3
    assert sum(start.sizes[seen:]) == left, "rows that are known in another layout are not read"
    again, said = ask(tmp_path, [unpacked, packed], start)
    assert again == more and start.asked == 2 and said[0].endswith("from reference.npz")
    # What the first rows hold is not what it is complete for.
    ask(tmp_path, [some], start)
    assert start.asked == 3 and sum(start.sizes[seen:]) == left


def test_the_file_of_other_settings_or_a_damaged_one_is_not_used(
    packed: Rows, tokenizer: str, tmp_path: Path
) -> None:
    start = Counting(gradients.model(tokenizer, torch.float32, seed=2))
    first, _ = ask(tmp_path, [packed], start)
    _, said = ask(tmp_path, [packed], start, about={"precision": "bf16"})
    assert said[0] == "reference: reference.npz is of another precision: computed again"
    path = tmp_path / reference.NAME
    path.write_bytes(path.read_bytes()[:-40])
    again, said = ask(tmp_path, [packed], start)
    assert said[0].startswith("WARNING: reference.npz cannot be read (")
    assert again == first and start.asked == 3


def test_a_file_that_is_cut_off_or_changed_anywhere_ends_no_stage(
    packed: Rows, tokenizer: str, tmp_path: Path
) -> None:
    start = Counting(gradients.model(tokenizer, torch.float32, seed=2))
    few, path = packed.first(1), tmp_path / reference.NAME
    first, _ = ask(tmp_path, [few], start)
    whole = path.read_bytes()
    places = (*range(12), *(len(whole) - back for back in range(1, 190, 9)))
    for content in (
        *(whole[:size] for size in (0, 1, 30, len(whole) // 2, len(whole) - 1)),
        *(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :] for at in places),
    ):
        path.write_bytes(content)
        again, said = ask(tmp_path, [few], start)
        assert again == first
        assert said[0].startswith(("WARNING: reference.npz cannot be read (", "reference: "))
        if not content:
            assert said[0].startswith("WARNING: ")


@pytest.fixture
def named(prefers: StageConfig, tokenizer: str, tmp_path: Path) -> StageConfig:
    """The stage on a model in a folder."""
    save(1, tokenizer, tmp_path / "base")
    return replace(prefers, model=Model(name=str(tmp_path / "base")))


def save(seed: int, tokenizer: str, folder: Path) -> None:
    gradients.model(tokenizer, torch.float32, seed=seed, hidden=64).save_pretrained(folder)
    load_tokenizer(tokenizer).save_pretrained(folder)


def test_another_model_of_the_same_name_is_asked_again(
    named: StageConfig, tokenizer: str, tmp_path: Path, run_stage: Callable[..., Any]
) -> None:
    folder = Path(named.output)
    run_stage(in_folder(named, folder, steps=6, until=2))
    (tmp_path / "moved").mkdir()
    base = (tmp_path / "base").rename(tmp_path / "moved" / "base")  # of the same name
    assert named.model is not None
    moved = replace(named, model=replace(named.model, name=str(base)))
    said = run_stage(in_folder(moved, folder, steps=6, until=3)).lines
    assert "reference: 440 answers, from reference.npz" in said
    save(2, tokenizer, base)
    said = run_stage(in_folder(moved, folder, steps=6, until=4)).lines
    assert "reference: reference.npz is of another checkpoint: computed again" in said
    (base / "model.safetensors").unlink()  # what training goes on from has its own weights
    said = run_stage(in_folder(moved, folder, steps=6)).lines
    assert "reference: 440 answers, from reference.npz" in said


def test_a_reference_in_4_bits_is_another_one(
    named: StageConfig, tmp_path: Path, run_stage: Callable[..., Any]
) -> None:
    folder = Path(named.output)
    assert named.model is not None
    for until, packed in ((1, "none"), (2, "nf4")):
        model = replace(named.model, adapter=Adapter(rank=2, quantization=packed))  # type: ignore[arg-type]
        said = run_stage(in_folder(replace(named, model=model), folder, steps=3, until=until)).lines
    assert "reference: reference.npz is of another quantization: computed again" in said


def test_out_of_memory_in_the_pass_of_the_reference_halves_its_rows(
    packed: Rows, tokenizer: str, tmp_path: Path
) -> None:
    calm, _ = ask(tmp_path / "a", [packed], Counting(gradients.model(tokenizer, torch.float64, 2)))
    tight = Counting(gradients.model(tokenizer, torch.float64, 2), fits=1)
    found, said = ask(tmp_path / "b", [packed], tight)
    assert found.keys() == calm.keys() and max(tight.sizes) == 4
    assert all(found[key] == pytest.approx(calm[key], rel=1e-9) for key in calm)
    assert "reference: out of memory: 1 rows at a time" in said
    with pytest.raises(ConfigError, match=r"^preference\.reference: one row does not fit"):
        ask(tmp_path / "c", [packed], Counting(gradients.model(tokenizer, torch.float64, 2), 0))


def test_a_job_that_is_asked_to_leave_keeps_what_the_reference_has_said(
    packed: Rows, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_BLOCK", 1)
    start = Counting(gradients.model(tokenizer, torch.float32, seed=2))
    asked = iter([False, True])
    with pytest.raises(Left):
        ask(tmp_path, [packed], start, leave=lambda: next(asked))
    assert sum(start.sizes) == 4
    found, _ = ask(tmp_path, [packed], start)
    assert sum(start.sizes) == len(packed)
    assert found == ask(tmp_path / "calm", [packed], start)[0]


def test_of_held_out_pairs_those_are_asked_that_an_evaluation_reads(
    prefers: StageConfig, run_stage: Callable[..., Any]
) -> None:
    folder = Path(prefers.output)
    few = run_stage(in_folder(prefers, folder, steps=1, evaluate_batches=1))
    (said,) = (line for line in few.lines if "answers in" in line)
    assert few.evaluation["val_count"] < 60
    assert f" {320 + 2 * few.evaluation['val_count']:.0f} answers in" in said
    more = run_stage(in_folder(prefers, folder, steps=2, evaluate_batches=0))
    assert more.evaluation["val_count"] == 60


def test_a_signal_in_that_pass_ends_the_stage_which_then_goes_on(
    prefers: StageConfig, run_stage: Callable[..., Any]
) -> None:
    def before(module: Any, inputs: Any) -> None:
        if isinstance(module, torch.nn.Embedding) and inputs[0].shape[1] > 16:
            os.kill(os.getpid(), signal.SIGTERM)

    config = in_folder(prefers, Path(prefers.output), steps=2)
    handle = torch.nn.modules.module.register_module_forward_pre_hook(before)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "_BLOCK", 1)
            outcome = run_stage(config)
    finally:
        handle.remove()
    assert (outcome.stopped, outcome.step) == ("signal", 0)
    assert run_stage(config).step == 2


def test_pairs_without_a_block_have_its_defaults(
    prefers: StageConfig, run_stage: Callable[..., Any]
) -> None:
    config = replace(prefers, preference=None)
    assert run_stage(in_folder(config, Path(prefers.output), steps=1)).step == 1


@pytest.mark.parametrize("given", [Source(hf=Hub("org/pairs")), Source(path="gs://b/x.jsonl")])
def test_a_dry_run_replaces_what_is_not_here_by_pairs(
    given: Source, prefers: StageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = replace(prefers.data, train=(given,))
    config, notes = shrink(replace(prefers, data=data), set())
    assert config.data.train == (Source(builtin="python-preferences", split="train"),)
    assert any(note.endswith("not on this machine, Python's own preferences instead")
               for note in notes)  # fmt: skip


def test_many_things_that_are_judged_are_counted_exactly(packed: Rows, tokenizer: str) -> None:
    class Many:
        measures = ("loss",)

        def judge(self, model: Any, batch: Batch) -> tuple[int, torch.Tensor]:
            return 2**24 + 1, torch.ones(1, dtype=torch.float64)

    model = gradients.model(tokenizer, torch.float32, seed=1)
    found = held_out(model, packed.first(1), gradients.CPU, Many(), micro_batch=1)
    assert found["val_count"] == 2**24 + 1


def test_bad_pairs_end_the_stage_with_one_line_or_are_counted_at_its_start(
    prefers: StageConfig, tmp_path: Path, run_stage: Callable[..., Any]
) -> None:
    path = tmp_path / "some-bad.jsonl"
    good = {"prompt": "ab", "chosen": "c", "rejected": "d"}
    lines = [good, {**good, "rejected": "c"}, {**good, "prompt": "p" * 200}, good]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = replace(prefers.data, train=(Source(path=str(path)),), validation=())
    config = in_folder(replace(prefers, data=data), Path(prefers.output), steps=1)
    with pytest.raises(DataError, match=r"some-bad.jsonl:2: 'chosen' and 'rejected' are the same"):
        run_stage(config)
    said = "\n".join(run_stage(replace(config, data=replace(data, skip_bad=True))).lines)
    assert "1 shard, 2 pairs, " in said and "1 bad line skipped:" in said
    assert "1 pair left out: nothing to learn before the end of a row" in said
