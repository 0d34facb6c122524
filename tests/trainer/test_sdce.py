"""Surrogate-guided cross-entropy against its formula, and the stage `sdce`."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.trainer import gradients
from tests.trainer.conftest import in_folder
from trainer import models, stand_ins
from trainer.checkpoint import load_state, resolve
from trainer.config import ConfigError, FieldErrors, Job, Model, Sdce, Source, StageConfig, load_job
from trainer.data.stream import Stream
from trainer.data.token_bytes import token_bytes
from trainer.data.tokenizer import byte_tokenizer, train_tokenizer
from trainer.models import load_tokenizer
from trainer.objectives.sdce import SurrogateGuided, weight_at
from trainer.shrink import shrink
from trainer.step import backward, normalisers, prepare
from trainer.surrogate import Surrogate, Vocabularies, choose

Run = Callable[..., Any]
DTYPES = [torch.float64, torch.float32]


@pytest.fixture(scope="module")
def other(texts: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer with 340 tokens, that of the model having one a byte."""
    folder = tmp_path_factory.mktemp("other")
    train_tokenizer([Path(texts).read_text()], 340, 2, folder)
    return str(folder)


def sharp(tokenizer: str, dtype: torch.dtype, seed: int, times: float = 18.0) -> Any:
    """A random model that is sure of itself: some tokens come above 0.02, most do not."""
    model = gradients.model(tokenizer, dtype, seed, hidden=64)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(times)
    return model


