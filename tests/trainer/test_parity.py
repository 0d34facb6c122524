"""Parity on the same tensors: with TRL's supervised fine-tuning and its divergences, with PEFT's
merge, and with float64 where test_losses*.py leave a gap. Where a peer computes something else, a
test holds the difference as a factor or a term, and says which of the two is meant.

TRL's classes do their own work here: its trainer prepares the data set, collates, counts the tokens
of a step and computes the loss. Its head works in fp32 whatever the model is, so the gradient of a
float64 model agrees to fp32; with the head left to autograd it agrees to float64.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.trainer import gradients
from tests.trainer.chats import marked, talk
from tests.trainer.conftest import in_folder
from tests.trainer.loss_cases import Case, assert_close, distance, exact, kd, make_case
from trainer.checkpoint import resolve
from trainer.config import Adapter, Data, Merge, Model, Source, StageConfig
from trainer.data.chat import view_of
from trainer.data.stream import Stream, build_rows
from trainer.losses.answers import divergence
from trainer.losses.distance import logit_distance
from trainer.models import load_pretrained, load_tokenizer
from trainer.objectives.next_token import NextToken
from trainer.step import backward, normalisers, prepare

#: TRL's experimental parts one by one: a version without one of them skips only what needs it.
GKD, IW_OPD = "trl.experimental.gkd", "trl.experimental.iw_opd.iw_opd_trainer"
DTYPES = [torch.float64, torch.float32]
#: Of gradients: exact, and where fp32 sums enter on one side or both.
LIMIT = {torch.float64: 1e-12, torch.float32: 5e-6}
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
#: One conversation for both: ours learns what it finds by rendering prefixes, TRL what is marked.
TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LENGTH = 256

Gradient = tuple[float, Tensor]


@pytest.fixture(scope="module")
def folder(tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer with marks and a template, in which padding and end are one token."""
    path = tmp_path_factory.mktemp("marked")
    marked(tokenizer, TURNS).save_pretrained(path)
    return str(path)


def records(kind: str) -> list[dict[str, Any]]:
    """Nine records of unequal length, all shorter than a row."""
    from pydoc_data.topics import topics

    words = " ".join(topics["typesmapping"].split())
    starts = [100 * i for i in range(9)]
    if kind == "text":
        return [{"text": words[s : s + 9 + 7 * i]} for i, s in enumerate(starts)]
    if kind == "answers":
        return [
            {"prompt": words[s : s + 5 + i] + " ", "completion": words[s + 30 : s + 37 + 9 * i]}
            for i, s in enumerate(starts)
        ]
    cuts = [[s + j * (5 + i) for j in range(3 + 2 * (i % 2))] for i, s in enumerate(starts)]
    return [talk(*(words[a:b] for a, b in pairwise(cut))) for cut in cuts]


