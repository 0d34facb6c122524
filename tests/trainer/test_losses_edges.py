"""What the losses meet at the edges of training: frozen parts, loss scales, unusual tensors."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from tests.trainer.loss_cases import (
    Case,
    Operations,
    assert_close,
    distance,
    exact,
    gradients,
    kd,
    make_case,
    sparse,
)
from trainer.losses import token_logprobs
from trainer.losses.answers import divergence
from trainer.losses.chunks import Gradients
from trainer.losses.distance import logit_distance


def keep(case: Case, **options) -> Tensor:
    # Another start of the same sizes: the case turned by one row.
    start = [case[name].detach().roll(1, 0) for name in ("hidden", "weight")]
    return logit_distance(case["hidden"], case["weight"], *start, **options)


def answers(case: Case, **options) -> Tensor:
    p = case["w"].abs() / (1 + case["w"].abs().sum(dim=1, keepdim=True))
    ids = torch.arange(p.numel()).view(p.shape) % len(case["weight"])
    known = case["labels"] >= 0
    ids = ids.masked_fill(~known.unsqueeze(1), -1)
    return divergence(case["hidden"], case["weight"], ids, p, known, temperature=2.0, **options)


def loss_of(op, case: Case, **options) -> Tensor:
    result = op(case, **options)
    return result if isinstance(result, Tensor) else result.loss


def gradients_of(op, case: Case, scale: float = 1.0) -> list[Tensor]:
    loss = loss_of(op, case)
    return list(torch.autograd.grad(loss * scale, [case["hidden"], case["weight"]]))


LOSSES = [sparse, kd, partial(kd, beta=0.5), partial(kd, beta=1.0), keep, answers]
EVERY = pytest.mark.parametrize("op", LOSSES, ids=["sparse", "kl", "jsd", "reverse", "keep", "top"])


def held(loss: Tensor) -> Gradients:
    """What the operation below `loss` has summed for the backward pass."""
    node = loss.grad_fn
    while not hasattr(node, "gradients"):
        node = node.next_functions[0][0]
    return node.gradients


@EVERY
def test_a_frozen_head_costs_no_product_and_no_memory(op) -> None:
    case = make_case(40, 300, 8)
    expected = gradients_of(op, case)[0]
    case["weight"] = case["weight"].detach()
    with Operations() as operations:
        loss = loss_of(op, case)
    assert operations.count("aten::addmm_") == 0
    assert held(loss).weight is None and held(loss).hidden is not None
    assert_close(list(torch.autograd.grad(loss, [case["hidden"]])), [expected], 1e-13)


@EVERY
def test_without_recording_nothing_is_summed_for_a_backward(op) -> None:
    case = make_case(40, 300, 8)
    with Operations() as recorded:
        loss_of(op, case)
    with torch.no_grad(), Operations() as operations:
        assert not loss_of(op, case).requires_grad
    assert operations.count("aten::addmm_") == 0 < recorded.count("aten::addmm_")
    assert operations.count("aten::mm") == recorded.count("aten::mm") - 1


@EVERY
def test_a_frozen_model_with_a_learning_head_gets_the_heads_gradient_alone(op) -> None:
    case = make_case()
    expected = gradients_of(op, case)[1]
    case["hidden"] = case["hidden"].detach()
    (found,) = torch.autograd.grad(loss_of(op, case), [case["weight"]])
    assert_close([found], [expected], 1e-13)


@EVERY
def test_the_loss_scale_of_fp16_training_is_kept_in_the_gradient(op) -> None:
    """Per-token gradients of a mean over 2^20 tokens vanish in fp16; scaled by 2^16 they do not,
    whether the scale comes in the gradient of the loss or in its weights."""
    case = make_case(dtype=torch.float16)
    tokens, scale = 2.0**20, 2.0**16
    found = gradients_of(op, case, scale / tokens)
    assert [t.dtype for t in found] == [torch.float16] * 2
    assert_close(found, gradients_of(op, exact(case), scale / tokens), 2e-3)
    vanished = gradients_of(op, case, 2.0**-30)[0]
    assert distance(vanished, gradients_of(op, exact(case), 2.0**-30)[0]) > 0.1


def test_the_loss_scale_may_be_in_the_weights() -> None:
    case, scale = make_case(dtype=torch.float16), 2.0**-4
    truth = exact(case)
    scaled = case | {"w": case["w"].float() * scale}
    assert_close(gradients(sparse(scaled), case),
                 gradients(sparse(truth | {"w": truth["w"] * scale}), truth), 2e-3)  # fmt: skip
    weights = {"ce_weight": torch.tensor(0.3 * scale), "kl_weight": 0.7 * scale}
    assert_close(gradients(kd(case, **weights), case), gradients(kd(truth, **weights), truth), 2e-3)


@EVERY
def test_views_and_transposed_tensors_are_taken_as_they_are(op) -> None:
    case = make_case()
    expected = [loss_of(op, case), *gradients_of(op, case)]
    odd = dict(case)
    odd["hidden"] = case["hidden"].detach().repeat(2, 2)[:37, :16].requires_grad_()
    odd["weight"] = case["weight"].detach().t().contiguous().t().requires_grad_()
    odd["w"], odd["ids"] = (case[n].t().contiguous().t() for n in ("w", "ids"))
    odd["teacher_hidden"] = case["teacher_hidden"].repeat(1, 2)[:, :24]
    odd["labels"] = case["labels"].repeat_interleave(2)[::2]
    assert not any(odd[n].is_contiguous() for n in ("hidden", "weight", "w", "labels"))
    assert_close([loss_of(op, odd), *gradients_of(op, odd)], expected, 1e-13)


@EVERY
def test_a_second_backward_and_a_second_derivative_are_refused(op) -> None:
    case = make_case()
    loss = loss_of(op, case)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiated once"):
        loss.backward()
    (first,) = torch.autograd.grad(loss_of(op, case), [case["hidden"]], create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiate twice|does not require grad"):
        first.sum().backward()


@EVERY
def test_autocast_around_a_loss_does_not_reach_it(op) -> None:
    case = make_case(dtype=torch.float32)
    expected = [loss_of(op, case), *gradients_of(op, case)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [loss_of(op, case), *gradients_of(op, case)]
    assert all(map(torch.equal, found, expected))


@EVERY
def test_a_head_shared_with_the_embeddings_gets_both_gradients(op) -> None:
    case = make_case(n=37, v=211, h=16)
    table = case["weight"].detach().clone().requires_grad_()
    ids = torch.arange(37) * 3

    def tied(embeddings: Tensor, head: Tensor) -> Tensor:
        return loss_of(op, case | {"hidden": embeddings[ids].tanh(), "weight": head})

    one, other = (table.detach().clone().requires_grad_() for _ in range(2))
    apart = torch.autograd.grad(tied(one, other), [one, other])
    (together,) = torch.autograd.grad(tied(table, table), [table])
    assert all(bool(gradient.any()) for gradient in apart)
    assert_close([together], [apart[0] + apart[1]], 1e-13)


@pytest.mark.parametrize("temperature", [1e-3, 30.0, 1e3])
def test_extreme_temperatures_stay_finite_and_right(temperature: float) -> None:
    case = make_case(dtype=torch.float32)
    truth = exact(case)
    for op in (sparse, kd, partial(kd, beta=0.5), partial(kd, beta=1.0)):
        found, expected = (op(which, temperature=temperature) for which in (case, truth))
        # At T = 1000 rounding is what is left of the divergence, times T^2; not of its gradient.
        assert distance(found.loss, expected.loss) <= (1e-4 if temperature < 1e3 else 1e-2)
        assert_close(gradients(found, case), gradients(expected, truth), 1e-3)


def test_entries_beyond_the_tokenizer_take_part_but_are_never_a_target() -> None:
    """A vocabulary padded to a round size: the entries have logits, and only lose by training."""
    case = make_case(v=211)
    case["ids"].clamp_(max=199)
    case["w"] = case["w"].abs()
    dw = gradients(sparse(case), case)[1]
    plain = torch.autograd.grad(
        -token_logprobs(case["hidden"], case["weight"], case["labels"].clamp(max=199)).sum(),
        [case["weight"]],
    )[0]
    for gradient in (dw, plain):
        # The gradient of such a row is a sum of hidden states, each with a weight above 0.
        assert bool(gradient[200:].any(dim=1).all())
    with torch.no_grad():
        moved = case["weight"] - 1e-3 * dw
        before, after = (
            (case["hidden"] @ w.t()).softmax(dim=1)[case["labels"] >= 0, 200:].sum()
            for w in (case["weight"], moved)
        )
    assert float(after) < float(before)
