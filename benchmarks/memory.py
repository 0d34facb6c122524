"""The forecast of memory (launcher/fit) against what torch counts for the trainer's own step.

    python benchmarks/memory.py                  every case: forecast, counted, error
    python benchmarks/memory.py --case 1b-full   one case, or those whose names begin so
    python benchmarks/memory.py --check          exits 1 when a case is off by more than 10%
    python benchmarks/memory.py --write          results/memory.json
    python benchmarks/memory.py --device cuda    real tensors on a GPU: max_memory_allocated, 15%

A model of full size is made of fake tensors, which have shapes and dtypes but no memory, and takes
one whole step through the trainer's code: teacher pass, forward, loss, backward, clipping, AdamW,
with as much ballast as its moments take. torch.distributed's MemTracker counts the storages that
exist after every operation. No GPU is needed, nor the weights; a case takes 10 to 40 s of a core.

What differs from a GPU. The tensors are a CPU's, since torch built without CUDA cannot
differentiate a GPU's fakes; the losses are told to do what they do on CUDA without Triton.
Attention is the CPU's fused kernel: like those of CUDA it keeps queries, keys, values, its result
and a logarithm a head and token, and no scores. Where autograd adds two gradients, torch without a
tracker writes over one of them; with it there is a third, so that a step whose peak is the gradient
of a tied embedding is counted up to 5% too high. Context, communication and the allocator's slack
are not counted, and not compared.

Constants of the forecast that are measured, not derived (what a block's forward and backward pass
have in hand), were read off models cut to two and four blocks; no case here is such a model.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional
from unittest.mock import patch

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "memory.json"
LIMIT, CUDA_LIMIT = 0.10, 0.15


@dataclass(frozen=True)
class Case:
    """One step of one model. `stored`: distillation from a teacher's stored answers; `stage` says
    what else is learned, with `teacher` as the surrogate of sdce."""

    name: str
    model: str
    length: int
    rows: int
    checkpointing: bool = False
    adapter: bool = False
    teacher: Optional[str] = None
    stored: bool = False
    accumulate: int = 1
    packing: bool = True
    precision: Literal["bf16", "fp32"] = "bf16"
    freeze: tuple[str, ...] = ()
    selective: bool = False
    stage: Literal["sft", "dpo", "ipo", "sdce"] = "sft"
    kl: bool = False  # sdce: the whole distribution
    workers: int = 1  # that share the model (train.parallel: fsdp)
    off: bool = False  # dpo and ipo: the reference is the model with its adapter switched off


_1B, _8B = "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B"
CASES = (
    Case("1b-full-1024", _1B, 1024, 8),
    Case("1b-full-2048", _1B, 2048, 8),
    Case("1b-full-2048-checkpointing", _1B, 2048, 16, True),
    Case("1b-full-4096-checkpointing", _1B, 4096, 16, True),
    Case("1b-full-1024-accumulate", _1B, 1024, 2, accumulate=4),
    Case("1b-full-1024-padded", _1B, 1024, 8, packing=False),
    Case("1b-lora-2048", _1B, 2048, 4, adapter=True),
    Case("1b-kd8b-1024", _1B, 1024, 8, teacher=_8B),
    Case("1b-kd8b-2048-checkpointing", _1B, 2048, 8, True, teacher=_8B),
    Case(
        "1b-kd8b-2048-frozen", _1B, 2048, 1, True, teacher=_8B, accumulate=8,
        freeze=("model.embed_tokens.*",),
    ),
    Case("1b-kd-stored-1024", _1B, 1024, 8, stored=True),
    Case("8b-full-1024", _8B, 1024, 1),
    Case("8b-full-2048-checkpointing", _8B, 2048, 8, True),
    Case("8b-lora-1024", _8B, 1024, 4, adapter=True),
    Case("8b-lora-2048", _8B, 2048, 1, adapter=True),
    Case("8b-lora-2048-checkpointing", _8B, 2048, 8, True, adapter=True),
    Case("1b-full-2048-selective", _1B, 2048, 8, selective=True),
    Case("1b-full-1024-selective", _1B, 1024, 8, selective=True),
    Case("8b-full-2048-selective", _8B, 2048, 4, selective=True),
    Case("8b-lora-2048-selective", _8B, 2048, 4, adapter=True, selective=True),
    Case("1b-fp32-full-1024-selective", _1B, 1024, 4, precision="fp32", selective=True),
    Case("qwen3-0.6b-full-2048-selective", "Qwen/Qwen3-0.6B", 2048, 4, selective=True),
    Case("qwen3-0.6b-full-2048", "Qwen/Qwen3-0.6B", 2048, 4),
    Case("1b-fp32-full-1024", _1B, 1024, 4, precision="fp32"),
    Case("1b-fp32-lora-1024-checkpointing", _1B, 1024, 4, True, True, precision="fp32"),
    Case("1b-dpo-1024", _1B, 1024, 8, stage="dpo"),
    Case("1b-fp32-dpo-1024", _1B, 1024, 4, precision="fp32", stage="dpo"),
    Case("1b-ipo-2048-checkpointing", _1B, 2048, 8, True, stage="ipo"),
    Case("1b-dpo-1024-accumulate", _1B, 1024, 2, accumulate=4, stage="dpo"),
    Case("8b-dpo-lora-1024", _8B, 1024, 4, adapter=True, stage="dpo", off=True),
    Case("1b-sdce8b-1024", _1B, 1024, 8, teacher=_8B, stage="sdce"),
    Case("1b-sdce8b-2048-checkpointing", _1B, 2048, 8, True, teacher=_8B, stage="sdce"),
    Case("1b-sdce8b-kl-1024", _1B, 1024, 8, teacher=_8B, stage="sdce", kl=True),
    Case("1b-fp32-sdce1b-1024", _1B, 1024, 4, teacher=_1B, precision="fp32", stage="sdce"),
    Case("1b-fsdp8-1024", _1B, 1024, 8, workers=8),
    Case("8b-fsdp8-2048-checkpointing", _8B, 2048, 4, True, workers=8),
    Case("8b-fsdp8-512-checkpointing", _8B, 512, 1, True, workers=8),
    Case("8b-fsdp8-2048-accumulate", _8B, 2048, 1, accumulate=4, workers=8),
    Case(
        "8b-fsdp8-512-frozen", _8B, 512, 1, True, workers=8,
        freeze=("model.embed_tokens.*", "lm_head.*"),
    ),
    Case("8b-fsdp8-lora-2048-checkpointing", _8B, 2048, 8, True, adapter=True, workers=8),
    Case("8b-fsdp8-lora-1024", _8B, 1024, 4, adapter=True, workers=8),
    Case("1b-fp32-fsdp4-1024", _1B, 1024, 4, precision="fp32", workers=4),
    Case("qwen3-0.6b-fsdp2-2048", "Qwen/Qwen3-0.6B", 2048, 4, workers=2),
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--case", default="", help="only the cases whose names begin so")
    parser.add_argument("--check", action="store_true", help="exit 1 over the limit")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument("--device", choices=("none", "cuda"), default="none")
    options = parser.parse_args()
    on_cuda = options.device == "cuda"
    limit = CUDA_LIMIT if on_cuda else LIMIT
    sys.path.insert(0, str(REPOSITORY))
    rows = []
    print(f"{'case':32} {'forecast':>9} {'counted':>9}  error   moment")
    for case in CASES:
        if not case.name.startswith(options.case):
            continue
        began = time.process_time()
        row = compare(case, count_on_cuda if on_cuda else count)
        rows.append({**row, "cpu_seconds": round(time.process_time() - began, 1)})
        print(
            f"{case.name:32} {row['forecast'] / 2**30:5.2f} GiB {row['counted'] / 2**30:5.2f} GiB"
            f"  {row['error']:+6.1%} {row['moment']}",
            flush=True,
        )
    if options.write:
        import torch
        import transformers

        about = {"torch": torch.__version__, "transformers": transformers.__version__}
        RESULTS.write_text(json.dumps({"v": 1, **about, "limit": limit, "cases": rows}, indent=1))
    worst = max((abs(row["error"]) for row in rows), default=1.0)
    print(f"largest error {worst:.1%}, limit {limit:.0%}")
    return int(options.check and worst > limit)


def compare(case: Case, counting: Optional[Callable[[Case], int]] = None) -> dict[str, Any]:
    """The forecast of a case and what is counted, in bytes, and the error of the forecast."""
    from launcher import fit, hardware, shapes

    stage = stage_of(case)
    accelerator = hardware.parse(f"H100:{case.workers}")
    found = fit.memory(stage, accelerator, 1, shapes.of_stage(stage, (stage,), REPOSITORY))
    assert found is not None
    counted = (counting or count)(case)
    error = found.allocated / counted - 1
    return {
        "case": case.name, "forecast": round(found.allocated), "counted": counted,
        "error": round(error, 4), "moment": found.moment,
    }  # fmt: skip


def stage_of(case: Case) -> Any:
    """The stage of a recipe that a case is."""
    from launcher.spec import Stage
    from trainer.config import Adapter, Data, Distill, Model, Preference, Sdce, Train

    kd = sdce = preference = None
    if case.stored:
        kd = Distill(mode="precompute", targets="stored")
    elif case.stage == "sdce":
        sdce = Sdce(surrogate=case.teacher, loss="kl" if case.kl else "surrogate")
    elif case.teacher is not None:
        kd = Distill(teacher=case.teacher)
    elif case.stage != "sft":
        preference = Preference(reference="adapter" if case.off else "precompute")
    return Stage(
        id="step",
        stage=case.stage if kd is None else "kd",
        model=Model(
            name=case.model,
            attention="sdpa",
            precision=case.precision,
            freeze=case.freeze,
            gradient_checkpointing="selective" if case.selective else case.checkpointing,
            adapter=Adapter(rank=16) if case.adapter else None,
        ),
        data=Data(sequence_length=case.length, packing=case.packing),
        train=Train(
            steps=1,
            micro_batch=case.rows,
            accumulate=case.accumulate,
            parallel="fsdp" if case.workers > 1 else "ddp",
        ),
        kd=kd,
        sdce=sdce,
        preference=preference,
    )


def count(case: Case) -> int:
    """Bytes of all storages at the peak of one step of fake tensors."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    tracker = _tracker()

    @contextlib.contextmanager
    def tracked(*modules: Any) -> Iterator[None]:
        tracker.track_external(*modules)
        with tracker, _values():
            yield

    with _configured(case), _losses_as_on_cuda(case), _workers(case), FakeTensorMode():
        _step(case, torch.device("cpu"), tracked)
        return int(sum(device["Total"] for device in tracker.get_tracker_snapshot("peak").values()))


