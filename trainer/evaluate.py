"""What a model makes of held-out text: cross-entropy, in the loop and as the stage `evaluate`, and
there how far its probabilities can be trusted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainer.data.stream import Rows, validation_batches
from trainer.losses.heads import head_for
from trainer.losses.linear import sparse_target
from trainer.models import head_weight, hidden_states
from trainer.runtime import Runtime

#: Bins of equal width for the calibration error, as Guo et al. have them.
BINS = 15
#: Bytes of one buffer of logits.
_BUFFER = 64 * 2**20


class Score(NamedTuple):
    loss: float  # nats per supervised token
    tokens: int
    ece: float  # in [0, 1]


@torch.no_grad()  # type: ignore[untyped-decorator]
def cross_entropy(
    model: nn.Module, rows: Rows, runtime: Runtime, *, micro_batch: int, limit: int = 0
) -> tuple[float, int]:
    """Mean cross-entropy in nats per supervised token over `rows` (at most `limit` micro-batches a
    rank; 0: all), and the number of those tokens, over all ranks. The model's mode is restored."""
    total = torch.zeros((), dtype=torch.float64, device=runtime.device)
    tokens = torch.zeros((), dtype=torch.float64)
    weight = head_weight(model).detach()
    for hidden, labels in _states(model, rows, runtime, micro_batch, limit):
        ones = torch.ones_like(labels, dtype=torch.float32).unsqueeze(1)
        total += sparse_target(hidden, weight, labels.unsqueeze(1), ones).loss
        tokens += len(labels)
    sums = runtime.all_sum({"loss": total, "tokens": tokens})
    count = int(sums["tokens"])
    return float(sums["loss"]) / max(count, 1), count


@torch.no_grad()  # type: ignore[untyped-decorator]
def score(model: nn.Module, rows: Rows, runtime: Runtime, *, micro_batch: int) -> Score:
    """Cross-entropy and calibration over all of `rows`, over all ranks. The model's mode is
    restored.

    `ece` is the expected calibration error of the most probable token (Guo et al. 2017, arXiv
    1706.04599): the N supervised tokens are put into bins ((m - 1) / 15, m / 15] by the probability
    that the model gives to its own first choice, and ece = sum over m of
    |B_m| / N * |accuracy(B_m) - confidence(B_m)|, with the share of first choices that are right
    and the mean of their probabilities. 0: a choice made with probability p is right p of the time.
    """
    loss = torch.zeros((), dtype=torch.float64, device=runtime.device)
    gaps = torch.zeros(BINS, dtype=torch.float64, device=runtime.device)
    tokens = torch.zeros((), dtype=torch.float64)
    weight = head_weight(model).detach()
    for hidden, labels in _states(model, rows, runtime, micro_batch, 0):
        logprobs, confidence, right = predictions(hidden, weight, labels)
        loss -= logprobs.double().sum()
        gaps += calibration_gaps(confidence, right)
        tokens += len(labels)
    parts = {f"bin{m}": gap for m, gap in enumerate(gaps)}
    sums = runtime.all_sum({"loss": loss, "tokens": tokens, **parts})
    count = int(sums["tokens"])
    apart = sum(abs(float(sums[name])) for name in parts)
    return Score(float(sums["loss"]) / max(count, 1), count, apart / max(count, 1))


def predictions(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For hidden [N, H], weight [V, H] and labels [N]: log softmax(z)[label] (nats), the largest
    probability, and whether it is the label's; each [N], from fp32 logits of a chunk at a time."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    chunk = max(16, _BUFFER // (4 * len(weight)))
    head = head_for(hidden, weight, dtype, min(chunk, max(len(hidden), 1)))
    logprobs, confidence = hidden.new_zeros((2, len(hidden)), dtype=dtype)
    right = torch.zeros_like(labels, dtype=torch.bool)
    for first in range(0, len(hidden), chunk):
        at = slice(first, first + chunk)
        every = torch.ones_like(hidden[at, :1], dtype=torch.bool)
        z = head.logits(head.operand(hidden[at], every))
        top, lse = z.max(dim=1), z.logsumexp(dim=1)
        logprobs[at] = z.gather(1, labels[at].unsqueeze(1)).squeeze(1) - lse
        confidence[at] = (top.values - lse).exp()
        right[at] = top.indices == labels[at]
    return logprobs, confidence, right


def calibration_gaps(confidence: Tensor, right: Tensor) -> Tensor:
    """Of each of the `BINS` bins, how many choices in it were right, less the sum of their
    probabilities [BINS], float64: the sum of absolute values over N is the calibration error.
    confidence [N] in (0, 1]; right [N], bool."""
    sure = confidence.double()
    # A bin holds its upper end; rounding may put a probability a hair above 1.
    bins = (sure * BINS).ceil().long().clamp(1, BINS) - 1
    gaps = torch.zeros(BINS, dtype=torch.float64, device=confidence.device)
    return gaps.index_add_(0, bins, right.double() - sure)


def _states(
    model: nn.Module, rows: Rows, runtime: Runtime, micro_batch: int, limit: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden states [n, H] and labels [n] of the supervised tokens of this rank's batches."""
    training = model.training
    model.eval()
    for host in validation_batches(rows, micro_batch, runtime.rank, runtime.world_size, limit):
        batch = host.to(runtime.device)
        with runtime.autocast():
            hidden = hidden_states(model, batch)
        yield hidden, batch.labels
    model.train(training)