@pytest.fixture(scope="module")
def plain(texts: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A part of `texts` in which characters are bytes."""
    found = documents(texts)[:20]
    path = tmp_path_factory.mktemp("plain") / "train.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in found if text.isascii()))
    return str(path)


@pytest.fixture(scope="module")
def surrogate(other: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("surrogate")
    sharp(other, torch.float32, seed=2).save_pretrained(folder)
    load_tokenizer(other).save_pretrained(folder)
    return str(folder)


def documents(texts: str) -> list[str]:
    return [json.loads(line)["text"] for line in Path(texts).read_text().splitlines()]


class Transcription:
    """The formula as it stands, document by document in float64: which token begins at which
    character is asked of the printed text, which is ASCII, and every sum is a loop."""

    def __init__(self, config: Sdce, tokenizer: str, other: str, surrogate: Any) -> None:
        self.config, self.surrogate = config, surrogate
        self.ours, self.theirs = (AutoTokenizer.from_pretrained(t) for t in (tokenizer, other))
        spelt = {part: i for i, part in enumerate(token_bytes(self.ours)) if part}
        self.map = {i: spelt.get(part) for i, part in enumerate(token_bytes(self.theirs)) if part}
        self.back = {ours: i for i, ours in self.map.items() if ours is not None}

    def __call__(self, model: Any, found: list[str], weight: float) -> Tensor:
        ce, tokens = torch.zeros((), dtype=torch.float64), 0
        beside, entries, rows = torch.zeros_like(ce), 0, 0
        self.covered = self.agreed = 0
        for text in found:
            ids = self.ours(text)["input_ids"]
            logits = model(input_ids=torch.tensor([ids])).logits[0]
            logq = torch.log_softmax(logits.double(), dim=-1)
            expected = self.expected(text)
            begins = [offset[0] for offset in self.ours(text, return_offsets_mapping=True)[
                "offset_mapping"]]  # fmt: skip
            for t in range(len(ids)):
                gold = ids[t + 1] if t + 1 < len(ids) else self.ours.eos_token_id
                ce, tokens = ce - logq[t, gold], tokens + 1
                p = expected.get(begins[t + 1]) if t + 1 < len(ids) else None
                if p is None or gold not in self.back:
                    continue
                weights, count = self.weights(p, gold)
                self.covered += 1
                self.agreed += p.index(max(p)) == self.back[gold]
                entries += count
                rows += bool(weights)
                for j, w in weights.items():
                    beside = beside - w * logq[t, j]
        self.rows, self.entries, self.tokens = rows, entries, tokens
        return ce / tokens + weight * beside / (entries if self.config.form == "parity" else rows)

    def expected(self, text: str) -> dict[int, list[float]]:
        """Character -> the distribution over what begins there."""
        encoded = self.theirs(text, return_offsets_mapping=True)
        with torch.no_grad():
            logits = self.surrogate(input_ids=torch.tensor([encoded["input_ids"]])).logits[0]
        p = torch.softmax(logits.double(), dim=-1)
        return {begin: p[j].tolist() for j, (begin, _) in enumerate(encoded["offset_mapping"][1:])}

    def weights(self, p: list[float], gold: int) -> tuple[dict[int, float], int]:
        """Of each token in the target, and how many others than the gold one there are."""
        others = [(p[i], ours) for i, ours in self.map.items()
                  if ours is not None and ours != gold]  # fmt: skip
        best = sorted(others, reverse=True)[: self.config.k]
        kept = [(x, j) for x, j in best if x >= self.config.threshold]
        if self.config.form == "parity":
            total = sum(math.exp(-1 / x) for x, _ in kept)
            return {j: math.exp(-1 / x) / total for x, j in kept}, len(kept)
        own = p[self.back[gold]]
        if not kept and own < self.config.threshold:
            return {}, 0
        total = own + sum(x for x, _ in kept)
        return {gold: own / total, **{j: x / total for x, j in kept}}, len(kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["soft", "parity"])
def test_it_is_its_formula(
    form: Any, dtype: torch.dtype, tokenizer: str, other: str, plain: str
) -> None:
    """Of packed rows, against documents one by one: loss and gradient."""
    config = Sdce("s", form=form, k=5, weight=0.8, weight_final=0.2)
    surrogate, student = sharp(other, dtype, 2), gradients.model(tokenizer, dtype, seed=1)
    words = Vocabularies(load_tokenizer(tokenizer), load_tokenizer(other))
    objective = SurrogateGuided(config, Surrogate(surrogate, words, gradients.CPU))
    rows = gradients.rows(tokenizer, plain, packing=True)
    group = [rows.batch(range(len(rows)))]
    batches = prepare(objective, group, gradients.CPU, 0, 0.25)
    found = backward(
        student, objective, batches, normalisers(batches, gradients.CPU), gradients.CPU
    )
    gradient = torch.cat([p.grad.flatten().double() for p in student.parameters()])

    literal = Transcription(config, tokenizer, other, surrogate)
    student.zero_grad()
    weight = 0.2 + (0.8 - 0.2) / 2 * (1 + math.cos(math.pi * 0.25))
    total = literal(student, documents(plain), weight)
    total.backward()
    expected = torch.cat([p.grad.flatten().double() for p in student.parameters()])
    limit = 1e-10 if dtype == torch.float64 else 3e-6
    assert literal.rows > 50 and literal.entries > literal.rows / 2
    assert float(found.total) == pytest.approx(total.item(), rel=limit)
    assert float((gradient - expected).norm() / expected.norm()) < limit
    logged = {name: float(value) for name, value in found.sums.items()}
    assert logged["surrogate_coverage"] == pytest.approx(literal.covered / literal.tokens)
    assert logged["surrogate_kept"] == pytest.approx(literal.entries / literal.covered)
    assert logged["surrogate_agreement"] == pytest.approx(literal.agreed / literal.covered)


def test_parity_divides_by_the_entries_of_all_rows(tokenizer: str, other: str, plain: str) -> None:
    """Of a surrogate that is not sure: several entries in most rows."""
    config = Sdce("s", form="parity", k=5, threshold=0.002)
    words = Vocabularies(load_tokenizer(tokenizer), load_tokenizer(other))
    unsure = sharp(other, torch.float64, 2, times=1.0)
    student = gradients.model(tokenizer, torch.float64, seed=1)
    objective = SurrogateGuided(config, Surrogate(unsure, words, gradients.CPU))
    group = [gradients.rows(tokenizer, plain, packing=True).batch([0, 1])]
    batches = prepare(objective, group, gradients.CPU, 0)
    opinion = batches[0].extra["opinion"]
    rows, entries = (opinion.weights[:, 1:] > 0).any(dim=1).sum(), (opinion.ids[:, 1:] >= 0).sum()
    assert int(entries) > 2 * int(rows) > 0
    found = backward(
        student, objective, batches, normalisers(batches, gradients.CPU), gradients.CPU
    )
    sums = {name: float(value) for name, value in found.sums.items()}
    assert float(batches[0].weights["surrogate"]) == int(entries)
    assert float(found.total) == pytest.approx(sums["ce_loss"] + sums["surrogate_loss"])


def test_kl_is_from_the_surrogate_to_the_model(tokenizer: str, plain: str) -> None:
    """KL(p || q) of whole distributions, p being the surrogate's."""
    unsure, tokens = sharp(tokenizer, torch.float64, 2, times=2.0), load_tokenizer(tokenizer)
    student = gradients.model(tokenizer, torch.float64, seed=1)
    surrogate = Surrogate(unsure, Vocabularies(tokens, tokens), gradients.CPU)
    objective = SurrogateGuided(Sdce("s", loss="kl"), surrogate)
    group = [gradients.rows(tokenizer, plain, packing=False).batch([0])]
    batches = prepare(objective, group, gradients.CPU, 0)
    norm = normalisers(batches, gradients.CPU)
    found = backward(student, objective, batches, norm, gradients.CPU)
    with torch.no_grad():
        logs = [
            model(input_ids=group[0].input_ids, use_cache=False).logits[0].log_softmax(-1)
            for model in (unsure, student)
        ]
    at = group[0].targets[0] != -100
    expected = (logs[0].exp() * (logs[0] - logs[1])).sum(dim=-1)[at].mean()
    assert float(found.sums["surrogate_loss"]) == pytest.approx(float(expected), rel=1e-6)


def test_its_terms_without_the_surrogate_are_cross_entropy(tokenizer: str, texts: str) -> None:
    """With weight 0, and where the surrogate has no opinion on anything."""
    plain = gradients.of("next_token", tokenizer, texts, torch.float64, micro_batch=8)
    for changes in ({"weight": 0.0}, {"threshold": 0.99}):
        config = replace(gradients.GUIDED["parity"], **changes)
        objective = gradients.guided(config, tokenizer, texts, torch.float64)
        student = gradients.model(tokenizer, torch.float64, seed=1)
        rows = gradients.rows(tokenizer, texts, packing=True)
        stream = Stream(rows, micro_batch=8, accumulate=1, rank=0, world_size=1, seed=0)
        batches = prepare(objective, stream.next_group(), gradients.CPU, 0)
        norm = normalisers(batches, gradients.CPU)
        assert (norm["surrogate"] == 0) == ("threshold" in changes)
        backward(student, objective, batches, norm, gradients.CPU)
        found = torch.cat([p.grad.flatten() for p in student.parameters()])
        assert float((found - plain).norm() / plain.norm()) < 1e-12


@pytest.mark.parametrize("form", ["soft", "parity"])
def test_the_same_tokens_read_anew_give_the_same_targets(
    form: Any, tokenizer: str, texts: str, tmp_path: Path
) -> None:
    """The one path takes rows as they are, the other reads their bytes again."""
    again = AutoTokenizer.from_pretrained(tokenizer)
    ours = load_tokenizer(tokenizer)
    again.add_special_tokens({"additional_special_tokens": ["<|more|>"]})
    same, anew = Vocabularies(ours, ours), Vocabularies(ours, again)
    assert same.same and not anew.same
    model = sharp(tokenizer, torch.float64, 2)
    batch = gradients.rows(tokenizer, texts, packing=True).batch([0, 1, 2])
    batch = batch.to(gradients.CPU.device)
    config = Sdce("s", form=form, k=6)
    anew.to_ours = anew.to_ours[: len(same.to_ours)]  # the model has no logit for the new one
    one, two = (Surrogate(model, w, gradients.CPU).opinion(batch, config) for w in (same, anew))
    inner = batch.labels != ours.eos_token_id  # the end of a text is special
    assert one.covered == len(batch.labels) and two.covered == int(inner.sum())
    assert int(two.kept) > 20
    # Read anew, special tokens are no candidates: only rows without them are to be equal.
    plain = inner & ~torch.isin(one.ids[:, 1:], torch.tensor(ours.all_special_ids)).any(1)
    assert int(plain.sum()) > 20
    assert torch.equal(one.ids[plain], two.ids[plain])
    torch.testing.assert_close(one.weights[plain], two.weights[plain], rtol=0, atol=1e-12)


def test_rows_without_anything_to_keep_stay_finite() -> None:
    """Certainty, p = 0, a vocabulary of which nothing matches, and no threshold at all."""
    p = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25],
                      [1.0, 1e-40, 1e-30, 0.0]])  # fmt: skip
    gold = torch.tensor([0, 0, 0, 0])
    for form in ("soft", "parity"):
        for threshold in (0.0, 0.02):
            config = Sdce("s", form=form, threshold=threshold, k=30)
            for to_ours in (torch.arange(4), torch.tensor([7, -1, -1, -1])):
                ids, weights, right = choose(p.clone(), gold, to_ours, config)
                assert bool(torch.isfinite(weights).all()) and right.tolist()[:2] == [True, False]
                assert bool((weights[:, 1:][ids < 0] == 0).all())
                sums = weights.sum(dim=1)
                assert bool(((sums - 1).abs().lt(1e-6) | (sums == 0)).all())
    _, soft, _ = choose(p.clone(), gold, torch.arange(4), Sdce("s", threshold=0.02))
    assert soft[2].tolist() == [0.25] * 4 + [0] and soft[0].tolist() == [1, 0, 0, 0, 0]


