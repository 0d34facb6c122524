"""From documents to batches: read, tokenise, pack, stream."""

from __future__ import annotations


class DataError(ValueError):
    """Data that cannot be used: one line with what, where and what to do (exit code 65)."""
