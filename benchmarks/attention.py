"""A model's forward and backward pass on packed rows, by what its attention runs on.

    python benchmarks/attention.py [--length N] [--documents N] [--rounds N] [--check]

One model, the same packed rows; the implementations that can run on the device take turns. Their
median times are given as shares of eager attention's, with the relative difference of the hidden
states from its. On a CPU these are eager and SDPA. Those left out are named, with the reason.
`--check` exits with 1 where the one that `auto` takes is slower than eager, or one is further off
than rounding explains.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch

from trainer import attention
from trainer.batch import Batch
from trainer.models import hidden_states
from trainer.runtime import Runtime

SLOWEST, APART = 1.1, {"fp32": 1e-4, "bf16": 5e-2}
KINDS = ("eager", "sdpa", "flex", "varlen", "flash_attention_2", "flash_attention_3")
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}  # fmt: skip
LARGE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4,
         "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Attention on packed rows.")
    parser.add_argument("--length", type=int, help="tokens of a row; 512 on a CPU, 4096 on a GPU")
    parser.add_argument("--documents", type=int, default=8, help="of a row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--check", action="store_true", help="fail above the budgets")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    runtime = Runtime(torch.device("cuda" if cuda else "cpu"), "bf16" if cuda else "fp32")
    batch = packed(options.length or (4096 if cuda else 512), options.documents)
    model = build(LARGE if cuda else SMALL, runtime)
    batch = batch.to(runtime.device)
    usable = []
    for kind in KINDS:
        if (found := attention.status(kind, runtime)) == "usable":
            usable.append(kind)
        else:
            print(f"{kind:<20}{found}")
    times: dict[str, list[float]] = {kind: [] for kind in usable}
    hidden = {kind: step(model, kind, batch, runtime)[1] for kind in usable}  # and warms up
    for _ in range(options.rounds):
        for kind in usable:
            times[kind].append(step(model, kind, batch, runtime)[0])
    middle = {kind: statistics.median(found) for kind, found in times.items()}
    print(f"{'attention':<20}{'ms':>10}{'of eager':>10}{'apart':>12}")
    failed = []
    for kind in usable:
        apart = float((hidden[kind] - hidden["eager"]).norm() / hidden["eager"].norm())
        share = middle[kind] / middle["eager"]
        print(f"{kind:<20}{1000 * middle[kind]:>10.1f}{share:>10.2f}{apart:>12.1e}")
        failed += [f"{kind} is {apart:.1e} off"] if apart > APART[runtime.precision] else []
    best = attention.attention_implementations(None, runtime)[0]
    if middle[best] > SLOWEST * middle["eager"]:
        failed.append(f"{best} takes {middle[best] / middle['eager']:.2f} of eager's time")
    if options.check and failed:
        print("FAILED: " + "; ".join(failed))
    return 1 if options.check and failed else 0


def build(size: dict[str, int], runtime: Runtime) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=1024, **size)
    return AutoModelForCausalLM.from_config(config).to(runtime.device)


def packed(length: int, documents: int) -> Batch:
    """Two rows of `documents` documents of equal length each, the last with what is left."""
    each = max(1, length // documents)
    row = torch.cat([torch.arange(each).repeat(documents - 1),
                     torch.arange(length - each * (documents - 1))])  # fmt: skip
    ids = torch.randint(0, 1024, (2, length))
    return Batch(ids, row.repeat(2, 1), ids)


def step(model: Any, kind: str, batch: Batch, runtime: Runtime) -> tuple[float, torch.Tensor]:
    """Seconds of one forward and backward pass, and the hidden states."""
    model.set_attn_implementation(attention.pick_attention(model.config, kind))
    model.zero_grad()
    runtime.finish()
    begun = time.perf_counter()
    with runtime.autocast():
        hidden = hidden_states(model, batch)
    hidden.float().square().mean().backward()
    runtime.finish()
    return time.perf_counter() - begun, hidden.detach().float()


if __name__ == "__main__":
    sys.exit(main())
