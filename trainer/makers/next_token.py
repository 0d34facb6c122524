"""The objective of the stages `pretrain` and `sft`, and the rows that they are laid out in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

from trainer.config import Source
from trainer.context import Context
from trainer.data import chat
from trainer.data.stream import Rows, build_rows
from trainer.objective import Objective
from trainer.objectives.next_token import NextToken


def make(context: Context, tokens: Any) -> Objective:
    """Cross-entropy of the next token."""
    del context, tokens
    return NextToken()


def lay_out(
    context: Context,
    tokens: Any,
    sources: tuple[Source, ...],
    limit: Optional[int],
    build: Callable[..., Rows] = build_rows,
) -> Rows:
    """The rows that `build` makes of `sources`, at most `limit`. Errors: its own."""
    data = context.config.data
    return build(
        sources,
        tokens,
        sequence_length=data.sequence_length,
        packing=data.packing,
        limit_rows=limit,
        view=chat.view_of(data, context.config.stage, tokens),
    )
