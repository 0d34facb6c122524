"""How well the device is used: model FLOP/s utilisation, and what NVML says of the GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Optional

import numpy as np
import torch
from torch import nn

from trainer.data.stream import Rows
from trainer.runtime import Runtime

#: Configurations of mixtures of experts: a token meets only a part of their parameters.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


class Meter:
    """Facts of a logged step beyond its own. `peak_tflops`: bf16, of one worker's accelerator."""

    def __init__(
        self, model: nn.Module, rows: Rows, runtime: Runtime, peak_tflops: Optional[float]
    ) -> None:
        self._flops_per_row: Optional[float] = None
        self._model, self._device = model, runtime.device
        self._peak = (peak_tflops or 0.0) * 1e12 * runtime.world_size
        self._gpu = gpu_reader(runtime.device)
        self.read(rows)

    def read(self, rows: Rows) -> None:
        """From now on the rows that are counted are these."""
        # Of rows that only ask, what is trained on is not known here.
        learns = rows.summary["supervised_tokens"] > 0
        if self._peak and learns and self._device.type == "cuda":
            per_token = flops_per_token(self._model, mean_context(rows))
            if per_token is not None:
                self._flops_per_row = per_token * rows.summary["tokens"] / len(rows)

    def facts(self, examples_per_sec: float) -> dict[str, float]:
        """`mfu` (of 1) for `examples_per_sec` rows of all workers, padding not counted; and the
        utilisation [%], power [W] and temperature [C] of this process's GPU. What is not known is
        left out."""
        found = self._gpu()
        if self._flops_per_row is not None:
            found["mfu"] = examples_per_sec * self._flops_per_row / self._peak
        return found


def flops_per_token(model: nn.Module, context: float) -> Optional[float]:
    """Model FLOPs of one token's forward and backward: 6 N + 12 L H Q T (Chowdhery et al. 2022,
    arXiv 2204.02311, appendix B), where N counts the weights of matrix products, L layers, H heads
    of width Q, and T the `context`. A frozen weight has no gradient of its own: 4 instead of 6. A
    teacher's passes and recomputed activations do not count. None: not known for this model."""
    config: Any = model.config
    if any(getattr(config, name, None) for name in _EXPERTS):
        return None
    products = 0.0
    for parameter in _multiplied(model):
        if not parameter.is_floating_point():
            return None  # quantised: several weights share an element
        products += (6 if parameter.requires_grad else 4) * parameter.numel()
    heads = getattr(config, "num_attention_heads", None)
    layers = getattr(config, "num_hidden_layers", None)
    if not heads or not layers:
        return None
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return products + 12.0 * float(layers * heads * width) * context


def mean_context(rows: Rows) -> float:
    """The length of the document in which a token stands, on average over the tokens: packed
    documents do not see each other."""
    lengths = rows.chunks.lengths[rows.packing.items].astype(np.float64)
    return float((lengths**2).sum() / lengths.sum())


def gpu_reader(device: torch.device) -> Callable[[], dict[str, float]]:
    """What to call for `gpu_util`, `gpu_power_W` and `gpu_temp_C`; without a GPU or NVML, and for
    what the GPU does not tell, there is nothing in the answer."""
    if device.type != "cuda":
        return dict
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return nvml_reader(f"GPU-{uuid}")


def nvml_reader(uuid: str) -> Callable[[], dict[str, float]]:
    """`gpu_reader` of the GPU that NVML calls `uuid`: indices differ where some are hidden."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except Exception:  # not installed, no driver, no permission: it is only a convenience
        return dict

    readings: dict[str, Callable[[], float]] = {
        "gpu_util": lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        "gpu_power_W": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,  # of milliwatts
        "gpu_temp_C": lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
    }

    def read() -> dict[str, float]:
        found: dict[str, float] = {}
        for name, reading in readings.items():
            with contextlib.suppress(Exception):
                found[name] = float(reading())
        return found

    return read


def _multiplied(model: nn.Module) -> list[nn.Parameter]:
    """The matrices that tokens are multiplied with: an embedding is only looked up, unless it is
    the output head too (`parameters` gives a tied weight once)."""
    lookup = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is lookup
    return [p for p in model.parameters() if p.ndim >= 2 and (tied or p is not lookup)]
