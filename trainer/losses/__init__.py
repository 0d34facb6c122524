"""Losses on the last hidden state: head and loss in one operation (`linear`), and the textbook
computation of the same numbers (`reference`), for tests and benchmarks."""

from trainer.losses.linear import (
    DenseKL,
    SparseTarget,
    dense_kl,
    sparse_target,
    token_logprobs,
)

__all__ = ["DenseKL", "SparseTarget", "dense_kl", "sparse_target", "token_logprobs"]