def ours(
    folder: str, path: Path, kind: str, dtype: torch.dtype, *, packing: bool, micro: Optional[int]
) -> Gradient:
    """Loss and gradient of one step over the whole file, `micro` rows (None: all) at a time."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records(kind)))
    tokens, data = load_tokenizer(folder), Data(train=(Source(path=str(path)),))
    view = view_of(data, "pretrain" if kind == "text" else "sft", tokens)
    rows = build_rows(data.train, tokens, sequence_length=LENGTH, packing=packing, view=view)
    assert not packing or len(rows) < 9, "nothing was packed"
    micro = micro or len(rows)
    stream = Stream(
        rows, micro_batch=micro, accumulate=len(rows) // micro, rank=0, world_size=1, seed=0
    )
    model, objective = gradients.model(folder, dtype, seed=1), NextToken()
    batches = prepare(objective, stream.next_group(), gradients.CPU, 0)
    done = backward(model, objective, batches, normalisers(batches, gradients.CPU), gradients.CPU)
    return float(done.total), flat(model)


def trl(
    folder: str,
    out: Path,
    kind: str,
    dtype: torch.dtype,
    *,
    packing: bool = False,
    strategy: str = "bfd",
    micro: Optional[int] = None,
    counted: bool = True,
    head: bool = True,
) -> Gradient:
    """What SFTTrainer computes on the same records. `counted`: with the tokens of the step that it
    counts itself; `head`: with its own head, else with all logits and autograd."""
    pytest.importorskip("datasets")
    pytest.importorskip("trl", reason="TRL is not installed")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    size = 9 // (micro or 9)
    arguments = SFTConfig(
        output_dir=str(out), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False, max_length=LENGTH, packing=packing, packing_strategy=strategy,
        assistant_only_loss=kind == "chats", per_device_train_batch_size=micro or 9,
        gradient_accumulation_steps=size, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = SFTTrainer(
        gradients.model(folder, dtype, seed=1),
        args=arguments,
        train_dataset=Dataset.from_list(records(kind)),
        processing_class=load_tokenizer(folder),
        compute_loss_func=None if head else summed_cross_entropy,
    )
    trainer.current_gradient_accumulation_steps = size
    batches = iter(trainer.get_train_dataloader())
    group, items = trainer.get_batch_samples(batches, size, torch.device("cpu"))
    assert len(group) == size and next(batches, None) is None, "a step is the whole data set"
    losses = [
        trainer.training_step(trainer.model, batch, items if counted else None) for batch in group
    ]
    return float(sum(losses)), flat(trainer.model)


def summed_cross_entropy(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    """The causal loss from all logits, in their own precision (the library's would be fp32)."""
    logits = outputs.logits[:, :-1].flatten(0, 1)
    total = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return total / num_items_in_batch


def flat(model: Any) -> Tensor:
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", ["text", "answers", "chats"])
def test_a_step_of_sft_has_trls_loss_and_gradient(
    kind: str, packing: bool, dtype: torch.dtype, folder: str, tmp_path: Path
) -> None:
    """From the same file: text, completion-only and assistant-only loss; padded with a mask, and
    packed, where both tell documents apart by position ids alone. Padding and end are one token:
    TRL masks padding by length, as we do, so the end is learned on both sides."""
    ours_loss, ours_gradient = ours(
        folder, tmp_path / "data.jsonl", kind, dtype, packing=packing, micro=None
    )
    loss, gradient = trl(folder, tmp_path, kind, dtype, packing=packing)
    assert ours_loss == pytest.approx(loss, rel=1e-6)
    assert distance(ours_gradient, gradient) <= LIMIT[torch.float32]
    loss, gradient = trl(folder, tmp_path, kind, dtype, packing=packing, head=False)
    assert ours_loss == pytest.approx(loss, rel=LIMIT[dtype])
    assert distance(ours_gradient, gradient) <= LIMIT[dtype]


def test_accumulated_answers_of_unequal_length_have_trls_gradient(
    folder: str, tmp_path: Path
) -> None:
    """Nine micro-batches of one row, each with its own number of learned tokens: TRL divides every
    sum by the tokens of the step (`num_items_in_batch`), as our norm does. Without that number it
    computes a mean of means, which is another gradient: so this comparison can tell."""
    _, mine = ours(folder, tmp_path / "d.jsonl", "answers", torch.float64, packing=False, micro=1)
    _, theirs = trl(folder, tmp_path, "answers", torch.float64, micro=1)
    assert distance(mine, theirs) <= LIMIT[torch.float32]
    _, means = trl(folder, tmp_path, "answers", torch.float64, micro=1, counted=False)
    assert distance(mine, means) > 0.05


def test_rows_that_trl_wraps_leak_and_ours_do_not(folder: str, tmp_path: Path) -> None:
    """TRL's packing `wrapped` puts texts behind one another without telling them apart, and cuts
    them where rows end: the gradient is that of another task. Ours is that of the padded texts."""
    path = tmp_path / "d.jsonl"
    _, mine = ours(folder, path, "text", torch.float64, packing=True, micro=None)
    _, padded = trl(folder, tmp_path, "text", torch.float64, head=False)
    _, wrapped = trl(
        folder, tmp_path, "text", torch.float64, packing=True, strategy="wrapped", head=False
    )
    assert distance(mine, padded) <= LIMIT[torch.float64]
    assert distance(wrapped, padded) > 0.05


def logits(case: Case) -> tuple[Tensor, Tensor]:
    """Of student and teacher, [1, N, V]."""
    student = F.linear(case["hidden"], case["weight"])
    return student[None], F.linear(case["teacher_hidden"], case["teacher_weight"])[None]


def of_both(loss: Tensor, case: Case) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [case["hidden"], case["weight"]]))


