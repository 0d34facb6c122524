"""TRL's trainers, on the same model and texts. Nothing of ours runs in these cases."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from speed.world import (
    CLIP,
    LR,
    RANK,
    Absent,
    Size,
    now,
    pair_tokens,
    peak_mib,
    student,
    teacher,
    texts,
)

#: case -> modules that it needs
CASES = {
    "sft trl packed": ("trl", "datasets"),
    "sft trl packed liger": ("trl", "datasets", "liger_kernel"),
    "lora trl": ("trl", "datasets", "peft"),
    "dpo trl": ("trl", "datasets"),
    "kd trl": ("trl.experimental.gkd", "datasets"),
}


def measure(case: str, work: Path, size: Size, peak_tflops: float | None) -> dict[str, float]:
    """Tokens a second over the last `size.steps` steps, and peak memory. Errors: `Absent`."""
    import torch

    if "liger_kernel" in CASES[case] and not torch.cuda.is_available():
        raise Absent("Liger's kernels need a GPU")
    for name in CASES[case]:
        try:
            importlib.import_module(name)
        except Exception as error:  # a peer may fail in any way while it is imported
            raise Absent(f"{type(error).__name__}: {error}".splitlines()[0]) from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made = {"kd": distillation, "dpo": preference}.get(case.split()[0], fine_tuning)
    trainer = made(case, work, size, device)
    clock = Clock(size.steps, device)
    trainer.add_callback(clock.callback())
    counts = count_tokens(trainer, clock)
    trainer.train()
    seconds = clock.seconds()
    if case.startswith("dpo"):  # every pair is as long as any other
        tokens = size.steps * size.dpo[0] * size.dpo[1] * pair_tokens(size)
        counts = {"supervised": tokens, "real": tokens}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "supervised_per_sec": float(counts["supervised"]) / seconds,
        "real_per_sec": float(counts["real"]) / seconds,
        "peak_mib": peak_mib(device),
        "loss": losses[-1],
    }


def fine_tuning(case: str, work: Path, size: Size, device: Any) -> Any:
    """SFTTrainer with best-fit packing: documents are kept apart by position ids."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    micro, accumulate, length = size.sft
    arguments = SFTConfig(
        **common(work, size, device), max_length=length, packing=True, packing_strategy="bfd",
        per_device_train_batch_size=micro, gradient_accumulation_steps=accumulate,
        use_liger_kernel="liger" in case,
    )  # fmt: skip
    adapter = None
    if case.startswith("lora"):
        from peft import LoraConfig

        adapter = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    return SFTTrainer(
        (teacher if adapter else student)(work, device, attention(device)),
        args=arguments,
        peft_config=adapter,
        train_dataset=Dataset.from_dict({"text": texts(work / "sft.jsonl")}),
        processing_class=AutoTokenizer.from_pretrained(work / "student"),
    )


def preference(case: str, work: Path, size: Size, device: Any) -> Any:
    """DPOTrainer with the reference's log-probs computed before the first step, as ours."""
    import json

    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    micro, accumulate, length = size.dpo
    pairs = [json.loads(line) for line in (work / "dpo.jsonl").read_text().splitlines()]
    arguments = DPOConfig(
        **common(work, size, device), max_length=length, per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulate, precompute_ref_log_probs=True,
    )  # fmt: skip
    return DPOTrainer(
        student(work, device, attention(device)),
        args=arguments,
        train_dataset=Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(work / "student"),
    )


def distillation(case: str, work: Path, size: Size, device: Any) -> Any:
    """GKDTrainer without generation (lmbda 0), KL(teacher || student) (beta 0) at T = 1; every
    token but the first is learned, as in ours."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    micro, accumulate, length = size.kd
    tokens = AutoTokenizer.from_pretrained(work / "student")
    ids = [[*tokens(text).input_ids, tokens.eos_token_id] for text in texts(work / "kd.jsonl")]
    rows = {
        "input_ids": ids,
        "completion_mask": [[0] + [1] * (len(row) - 1) for row in ids],
        "prompt": ["w0"] * len(ids),
    }
    arguments = GKDConfig(
        **common(work, size, device), max_length=length, lmbda=0.0, beta=0.0,
        per_device_train_batch_size=micro, gradient_accumulation_steps=accumulate,
    )  # fmt: skip
    return GKDTrainer(
        student(work, device, attention(device)),
        teacher_model=teacher(work, device, attention(device)),
        args=arguments,
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokens,
    )


def common(work: Path, size: Size, device: Any) -> dict[str, Any]:
    """As ours: fp32 weights under bf16 autocast on a GPU, fused AdamW, constant rate, no
    recomputation, no checkpoint; the loss is logged as rarely as ours."""
    on_gpu = device.type == "cuda"
    return {
        "output_dir": str(work / "trl"), "max_steps": 2 * size.steps, "use_cpu": not on_gpu,
        "bf16": on_gpu, "learning_rate": LR, "lr_scheduler_type": "constant", "warmup_steps": 0,
        "max_grad_norm": CLIP, "weight_decay": 0.1, "adam_beta2": 0.95,
        "optim": "adamw_torch_fused", "gradient_checkpointing": False, "save_strategy": "no",
        "logging_steps": size.steps, "report_to": "none", "disable_tqdm": True,
        "dataloader_pin_memory": on_gpu, "seed": 0,
    }  # fmt: skip


def attention(device: Any) -> str:
    """As ours: flash-attn where it is installed, else SDPA."""
    flash = importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if device.type == "cuda" and flash else "sdpa"


class Clock:
    """Reads the time after the warm-up and after the last step."""

    def __init__(self, steps: int, device: Any) -> None:
        self.steps, self.device = steps, device
        self.done = 0
        self.times: list[float] = []

    @property
    def running(self) -> bool:
        return self.done >= self.steps

    def seconds(self) -> float:
        first, last = self.times
        return last - first

    def callback(self) -> Any:
        from transformers import TrainerCallback

        clock = self

        class Tick(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, *given: Any, **more: Any) -> None:
                clock.done += 1
                if clock.done in (clock.steps, 2 * clock.steps):
                    clock.times.append(now(clock.device))

        return Tick()


def count_tokens(trainer: Any, clock: Clock) -> dict[str, Any]:
    """Sums, over the steps that are measured, of `real` (not padding) and `supervised` tokens; they
    stay on the device."""
    sums: dict[str, Any] = {"real": 0, "supervised": 0}
    train = trainer.training_step

    def training_step(model: Any, inputs: Any, *more: Any, **named: Any) -> Any:
        if clock.running:
            mask = inputs.get("attention_mask")  # packed rows have none, and no padding
            sums["real"] += inputs["input_ids"].numel() if mask is None else mask.sum()
            if "labels" in inputs:  # pairs have none
                sums["supervised"] += (inputs["labels"][:, 1:] != -100).sum()
        return train(model, inputs, *more, **named)

    trainer.training_step = training_step
    return sums
