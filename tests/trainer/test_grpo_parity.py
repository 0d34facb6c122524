"""The loss of stage `grpo` against that of TRL's GRPOTrainer, on the same tensors: value and
gradient, with clipping at work, with and without the KL to a reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer import gradients, grpo_cases
from trainer.answer_rows import Group
from trainer.batch import Batch
from trainer.groups import advantages
from trainer.models import load_tokenizer
from trainer.objectives.grpo import Reinforce
from trainer.step import backward, normalisers, prepare

pytest.importorskip("datasets")
pytest.importorskip("trl", reason="TRL is not installed")

#: What the loss is a mean over -> TRL's name for it. Its `grpo` divides by answers of one
#: micro-batch, its `dapo` by the tokens of the step: with one micro-batch both are ours.
LOSSES = {"answers": "grpo", "tokens": "dapo", "constant": "dr_grpo"}
TEMPERATURE, MOST = 0.7, 12
#: TRL's head works in fp32 whatever the model is.
LIMIT = {torch.float64: 5e-6, torch.float32: 1e-5}


def cases() -> list[Group]:
    """Three groups of unequal prompts and answers, one of them of equal rewards."""
    found, dice = [], torch.Generator().manual_seed(0)
    for g, rewards in enumerate(([0.0, 1.0, 0.3, 0.1], [1.0] * 4, [0.5, 0.0, 0.0, 2.0])):
        prompt = torch.randint(40, 120, (3 + 4 * g,), generator=dice).tolist()
        sizes = torch.randint(1, MOST + 1, (4,), generator=dice).tolist()
        answers = [torch.randint(40, 120, (n,), generator=dice).tolist() for n in sizes]
        # Old and reference log-probs around what a fresh model gives to 258 tokens.
        apart = [[-5.5 + torch.randn(n, generator=dice, dtype=torch.float64) for n in sizes]
                 for _ in range(2)]  # fmt: skip
        found.append(Group(prompt, answers, advantages(rewards, True), {}, *apart))
    return found


def ours(tokenizer: str, dtype: torch.dtype, normalise: str, beta: float) -> tuple[float, Tensor]:
    model, groups = gradients.model(tokenizer, dtype, seed=1), cases()
    settings: dict[str, Any] = {"normalise": normalise, "temperature": TEMPERATURE, "clip": 0.2}
    made = grpo_cases.groups(
        model, gradients.CPU, beta=beta, clip_high=0.28, max_new_tokens=MOST, **settings
    )
    if not beta:
        for group in groups:
            group.reference = []
    made.kept, made.step = dict(enumerate(groups)), 0
    rows = torch.zeros(len(groups), 1, dtype=torch.long)
    batch = Batch(rows, rows, rows, places=range(len(groups)), records=[None] * len(groups))
    objective = Reinforce(made)
    batches = prepare(objective, [batch], gradients.CPU, 0)
    done = backward(model, objective, batches, normalisers(batches, gradients.CPU), gradients.CPU)
    assert float(done.sums["clipped"]) > 0.1
    return float(done.total), torch.cat([p.grad.flatten() for p in model.parameters()]).double()


@pytest.fixture(scope="module")
def trainer(tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's trainer as it makes itself; what it is to compute is set by `theirs`."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    folder = tmp_path_factory.mktemp("trl")
    model = gradients.model(tokenizer, torch.float32, seed=1)
    model.save_pretrained(folder / "model")
    model.name_or_path = str(folder / "model")
    settings = GRPOConfig(
        str(folder), report_to=[], use_cpu=True, per_device_train_batch_size=12,
        num_generations=4, max_completion_length=MOST, temperature=TEMPERATURE,
        epsilon=0.2, epsilon_high=0.28, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": "a"}] * 12)
    return GRPOTrainer(
        model, grpo_cases.sums, args=settings, train_dataset=data,
        processing_class=load_tokenizer(tokenizer),
    )  # fmt: skip


def theirs(
    trainer: Any, tokenizer: str, dtype: torch.dtype, normalise: str, beta: float
) -> tuple[float, Tensor]:
    from trl.trainer.utils import add_fused_lm_head

    model = gradients.model(tokenizer, dtype, seed=1)
    add_fused_lm_head(model, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
    trainer.model = model
    trainer.loss_type, trainer.beta = LOSSES[normalise], beta
    trainer.current_gradient_accumulation_steps = 1
    trainer.args.steps_per_generation = 1
    parts = [(g, a) for g in cases() for a in range(len(g.answers))]
    tokens = sum(len(g.answers[a]) for g, a in parts)
    inputs: dict[str, Any] = {
        **_padded("prompt", [g.prompt for g, _ in parts], left=True),
        **_padded("completion", [g.answers[a] for g, a in parts]),
        "advantages": torch.tensor([g.advantages[a] for g, a in parts], dtype=dtype),
        "old_per_token_logps": _column([g.old[a] for g, a in parts], dtype),
        "ref_per_token_logps": _column([g.reference[a] for g, a in parts], dtype),
        "num_items_in_batch": torch.tensor(float(tokens)),
    }
    loss = trainer._compute_loss(model, inputs)
    loss.backward()
    return float(loss), torch.cat([p.grad.flatten() for p in model.parameters()]).double()


@pytest.mark.parametrize("dtype", list(LIMIT), ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("normalise", list(LOSSES))
def test_the_loss_and_its_gradient_are_trls(
    normalise: str, beta: float, dtype: torch.dtype, trainer: Any, tokenizer: str
) -> None:
    value, gradient = ours(tokenizer, dtype, normalise, beta)
    wanted, other = theirs(trainer, tokenizer, dtype, normalise, beta)
    assert value == pytest.approx(wanted, rel=LIMIT[dtype])
    assert float((gradient - other).norm() / other.norm()) < LIMIT[dtype]


def _padded(name: str, rows: list[list[int]], left: bool = False) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), 256)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, at], mask[i, at] = torch.tensor(row), 1
    return {f"{name}_ids": ids, f"{name}_mask": mask}


def _column(rows: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(dtype)