def jsd() -> Callable[..., Tensor]:
    """`generalized_jsd_loss` of TRL's GKD trainer."""
    loss: Callable[..., Tensor] = pytest.importorskip(GKD).GKDTrainer.generalized_jsd_loss
    return loss


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_divergences_are_trls_times_the_square_of_the_temperature(
    beta: float, temperature: float, dtype: torch.dtype
) -> None:
    """Equal at T = 1. At other temperatures TRL's function leaves T^2 out: exactly that factor lies
    between the two, in the loss and in the gradient. With logits z / T the gradient shrinks as
    1 / T^2 (Hinton et al. 2015, arXiv 1503.02531, section 2.1), so without the factor a change of T
    changes the weight of distillation against cross-entropy; ours keeps it."""
    case, loss_of = make_case(dtype=dtype), jsd()
    student, teacher = logits(case)
    counts = int((case["labels"] != -100).sum())
    theirs = loss_of(
        student, teacher, labels=case["labels"][None], beta=beta, temperature=temperature
    )
    mine = kd(case, beta=beta, temperature=temperature, ce_weight=0.0, kl_weight=1 / counts)
    factor = temperature**2
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    assert_close([mine.loss], [factor * theirs], limit)
    assert_close(of_both(mine.loss, case), of_both(factor * theirs, case), limit)


def test_trls_other_reductions_are_not_means_over_tokens() -> None:
    """Per token is what `num_items_in_batch` and `batchmean` with labels give; ours is that. `mean`
    divides by the vocabulary once more, and `batchmean` without labels by rows instead of tokens,
    padding included: the factors V and, for one row, the number of tokens."""
    case, loss_of = make_case(), jsd()
    student, teacher = logits(case)
    labels = case["labels"][None]
    counts, vocabulary = int((labels != -100).sum()), student.shape[-1]
    per_token = float(kd(case, temperature=1.0, beta=0.5, kl_weight=1.0).kl) / counts
    given = {"beta": 0.5, "temperature": 1.0}
    student, teacher = student.detach(), teacher.detach()
    counted = loss_of(student, teacher, labels=labels, num_items_in_batch=counts, **given)
    assert float(counted) == pytest.approx(per_token, rel=1e-12)
    mean = loss_of(student, teacher, labels=labels, reduction="mean", **given)
    assert float(mean) * vocabulary == pytest.approx(per_token, rel=1e-12)
    everything = case | {"labels": case["labels"].clamp_min(0)}
    unmasked = float(kd(everything, temperature=1.0, beta=0.5, kl_weight=1.0).kl)
    assert float(loss_of(student, teacher, **given)) == pytest.approx(unmasked, rel=1e-12)
    assert unmasked / student.shape[1] != pytest.approx(per_token, rel=1e-3)


def test_a_teacher_with_a_larger_vocabulary_is_cut_where_trl_refuses() -> None:
    """Vocabularies padded to a round size differ between models of one family. TRL's GKD trainer
    refuses them; ours compares the first min(V, Vt) entries: what TRL's function gives for logits
    cut there. To pad the shorter side with zero logits instead gives mass to tokens that are none,
    and another gradient."""
    case, loss_of = make_case(v=211, vt=256), jsd()
    student, teacher = logits(case)
    labels = case["labels"][None]
    counts = int((labels != -100).sum())
    mine = of_both(kd(case, temperature=1.0, ce_weight=0.0, kl_weight=1 / counts).loss, case)
    cut = loss_of(student, teacher[..., :211], labels=labels, beta=0.0)
    assert_close(mine, of_both(cut, case), 1e-12)
    with pytest.raises(RuntimeError):
        loss_of(*logits(case), labels=labels, beta=0.0)
    padded = F.pad(logits(case)[0], (0, 45))
    wrong = of_both(loss_of(padded, teacher, labels=labels, beta=0.0), case)
    assert all(distance(a, b) > 0.01 for a, b in zip(mine, wrong))


def test_tokens_that_a_teacher_rules_out_are_no_nan() -> None:
    """A probability of exactly 0 (a logit of -inf, as files of masked logits hold it) adds nothing
    to the divergence: 0 * log 0 is 0. TRL's function computes 0 * -inf, which is NaN."""
    case, loss_of = make_case(), jsd()
    student, teacher = (t.detach() for t in logits(case))
    teacher[..., 5:9] = -torch.inf
    assert loss_of(student, teacher, labels=case["labels"][None], beta=0.0).isnan()
    p = teacher[0].softmax(dim=-1)
    counts = case["labels"] != -100
    ids = torch.arange(p.shape[1]).expand(p.shape).where(counts[:, None], -1)
    found = divergence(case["hidden"], case["weight"], ids, p, counts, temperature=1.0)
    log_q = F.linear(case["hidden"], case["weight"]).log_softmax(dim=-1)
    expected = (torch.xlogy(p, p) - p * log_q)[counts].sum()
    assert_close([found, *of_both(found, case)], [expected, *of_both(expected, case)], 1e-9)


