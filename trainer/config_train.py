"""The block of a job that says how long and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Optional, Union

from trainer.loading import Strict, require


def refused(stage: str, parallel: str, quantization: str = "none") -> str:
    """Why a stage's model cannot be shared so; empty where it can."""
    if stage == "grpo" and parallel == "fsdp":
        return "fsdp: grpo writes answers of any length, which needs the whole model; use ddp"
    if parallel == "fsdp" and quantization != "none":
        return f"fsdp cannot share weights of model.adapter.quantization: {quantization}; use ddp"
    return ""


@dataclass(frozen=True)
class Train(Strict):
    """Length, batch and optimizer. Exactly one of `steps`, `epochs`, `seconds_of` sets the horizon
    of the schedule (`seconds_of`: the training time of another stage's output folder)."""

    steps: Optional[int] = None
    epochs: Optional[float] = None
    seconds_of: Optional[str] = None
    micro_batch: Union[Literal["auto"], int] = 8  # rows per forward pass and device
    accumulate: int = 1  # micro-batches per optimizer step
    global_batch: Optional[int] = None  # rows per optimizer step, where micro_batch is "auto"
    lr: float = 1e-4
    min_lr_ratio: float = 0.05  # the schedule ends at lr * min_lr_ratio
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.03  # below 1: share of the horizon; from 1: steps
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip: float = 1.0  # largest norm of the whole gradient; 0: off
    evaluate_every: int = 0  # steps; 0: only at the end
    evaluate_batches: int = 0  # of micro_batch rows over all workers (auto: 8); 0: all
    save_every: int = 0  # steps; 0: only at the end
    log_every: int = 10
    keep: int = 3  # newest checkpoints kept, besides the best one
    save_async: bool = True  # write a checkpoint while the next steps run
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"  # each worker holds the model, or a part
    sharded: bool = False  # all workers write the optimizer's state, each a part
    seed: int = 0
    limit_batches: Optional[int] = None  # read at most this many micro-batches of the data
    until: Optional[int] = None  # pause after this step; the schedule's horizon stays
    report_to: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ("tensorboard",)
    resume: Optional[str] = None  # another run's stage folder, or one of its checkpoints

    def __post_init__(self) -> None:
        horizons = [h for h in (self.steps, self.epochs, self.seconds_of) if h is not None]
        automatic, at_least_1 = self.micro_batch == "auto", "must be at least 1"
        require(
            self,
            steps=(len(horizons) == 1 and (self.steps is None or self.steps >= 1),
                   "give exactly one of `steps`, `epochs` and `seconds_of`, greater than 0"),
            epochs=(self.epochs is None or self.epochs > 0, "must be greater than 0"),
            micro_batch=(isinstance(self.micro_batch, str) or self.micro_batch >= 1, at_least_1),
            accumulate=(self.accumulate >= 1 and (self.accumulate == 1 or not automatic),
                        "follows from global_batch; leave it out" if automatic else at_least_1),
            global_batch=((self.global_batch or 0) >= 1 if automatic else self.global_batch is None,
                          "must say the rows of one optimizer step, since micro_batch is auto"
                          if automatic else "belongs to `micro_batch: auto`"),
            lr=(self.lr > 0, "must be greater than 0"),
            min_lr_ratio=(0 <= self.min_lr_ratio <= 1, "must be in [0, 1]"),
            warmup=(self.warmup >= 0, "must not be negative"),
            weight_decay=(self.weight_decay >= 0, "must not be negative"),
            clip=(self.clip >= 0, "must not be negative"),
            evaluate_every=(self.evaluate_every >= 0, "must not be negative"),
            evaluate_batches=(self.evaluate_batches >= 0, "must not be negative"),
            save_every=(self.save_every >= 0, "must not be negative"),
            log_every=(self.log_every >= 1, at_least_1),
            keep=(self.keep >= 1, at_least_1),
            limit_batches=(self.limit_batches is None or self.limit_batches >= 1, at_least_1),
            until=(self.until is None or self.until >= 1, at_least_1),
        )  # fmt: skip
