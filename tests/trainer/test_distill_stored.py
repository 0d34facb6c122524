"""Distillation from stored answers: the store, its two samplers, and the losses that read it."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.trainer import gradients
from tests.trainer.conftest import in_folder
from tests.trainer.loss_cases import make_case
from trainer import runtime, stages, teacher_pass
from trainer.config import (
    ConfigError,
    Distill,
    FieldErrors,
    Job,
    KeepLogits,
    Source,
    StageConfig,
    Targets,
    Train,
)
from trainer.data import DataError
from trainer.data.stream import Rows, build_rows
from trainer.interrupts import listening
from trainer.losses.answers import divergence
from trainer.losses.distance import logit_distance
from trainer.losses.linear import sparse_target
from trainer.models import load_tokenizer
from trainer.objectives.distill import DistillOnline, alpha_at
from trainer.step import backward, normalisers, prepare
from trainer.teacher import StoredAnswers, coverage
from trainer.teacher_pass import answers, write_targets


def gradient(objective: Any, tokenizer: str, rows: Rows, dtype: torch.dtype) -> torch.Tensor:
    student = gradients.model(tokenizer, dtype, seed=1)
    batches = prepare(objective, [rows.batch(range(len(rows)))], gradients.CPU, 0)
    backward(student, objective, batches, normalisers(batches, gradients.CPU), gradients.CPU)
    return torch.cat([p.grad.flatten().double() for p in student.parameters()])


def online(tokenizer: str, dtype: torch.dtype, alpha: float) -> DistillOnline:
    teacher = gradients.model(tokenizer, dtype, seed=2, hidden=64)
    return DistillOnline(Distill("t", temperature=2.0, alpha=alpha), teacher, gradients.CPU)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("values", "limit"), [("float64", 1e-6), ("float16", 1e-3)])
def test_the_whole_vocabulary_stored_gives_the_gradient_of_an_online_teacher(
    values: str, limit: float, tokenizer: str, texts: str
) -> None:
    data = gradients.rows(tokenizer, texts, packing=True)
    kept = gradients.stored(tokenizer, data, torch.float64, top_k=10**6, values=values)
    expected = gradient(online(tokenizer, torch.float64, 0.3), tokenizer, data, torch.float64)
    assert distance(gradient(kept, tokenizer, data, torch.float64), expected) < limit


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("k", [1, 5, 211])
def test_top_k_with_the_rest_as_one_is_the_textbook_divergence(k: int, dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype)
    teacher_logits = F.linear(case["teacher_hidden"], case["teacher_weight"]).detach()
    teacher = torch.softmax(teacher_logits / 2, dim=1)
    p, ids = teacher.topk(k, dim=1)
    known = torch.arange(len(p)) % 4 > 0
    missing = ids.masked_fill(~known.unsqueeze(1), -1)
    hidden, weight = (case[n].detach().clone().requires_grad_() for n in ("hidden", "weight"))
    result = divergence(hidden, weight, missing, p, known, temperature=2.0, chunk_rows=8)
    result.backward()
    h, w = (case[n].detach().clone().requires_grad_() for n in ("hidden", "weight"))
    q = torch.softmax(F.linear(h, w) / 2, dim=1)
    kl = (p * (p / q.gather(1, ids)).log()).sum(dim=1)
    if k < 211:
        named = torch.zeros_like(q, dtype=torch.bool).scatter_(1, ids, True)
        rest, rest_q = 1 - p.sum(dim=1), q.masked_fill(named, 0).sum(dim=1)
        kl = kl + rest * (rest / rest_q).log()
    loss = kl[known].sum()
    loss.backward()
    limit = 1e-10 if dtype == torch.float64 else 2e-5
    assert hidden.grad is not None and weight.grad is not None
    assert h.grad is not None and w.grad is not None
    assert distance(hidden.grad, h.grad) < limit and distance(weight.grad, w.grad) < limit
    assert abs(float((result - loss).detach())) < limit * float(loss.detach())


def test_rounding_does_not_pull_from_a_student_that_knows_the_answers() -> None:
    """All but 1e-9 of the probability lies in the answers, in teacher and student: 1 - sum q is
    rounding there, and so is 1 - sum p where the whole vocabulary is stored."""
    head = torch.zeros(50, 2)
    head[:2] = torch.tensor([[20.0, 0.0], [21.0, 1.0]])
    hidden = torch.tensor([[1.0, 0.5]]).requires_grad_()
    q = torch.softmax(F.linear(hidden.detach(), head), dim=1)
    for ids in (torch.tensor([[0, 1]]), torch.arange(50).unsqueeze(0)):
        p = q.gather(1, ids)
        kl = divergence(hidden, head, ids, p * (1 - 1e-7), torch.tensor([True]), temperature=1.0)
        (found,) = torch.autograd.grad(kl, [hidden])
        assert float(kl.detach().abs()) < 1e-5 and float(found.abs().max()) < 1e-4


def test_the_distance_to_a_teacher_is_reported_before_it_has_a_weight(
    tokenizer: str, texts: str
) -> None:
    data = gradients.rows(tokenizer, texts, packing=True)
    for sampler in ("top_k", "sample"):
        found = []
        for alpha in (0.5, 1.0):
            kept = gradients.stored(
                tokenizer, data, torch.float64, alpha=alpha, sampler=sampler, top_k=8
            )
            (batch,) = prepare(kept, [data.batch(range(len(data)))], gradients.CPU, 0)
            student = gradients.model(tokenizer, torch.float64, seed=1)
            found.append(kept.loss(student, batch, batch.weights, log=True))
        ours, none = (float(loss.sums["kd_loss"][0]) for loss in found)
        assert ours == pytest.approx(none, rel=1e-12) and ours > 0
        assert float(found[1].total.detach()) == pytest.approx(
            float(found[1].sums["ce_loss"][0] / batch.weights["ce"]), rel=1e-12
        )


def test_sampled_targets_have_the_dense_gradient_as_their_mean() -> None:
    case = make_case(n=12, v=61)
    teacher_logits = F.linear(case["teacher_hidden"], case["teacher_weight"])
    p = torch.softmax(teacher_logits.detach() / 2, dim=1)
    dense = _sparse_gradient(case, torch.arange(61).expand(12, 61), p)
    plan = Targets("t", sampler="sample", samples=16, temperature=2.0)
    errors, mean = [], torch.zeros_like(dense)
    for seed in range(400):
        drawn = answers(
            case["teacher_hidden"].detach(),
            case["teacher_weight"].detach(),
            plan,
            torch.Generator().manual_seed(seed),
        )
        assert int(drawn.p.sum()) == 12 * 16
        target = torch.zeros_like(p).flatten()
        row = torch.arange(12).repeat_interleave(torch.from_numpy(drawn.counts))
        target[row * 61 + torch.from_numpy(drawn.ids)] = torch.from_numpy(drawn.p).double() / 16
        found = _sparse_gradient(case, torch.arange(61).expand(12, 61), target.view(12, 61))
        errors.append(distance(found, dense))
        mean += found / 400
    typical = sum(errors) / len(errors)
    # Independent errors shrink with the root of their number (20); a bias would stay.
    assert distance(mean, dense) < typical / 10
    ids = p.topk(4, dim=1).indices
    top = p.gather(1, ids)
    biased = _sparse_gradient(case, ids, top / top.sum(dim=1, keepdim=True))
    assert distance(biased, dense) > 2 * distance(mean, dense)


def test_the_loss_of_samples_is_a_divergence(tokenizer: str, texts: str) -> None:
    """Of a student that is the teacher: the noise of sampling, which more samples make small."""
    data = gradients.rows(tokenizer, texts, packing=True)
    found = {}
    for samples in (64, 4096):
        kept = gradients.stored(
            tokenizer, data, torch.float64, alpha=0.0, sampler="sample", samples=samples
        )
        (batch,) = prepare(kept, [data.batch(range(len(data)))], gradients.CPU, 0)
        teacher = gradients.model(tokenizer, torch.float64, seed=2, hidden=64)
        loss = kept.loss(teacher, batch, batch.weights, log=True)
        found[samples] = float(loss.sums["kd_loss"][0] / batch.weights["kd"])
        assert float(loss.total.detach()) == pytest.approx(found[samples])
    assert 0 < found[4096] < 0.05 < found[64]


def _sparse_gradient(case: Any, ids: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    hidden = case["hidden"].detach().clone().requires_grad_()
    sparse_target(hidden, case["weight"], ids, w, temperature=2.0).loss.backward()
    return hidden.grad.flatten()


def test_documents_without_an_answer_have_no_weight_in_the_distillation(
    tokenizer: str, texts: str, tmp_path: Path
) -> None:
    half = tmp_path / "half.jsonl"
    half.write_text("".join(f"{x}\n" for x in Path(texts).read_text().splitlines()[:24]))
    known = gradients.rows(tokenizer, str(half), packing=True)
    every = gradients.rows(tokenizer, texts, packing=False)
    kept = gradients.stored(tokenizer, known, torch.float64, alpha=0.0, top_k=10**6)
    expected = gradient(online(tokenizer, torch.float64, 0.0), tokenizer, known, torch.float64)
    assert distance(gradient(kept, tokenizer, every, torch.float64), expected) < 1e-6
    seen = coverage(kept.answers, every)
    assert (seen.known_chunks, seen.chunks) == (24, 48)
    assert seen.known == known.summary["supervised_tokens"]
    assert seen.tokens == every.summary["supervised_tokens"]
    batch = prepare(kept, [every.batch(range(48))], gradients.CPU, 0)[0]
    missing = int(batch.weights["ce"] - batch.weights["kd"])
    assert missing == every.summary["supervised_tokens"] - known.summary["supervised_tokens"]
    student = gradients.model(tokenizer, torch.float64, seed=1)
    loss = kept.loss(student, batch, batch.weights, log=True)
    assert int(loss.sums["teacher_missing"][0]) == missing


def test_the_store_survives_another_order_and_is_not_written_twice(
    tokenizer: str, texts: str, tmp_path: Path
) -> None:
    tokens, data = load_tokenizer(tokenizer), gradients.rows(tokenizer, texts, packing=True)
    teacher = gradients.model(tokenizer, torch.float32, seed=2).eval()

    def write(rows: Rows, **settings: Any) -> dict[str, float]:
        plan = Targets("t", temperature=2.0, **settings)
        return write_targets(tmp_path, plan, rows, teacher, tokens, gradients.CPU, print)

    assert write(data)["kept"] == 0
    before = (tmp_path / "shard-00000" / "values.npy").stat()
    assert write(data)["kept"] == 1
    assert (tmp_path / "shard-00000" / "values.npy").stat() == before
    turned = tmp_path / "turned.jsonl"
    turned.write_text("\n".join(reversed(Path(texts).read_text().splitlines())))
    other = gradients.rows(tokenizer, str(turned), True)
    assert coverage(StoredAnswers(str(tmp_path), tokens, 2.0), other).missing == 0
    assert write(data, top_k=3)["kept"] == 0
    meta = json.loads((tmp_path / "shard-00000" / "meta.json").read_text())
    assert meta["entries"] == 3 * meta["tokens"] == 3 * data.summary["supervised_tokens"]


def test_a_shard_that_lacks_an_array_is_written_again(
    tokenizer: str, texts: str, tmp_path: Path
) -> None:
    """As a machine leaves it that was taken while it copied the shard to a store."""
    tokens, data = load_tokenizer(tokenizer), gradients.rows(tokenizer, texts, packing=True)
    teacher = gradients.model(tokenizer, torch.float32, seed=2).eval()
    plan = Targets("t", temperature=2.0)

    def write() -> float:
        return write_targets(tmp_path, plan, data, teacher, tokens, gradients.CPU, print)["kept"]

    assert (write(), write()) == (0, 1)
    array = tmp_path / "shard-00000" / "ids.npy"
    content = array.read_bytes()
    array.write_bytes(content[: len(content) // 2])
    assert (write(), array.read_bytes()) == (0, content)
    array.unlink()
    assert (write(), array.read_bytes()) == (0, content)


def test_answers_of_a_teacher_that_has_changed_are_not_kept(
    tokenizer: str, texts: str, tmp_path: Path
) -> None:
    """Other weights under the same reference: what `stage@best` was yesterday."""
    tokens, data = load_tokenizer(tokenizer), gradients.rows(tokenizer, texts, packing=True)
    plan = Targets("runs/x/teacher@best", temperature=2.0)

    def kept(teacher: torch.nn.Module, process: Any = gradients.CPU) -> float:
        written = write_targets(tmp_path, plan, data, teacher.eval(), tokens, process, print)
        return written["kept"]

    teacher = gradients.model(tokenizer, torch.float32, seed=2)
    assert kept(teacher) == 0 and kept(gradients.model(tokenizer, torch.float32, seed=2)) == 1
    before = (tmp_path / "shard-00000" / "values.npy").read_bytes()
    with torch.no_grad():  # the least change of a single weight
        weight = next(iter(teacher.parameters())).flatten()[:1]
        weight.copy_(torch.nextafter(weight, torch.tensor(1e9)))
    assert kept(teacher) == 0
    assert kept(gradients.model(tokenizer, torch.float32, seed=3)) == 0
    assert (tmp_path / "shard-00000" / "values.npy").read_bytes() != before
    assert kept(teacher.to(torch.bfloat16)) == 0


def test_a_store_from_before_is_read(tokenizer: str, texts: str) -> None:
    data = gradients.rows(tokenizer, texts, packing=True)
    objective = gradients.stored(tokenizer, data, torch.float32, top_k=4)
    folder = Path(str(objective.config.targets))
    path = folder / "shard-00000" / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({k: meta[k] for k in meta if k not in ("weights", "precision")}))
    assert coverage(StoredAnswers(str(folder), load_tokenizer(tokenizer), 2.0), data).missing == 0


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"sampler": "sample", "samples": 16}, "sampler"),
        ({"top_k": 9}, "top_k"),
        ({"teacher": "another"}, "teacher"),
        ({"temperature": 1.0}, "temperature"),
    ],
)
def test_a_store_of_mixed_shards_is_one_line(
    changed: dict[str, Any], said: str, tokenizer: str, texts: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A stage `targets` that was changed, begun again and stopped after its first shard."""
    monkeypatch.setattr(teacher_pass, "SHARD_ROWS", 8)
    tokens, data = load_tokenizer(tokenizer), gradients.rows(tokenizer, texts, packing=True)
    teacher = gradients.model(tokenizer, torch.float32, seed=2).eval()
    plan = Targets("t", top_k=8, temperature=2.0)
    write_targets(tmp_path, plan, data, teacher, tokens, gradients.CPU, print)
    StoredAnswers(str(tmp_path), tokens, 2.0)
    asked = iter([False, True, True, True, True, True])
    write_targets(
        tmp_path, replace(plan, **changed), data, teacher, tokens, gradients.CPU, print,
        stop=lambda: next(asked),
    )  # fmt: skip
    with pytest.raises(
        ConfigError, match=f"shard-00000 and shard-00001 differ in `{said}`"
    ) as error:
        StoredAnswers(str(tmp_path), tokens, 2.0)
    assert "\n" not in str(error.value)


