"""The blocks of a job that say what is learned, each of one objective."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Optional

from trainer.config_model import Model
from trainer.loading import Strict, require

#: `module:function` or `FOLDER/file.py:function`.
_FUNCTION = re.compile(r"([A-Za-z_]\w*(\.[A-Za-z_]\w*)*|[^:]+\.py):[A-Za-z_]\w*")


@dataclass(frozen=True)
class KeepLogits(Strict):
    """Hold the student near its starting logits. `fade`: the share of the horizon over which the
    weight falls linearly to 0."""

    weight: float = 0.1
    fade: float = 0.5

    def __post_init__(self) -> None:
        require(
            self,
            weight=(self.weight > 0, "must be greater than 0"),
            fade=(0 < self.fade <= 1, "must be in (0, 1]"),
        )


@dataclass(frozen=True)
class Distill(Strict):
    """Knowledge distillation. loss = alpha * CE + (1 - alpha) * T^2 * KL(teacher || student),
    both at temperature T inside the KL (Hinton et al. 2015, arXiv 1503.02531). `precompute`: the
    teacher's answers are read from `targets` (a stage of that name) or `logits_dir` (a file for
    each sample), of which `top_k` logits a token are kept."""

    teacher: Optional[str] = None
    mode: Literal["online", "precompute"] = "online"
    temperature: float = 2.0
    alpha: float = 0.5
    alpha_final: Optional[float] = None  # alpha at the end of the horizon
    alpha_schedule: Literal["constant", "linear", "cosine"] = "constant"
    keep_logits: Optional[KeepLogits] = None
    targets: Optional[str] = None
    logits_dir: Optional[str] = None
    top_k: int = 64

    def __post_init__(self) -> None:
        online = self.mode == "online"
        anneals = self.alpha_schedule != "constant"
        stored = [given for given in (self.targets, self.logits_dir) if given is not None]
        where = "belongs to `mode: precompute`"
        require(
            self,
            teacher=((self.teacher is not None) == online,
                     "must be named" if online else "is not read with `mode: precompute`"),
            mode=(online or len(stored) == 1,
                  "`precompute` needs exactly one of `targets` and `logits_dir`"),
            temperature=(self.temperature > 0, "must be greater than 0"),
            alpha=(0 <= self.alpha <= 1, "must be in [0, 1]"),
            alpha_final=(self.alpha_final is None or 0 <= self.alpha_final <= 1,
                         "must be in [0, 1]"),
            alpha_schedule=(anneals == (self.alpha_final is not None),
                            "`linear` and `cosine` go with `alpha_final`, and it with them"),
            targets=(not online or self.targets is None, where),
            logits_dir=(not online or self.logits_dir is None, where),
            top_k=(self.top_k >= 1, "must be at least 1"),
        )  # fmt: skip


@dataclass(frozen=True)
class Targets(Strict):
    """A teacher's answers on `data.train`, stored for `kd` with `mode: precompute`. `top_k`: the
    most probable tokens, the rest as one; `sample`: `samples` draws, unbiased (arXiv 2503.16870).
    `temperature` is that of the `kd` stage."""

    teacher: str
    top_k: int = 64
    sampler: Literal["top_k", "sample"] = "top_k"
    samples: int = 32
    temperature: float = 2.0
    micro_batch: int = 8  # rows per forward pass
    seed: int = 0  # of the draws
    limit_rows: Optional[int] = None  # read only as much as fills that many rows

    def __post_init__(self) -> None:
        at_least_1 = "must be at least 1"
        require(
            self,
            top_k=(self.top_k >= 1, at_least_1),
            samples=(1 <= self.samples < 65536, "must be in 1..65535"),
            temperature=(self.temperature > 0, "must be greater than 0"),
            micro_batch=(self.micro_batch >= 1, at_least_1),
            limit_rows=(self.limit_rows is None or self.limit_rows >= 1, at_least_1),
        )


@dataclass(frozen=True)
class Preference(Strict):
    """Learning from pairs of a chosen and a rejected answer (stages `dpo` and `ipo`).

    `dpo`: -log sigmoid(beta * margin) (Rafailov et al. 2023, arXiv 2305.18290). `ipo`: (margin -
    1 / (2 beta))^2 with log-probs averaged over each answer's tokens (Azar et al. 2023, arXiv
    2310.12036). The reference is the model as the stage found it: `precompute` asks it once for
    all pairs, `adapter` at every step with the adapter switched off."""

    beta: float = 0.1
    reference: Literal["auto", "precompute", "adapter"] = "auto"  # auto: precompute
    label_smoothing: float = 0.0  # dpo: the share of labels that are taken to be wrong
    sft_weight: float = 0.0  # of the chosen answer's mean negative log-likelihood, beside the loss

    def __post_init__(self) -> None:
        require(
            self,
            beta=(self.beta > 0, "must be greater than 0"),
            label_smoothing=(0 <= self.label_smoothing < 0.5, "must be in [0, 0.5)"),
            sft_weight=(self.sft_weight >= 0, "must not be negative"),
        )


def preference_problems(
    stage: str, preference: Preference, model: Model
) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) of a block beside its stage and model."""
    if preference.reference == "adapter" and model.adapter is None:
        yield "reference", "`adapter` needs a model.adapter that can be switched off"
    if preference.label_smoothing and stage == "ipo":
        yield "label_smoothing", "belongs to stage `dpo`: the loss of `ipo` has no labels"


