"""What of a model goes into a checkpoint, and how it is written there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer import adapters, parallel


@dataclass(frozen=True)
class ModelFiles:
    """A model (`adapter`: only its adapter) and its tokenizer, as `from_pretrained` reads them."""

    model: Any
    tokenizer: Any
    adapter: bool

    def tensors(self) -> dict[str, Tensor]:
        """What is to be written: the model's own tensors, or copies of them later. Of a sharded
        model they are copies, and all on rank 0; all ranks must ask for them then."""
        adapter = adapters.tensors(self.model) if self.adapter else None
        tensors = dict(self.model.state_dict()) if adapter is None else adapter
        return parallel.whole(self.model, tensors) if parallel.is_sharded(self.model) else tensors

    def write(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        """Write a checkpoint's files; the numbers are those of `tensors`, not of the model now."""
        if self.adapter:
            adapters.save(self.model, folder, tensors)
        else:
            self.model.save_pretrained(folder, state_dict=tensors)
        self.tokenizer.save_pretrained(folder)