def test_a_store_that_does_not_fit_is_one_line(tokenizer: str, texts: str, tmp_path: Path) -> None:
    tokens, data = load_tokenizer(tokenizer), gradients.rows(tokenizer, texts, packing=True)
    with pytest.raises(ConfigError, match="no stored targets in"):
        StoredAnswers(str(tmp_path), tokens, 2.0)
    objective = gradients.stored(tokenizer, data, torch.float32, top_k=4)
    folder = Path(str(objective.config.targets))
    with pytest.raises(ConfigError, match=r"made with temperature 2.0; this stage has 1.0"):
        StoredAnswers(str(folder), tokens, 1.0)
    tokens.add_tokens(["<new>"])
    with pytest.raises(ConfigError, match="another tokenizer"):
        StoredAnswers(str(folder), tokens, 2.0)
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "never seen before"}\n')
    with pytest.raises(DataError, match="no answer for any of the 1 chunks"):
        coverage(objective.answers, gradients.rows(tokenizer, str(other), True))
    ids = folder / "shard-00000" / "ids.npy"
    ids.write_bytes(ids.read_bytes()[:-8])
    with pytest.raises(DataError, match="store the targets again"):
        StoredAnswers(str(folder), load_tokenizer(tokenizer), 2.0)


def test_alpha_goes_from_its_first_to_its_last_value() -> None:
    def kd(**values: Any) -> Distill:
        return Distill("t", alpha=0.2, **values)

    assert alpha_at(kd(), 0.7) == 0.2
    line = kd(alpha_final=1.0, alpha_schedule="linear")
    assert [alpha_at(line, x) for x in (0, 0.5, 1)] == pytest.approx([0.2, 0.6, 1.0])
    curve = kd(alpha_final=1.0, alpha_schedule="cosine")
    assert [alpha_at(curve, x) for x in (0, 0.5, 1)] == pytest.approx([0.2, 0.6, 1.0])
    assert alpha_at(curve, 0.25) < alpha_at(line, 0.25)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_distance_of_logits_is_the_textbook_one(dtype: torch.dtype) -> None:
    case, start = make_case(dtype=dtype), make_case(dtype=dtype, seed=1)
    hidden, weight = (case[n].detach().clone().requires_grad_() for n in ("hidden", "weight"))
    found = logit_distance(hidden, weight, start["hidden"], start["weight"], chunk_rows=8)
    (3 * found).backward()
    h, w = (case[n].detach().clone().requires_grad_() for n in ("hidden", "weight"))
    gap = F.linear(h, w) - F.linear(start["hidden"].detach(), start["weight"].detach())
    expected = gap.square().mean(dim=1).sum()
    (3 * expected).backward()
    limit = 1e-12 if dtype == torch.float64 else 2e-6
    assert hidden.grad is not None and weight.grad is not None
    assert h.grad is not None and w.grad is not None
    assert distance(hidden.grad, h.grad) < limit and distance(weight.grad, w.grad) < limit
    assert abs(float((found - expected).detach())) < limit * float(expected.detach())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "must be named"),
        ({"mode": "precompute"}, "exactly one of"),
        ({"mode": "precompute", "targets": "a", "logits_dir": "b"}, "exactly one of"),
        ({"mode": "precompute", "targets": "a", "teacher": "t"}, "is not read"),
        ({"teacher": "t", "targets": "a"}, "belongs to"),
        ({"teacher": "t", "alpha_final": 0.1}, "alpha_schedule"),
        ({"teacher": "t", "alpha_schedule": "linear"}, "alpha_final"),
    ],
)
def test_settings_that_do_not_fit_together(values: dict[str, Any], said: str) -> None:
    with pytest.raises(FieldErrors, match=said):
        Distill(**values)


