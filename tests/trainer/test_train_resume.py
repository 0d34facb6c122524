"""`train.resume`: a new run that goes on from another run's checkpoint, here or in a store."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("google.cloud.storage", reason="gs:// needs the extra `google`")

from launcher.rehearsal.gcs import GcsServer
from tests.trainer.conftest import in_folder
from tests.trainer.remote import environment
from tests.trainer.test_loop import lines
from trainer import copies
from trainer.checkpoint import CheckpointError
from trainer.config import Adapter, ConfigError, Job, StageConfig, load_job, to_dict
from trainer.inputs import fetch_inputs
from trainer.mirror import Mirror
from trainer.store import open_store

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def gcs() -> Iterator[GcsServer]:
    with GcsServer() as server, environment(STORAGE_EMULATOR_HOST=server.url):
        server.objects.create_bucket("runs", {})
        yield server
    copies.use({})


@pytest.fixture
def config(stage: StageConfig) -> StageConfig:
    """Evaluated at 4, 8, ... and saved at 6, 12, ...: the best one is not the last one."""
    return in_folder(stage, Path(stage.output), evaluate_every=4, save_every=6, steps=16)


def weights(folder: Path, step: int = 16) -> bytes:
    return (folder / "checkpoints" / f"step-{step}" / "model.safetensors").read_bytes()


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["global_step"], line["train_loss"]) for line in lines(folder, "step")]


def test_a_run_interrupted_in_a_store_goes_on_elsewhere_as_if_nothing_had_been(
    config: StageConfig, run_stage: Run, tmp_path: Path, gcs: GcsServer
) -> None:
    undisturbed, first, second = (tmp_path / name for name in ("whole", "a", "b"))
    run_stage(in_folder(config, undisturbed))
    run_stage(in_folder(config, first, until=10))
    mirror = Mirror(first, open_store("gs://runs/a/student")).start()
    assert mirror.close(bound=60) == []
    uri = "gs://runs/a/student"
    job = Job(run="b", stages=(in_folder(config, second, resume=uri),))
    file = tmp_path / "job.json"
    file.write_text(json.dumps(to_dict(job)))
    fetch_inputs(file, tmp_path / "inputs", lambda line: None)
    job = load_job(file)
    copies.use(job.copies)
    outcome = run_stage(job.stages[0], "b")
    assert any("resumed at step 10 from " in line for line in outcome.lines)
    assert weights(second) == weights(undisturbed)
    assert losses(second) == losses(undisturbed)[10:]
    whole, ours = (json.loads((f / "evaluation.json").read_text()) for f in (undisturbed, second))
    assert ours == whole
    for pointer in ("last", "best"):
        texts = [
            (f / "checkpoints" / f"{pointer}.json").read_bytes() for f in (undisturbed, second)
        ]
        assert texts[0] == texts[1]
    # What is kept names the store, not this machine.
    kept = json.loads((second / "args_snapshot.json").read_text())
    assert kept["train"]["resume"] == f"{uri}/checkpoints/step-10"


def test_the_best_checkpoint_of_before_stays_the_best(
    config: StageConfig, run_stage: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer import evaluate

    values = iter([3.0, 4.0, 4.1, 4.2])
    monkeypatch.setattr(evaluate, "cross_entropy", lambda *a, **k: (next(values), 10))
    first, second = tmp_path / "a", tmp_path / "b"
    run_stage(in_folder(config, first, until=10))
    run_stage(in_folder(config, second, resume=str(first)))
    assert json.loads((second / "checkpoints" / "best.json").read_text()) == {
        "v": 1, "step": 4, "path": "step-4", "val_loss": 3.0,
    }  # fmt: skip
    assert weights(second, 4) == weights(first, 4)
    # The first run is as it was, and no longer needed.
    assert {path.name for path in (first / "checkpoints").iterdir()} >= {"step-4", "step-10"}


def test_an_own_checkpoint_comes_before_the_one_that_is_named(
    config: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    run_stage(in_folder(config, first, until=6))
    named = str(first / "checkpoints" / "step-6")
    run_stage(in_folder(config, second, until=12, resume=named))
    for path in (first / "checkpoints" / "step-6").iterdir():
        path.unlink()
    outcome = run_stage(in_folder(config, second, resume=named), attempt=2)
    assert any("resumed at step 12 from " in line for line in outcome.lines)
    assert torch.isfinite(torch.tensor(losses(second)[-1][1]))


def test_a_killed_adoption_leaves_nothing_that_is_taken_for_a_checkpoint(
    config: StageConfig, run_stage: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer import checkpoint

    first, second = tmp_path / "a", tmp_path / "b"
    run_stage(in_folder(config, first, until=6))
    done: list[str] = []

    def dies(source: str, target: str) -> None:
        done.append(source)
        if len(done) == 3:
            raise KeyboardInterrupt
        checkpoint.shutil.copy2(source, target)

    monkeypatch.setattr(checkpoint, "_link", dies)
    with pytest.raises(KeyboardInterrupt):
        run_stage(in_folder(config, second, resume=str(first)))
    assert not list((second / "checkpoints").iterdir())
    monkeypatch.undo()
    assert run_stage(in_folder(config, second, resume=str(first))).step == 16


def test_a_checkpoint_of_another_model_is_refused_by_what_differs(
    config: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    assert config.model is not None and config.model.architecture is not None
    first = tmp_path / "a"
    run_stage(in_folder(config, first, until=6))
    resumed = in_folder(config, tmp_path / "b", resume=str(first))
    deeper = replace(config.model, architecture=replace(config.model.architecture, layers=3))
    for attempt in (1, 2):  # nothing of it has become the stage's own
        with pytest.raises(ConfigError, match=r"model: num_hidden_layers is 2 there, 3 here"):
            run_stage(replace(resumed, model=deeper), attempt=attempt)
    with pytest.raises(ConfigError, match=r"^stage \w+: .*num_hidden_layers is 2 there, 3 here"):
        run_stage(replace(in_folder(config, first), model=deeper), attempt=2)  # nor of its own
    lora = replace(
        config.model, name=str(first), init="pretrained", architecture=None, adapter=Adapter()
    )
    with pytest.raises(ConfigError, match=r"holds a model, model\.adapter asks for an adapter"):
        run_stage(replace(resumed, model=lora, output=str(tmp_path / "c")))
    with pytest.raises(CheckpointError, match=r"its optimizer holds \d+ parameters"):
        frozen = replace(config.model, freeze=("model.layers.0.*",))
        run_stage(replace(resumed, model=frozen, output=str(tmp_path / "d")))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("empty", r"empty is not the folder of a stage that trains"),
        ("broken", r"no whole checkpoint \(1 broken\)"),
        ("broken/checkpoints/step-6", r"step-6: model\.safetensors has 0 bytes"),
        ("gs://runs/a", r"gs://runs/a: is not on this machine; fetch it"),
    ],
)
def test_what_cannot_be_resumed_is_one_line(
    name: str, said: str, config: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    if name.startswith("broken"):
        run_stage(in_folder(config, tmp_path / "broken", until=6, evaluate_every=0))
        (tmp_path / name.split("/")[0] / "checkpoints/step-6/model.safetensors").write_bytes(b"")
    reference = name if "://" in name else str(tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"^train\.resume: .*{said}") as caught:
        run_stage(in_folder(config, tmp_path / "b", resume=reference))
    assert "\n" not in str(caught.value)
