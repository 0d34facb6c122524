"""Datasets of the Hugging Face hub, through the `datasets` library, imported on use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainer.config import Hub
from trainer.data import DataError


def hub_name(hub: Hub) -> str:
    """What people call it: `hf:NAME/CONFIG:SPLIT`."""
    return f"hf:{hub.name}{f'/{hub.config}' if hub.config else ''}:{hub.split}"


def rows(hub: Hub) -> Iterator[dict[str, Any]]:
    """Every row as a dict. Errors: `DataError`, one line, where the library is not installed, the
    hub is out of reach or has no such dataset, configuration or split."""
    name = hub_name(hub)
    try:
        from datasets import disable_progress_bars, load_dataset
    except ImportError as error:
        raise DataError(
            f"{name}: datasets of the hub are read with the package `datasets`, which cannot be"
            " imported; pip install 'launch-llm[hub]', or give a `path` to a copy"
        ) from error
    disable_progress_bars()  # a log is read as lines
    try:
        found = load_dataset(hub.name, hub.config, split=hub.split)
    except Exception as error:  # the library raises many kinds for "not there" and "offline"
        # The second line is where it lists the configurations that there are.
        why = " ".join(str(error).strip().splitlines()[:2]) or type(error).__name__
        raise DataError(f"{name}: cannot be loaded: {why}") from error
    yield from map(dict, found)
