"""The textbook's loop: all logits at once, gradients by autograd, and nothing else saved. It draws
the same batches as ours, so what differs is the head and its loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from speed.ours import CASES as OURS
from speed.ours import stage
from speed.world import CLIP, LR, Size, now, peak_mib, student, teacher

#: case -> the case of ours whose batches it draws
CASES = {
    "sft textbook packed": "sft ours packed",
    "sft textbook padded": "sft ours padded",
    "kd textbook": "kd ours",
}


def measure(case: str, work: Path, size: Size, peak_tflops: float | None) -> dict[str, float]:
    """Tokens a second over the last `size.steps` steps, and peak memory."""
    import torch
    import torch.nn.functional as F

    from trainer import models, runtime
    from trainer.batch import IGNORE
    from trainer.data.chat import view_of
    from trainer.data.stream import Stream, build_rows

    config = stage(CASES[case], work, size)
    assert config.train is not None and CASES[case] in OURS
    tokens = models.load_tokenizer(str(work / "student"))
    rows = build_rows(
        config.data.train, tokens, sequence_length=config.data.sequence_length,
        packing=config.data.packing, view=view_of(config.data, config.stage, tokens),
    )  # fmt: skip
    stream = Stream(
        rows, micro_batch=int(config.train.micro_batch), accumulate=config.train.accumulate,
        rank=0, world_size=1, seed=config.train.seed,
    )  # fmt: skip
    with runtime.start() as process:
        process = process.at("auto")
        device = process.device
        attention = models.attention_implementations(None, process)[0]
        model = student(work, device, attention)
        guide = teacher(work, device, attention) if config.kd is not None else None
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)

        def logits(of: Any, batch: Any) -> Any:
            ids, positions = batch.input_ids, batch.position_ids
            if attention == "flash_attention_2":
                ids, positions = ids.view(1, -1), positions.view(1, -1)
            found = of(input_ids=ids, position_ids=positions, use_cache=False).logits
            return found.flatten(0, 1)

        def step() -> tuple[int, Any]:
            group = stream.next_group()
            supervised = sum(int((batch.targets != IGNORE).sum()) for batch in group)
            total = torch.zeros((), device=device)
            for batch in (part.to(device) for part in group):
                labels = batch.targets.flatten()
                with process.autocast():
                    z = logits(model, batch).float()
                    if guide is None:
                        loss = F.cross_entropy(z, labels, ignore_index=IGNORE, reduction="sum")
                    else:
                        with torch.no_grad():
                            log_p = logits(guide, batch).float().log_softmax(dim=-1)
                        per_token = F.kl_div(
                            z.log_softmax(dim=-1), log_p, reduction="none", log_target=True
                        ).sum(dim=-1)
                        loss = (per_token * (labels != IGNORE)).sum()
                loss = loss / supervised
                loss.backward()
                total += loss.detach()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return supervised, total

        for _ in range(size.steps):
            step()
        started = now(device)
        done = [step() for _ in range(size.steps)]
        seconds = now(device) - started
        supervised = sum(count for count, _ in done)
        real = rows.summary["tokens"] / rows.summary["supervised_tokens"]
        return {
            "supervised_per_sec": supervised / seconds,
            "real_per_sec": supervised / seconds * real,
            "peak_mib": peak_mib(device),
            "loss": sum(float(loss) for _, loss in done) / len(done),
        }
