"""Answers from a vLLM server that is given the weights of every step, through TRL's client."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Optional

import torch
from torch import Tensor, nn

from trainer.config import ConfigError, Grpo
from trainer.rollouts import Answer, cut, number_of
from trainer.runtime import Runtime

_START = 'VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config \'{"backend": "nccl"}\''


class Server:
    """Sends prompts as token ids; before the first draw, and after each change of the weights, the
    server gets them over NCCL. `client`: one that is connected (default: to `grpo.vllm_server`)."""

    def __init__(
        self,
        model: nn.Module,
        plan: Grpo,
        runtime: Runtime,
        ends: Sequence[int],
        client: Optional[Any] = None,
    ) -> None:
        if runtime.world_size > 1:
            raise ConfigError(
                "grpo.rollouts: vllm serves one worker; take one, or `rollouts: generate`"
            )
        self.model, self.plan, self.runtime, self.ends = model, plan, runtime, ends
        self.client = connect(str(plan.vllm_server)) if client is None else client
        self.sent: Optional[int] = None  # the version of the weights that the server has
        self.joined = False

    def draw(
        self, prompts: Sequence[Sequence[int]], count: int, seed: Optional[str], version: int
    ) -> list[list[Answer]]:
        self._send_weights(version)
        plan = self.plan
        with _said(str(plan.vllm_server)):
            found = self.client.generate(
                prompts=[list(prompt) for prompt in prompts],
                n=count,
                temperature=plan.temperature if seed is not None else 0.0,
                top_p=plan.top_p,
                top_k=plan.top_k,
                max_tokens=plan.max_new_tokens,
                generation_kwargs={
                    "stop_token_ids": list(self.ends),
                    **({"seed": number_of(seed)} if seed is not None else {}),
                },
            )
        answers = [cut(list(ids), self.ends) for ids in found["completion_ids"]]
        if len(answers) != count * len(prompts) or not all(answer.ids for answer in answers):
            raise ConfigError(
                f"grpo.vllm_server: {plan.vllm_server} gave {len(answers)} answers, some of them"
                f" empty, or not {count} to each of {len(prompts)} prompts"
            )
        return [answers[i : i + count] for i in range(0, len(answers), count)]

    def _send_weights(self, version: int) -> None:
        if version == self.sent:
            return
        with _said(str(self.plan.vllm_server)):
            if not self.joined:
                self.client.init_communicator(device=self.runtime.device)
                self.joined = True
            facts = [
                (name, str(weight.dtype).removeprefix("torch."), list(weight.shape))
                for name, weight in plain_weights(self.model, merged=False)
            ]
            self.client.update_named_params(facts, plain_weights(self.model))
            self.client.reset_prefix_cache()
        self.sent = version


def connect(url: str) -> Any:
    """TRL's client for a server. Errors: `ConfigError` when it or vLLM is not installed, or nothing
    answers at `url`."""
    try:
        from trl.generation.vllm_client import VLLMClient

        return VLLMClient(base_url=url)
    except ImportError as error:
        raise ConfigError(
            f"grpo.rollouts: vllm needs TRL and vLLM beside the trainer ({error}): pip install"
            " 'trl[vllm]', or take `rollouts: generate`"
        ) from error
    except OSError as error:  # that of `requests`, too
        raise ConfigError(
            f"grpo.vllm_server: nothing answers at {url}; start a server there: {_START}"
        ) from error


def plain_weights(model: Any, merged: bool = True) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the weights as the base model names them; what an adapter learned is added
    to those that it adapts, in a tensor that lives until the next one, unless not `merged`. The
    base stays as it is: to add and to take away again would round one of 16 bits anew each time."""
    base = model.get_base_model() if hasattr(model, "merge_adapter") else model
    layers: dict[int, list[Any]] = {}
    for layer in base.modules() if merged else ():
        if hasattr(layer, "get_delta_weight"):
            weight = getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"))
            layers.setdefault(id(weight), []).append(layer)
    for name, weight in base.named_parameters():
        if ".lora_" in name:
            continue
        tensor = weight.detach()
        with torch.no_grad():
            for layer in layers.get(id(weight), ()):
                for adapter in layer.active_adapters:
                    tensor = (tensor + layer.get_delta_weight(adapter)).to(weight.dtype)
        yield name.replace(".base_layer", ""), tensor


@contextmanager
def _said(url: str) -> Iterator[None]:
    """What the client raises, in one line."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # it raises plain `Exception` for what a server refuses
        why = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"grpo.vllm_server: {url}: {why}") from error