def count_on_cuda(case: Case) -> int:
    """What torch's allocator had handed out at the peak of one real step."""
    import torch

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with _configured(case):
        _step(case, torch.device("cuda"), lambda *modules: contextlib.nullcontext())
    return int(torch.cuda.max_memory_allocated())


def _step(case: Case, device: Any, watch: Callable[..., Any]) -> None:
    """One step as the loop takes it, the first one, beside the ballast of the moments."""
    import torch

    from trainer import models, probe
    from trainer.objectives.distill import DistillOnline
    from trainer.objectives.next_token import NextToken
    from trainer.optimizer import clip, make_optimizer, unscale
    from trainer.runtime import Runtime
    from trainer.step import backward, normalisers, prepare

    stage, runtime = stage_of(case), Runtime(device, case.precision, 0, case.workers)
    with _values() if case.workers > 1 else contextlib.nullcontext():
        model = models.load_model(stage.model, None, runtime, seed=0, share=stage.train.parallel)
    read = []
    objective: Any = NextToken()
    if case.stored:
        objective = _stored(stage.kd, runtime)
    elif case.stage == "sdce":
        read = [models.load_frozen(str(case.teacher), runtime, models.PLAIN_ATTENTION)]
        objective = _guided(stage.sdce, read[0], runtime)
    elif stage.preference is not None:
        objective = _prefer(case.stage, stage.preference, runtime)
    elif case.teacher is not None:
        read = [models.load_frozen(case.teacher, runtime, models.PLAIN_ATTENTION)]
        objective = DistillOnline(stage.kd, read[0], runtime)
    optimizer = make_optimizer(model, stage.train)
    with watch(model, *read):
        ballast = probe.ballast(model, runtime, optimizer)
        group = [_batch(case) for _ in range(case.accumulate)]
        batches = prepare(objective, group, runtime, 0)
        backward(model, objective, batches, normalisers(batches, runtime), runtime, log=True)
        norm = unscale(model, 1.0)
        ballast.clear()
        clip(model, norm, stage.train.clip)
        if case.workers > 1:  # DTensor asks for shapes with whole tensors, which would be counted
            return
        optimizer.found_inf = (~torch.isfinite(norm)).float()
        optimizer.step()


