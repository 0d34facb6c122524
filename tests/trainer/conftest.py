"""Real text, a byte-level tokenizer and jobs that train in seconds."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from trainer.config import (
    Architecture,
    Data,
    Job,
    Model,
    Source,
    StageConfig,
    Train,
)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tokenizer whose tokens are bytes."""
    from trainer.data.tokenizer import byte_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A JSONL file of 48 documents of unequal length, all shorter than 120 bytes."""
    from pydoc_data.topics import topics

    words = " ".join(topics["typesseq"].split())
    path = tmp_path_factory.mktemp("texts") / "train.jsonl"
    lengths = [7 + (i * 37) % 110 for i in range(48)]
    starts = [sum(lengths[:i]) for i in range(48)]
    lines = [json.dumps({"text": words[s : s + n]}) for s, n in zip(starts, lengths)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def stage(tmp_path: Path, tokenizer: str, texts: str) -> StageConfig:
    """A tiny `pretrain` stage of 20 steps, with attention dropout so that RNG matters."""
    return StageConfig(
        id="tiny",
        stage="pretrain",
        output=str(tmp_path / "out"),
        model=Model(
            init="random",
            tokenizer=tokenizer,
            architecture=Architecture(
                hidden_size=32, layers=2, heads=4, kv_heads=2, intermediate_size=64, dropout=0.1
            ),
        ),
        data=Data(
            train=(Source(path=texts),), validation=(Source(path=texts),), sequence_length=128
        ),
        train=Train(steps=20, micro_batch=4, lr=3e-3, log_every=1, warmup=2),
    )


@pytest.fixture
def run_stage() -> Callable[..., Any]:
    """Run a stage in this process; the lines it said are in `.lines` of the result."""
    from trainer import interrupts, runtime, stages

    def run(config: StageConfig, run_id: str = "r", **job: Any) -> Any:
        lines: list[str] = []
        with interrupts.listening() as signalled, runtime.start() as process:
            outcome = stages.run_stage(
                config, Job(run=run_id, stages=(config,), **job), process, lines.append, signalled
            )
        outcome.lines = lines
        return outcome

    return run


def in_folder(config: StageConfig, folder: Path, **train: Any) -> StageConfig:
    """The stage with another output folder and other settings of `train`."""
    assert config.train is not None
    return replace(config, output=str(folder), train=replace(config.train, **train))


def torchrun(*command: str) -> subprocess.CompletedProcess[str]:
    """`python COMMAND` on two processes of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    root = str(Path(__file__).resolve().parents[2])
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    return subprocess.run(
        [sys.executable, *start, *command], capture_output=True, text=True, env=environ, timeout=120
    )
