"""What `throughput.py --gpu` measures, and what is asked of it: an H100 of 80 GB, 10 minutes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Optional

#: Size (speed/world.py) -> cases: the shapes of Llama-3.2-1B and 3B in full, an adapter on 8B.
CASES = {
    "1b": ("sft ours selective", "sft ours selective compiled", "sft ours compiled",
           "sft ours fsdp", "sft trl packed liger"),
    "3b": ("sft ours checkpointing compiled", "sft ours checkpointing float8"),
    "8b": ("lora ours", "lora ours compiled", "lora trl"),
}  # fmt: skip
#: The least that is asked: MFU of 1B in bf16; float8 over bf16 of 3B, and how far their losses may
#: be apart at equal steps.
MFU, FLOAT8, APART = 0.50, 1.15, 0.005
#: Tokens a second that torchtune's README gives for Llama-3.1-8B with LoRA on an RTX A6000.
TORCHTUNE = 4699.0


def verdicts(reports: dict[str, Any]) -> Iterator[tuple[str, Optional[bool]]]:
    """A line for each thing that is asked, and whether it is met; None: it was not measured."""
    small = measured(reports, "1b", "sft ours")
    used = max((facts["mfu"] for facts in small.values() if facts.get("mfu")), default=None)
    yield _line("1B, full, bf16: MFU", used, MFU)
    large = measured(reports, "3b", "sft ours")
    plain, eight = (large.get(name) for name in CASES["3b"])
    faster = apart = None
    if plain and eight:
        faster = eight["real_per_sec"] / plain["real_per_sec"]
        apart = abs(eight["loss"] / plain["loss"] - 1)
    yield _line("3B, full: float8 over bf16", faster, FLOAT8)
    shown = "not measured" if apart is None else f"{apart:.3%} apart, at most {APART:.1%}"
    yield f"3B, full: losses of float8 and bf16: {shown}", None if apart is None else apart <= APART
    adapters = measured(reports, "8b", "lora ours")
    best = max((facts["real_per_sec"] for facts in adapters.values()), default=None)
    told = "not measured" if best is None else f"{best:,.0f} tokens/s"
    peer = measured(reports, "8b", "lora trl").get("lora trl")
    beside = f"TRL {peer['real_per_sec']:,.0f}" if peer else "TRL not measured"
    yield f"8B, LoRA, rows of 2,048: {told}; {beside}; torchtune, published: {TORCHTUNE:,.0f}", None


def measured(reports: dict[str, Any], size: str, prefix: str) -> dict[str, dict[str, Any]]:
    """The results of the cases of `size` whose names begin so, as far as there are any."""
    results = reports.get(size, {"results": {}})["results"].items()
    return {n: facts for n, facts in results if n.startswith(prefix) and "real_per_sec" in facts}


def _line(what: str, value: Optional[float], least: float) -> tuple[str, Optional[bool]]:
    if value is None:
        return f"{what}: not measured", None
    return f"{what}: {value:.2f}, at least {least:.2f}", value >= least