def _batch(case: Case) -> Any:
    """Rows of two documents, or of one where they are not packed."""
    import torch

    from trainer.batch import Batch

    ids = torch.zeros((case.rows, case.length), dtype=torch.int64)
    documents = 2 if case.packing else 1
    positions = torch.arange(case.length).remainder(case.length // documents)
    return Batch(ids, positions.repeat(case.rows, 1), ids.clone())


@contextlib.contextmanager
def _configured(case: Case) -> Iterator[None]:
    """Models by name, in Transformers' own words and with random weights."""
    import transformers

    from launcher import shapes
    from trainer import models

    made = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}
    with tempfile.TemporaryDirectory() as folder:
        for name in filter(None, (case.model, case.teacher)):
            shape = shapes.of_reference(name, Path(folder))
            assert shape is not None
            made[shape.family](
                vocab_size=shape.vocabulary,
                hidden_size=shape.hidden,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.kv_heads,
                head_dim=shape.head_dim,
                intermediate_size=shape.intermediate,
                tie_word_embeddings=shape.tied,
            ).save_pretrained(Path(folder) / name)

        def load(reference: str, dtype: Any, attention: Any) -> Any:
            configuration = transformers.AutoConfig.from_pretrained(Path(folder) / reference)
            kind = models.pick_attention(configuration, attention)
            return transformers.AutoModelForCausalLM.from_config(
                configuration, dtype=dtype, attn_implementation=kind
            )

        with patch.object(models, "load_pretrained", load):
            yield