def gkd_trainer(folder: str, out: Path, **settings: Any) -> Any:
    """TRL's GKD trainer without generation, with the student and teacher of `gradients.of`."""
    gkd = pytest.importorskip(GKD)
    from datasets import Dataset

    arguments = gkd.GKDConfig(
        output_dir=str(out), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False, max_length=LENGTH, per_device_train_batch_size=9,
        gradient_checkpointing=False, lmbda=0.0, **settings,
    )  # fmt: skip
    student = gradients.model(folder, torch.float64, seed=1)
    teacher = gradients.model(folder, torch.float64, seed=2, hidden=64)
    for model in (student, teacher):  # as sure of itself as a trained one: near 0, T^2 hides T
        model.get_output_embeddings().weight.data *= 20
    return gkd.GKDTrainer(
        student,
        teacher_model=teacher,
        args=arguments,
        train_dataset=Dataset.from_list(records("chats")),
        processing_class=load_tokenizer(folder),
    )


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_trls_gkd_trainer_ignores_its_temperature(
    temperature: float, folder: str, tmp_path: Path
) -> None:
    """`GKDConfig.temperature` reaches the generation of answers and not the divergence, which stays
    at T = 1: the loss of the trainer at either temperature is ours at T = 1, and at T = 4 not ours
    at T = 4. A temperature that is set is meant; `test_divergences...` holds that ours has it."""
    trainer = gkd_trainer(folder, tmp_path, beta=0.0, temperature=temperature)
    (batch,), items = trainer.get_batch_samples(
        iter(trainer.get_train_dataloader()), 1, torch.device("cpu")
    )
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=items)
    theirs = float(loss.detach())
    found = {t: distilled(trainer, batch, t) for t in (1.0, 4.0)}
    assert found[1.0] == pytest.approx(theirs, rel=1e-6)
    assert found[4.0] != pytest.approx(theirs, rel=0.05)


def distilled(trainer: Any, batch: dict[str, Tensor], temperature: float) -> float:
    """Our divergence per token on the batch of TRL's collator (padded on the left)."""
    states = []
    for model in (trainer.model, trainer.teacher_model):
        out = model.get_decoder()(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        )
        states += [out.last_hidden_state[:, :-1].flatten(0, 1), model.lm_head.weight]
    names = ("hidden", "weight", "teacher_hidden", "teacher_weight")
    labels = batch["labels"][:, 1:].flatten()
    case = dict(zip(names, states)) | {"labels": labels}
    mine = kd(case, temperature=temperature, ce_weight=0.0, kl_weight=1.0)
    return float(mine.kl) / int((labels != -100).sum())


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_trls_chunked_distillation_is_ours_without_the_square(
    beta: float, temperature: float
) -> None:
    """The loss of TRL's DistillationTrainer, from hidden states and heads as ours, in fp32: it
    takes the temperature and leaves T^2 out, like the function above."""
    module = pytest.importorskip("trl.trainer.distillation_trainer")
    case = make_case(dtype=torch.float32)
    hidden, teacher = case["hidden"][None], case["teacher_hidden"][None]
    mask = (case["labels"] != -100)[None]
    theirs = module._chunked_divergence_loss(
        hidden, teacher, case["weight"], case["teacher_weight"], mask, beta,
        num_items_in_batch=int(mask.sum()), temperature=temperature,
    )[0]  # fmt: skip
    mine = kd(
        case, beta=beta, temperature=temperature, ce_weight=0.0, kl_weight=1 / int(mask.sum())
    ).loss
    factor = temperature**2
    assert_close([mine], [factor * theirs], 2e-6)
    assert_close(of_both(mine, case), of_both(factor * theirs, case), 1e-5)