def test_a_student_learns_from_a_store_that_lacks_documents(
    stage: StageConfig, tmp_path: Path, run_stage: Callable[..., Any]
) -> None:
    """Stages, end to end: a teacher, its answers for a part of the data, a student near its
    start whose alpha rises."""
    assert stage.train is not None and stage.model is not None
    teacher = replace(stage, output=str(tmp_path / "teacher"), train=Train(steps=2, micro_batch=4))
    run_stage(teacher)
    (source,) = stage.data.train
    part = replace(stage.data, train=(replace(source, share=0.7),))
    targets = StageConfig(
        id="answers", stage="targets", output=str(tmp_path / "answers"), data=part,
        targets=Targets(teacher.output, top_k=8),
    )  # fmt: skip
    assert run_stage(targets).evaluation["target_tokens"] > 500
    kd = Distill(
        mode="precompute", targets=targets.output, alpha=0.1, alpha_final=0.9,
        alpha_schedule="linear", keep_logits=KeepLogits(weight=0.01, fade=0.5),
    )  # fmt: skip
    student = replace(stage, stage="kd", output=str(tmp_path / "student"), kd=kd)
    outcome = run_stage(student)
    assert any(line.startswith("WARNING: ") and "no answer" in line for line in outcome.lines)
    assert any("a frozen copy of the starting model" in line for line in outcome.lines)
    (first,) = [line for line in outcome.lines if line.startswith("step 1/")]
    assert "kd_alpha 0.1000" in first and "keep_l2 " in first
    written = Path(student.output, "metrics", "0001.jsonl").read_text()
    lines = [json.loads(line) for line in written.splitlines()]
    (event,) = [line for line in lines if line.get("event") == "teacher_missing"]
    assert 0.1 < event["missing"] / event["tokens"] < 0.6
    steps = [line for line in lines if line["kind"] == "step"]
    assert steps[0]["kd_alpha"] == pytest.approx(0.1)
    assert steps[-1]["kd_alpha"] == pytest.approx(0.1 + 0.8 * 19 / 20)
    assert 0.05 < sum(line["teacher_missing"] for line in steps) / len(steps) < 0.6
    assert steps[0]["keep_l2"] == pytest.approx(0, abs=0.2) and steps[5]["keep_l2"] > 0
    assert "keep_l2" not in steps[-1]
    assert steps[-1]["ce_loss"] < steps[0]["ce_loss"]