@contextlib.contextmanager
def _losses_as_on_cuda(case: Case) -> Iterator[None]:
    """On fake tensors of a CPU, the losses do what they do on CUDA without Triton."""
    import torch
    from transformers import masking_utils

    from trainer.losses import chunks, heads, linear, rows

    with contextlib.ExitStack() as stack:
        for changed in (
            # Moving fake parameters to where they are is refused; there is nothing to move.
            patch.object(torch.nn.Module, "_apply", lambda self, fn, recurse=True: self),
            patch.object(chunks, "CPU_BUFFER", chunks.DEVICE_BUFFER),
            patch.object(heads, "_mixed_output", lambda device: True),
            patch.object(heads, "_mixed_accumulation", lambda device: True),
            patch.object(linear, "rows_for", lambda device, dtype: rows.TorchRows()),
        ):
            stack.enter_context(changed)
        if not case.packing:  # one document a row, which tensors without values cannot show
            one = patch.object(
                masking_utils, "find_packed_sequence_indices", lambda positions: None
            )
            stack.enter_context(one)
        yield


@contextlib.contextmanager
def _workers(case: Case) -> Iterator[None]:
    """A group of as many workers, of which only the first is there: what it would get from the
    others has the right size and no values."""
    if case.workers == 1:
        yield
        return
    import torch.distributed as dist
    from torch.distributed import device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=case.workers)
    try:  # a mesh has values to look at, so it cannot be made of fakes
        mesh = device_mesh.init_device_mesh("cpu", (case.workers,))
        with patch.object(device_mesh, "init_device_mesh", lambda *arguments: mesh):
            yield
    finally:
        dist.destroy_process_group()