@pytest.mark.parametrize("k", [1, 8])
def test_top_k_with_a_tail_is_trls(k: int) -> None:
    """TRL's importance-weighted distillation compares the teacher's top k and one bucket for all
    other tokens: our target for stored answers."""
    loss_of = pytest.importorskip(IW_OPD).IWOPDTrainer.generalized_jsd_loss
    case, temperature = make_case(), 2.0
    student, teacher = logits(case)
    labels = case["labels"][None]
    theirs = loss_of(student, teacher, labels=labels, beta=0.0, temperature=temperature, top_k=k)
    p, ids = (teacher[0] / temperature).softmax(dim=-1).detach().topk(k)
    counts = case["labels"] != -100
    ids = ids.where(counts[:, None], -1)
    found = divergence(case["hidden"], case["weight"], ids, p, counts, temperature=temperature)
    mine = found / counts.sum()
    assert_close([mine, *of_both(mine, case)], [theirs, *of_both(theirs, case)], 1e-9)


def test_a_merge_is_pefts_and_the_sum_that_it_stands_for(
    stage: StageConfig, run_stage: Callable[..., Any], tmp_path: Path
) -> None:
    """The folder that stage `merge` writes, the model that PEFT merges by itself from the same two
    folders, and W + alpha / r * B A in float64: the first two bit for bit, in weights and logits,
    the third to the rounding of fp32."""
    from peft import PeftModel
    from safetensors.torch import load_file

    base = in_folder(stage, tmp_path / "base", steps=3)
    run_stage(base)
    plan = Model(name=base.output, adapter=Adapter(rank=3, alpha=6))
    lora = in_folder(replace(base, model=plan), tmp_path / "lora", steps=6)
    run_stage(lora)
    out = tmp_path / "merged"
    run_stage(StageConfig(id="m", stage="merge", output=str(out), merge=Merge(lora.output)))
    plain = load_pretrained(resolve(base.output), torch.float32, "sdpa").eval()
    weights = {name: value.double() for name, value in plain.state_dict().items()}
    peft = PeftModel.from_pretrained(plain, resolve(lora.output)).merge_and_unload().eval()
    merged = load_pretrained(str(out), torch.float32, "sdpa").eval()
    theirs, mine = peft.state_dict(), merged.state_dict()
    assert set(theirs) == set(mine) and all(torch.equal(theirs[n], mine[n]) for n in mine)
    ids = torch.arange(5, 45)[None]
    assert torch.equal(peft(input_ids=ids).logits, merged(input_ids=ids).logits)
    parts = load_file(Path(resolve(lora.output)) / "adapter_model.safetensors")
    changed = 0
    for name, low in parts.items():
        if not name.endswith("lora_A.weight"):
            continue
        high = parts[name.replace("lora_A", "lora_B")]
        layer = name.removeprefix("base_model.model.").replace("lora_A.", "")
        added = 6 / 3 * high.double() @ low.double()
        assert distance(mine[layer], weights[layer] + added) <= 1e-7
        assert added.norm() > 1e-5 * weights[layer].norm()
        changed += 1
    assert changed == 2 * 7


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 5e-3)]
)
def test_the_distance_to_the_starting_logits_keeps_its_precision(
    dtype: torch.dtype, limit: float
) -> None:
    """`keep_logits` against float64 autograd, for hidden states and head, also in bf16. The value,
    which is only reported, is a sum in fp32."""
    case, start = make_case(96, 8315, 64, dtype=dtype), make_case(96, 8315, 64, dtype=dtype, seed=1)
    truth, first = exact(case), exact(start)
    found = logit_distance(
        case["hidden"], case["weight"], start["hidden"], start["weight"], chunk_rows=32
    )
    gap = F.linear(truth["hidden"], truth["weight"]) - F.linear(first["hidden"], first["weight"])
    expected = gap.square().mean(dim=1).sum()
    assert distance(found, expected) <= (1e-12 if dtype == torch.float64 else 1e-5)
    assert_close(of_both(found, case), of_both(expected, truth), limit)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch before 2.13")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_cross_entropy_is_that_of_torchs_own_fused_one(dtype: torch.dtype) -> None:
    """Hidden states and head, with rows that do not count."""
    case = make_case(dtype=dtype)
    mine = kd(case, ce_weight=1.0, kl_weight=0.0)
    theirs = F.linear_cross_entropy(
        case["hidden"], case["weight"], case["labels"], ignore_index=-100, reduction="sum"
    )
    limit = 1e-12 if dtype == torch.float64 else 2e-6
    assert_close([mine.loss, *of_both(mine.loss, case)], [theirs, *of_both(theirs, case)], limit)