def test_a_resumed_student_is_held_near_the_same_start(
    stage: StageConfig, tmp_path: Path, run_stage: Callable[..., Any]
) -> None:
    teacher = in_folder(stage, tmp_path / "teacher", steps=2)
    run_stage(teacher)
    kd = Distill(
        teacher.output, alpha_final=0.0, alpha_schedule="cosine",
        keep_logits=KeepLogits(weight=1.0, fade=1.0),
    )  # fmt: skip
    student = replace(stage, stage="kd", kd=kd)
    run_stage(in_folder(student, tmp_path / "whole"))
    run_stage(in_folder(student, tmp_path / "parts", until=9))
    run_stage(in_folder(student, tmp_path / "parts"))
    run_stage(in_folder(replace(student, kd=replace(kd, keep_logits=None)), tmp_path / "free"))
    whole, parts, free = (
        (tmp_path / name / "checkpoints" / "step-20" / "model.safetensors").read_bytes()
        for name in ("whole", "parts", "free")
    )
    assert whole == parts and whole != free


def test_targets_stop_between_shards_and_go_on_behind_them(
    stage: StageConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str
) -> None:
    monkeypatch.setattr(teacher_pass, "SHARD_ROWS", 8)
    gradients.model(tokenizer, torch.float32, seed=2).save_pretrained(tmp_path / "teacher")
    load_tokenizer(tokenizer).save_pretrained(tmp_path / "teacher")
    config = StageConfig(
        id="answers", stage="targets", output=str(tmp_path / "answers"),
        data=replace(stage.data, packing=False), targets=Targets(str(tmp_path / "teacher")),
    )  # fmt: skip
    control = tmp_path / "control"
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        if line.startswith("targets: shard 2/6"):
            signal.raise_signal(signal.SIGTERM)

    def run(say: Callable[[str], None]) -> Any:
        with runtime.start() as process, listening() as signalled:
            job = Job(run="r", stages=(config,), control=str(control))
            return stages.run_stage(config, job, process, say, signalled)

    assert run(say).stopped == "signal"
    assert len(list(tmp_path.glob("answers/targets/shard-*/meta.json"))) == 2
    assert not json.loads((tmp_path / "answers" / "run_meta.json").read_text())["completed"]
    control.mkdir()
    (control / "stop.json").write_text("{}")
    assert run(say).stopped == "stop"
    (control / "stop.json").unlink()
    whole = run(lines.append)
    assert whole.stopped is None and whole.evaluation["target_kept"] == 2
    assert whole.evaluation["target_chunks"] == 48


def test_sources_keep_their_names(tokenizer: str, texts: str) -> None:
    sources = (Source(path=texts), Source(path=texts, share=0.5))
    rows = build_rows(sources, load_tokenizer(tokenizer), sequence_length=16, packing=True)
    chunks = rows.chunks
    assert {source for source, _ in chunks.documents} == {0, 1}
    long = next(i for i in range(len(chunks)) if chunks.offset(i) == 32)
    assert chunks.document[long] == chunks.document[long - 2]
    assert chunks.offset(long - 2) == 0
