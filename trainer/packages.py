"""The packages that only some stages need. The standard library alone: boot reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def required(stage: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The packages that a stage (as JSON has it) cannot do without beside those that every job
    needs, each with what asks for it."""
    model = stage.get("model") or {}
    if (model.get("adapter") or {}).get("quantization") == "nf4":
        yield "bitsandbytes", "model.adapter.quantization: nf4"
    if (float8 := model.get("float8")) in ("torchao", "transformer_engine"):
        yield float8.replace("_", "-"), f"model.float8: {float8}"
    if (stage.get("export") or {}).get("format") == "gguf":
        yield "gguf", "export.format: gguf"
    data = stage.get("data") or {}
    for key in ("train", "validation"):
        if any(source.get("hf") for source in data.get(key) or ()):
            yield "datasets", f"data.{key}: hf"


def source_of(package: str) -> str:
    """What pip is to install for a package that `required` names."""
    if package == "transformer-engine":
        return "transformer-engine[pytorch]"
    return "launch-llm[hub]" if package == "datasets" else "launch-llm[quantize]"