@dataclass(frozen=True)
class Sdce(Strict):
    """Cross-entropy beside a target made of what a surrogate model holds likely (stage `sdce`).

    `surrogate`: the `k` most probable tokens of the surrogate, those of at least `threshold`.
    `kl`: the whole distribution, where both share a tokenizer. `standard`: cross-entropy alone.
    `form`: `soft` is one sparse soft label a token, `parity` what the published code computes.
    `weight` falls to `weight_final` along half a cosine."""

    surrogate: Optional[str] = None
    loss: Literal["surrogate", "kl", "standard"] = "surrogate"
    form: Literal["soft", "parity"] = "soft"
    k: int = 30
    threshold: float = 0.02
    weight: float = 1.0
    weight_final: float = 0.0

    def __post_init__(self) -> None:
        needed = self.loss != "standard"
        require(
            self,
            surrogate=((self.surrogate is not None) == needed,
                       "must be named" if needed else "is not read with `loss: standard`"),
            form=(self.form == "soft" or self.loss == "surrogate",
                  "`parity` belongs to `loss: surrogate`"),
            k=(self.k >= 1, "must be at least 1"),
            threshold=(0 <= self.threshold < 1, "must be in [0, 1)"),
            weight=(self.weight >= 0, "must not be negative"),
            weight_final=(self.weight_final >= 0, "must not be negative"),
        )  # fmt: skip


@dataclass(frozen=True)
class Grpo(Strict):
    """Reinforcement from rewards, relative to the other answers to the same prompt (stage `grpo`;
    Shao et al. 2024, arXiv 2402.03300). `rewards`: Python functions, `module:function` or
    `FOLDER/file.py:function`."""

    rewards: tuple[str, ...]
    reward_weights: tuple[float, ...] = ()  # one for each; none: all 1
    group: int = 8  # answers to a prompt
    max_new_tokens: int = 256
    temperature: float = 1.0  # of the draws, and of the probabilities that are compared
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    beta: float = 0.0  # of the KL to the reference; 0: no reference is kept
    clip: float = 0.2  # ratios count within 1 - clip and 1 + clip_high
    clip_high: Optional[float] = None  # None: as `clip`
    iterations: int = 1  # optimizer steps on the same answers
    scale_rewards: bool = True  # advantages are divided by the group's standard deviation
    normalise: Literal["tokens", "answers", "constant"] = "tokens"  # what the loss is a mean over
    rollouts: Literal["generate", "vllm"] = "generate"
    vllm_server: Optional[str] = None  # http://HOST:PORT of `vllm serve`

    def __post_init__(self) -> None:
        at_least_1, vllm = "must be at least 1", self.rollouts == "vllm"
        require(
            self,
            rewards=(bool(self.rewards) and all(_FUNCTION.fullmatch(r) for r in self.rewards),
                     "must name at least one function, as `module:function` or"
                     " `FOLDER/file.py:function`"),
            reward_weights=(len(self.reward_weights) in (0, len(self.rewards)),
                            "must be as many as `rewards`"),
            group=(self.group >= 2, "must be at least 2: an answer is compared with the others"),
            max_new_tokens=(self.max_new_tokens >= 1, at_least_1),
            temperature=(self.temperature > 0, "must be greater than 0"),
            top_p=(0 < self.top_p <= 1, "must be in (0, 1]"),
            top_k=(self.top_k >= 0, "must not be negative"),
            beta=(self.beta >= 0, "must not be negative"),
            clip=(0 < self.clip < 1, "must be in (0, 1)"),
            clip_high=(self.clip_high is None or self.clip_high > 0, "must be greater than 0"),
            iterations=(self.iterations >= 1, at_least_1),
            vllm_server=((self.vllm_server is not None) == vllm,
                         "must be given" if vllm else "belongs to `rollouts: vllm`"),
        )  # fmt: skip


def packed_for_server(grpo: Grpo, model: Optional[Model]) -> Optional[str]:
    """Why `rollouts: vllm` cannot serve `model`; None: it can, or is not asked for."""
    adapter = model.adapter if model is not None else None
    if grpo.rollouts != "vllm" or adapter is None or adapter.quantization != "nf4":
        return None
    return "vllm cannot be sent a base of 4 bits (model.adapter.quantization: nf4); take `generate`"