def _tracker() -> Any:
    """Torch's MemTracker without its statistics of modules: its hooks fail on parameters that
    learn nothing and on a module that runs twice. What it counts is the same."""
    from torch.distributed._tools.mem_tracker import MemTracker

    class Storages(MemTracker):
        def _pre_fw_hook(self, *arguments: Any) -> None:
            return None

        _post_fw_hook = _pre_bw_hook = _post_bw_hook = _pre_fw_hook

    return Storages()


def _values() -> Any:
    """Answers where the trainer looks at a value, which fake tensors do not have: flags are true,
    numbers 0, and every position has a target."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Values(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if function is torch.ops.aten._local_scalar_dense.default:
                return args[0].dtype == torch.bool or 0
            if function is torch.ops.aten.nonzero.default:
                return torch.zeros((args[0].numel(), args[0].dim()), dtype=torch.int64)
            return function(*args, **(kwargs or {}))

    return Values()


def _stored(kd: Any, runtime: Any) -> Any:
    """Distillation from stored answers, 16 to a token, without the store."""
    import torch

    from trainer.objectives.distill_stored import DistillStored

    class Answers:
        sampled, name = True, "none"

    class Stored(DistillStored):
        def prepare(self, batch: Any, step: int) -> Any:
            tokens = len(batch.labels)
            batch.extra.update(
                ids=torch.zeros((tokens, 16), dtype=torch.int64),
                p=torch.zeros((tokens, 16)),
                teacher_status=torch.ones(tokens, dtype=torch.bool),
            )
            weight = torch.tensor(float(tokens), dtype=torch.float64)
            batch.weights.update(ce=weight, kd=weight)
            return batch

    return Stored(kd, Answers(), runtime)  # type: ignore[arg-type]


def _prefer(kind: Any, config: Any, runtime: Any) -> Any:
    """Two answers to a row, whose log-probs by the reference are known, or are asked for."""
    import torch

    from trainer.objectives.preference import Prefer
    from trainer.reference import Known

    class Pairs(Prefer):
        def prepare(self, batch: Any, step: int) -> Any:
            answers, device = 2 * batch.rows, batch.labels.device
            each = len(batch.labels) // answers
            number = torch.arange(len(batch.labels), device=device)
            tokens = torch.full((answers,), float(each), dtype=torch.float64, device=device)
            batch.extra.update(answer=number // each, tokens=tokens, reference=-tokens)
            weight = torch.tensor(float(batch.rows), dtype=torch.float64)
            batch.weights.update(tokens=weight * each * 2, pairs=weight, chosen=weight * each)
            return batch

    return Pairs(kind, config, runtime, Known({}) if config.reference == "precompute" else None)


def _guided(config: Any, model: Any, runtime: Any) -> Any:
    """What a surrogate with the model's own tokenizer holds likely."""
    import numpy as np

    from trainer.models import head_weight
    from trainer.objectives.sdce import SurrogateGuided
    from trainer.surrogate import Surrogate

    class Words:
        same, to_ours = True, np.arange(len(head_weight(model)))

    surrogate = Surrogate(model, Words(), runtime)  # type: ignore[arg-type]
    surrogate.move()
    return SurrogateGuided(config, surrogate)


if __name__ == "__main__":
    sys.exit(main())