def test_its_weight_falls_along_half_a_cosine() -> None:
    config = Sdce("s", weight=1.0, weight_final=0.2)
    assert [weight_at(config, x) for x in (0.0, 0.5, 1.0, 2.0)] == pytest.approx([1, 0.6, 0.2, 0.2])


def test_what_is_not_read_is_refused() -> None:
    for wrong in ({"loss": "kl", "form": "parity"}, {"loss": "standard"}):
        with pytest.raises(FieldErrors, match=r"belongs to `loss: surrogate`|is not read with"):
            Sdce("s", **wrong)


# The stage.


@pytest.fixture
def guided(stage: StageConfig, surrogate: str) -> StageConfig:
    """A stage `sdce` whose surrogate reads other tokens."""
    return replace(stage, stage="sdce", sdce=Sdce(surrogate))


def steps(folder: Path) -> list[dict[str, Any]]:
    lines = [line for file in sorted((folder / "metrics").glob("*.jsonl"))
             for line in file.read_text().splitlines()]  # fmt: skip
    return [fact for fact in map(json.loads, lines) if fact["kind"] == "step"]


def test_a_stage_logs_what_the_surrogate_gives_and_resumes_exactly(
    guided: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    guided = in_folder(guided, tmp_path / "out", steps=12)
    whole = run_stage(guided)
    assert any(line.startswith("surrogate: ") and "of its 340 tokens are among the model's 258"
               in line for line in whole.lines)  # fmt: skip
    facts = steps(tmp_path / "out")
    assert all(0.1 < fact["surrogate_coverage"] < 0.9 for fact in facts)
    assert max(fact["surrogate_kept"] for fact in facts) > 0.3
    weights = [fact["surrogate_weight"] for fact in facts]
    assert weights[0] == 1.0 and weights == sorted(weights, reverse=True) and weights[-1] < 0.02
    for fact in facts:
        parts = fact["ce_loss"] + fact["surrogate_weight"] * fact["surrogate_loss"]
        assert fact["train_loss"] == pytest.approx(parts, rel=1e-5)

    cut = in_folder(guided, tmp_path / "cut")
    run_stage(in_folder(cut, tmp_path / "cut", until=5))
    run_stage(cut, attempt=2)
    one, two = (load_state(Path(resolve(str(tmp_path / name)))) for name in ("out", "cut"))
    assert one["step"] == two["step"] == 12 and one["stream"] == two["stream"]
    whole_file, cut_file = (
        Path(resolve(str(tmp_path / name))) / "model.safetensors" for name in ("out", "cut")
    )
    assert whole_file.read_bytes() == cut_file.read_bytes()


def test_an_out_of_memory_of_the_surrogate_halves_the_micro_batch(
    guided: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    calm = in_folder(guided, tmp_path / "calm", steps=2, micro_batch=4)
    model = calm.model
    assert model is not None and model.architecture is not None
    calm = replace(
        calm, model=replace(model, architecture=replace(model.architecture, dropout=0.0))
    )
    run_stage(calm)

    def before(module: Any, inputs: Any) -> None:
        asked = isinstance(module, nn.Embedding) and module.num_embeddings == 340
        if asked and inputs[0].shape[0] > 2 and inputs[0].shape[1] > 16:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    handle = nn.modules.module.register_module_forward_pre_hook(before)
    try:
        split = run_stage(in_folder(calm, tmp_path / "split"))
    finally:
        handle.remove()
    assert "out of memory with 4 rows: going on with 2" in split.lines
    for one, two in zip(steps(tmp_path / "calm"), steps(tmp_path / "split")):
        for name in ("train_loss", "surrogate_loss", "surrogate_kept", "grad_norm"):
            assert one[name] == pytest.approx(two[name], rel=1e-5)


@pytest.mark.parametrize("loss", ["kl", "standard"])
def test_the_other_losses_run(
    loss: Any, guided: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    """`kl` with a surrogate of the model's own tokenizer; `standard` is what `pretrain` does."""
    folder = tmp_path / "same"
    count = 5 if loss == "standard" else 14
    plain = replace(guided, stage="pretrain", sdce=None)
    run_stage(in_folder(plain, folder, steps=count))
    sdce = Sdce(None if loss == "standard" else f"{folder}@last", loss=loss)
    run_stage(in_folder(replace(guided, sdce=sdce), tmp_path / "out", steps=count))
    facts, without = steps(tmp_path / "out"), steps(folder)
    if loss == "standard":
        assert [f["ce_loss"] for f in facts] == [f["ce_loss"] for f in without]
        assert not any("surrogate_loss" in fact for fact in facts)
        return
    for fact in facts:
        assert fact["surrogate_coverage"] == 1.0
        parts = fact["ce_loss"] + fact["surrogate_weight"] * fact["surrogate_loss"]
        assert fact["train_loss"] == pytest.approx(parts, rel=1e-5)
    # The surrogate knows this text: to be near it is to know it too.
    assert facts[-2]["surrogate_loss"] < 0.8 * facts[0]["surrogate_loss"]


def refused(stage: StageConfig, run_stage: Run) -> str:
    """The one line that says why. There is no data: it comes before that is looked for."""
    absent = replace(stage.data, train=(Source(path="/nowhere/train.jsonl"),))
    with pytest.raises(ConfigError) as raised:
        run_stage(replace(stage, data=absent))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def changed(
    guided: StageConfig, tmp_path: Path, change: Optional[Callable[[Path], None]]
) -> StageConfig:
    """With a copy of the surrogate that `change` has been at."""
    assert guided.sdce is not None
    folder = tmp_path / "changed"
    shutil.copytree(resolve(str(guided.sdce.surrogate)), folder)
    if change is not None:
        change(folder)
    return replace(guided, sdce=replace(guided.sdce, surrogate=str(folder)))


def test_a_surrogate_that_cannot_serve_is_refused_before_data_is_read(
    guided: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    def broken(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        next(iter(tensors.values())).view(-1)[:4] = math.nan
        for tensor in tensors.values():
            tensor.view(-1)[:1] = math.nan
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    line = refused(changed(guided, tmp_path, broken), run_stage)
    assert "logits that are not finite, in fp32" in line and "changed" in line

    def quantised(folder: Path) -> None:
        facts = json.loads((folder / "config.json").read_text())
        facts["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        (folder / "config.json").write_text(json.dumps(facts))

    again = tmp_path / "again"
    line = refused(changed(guided, again, quantised), run_stage)
    assert "is quantised" in line and "fp32, bf16 or fp16" in line

    other_kl = replace(guided, sdce=replace(guided.sdce, loss="kl"))
    line = refused(other_kl, run_stage)
    assert "another tokenizer than the model" in line and "`loss: surrogate`" in line

    nobody = replace(guided, sdce=Sdce(str(tmp_path / "nobody")))
    assert "nobody" in refused(nobody, run_stage)


def test_a_surrogate_without_a_common_token_is_refused(tokenizer: str, tmp_path: Path) -> None:
    plain = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({"[UNK]": 0, "東京": 1}, unk_token="[UNK]")
    )
    plain.decoder = tokenizers.decoders.WordPiece()
    theirs = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]")
    with pytest.raises(
        ConfigError, match="none of its 2 tokens has the bytes of one of the model's"
    ):
        Vocabularies(load_tokenizer(tokenizer), theirs)
    byte_tokenizer(tmp_path)
    assert Vocabularies(load_tokenizer(tokenizer), load_tokenizer(str(tmp_path))).same


def test_a_model_may_begin_at_random_with_the_shape_of_another(
    guided: StageConfig, run_stage: Run, tokenizer: str, tmp_path: Path
) -> None:
    shape = in_folder(replace(guided, stage="pretrain", sdce=None), tmp_path / "shape", steps=1)
    run_stage(shape)
    model = Model(name=str(tmp_path / "shape"), init="random")
    found = run_stage(in_folder(replace(guided, model=model), tmp_path / "fresh", steps=1))
    assert found.stopped is None
    assert steps(tmp_path / "fresh")[0]["ce_loss"] == pytest.approx(math.log(258), rel=0.1)


@pytest.mark.parametrize("name", ["org/nothing-qwen3", "gs://bkt/surrogate"])
def test_a_dry_run_and_a_rehearsal_put_a_tiny_surrogate_in_place(
    name: str, guided: StageConfig, run_stage: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that `kl` compares with token by token."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for loss in ("surrogate", "kl"):
        stage = replace(guided, sdce=Sdce(name, loss=loss), output=str(tmp_path / loss))
        small, notes = shrink(stage, set())
        assert f"surrogate {name}: a random" in "\n".join(notes)
        assert run_stage(small, dry_run=True).step == 1
        made = small.sdce
        assert made is not None
        assert models.vocabulary_size(str(made.surrogate)) == 258
    folder = tmp_path / "rehearsal"
    folder.mkdir()
    remote = Model(name="gs://bkt/base")
    stage = replace(guided, sdce=Sdce(name), model=remote, data=replace(
        guided.data, train=(Source(path="gs://bkt/a.jsonl"),), validation=()))  # fmt: skip
    stand_ins.write(Job(run="r", stages=(stage,)), folder, "gs://bkt/rehearsal")
    text = (folder / "job.json").read_text().replace("gs://", f"{folder}/objects/")
    (folder / "here.json").write_text(text)
    rehearsed = load_job(folder / "here.json").stages[0]
    assert rehearsed.sdce is not None and str(folder) in str(rehearsed.sdce.surrogate)
    assert run_stage(in_folder(rehearsed, tmp_path / "rehearsed", steps=1, accumulate=1)).step == 1
