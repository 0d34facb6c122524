"""What a model makes of held-out text: cross-entropy, in the loop and as the stage `evaluate`, and
there how far its probabilities can be trusted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from trainer import parallel
from trainer.batch import Batch
from trainer.config import ConfigError, Train
from trainer.data.stream import Rows, batches_a_rank, validation_batches
from trainer.losses.heads import head_for
from trainer.losses.linear import sparse_target
from trainer.models import head_weight, hidden_states
from trainer.runtime import Runtime
from trainer.step import cut

#: Bins of equal width for the calibration error, as Guo et al. have them.
BINS = 15
#: Bytes of one buffer of logits.
_BUFFER = 64 * 2**20
#: Rows that stand for a micro-batch which is to be found.
_AUTO_ROWS = 8
_Smaller = Callable[[int], None]


class Left(Exception):
    """An evaluation that some rank was asked to leave, on all ranks; it found nothing."""


@runtime_checkable
class Judge(Protocol):
    """An objective with a measure of its own for held-out rows, in place of the cross-entropy."""

    #: What is measured: first `loss`, which is better the smaller it is.
    measures: tuple[str, ...]

    def judge(self, model: nn.Module, batch: Batch) -> tuple[int, Tensor]:
        """How many things `batch` (on the device, unprepared) holds that are judged, such as pairs,
        and the sums [len(measures)] of their measures. No gradients are kept."""
        ...


class Score(NamedTuple):
    loss: float  # nats per supervised token
    tokens: int
    ece: float  # in [0, 1]


def cross_entropy(
    model: nn.Module,
    rows: Rows,
    runtime: Runtime,
    *,
    micro_batch: int,
    limit: int = 0,
    smaller: _Smaller = lambda rows: None,
    leave: Callable[[], bool] = lambda: False,
) -> tuple[float, int]:
    """Mean cross-entropy in nats per supervised token over `rows` (the first `limit` of them; 0:
    all), and the number of those tokens, over all ranks. The model's mode is restored.

    Out of memory, a rank goes on with halves of its micro-batch: sums over rows do not depend on
    the cut. `smaller` is then told the smallest that any rank came to. Errors: `ConfigError`, on
    all ranks, when one row does not fit; `Left` when `leave` says so, asked before each batch."""

    def summed(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        ones = torch.ones_like(labels, dtype=torch.float32).unsqueeze(1)
        return sparse_target(hidden, weight, labels.unsqueeze(1), ones).loss.reshape(1)

    batch_sums = _of_tokens(model, runtime, summed)
    tokens, (loss,) = _sums(model, rows, runtime, batch_sums, 1, micro_batch, limit, smaller, leave)
    return loss / max(tokens, 1), tokens


def held_out(
    model: nn.Module,
    rows: Rows,
    runtime: Runtime,
    objective: object,
    *,
    micro_batch: int,
    limit: int = 0,
    smaller: _Smaller = lambda rows: None,
    leave: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """What `rows` show of `model`, as `val_...`: the measures of `objective` where it is a `Judge`,
    else cross-entropy, perplexity and tokens; the rest as in `cross_entropy`."""
    if not isinstance(objective, Judge):
        loss, tokens = cross_entropy(
            model, rows, runtime, micro_batch=micro_batch, limit=limit, smaller=smaller, leave=leave
        )
        perplexity = math.exp(min(loss, 700.0))
        return {"val_loss": loss, "val_ppl": perplexity, "val_tokens": float(tokens)}

    def batch_sums(host: Batch) -> tuple[int, Tensor]:
        return objective.judge(model, host.to(runtime.device))

    width = len(objective.measures)
    count, sums = _sums(model, rows, runtime, batch_sums, width, micro_batch, limit, smaller, leave)
    by = count or math.nan  # of nothing there is no mean: 0 would look like one
    means = {f"val_{name}": x / by for name, x in zip(objective.measures, sums)}
    return {**means, "val_count": float(count)}


def held_out_rows(config: Train) -> int:
    """The rows of a held-out loss while training, over all workers; 0: all. Of the micro-batch that
    was configured, so that nothing which only cuts a step changes what is compared."""
    rows = config.micro_batch if isinstance(config.micro_batch, int) else _AUTO_ROWS
    return config.evaluate_batches * rows


def score(
    model: nn.Module,
    rows: Rows,
    runtime: Runtime,
    *,
    micro_batch: int,
    smaller: _Smaller = lambda rows: None,
    leave: Callable[[], bool] = lambda: False,
) -> Score:
    """Cross-entropy and calibration over all of `rows`, over all ranks; memory and errors as in
    `cross_entropy`.

    `ece` is the expected calibration error of the most probable token (Guo et al. 2017, arXiv
    1706.04599): the N supervised tokens are put into bins ((m - 1) / 15, m / 15] by the probability
    that the model gives to its own first choice, and ece = sum over m of
    |B_m| / N * |accuracy(B_m) - confidence(B_m)|, with the share of first choices that are right
    and the mean of their probabilities. 0: a choice made with probability p is right p of the time.
    """

    def summed(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logprobs, confidence, right = predictions(hidden, weight, labels)
        return torch.cat([-logprobs.double().sum(0, True), calibration_gaps(confidence, right)])

    batch_sums = _of_tokens(model, runtime, summed)
    width = 1 + BINS
    tokens, sums = _sums(model, rows, runtime, batch_sums, width, micro_batch, 0, smaller, leave)
    apart = sum(abs(gap) for gap in sums[1:])
    return Score(sums[0] / max(tokens, 1), tokens, apart / max(tokens, 1))


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


def _of_tokens(
    model: nn.Module, runtime: Runtime, summed: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Callable[[Batch], tuple[int, Tensor]]:
    """The supervised tokens of a micro-batch, and what `summed` gives for their hidden states
    [n, H], the head [V, H] and their labels [n]."""

    def batch_sums(host: Batch) -> tuple[int, Tensor]:
        batch = host.to(runtime.device)
        with runtime.autocast():
            hidden = hidden_states(model, batch)
        return len(batch.labels), summed(hidden, head_weight(model).detach(), batch.labels)

    return batch_sums


@torch.no_grad()  # type: ignore[untyped-decorator]
def _sums(
    model: nn.Module,
    rows: Rows,
    runtime: Runtime,
    batch_sums: Callable[[Batch], tuple[int, Tensor]],
    width: int,
    micro_batch: int,
    limit: int,
    smaller: _Smaller,
    leave: Callable[[], bool],
) -> tuple[int, list[float]]:
    """The counts and the sums [width] that `batch_sums` gives for a micro-batch, added up over all
    micro-batches and ranks."""
    training = model.training
    model.eval()
    totals = torch.zeros(width, dtype=torch.float64, device=runtime.device)
    count, fitting = 0, micro_batch  # fitting 0: not even one row

    batches = validation_batches(rows, micro_batch, runtime.rank, runtime.world_size, limit)
    try:
        # Ranks may have one batch more or less: all ask as often, and leave together.
        for _ in range(batches_a_rank(rows, micro_batch, runtime.world_size, limit)):
            if runtime.any(leave())[0]:
                raise Left
            batch = next(batches, None)
            if batch is None and parallel.is_sharded(model):
                # The others need this rank's part of the model.
                parallel.attempt(model, 1, batch_sums, rows.batch([0]))
            waiting = cut([batch], fitting) if batch is not None and fitting else []
            while waiting:
                found = parallel.attempt(model, waiting[0].rows, batch_sums, waiting[0])
                if found is not None:
                    count += found[0]
                    totals += found[1]
                    del waiting[0]
                    continue
                runtime.release_memory()
                fitting = waiting[0].rows // 2
                waiting = cut(waiting, fitting) if fitting else []
    finally:
        parallel.settle(model)
        model.train(training)
    smallest = -int(runtime.largest(-float(fitting)))
    if smallest == 0:
        raise ConfigError(
            "evaluation: one row does not fit in the device's memory: lower data.sequence_length, "
            "or take a larger accelerator"
        )
    if smallest < micro_batch:
        smaller(smallest)
    parts = {str(i): x for i, x in enumerate(totals)}
    parts["count"] = torch.tensor(count, dtype=torch.float64)  # fp32 ends at 2^24
    sums = {name: float(value) for name, value in runtime.all_sum(parts).items()}
    return int(sums.pop("count")), list(sums.values())
