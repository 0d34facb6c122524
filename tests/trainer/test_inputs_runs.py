"""Stages that read their inputs from a store and write to one, on machines that change."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("google.cloud.storage", reason="gs:// needs the extra `google`")

from launcher.rehearsal.faults import Fault, Script
from launcher.rehearsal.gcs import GcsServer
from tests.trainer.conftest import in_folder
from tests.trainer.remote import QUICK, environment
from trainer import adapters, copies, export
from trainer.checkpoint import resolve
from trainer.config import (
    Adapter,
    ConfigError,
    Data,
    Distill,
    Export,
    Job,
    Merge,
    Model,
    Source,
    StageConfig,
    Targets,
    load_job,
    to_dict,
)
from trainer.inputs import fetch_inputs
from trainer.shrink import shrink
from trainer.store import Store, Transient, open_store
from trainer.store_gcs import GcsStore
from trainer.store_remote import Patience

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def gcs() -> Iterator[GcsServer]:
    with GcsServer() as server, environment(STORAGE_EMULATOR_HOST=server.url):
        server.objects.create_bucket("b", {})
        yield server
    copies.use({})


@pytest.fixture
def server(gcs: GcsServer) -> Iterator[GcsServer]:
    gcs.faults = Script()
    yield gcs
    gcs.faults = Script()
    for name in gcs.objects.names("b"):
        gcs.objects.delete("b", name)


@pytest.fixture
def base(stage: StageConfig, run_stage: Run, tmp_path: Path) -> StageConfig:
    """A stage that has trained a model for two steps."""
    config = in_folder(stage, tmp_path / "base", steps=2)
    run_stage(config)
    return config


class Machine:
    """A machine with a disk of its own: fetches what stages read, and runs them."""

    def __init__(self, disk: Path, run_stage: Run) -> None:
        self.disk, self.run_stage = disk, run_stage

    def run(self, config: StageConfig) -> StageConfig:
        """Returns the stage as it was run here; what it said is in `said`."""
        self.disk.mkdir(exist_ok=True)
        file = self.disk / "job.json"
        file.write_text(json.dumps(to_dict(Job(run="r", stages=(config,)))))
        fetch_inputs(file, self.disk / "inputs", lambda line: None)
        job = load_job(file)
        copies.use(job.copies)
        self.said: list[str] = self.run_stage(job.stages[0]).lines
        return job.stages[0]


def exports(base: StageConfig, tmp_path: Path, to: str = "gs://b/models/tiny") -> StageConfig:
    settings = Export(model=base.output, to=to)
    return StageConfig(id="e", stage="export", output=str(tmp_path / "export"), export=settings)


def test_a_model_exported_to_a_bucket_is_trained_from_there(
    server: GcsServer, base: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    asked = exports(base, tmp_path)
    run_stage(asked)
    names = server.objects.names("b")
    here = {f"models/tiny/{p.name}" for p in Path(base.output, "checkpoints/step-2").iterdir()}
    assert set(names) == here - {"models/tiny/trainer_state.pt", "models/tiny/MANIFEST.json"}
    # A copy stays in the stage's folder, and the same again is no conflict.
    assert (tmp_path / "export" / "config.json").exists()
    run_stage(asked, attempt=2)
    assert base.train is not None
    start = Model(name="gs://b/models/tiny")
    machine = Machine(tmp_path / "m", run_stage)
    ran = machine.run(replace(in_folder(base, tmp_path / "s", steps=1, lr=1e-30), model=start))
    assert ran.model is not None and "://" not in str(ran.model.name)
    ours = load_file(tmp_path / "s/checkpoints/step-1/model.safetensors")
    theirs = load_file(Path(base.output) / "checkpoints/step-2/model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    kept = json.loads((tmp_path / "s" / "args_snapshot.json").read_text())
    assert kept["model"]["name"] == "gs://b/models/tiny"
    assert any(line.startswith("model gs://b/models/tiny: ") for line in machine.said)


def test_an_export_takes_no_place_of_another_model(
    server: GcsServer, base: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    open_store("gs://b/models/tiny").put_bytes("config.json", b"{}")
    with pytest.raises(ConfigError, match=r"gs://b/models/tiny is taken .*\(config\.json\)"):
        run_stage(exports(base, tmp_path))
    assert server.objects.names("b") == ["models/tiny/config.json"]
    for to in ("http://x/y", "s4://b"):
        with pytest.raises(ValueError, match=r"gs://BUCKET/FOLDER, s3://BUCKET/FOLDER or hub:NAME"):
            Export(model="m", to=to)


def test_an_export_that_an_outage_cut_goes_on_the_next_time(
    server: GcsServer, base: StageConfig, run_stage: Run, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def opened(uri: str) -> Store:
        return GcsStore(uri, Patience(**QUICK, total=0.02))

    monkeypatch.setattr(export, "open_store", opened)
    server.faults = Script([("POST", Fault("slow")), *[("POST", Fault("status", 503))] * 500])
    with pytest.raises(Transient, match="cannot write gs://b/models/tiny/"):
        run_stage(exports(base, tmp_path))
    (sent,) = server.objects.names("b")
    assert sent != "models/tiny/config.json"  # what makes it a model comes last
    server.faults = Script()
    run_stage(exports(base, tmp_path), attempt=2)
    assert {"models/tiny/config.json", "models/tiny/model.safetensors"} <= set(
        server.objects.names("b")
    )


def test_an_adapter_of_a_model_in_a_bucket_is_merged_on_another_machine(
    server: GcsServer, base: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    run_stage(exports(base, tmp_path))
    model = Model(name="gs://b/models/tiny", adapter=Adapter(rank=2))
    tuned = replace(in_folder(base, tmp_path / "lora", steps=3, until=2), model=model)
    Machine(tmp_path / "one", run_stage).run(tuned)
    saved = Path(resolve(tuned.output))
    config = json.loads((saved / adapters.CONFIG).read_text())
    assert config["base_model_name_or_path"] == "gs://b/models/tiny"
    merged = StageConfig(
        id="m", stage="merge", output=str(tmp_path / "merged"), merge=Merge(adapter=tuned.output)
    )
    Machine(tmp_path / "two", run_stage).run(merged)
    assert (tmp_path / "merged" / "model.safetensors").exists()
    # An interrupted stage goes on with its adapter on a third one.
    again = in_folder(tuned, tmp_path / "lora", until=None)
    ran = Machine(tmp_path / "three", run_stage).run(again)
    assert ran.model is not None and str(tmp_path / "three") in str(ran.model.name)


def test_stored_answers_stay_valid_on_another_machine(
    server: GcsServer, base: StageConfig, run_stage: Run, tmp_path: Path, texts: str
) -> None:
    """Their shards say which teacher gave them: by its name, not by where its copy was."""
    run_stage(exports(base, tmp_path))
    config = StageConfig(
        id="t", stage="targets", output=str(tmp_path / "t"),
        data=Data(train=(Source(path=texts),), sequence_length=128),
        targets=Targets(teacher="gs://b/models/tiny"),
    )  # fmt: skip
    Machine(tmp_path / "one", run_stage).run(config)
    meta = next((tmp_path / "t" / "targets").glob("shard-*/meta.json"))
    assert json.loads(meta.read_text())["teacher"] == "gs://b/models/tiny"
    first = meta.stat().st_mtime_ns
    (tmp_path / "t" / "run_meta.json").unlink()  # as if it had been killed before its end
    Machine(tmp_path / "two", run_stage).run(config)
    assert meta.stat().st_mtime_ns == first


def test_the_client_asks_for_nothing_but_objects(server: GcsServer) -> None:
    """The library's own look at the bucket, in a thread, needs a right that jobs do not have."""
    server.log.clear()
    store = open_store("gs://b/x")
    store.put_bytes("k", b"v")
    assert (store.get_bytes("k"), store.list()) == (b"v", ["k"])
    for thread in threading.enumerate():
        if "_fetch_background" in thread.name:
            thread.join()
    assert [row for row in server.log if "/o" not in row[1]] == []


def test_a_dry_run_needs_nothing_of_a_bucket(
    stage: StageConfig, run_stage: Run, tmp_path: Path
) -> None:
    uri = "gs://no-such-bucket/x"
    asked = replace(
        in_folder(stage, tmp_path / "dry", resume=uri, steps=None, seconds_of=uri),
        stage="kd",
        model=Model(name=uri, tokenizer=uri),
        data=Data(train=(Source(path=f"{uri}/*"), Source(manifest=uri)), chat_template=uri),
        kd=Distill(mode="precompute", logits_dir=uri),
    )
    config, notes = shrink(asked, set())
    assert uri not in json.dumps(to_dict(config))
    assert any(note.startswith(f"data.chat_template {uri}: not on this machine") for note in notes)
    assert run_stage(config).step == 1
