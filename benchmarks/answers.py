"""How well the launcher's forecast of drawing answers holds here: `launcher.answers` against what
the trainer's own `Generate` takes.

    python benchmarks/answers.py            one core; about half a minute of CPU time
    python benchmarks/answers.py --check    exit 1 where a prediction is off by more than a factor 2

Tiny to small Llamas with random weights, which never end an answer, draw answers of full length:
other widths, depths, vocabularies, lengths, and answers at once. The CPU time of this one thread is
measured, the median of three draws of each case. The costs of operations, numbers and calls are
those of `launcher.speed.CORE`, measured in training; what `generate` itself costs beside them was
read off these cases. GPUs are not compared: none was at hand.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from launcher import answers, hardware, shapes  # noqa: E402
from launcher.spec import Stage  # noqa: E402
from trainer.config import Architecture, Data, Grpo, Model, Train  # noqa: E402

#: The most that a predicted time may be off, as a factor.
BUDGET = 2.0
DRAWS = 3


@dataclass(frozen=True)
class Case:
    """A model, and the answers that it draws at once; lengths in tokens."""

    name: str
    hidden: int
    layers: int
    heads: int
    vocabulary: int
    once: int
    prompt: int
    answer: int


CASES = (
    Case("recipe grpo-local", 64, 2, 4, 260, 256, 28, 4),
    Case("tiny, one at a time", 64, 2, 4, 260, 1, 16, 48),
    Case("tiny, many layers", 64, 8, 4, 512, 8, 16, 32),
    Case("long answers", 128, 3, 4, 1024, 8, 32, 256),
    Case("large vocabulary", 128, 2, 4, 16384, 16, 32, 32),
    Case("wide", 384, 3, 6, 1024, 16, 32, 32),
    Case("medium", 256, 4, 8, 4096, 32, 64, 64),
    Case("medium, one at a time", 512, 6, 8, 8192, 1, 32, 32),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="exit 1 beyond a factor of 2")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    print(f"{'case':<24}{'measured':>12}{'predicted':>12}{'tokens/s':>11}{'factor':>9}")
    worst = 1.0
    for case in CASES:
        taken, said = measured(case), predicted(case)
        factor = said / taken
        worst = max(worst, factor, 1 / factor)
        rate = case.once * case.answer / taken
        print(f"{case.name:<24}{taken:>10.3f} s{said:>10.3f} s{rate:>11,.0f}{factor:>9.2f}")
    print(f"the worst prediction is off by a factor of {worst:.2f}; the budget is {BUDGET:g}")
    return 1 if options.check and worst > BUDGET else 0


def stage(case: Case) -> Stage:
    architecture = Architecture(
        hidden_size=case.hidden, layers=case.layers, heads=case.heads,
        intermediate_size=case.hidden * 8 // 3,
    )  # fmt: skip
    return Stage(
        id="case", stage="grpo",
        model=Model(init="random", tokenizer="t", architecture=architecture),
        data=Data(sequence_length=case.prompt + case.answer),
        train=Train(steps=1, micro_batch=1),
        grpo=Grpo(rewards=("m:f",), group=max(2, case.once), max_new_tokens=case.answer),
    )  # fmt: skip


def predicted(case: Case) -> float:
    """Seconds of a draw, as the launcher says."""
    inner = case.hidden * 8 // 3
    shape = shapes.Shape(case.vocabulary, case.hidden, case.layers, case.heads, case.heads,
                         case.hidden // case.heads, inner, True)  # fmt: skip
    cpu = hardware.parse("cpu:1")
    return answers.drawing(stage(case), cpu, {"model": shape}, case.once, "full")[0]


def measured(case: Case) -> float:
    """CPU seconds of a draw, the median of three after one that warms up."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from trainer.rollouts import Generate
    from trainer.runtime import Runtime

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=case.vocabulary, hidden_size=case.hidden, num_hidden_layers=case.layers,
            num_attention_heads=case.heads, num_key_value_heads=case.heads,
            intermediate_size=case.hidden * 8 // 3, tie_word_embeddings=True,
            max_position_embeddings=4096, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        ),
        dtype=torch.float32,
    )  # fmt: skip
    plan = stage(case).grpo
    assert plan is not None
    plan = replace(plan, top_k=0)
    engine = Generate(model, plan, Runtime(torch.device("cpu"), "fp32"), [case.vocabulary])
    prompts = [[i % case.vocabulary for i in range(case.prompt)]]
    times = []
    for draw in range(1 + DRAWS):
        begun = time.process_time()
        engine.draw(prompts, case.once, str(draw), 0)
        times.append(time.process_time() - begun)
    return statistics.median(times[1:])


if __name__ == "__main__":
    sys.exit(main())
