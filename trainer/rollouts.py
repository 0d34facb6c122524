"""Answers that the model under training gives to prompts."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Optional, Protocol

import torch
from torch import nn

from trainer import float8
from trainer.config import Grpo
from trainer.models import reading
from trainer.runtime import Runtime
from trainer.step import unless_out_of_memory


class Answer(NamedTuple):
    """`ids`: with the mark that ends it, where it came to one (`ended`)."""

    ids: list[int]
    ended: bool


class Rollouts(Protocol):
    def draw(
        self, prompts: Sequence[Sequence[int]], count: int, seed: Optional[str], version: int
    ) -> list[list[Answer]]:
        """`count` answers to each prompt, by the weights as they are now. Equal seeds and prompts
        give equal answers; None: the most probable token every time. No random state changes.
        `version`: the optimizer steps behind the weights, for those who hold copies of them.
        Errors: `torch.OutOfMemoryError` when there is no memory for one answer."""
        ...


class Generate:
    """`model.generate`, with a cache of keys and values and prompts padded on the left. As many
    answers at once as memory allows: after an out-of-memory half as many, from then on."""

    def __init__(self, model: nn.Module, plan: Grpo, runtime: Runtime, ends: Sequence[int]) -> None:
        self.plan, self.runtime, self.ends = plan, runtime, list(ends)
        self.wrapped = model
        # PEFT's own `generate` adds nothing here: the adapter's layers are inside the base.
        self.model: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.most: Optional[int] = None

    def draw(
        self, prompts: Sequence[Sequence[int]], count: int, seed: Optional[str], version: int
    ) -> list[list[Answer]]:
        asked = [prompt for prompt in prompts for _ in range(count)]
        found: list[Answer] = []
        with reading(self.wrapped), self._plainly():
            while len(found) < len(asked):
                size = min(self.most or len(asked), len(asked))
                # Of each try: one that failed has drawn, too.
                own = f"{seed}/{len(found)}" if seed is not None and found else seed
                with _seeded(own, self.runtime.device):
                    made = unless_out_of_memory(
                        self._generate, asked[len(found) : len(found) + size], seed is None
                    )
                if made is not None:
                    found += made
                    continue
                self.runtime.release_memory()
                if size == 1:
                    raise torch.OutOfMemoryError("no memory for one answer")
                self.most = size // 2
        return [found[i : i + count] for i in range(0, len(found), count)]

    def _generate(self, prompts: Sequence[Sequence[int]], greedy: bool) -> list[Answer]:
        from transformers import GenerationConfig

        plan, width = self.plan, max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.ends[0])
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt) :] = torch.tensor(prompt)
            mask[i, width - len(prompt) :] = 1
        how: dict[str, Any] = {"do_sample": False}
        if not greedy:
            how = {
                "do_sample": True,
                "temperature": plan.temperature,
                "top_p": plan.top_p,
                "top_k": plan.top_k,
            }
        settings = GenerationConfig(
            max_new_tokens=plan.max_new_tokens,
            eos_token_id=self.ends,
            pad_token_id=self.ends[0],
            use_cache=True,
            **how,
        )
        with self.runtime.autocast():
            output = self.model.generate(
                input_ids=ids.to(self.runtime.device),
                attention_mask=mask.to(self.runtime.device),
                generation_config=settings,
            )
        return [cut(row, self.ends) for row in output[:, width:].tolist()]

    @contextlib.contextmanager
    def _plainly(self) -> Iterator[None]:
        """A model's own defaults (a temperature, a penalty) would fill what ours leave open; a
        cache that grows has compiled blocks compiled again, and one token at a time is neither
        what float8 is fast at nor, always, what its libraries take."""
        from transformers import GenerationConfig

        own, self.model.generation_config = self.model.generation_config, GenerationConfig()
        try:
            with torch.compiler.set_stance("force_eager"), float8.plain(self.wrapped):
                yield
        finally:
            self.model.generation_config = own


def cut(ids: list[int], ends: Sequence[int]) -> Answer:
    """An answer up to its first end, and whether there is one."""
    for at, token in enumerate(ids):
        if token in ends:
            return Answer(ids[: at + 1], True)
    return Answer(ids, False)


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and those that the model itself names."""
    named = getattr(model.generation_config, "eos_token_id", None)
    named = named if isinstance(named, list) else [] if named is None else [named]
    return list(dict.fromkeys([int(tokenizer.eos_token_id), *map(int, named)]))


def number_of(seed: str) -> int:
    """A seed in words as a number below 2**63."""
    return int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big") >> 1


@contextlib.contextmanager
def _seeded(seed: Optional[str], device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if seed is not None:
            torch.manual_seed(number_of(seed))
        yield
