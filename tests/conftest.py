"""What holds for every test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Commands that run inside this process set variables, such as HF_HUB_OFFLINE."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
