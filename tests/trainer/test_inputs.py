"""What a job reads from stores: which objects come, where the job file points, and what goes wrong.

The objects lie on the rehearsal's gs:// server; one test asks moto's s3://.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("google.cloud.storage", reason="gs:// needs the extra `google`")

from launcher.rehearsal.faults import Fault, Script
from launcher.rehearsal.gcs import GcsServer
from launcher.rehearsal.gcs_state import Conditions
from tests.trainer.remote import QUICK, environment, moto_server
from tests.trainer.test_store_remote import AWS
from trainer import downloads
from trainer.config import (
    ConfigError,
    Data,
    Distill,
    Evaluate,
    Export,
    Hub,
    Job,
    Merge,
    Model,
    Source,
    StageConfig,
    Train,
    load_job,
    to_dict,
)
from trainer.data import DataError
from trainer.data.read import documents
from trainer.downloads import INDEX
from trainer.inputs import fetch_inputs
from trainer.manifest import MANIFEST, STATE
from trainer.store import Denied, DiskFull, Store, StoreError, Transient, open_store
from trainer.store_gcs import GcsStore
from trainer.store_remote import Patience
from trainer.wanted import _matches

PATIENCE = Patience(**QUICK, total=5.0)
UNIQUE = itertools.count()


@pytest.fixture(scope="module")
def gcs() -> Iterator[GcsServer]:
    with GcsServer() as server, environment(STORAGE_EMULATOR_HOST=server.url):
        server.objects.create_bucket("in", {})
        yield server


@pytest.fixture
def server(gcs: GcsServer) -> Iterator[GcsServer]:
    gcs.log.clear()
    gcs.faults = Script()
    yield gcs
    gcs.faults = Script()
    gcs.objects.denied.clear()


class World:
    """A folder of its own in the bucket, and a job on this machine."""

    def __init__(self, server: GcsServer, tmp: Path) -> None:
        self.server, self.tmp = server, tmp
        self.base = f"t{next(UNIQUE)}"
        self.uri = f"gs://in/{self.base}"
        self.folder = tmp / "inputs"
        self.file = tmp / "job.json"
        self.said: list[str] = []
        self.patience = PATIENCE

    def put(self, name: str, content: str | bytes) -> str:
        """An object as another tool would have put it; its URI."""
        data = content.encode() if isinstance(content, str) else content
        self.server.objects.insert("in", f"{self.base}/{name}", data, {}, Conditions())
        return f"{self.uri}/{name}"

    def put_folder(self, name: str, files: dict[str, bytes]) -> str:
        for inner, data in files.items():
            self.put(f"{name}/{inner}", data)
        return f"{self.uri}/{name}"

    def checkpoint(self, stage: str, step: int, **files: bytes) -> dict[str, bytes]:
        """A checkpoint of a stage, manifest and all: its files by name."""
        held = {
            "config.json": b"{}", "model.safetensors": b"w" * 90 + bytes([step]),
            "tokenizer.json": b"[]", STATE: b"optimizer" * step,
            **{name.replace("__", "."): data for name, data in files.items()},
        }  # fmt: skip
        listed = {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in held.items()
        }
        manifest = json.dumps({"v": 1, "step": step, "files": listed})
        self.put_folder(f"{stage}/checkpoints/step-{step}", held)
        self.put(f"{stage}/checkpoints/step-{step}/{MANIFEST}", manifest)
        return held

    def best(self, stage: str, step: int) -> None:
        pointer = {"v": 1, "step": step, "path": f"step-{step}", "val_loss": 1.0}
        self.put(f"{stage}/checkpoints/best.json", json.dumps(pointer))

    def fetch(self, *stages: StageConfig, **job: Any) -> list[dict[str, Any]]:
        """The stages as the job file has them afterwards."""
        self.file.write_text(json.dumps(to_dict(Job(run="r", stages=stages, **job))))
        self.said.clear()
        self.server.log.clear()
        fetch_inputs(self.file, self.folder, self.said.append, self.open)
        load_job(self.file)
        found: list[dict[str, Any]] = json.loads(self.file.read_text())["stages"]
        return found

    def open(self, uri: str) -> Store:
        return GcsStore(uri, self.patience) if uri.startswith("gs://") else open_store(uri)

    def downloads(self) -> list[str]:
        return [row[1] for row in self.server.log if "alt=media" in row[1]]

    def here(self, name: str = "") -> Path:
        """Where the copy of an object of this world is."""
        return self.folder / "gs" / "in" / self.base / name

    def copies(self) -> set[str]:
        """The names of all copies."""
        base = self.here()
        return {p.relative_to(base).as_posix() for p in base.rglob("*") if p.is_file()}


@pytest.fixture
def world(server: GcsServer, tmp_path: Path) -> World:
    return World(server, tmp_path)


def stage(output: Path | str = "/nowhere/out", **blocks: Any) -> StageConfig:
    return StageConfig(id="s", stage="pretrain", output=str(output), **blocks)


def reading(*sources: Source, **data: Any) -> StageConfig:
    return stage(data=Data(train=sources, **data))


def texts(*words: str) -> str:
    return "".join(json.dumps({"text": word}) + "\n" for word in words)


def test_a_file_a_folder_and_a_glob_read_like_local_ones(world: World) -> None:
    """The same documents with the same ids, and nothing that the reader would not read."""
    for name in ("a.jsonl", "b/c.jsonl", "b/d/e.txt", "b/.hidden.jsonl", "b/table.csv"):
        world.put(f"data/{name}", texts(name))
    ways = ["data/a.jsonl", "data", "data/b/", "data/**/*.jsonl", "data/b/*/?.txt", "data/[ab]/c*"]
    (found,) = world.fetch(reading(*(Source(path=f"{world.uri}/{way}") for way in ways)))
    whole = world.tmp / "whole"
    for name in ("a.jsonl", "b/c.jsonl", "b/d/e.txt", "b/.hidden.jsonl", "b/table.csv"):
        (whole / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (whole / "data" / name).write_text(texts(name))
    for way, source in zip(ways, found["data"]["train"]):
        assert "://" not in source["path"]
        ours = list(documents((Source(path=source["path"]),)))
        assert ours and ours == list(documents((Source(path=str(whole / way)),))), way
    assert world.copies() == {"data/a.jsonl", "data/b/c.jsonl", "data/b/d/e.txt"}


def test_a_file_that_is_stored_packed_comes_unpacked_and_once(world: World) -> None:
    words, wanted = texts("a", "b" * 5000), {"contentEncoding": "gzip"}
    stored = gzip.compress(words.encode())
    world.server.objects.insert("in", f"{world.base}/a.jsonl", stored, wanted, Conditions())
    for fetched in (1, 0):
        world.fetch(reading(Source(path=f"{world.uri}/a.jsonl")))
        assert world.here("a.jsonl").read_text() == words
        assert len(world.downloads()) == fetched


def test_globs_match_in_a_bucket_what_they_match_in_a_folder(tmp_path: Path) -> None:
    files = ["a.txt", "A.txt", "x/a.txt", "x/y/b.txt", "x/y/z/ab.txt", "xy/a-1.txt", "x/[a].txt"]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    parts = ("*", "**", "?.txt", "x", "[ax]*", "[!a]*", "a-?.txt", "[[]a].txt", "y")
    patterns = [p for n in (1, 2, 3) for p in itertools.product(parts, repeat=n) if p[-1] != "**"]
    found = 0
    for pattern in patterns:
        paths = (path for path in tmp_path.glob("/".join(pattern)) if path.is_file())
        there = {path.relative_to(tmp_path).as_posix() for path in paths}
        assert {name for name in files if _matches(name.split("/"), pattern)} == there, pattern
        found += bool(there)
    assert found > 100


def test_what_two_fields_name_is_fetched_once_and_never_again(world: World) -> None:
    uri = world.put("train.jsonl", texts("one"))
    config = reading(Source(path=uri), Source(path=f"{world.uri}/*.jsonl"))
    (first,) = world.fetch(config)
    assert len(world.downloads()) == 1
    assert world.fetch(config) == [first]
    assert not world.downloads()
    # Another object of that name, one that was cut short here, and one that is gone, come again.
    world.put("train.jsonl", texts("two"))
    world.fetch(config)
    assert world.here("train.jsonl").read_text() == texts("two") and len(world.downloads()) == 1
    world.here("train.jsonl").write_text("cut")
    world.fetch(config)
    world.here("train.jsonl").unlink()
    world.fetch(config)
    assert world.here("train.jsonl").read_text() == texts("two")
    with (world.folder / INDEX).open("a") as index:
        index.write('{"file": "gs/in')  # killed while it wrote
    world.fetch(config)
    assert not world.downloads()


def test_a_job_without_uris_keeps_its_file_and_asks_nobody(world: World) -> None:
    world.file.write_text(before := json.dumps(to_dict(Job("r", (reading(Source(path="/x")),)))))
    fetch_inputs(world.file, world.folder, world.said.append, world.open)
    assert world.file.read_text() == before
    assert not world.server.log and not world.said and not world.folder.exists()


def test_a_manifest_brings_what_it_lists(world: World) -> None:
    world.put("data/lists/m.jsonl", "\ufeff" + "\n".join([
        json.dumps({"path": "part-*.jsonl", "type": "lm", "weight": 2.0}),
        "",
        json.dumps({"path": "../other"}),
        json.dumps({"path": f"{world.uri}/far.jsonl"}),
    ]))  # fmt: skip
    world.put("data/lists/part-1.jsonl", texts("one"))
    world.put("data/other/x.txt", "two")
    world.put("far.jsonl", texts("three"))
    local = world.tmp / "local.jsonl"
    (world.tmp / "near.jsonl").write_text(texts("four"))
    local.write_text(f'{{"path": "near.jsonl"}}\n{{"path": "{world.uri}/far.jsonl"}}\nno json\n')
    plain = world.tmp / "plain.jsonl"
    plain.write_text('{"path": "near.jsonl"}\n')
    (found,) = world.fetch(
        reading(
            Source(manifest=f"{world.uri}/data/lists/m.jsonl"),
            Source(manifest=str(local)),
            Source(manifest=str(plain)),
        )
    )
    remote, mixed, untouched = (source["manifest"] for source in found["data"]["train"])
    assert untouched == str(plain)
    ours = [doc.text for doc in documents((Source(manifest=remote),))]
    assert ours == ["one", "one", "two", "three"]
    assert Path(mixed).read_text().split("\n")[2:] == ["no json", ""]  # the reader's to refuse
    with pytest.raises(DataError, match=r":3: "):
        list(documents((Source(manifest=mixed),)))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            '{"path": "../../../etc/x.jsonl"}',
            r"\.\./\.\./\.\./etc/x\.jsonl leads out of the bucket",
        ),
        ('{"path": "gone.jsonl"}', r"there is no object of this name"),
        ('{"path": "gs://in/../x.jsonl"}', r"no empty part, '\.' or '\.\.'"),
    ],
)
def test_a_manifest_that_leads_astray_is_named_by_line(world: World, line: str, said: str) -> None:
    uri = world.put("m.jsonl", "\n" + line + "\n")
    with pytest.raises((DataError, ConfigError), match=said) as caught:
        world.fetch(reading(Source(manifest=uri)))
    assert f"data.train[0].manifest: {uri}:2: " in str(caught.value)
    assert str(caught.value).count("data.train[0].manifest") == 1
    assert not world.copies()


def test_everything_that_is_missing_is_told_at_once_by_the_names_of_the_recipe(
    world: World,
) -> None:
    world.put("odd/x.csv", "1,2")
    world.put("some.parquet", "x")
    at = world.uri
    config = StageConfig(
        id="student", stage="kd", output="/nowhere/out",
        model=Model(name=f"{at}/model"),
        data=Data(
            train=(Source(path=f"{at}/no.jsonl"), Source(path=f"{at}/*.jsonl"),
                   Source(path=f"{at}/odd"), Source(path=f"{at}/some.parquet")),
            validation=(Source(manifest=f"{at}/list.jsonl"), Source(hf=Hub(f"{at}/set"))),
            chat_template=f"{at}/chat.jinja",
        ),
        train=Train(seconds_of=f"{at}/stage"),
        kd=Distill(mode="precompute", targets=f"{at}/odd"),
    )  # fmt: skip
    with pytest.raises(DataError) as caught:
        world.fetch(config)
    told = dict(line.split(": ", 1) for line in str(caught.value).splitlines())
    assert set(told) == {
        "model.name", "data.train[0].path", "data.train[1].path", "data.train[2].path",
        "data.train[3].path", "data.validation[0].manifest", "data.validation[1].hf.name",
        "data.chat_template", "train.seconds_of", "kd.targets",
    }  # fmt: skip
    assert told["data.train[1].path"] == f"{at}/*.jsonl: no object matches this pattern"
    with pytest.raises(DataError, match=r"^stage student: model\.name: "):
        world.fetch(reading(), config)
    assert not world.copies()


def test_a_plain_model_comes_whole_and_a_tokenizer_without_weights(world: World) -> None:
    files = {"config.json": b"{}", "model-1.safetensors": b"w", "tokenizer.json": b"[]"}
    world.put_folder("llama", {**files, ".cache/x": b"", "onnx/model.onnx": b"o"})
    world.put_folder("words", files)
    (found,) = world.fetch(
        stage(model=Model(name=f"{world.uri}/llama", tokenizer=f"{world.uri}/words/"))
    )
    assert found["model"]["name"] == str(world.here("llama"))
    assert found["model"]["tokenizer"] == str(world.here("words"))
    llama = {f"llama/{name}" for name in (*files, "onnx/model.onnx")}
    assert world.copies() == llama | {"words/config.json", "words/tokenizer.json"}


def test_of_a_stage_only_the_checkpoint_that_is_meant_comes(world: World) -> None:
    for step in (10, 20, 30):
        world.checkpoint("run/teacher", step)
    world.best("run/teacher", 10)
    world.put("run/teacher/run_meta.json", "{}")
    world.put("run/teacher/metrics/0001-00000.jsonl", "{}")
    teacher = f"{world.uri}/run/teacher"
    (found,) = world.fetch(stage(kd=Distill(teacher=f"{teacher}@best"), model=Model(name=teacher)))
    steps = "run/teacher/checkpoints/step-"
    assert found["kd"]["teacher"] == str(world.here(f"{steps}10"))
    assert found["model"]["name"] == str(world.here(f"{steps}30"))
    # Without what only training needs, so without what would make it a checkpoint.
    names = ("config.json", "model.safetensors", "tokenizer.json")
    assert world.copies() == {f"{steps}{n}/{name}" for n in (10, 30) for name in names}
    (found,) = world.fetch(stage(evaluate=Evaluate({"a": f"{teacher}@best"})))
    assert {f"{steps}10/{MANIFEST}", f"{steps}10/{STATE}"} <= world.copies()
    assert found["evaluate"]["models"] == {"a": str(world.here(f"{steps}10"))}


def test_a_checkpoint_that_was_stored_packed_is_whole(world: World) -> None:
    """As it may be where somebody has copied it: what its manifest says is not what is listed."""
    held = world.checkpoint("s", 10, config__json=b"{}" + b" " * 99)
    name = f"{world.base}/s/checkpoints/step-10/config.json"
    packed = gzip.compress(held["config.json"])
    world.server.objects.insert("in", name, packed, {"contentEncoding": "gzip"}, Conditions())
    (found,) = world.fetch(stage(model=Model(name=f"{world.uri}/s")))
    assert found["model"]["name"] == str(world.here("s/checkpoints/step-10"))
    assert world.here("s/checkpoints/step-10/config.json").read_bytes() == held["config.json"]


def test_a_tokenizer_stage_and_an_exporting_one_are_what_they_wrote(world: World) -> None:
    done = b'{"completed": true}'
    world.put("t/run_meta.json", done.decode())
    world.put("t/tokenizer/tokenizer.json", "[]")
    world.put_folder("e", {"config.json": b"{}", "run_meta.json": done, "metrics/1": b"{}"})
    model = Model(name=f"{world.uri}/e@best", tokenizer=f"{world.uri}/t")
    (found,) = world.fetch(stage(model=model))
    assert found["model"]["tokenizer"] == str(world.here("t/tokenizer"))
    assert found["model"]["name"] == str(world.here("e"))
    assert world.copies() == {"t/tokenizer/tokenizer.json", "e/config.json", "e/run_meta.json"}


@pytest.mark.parametrize(
    "meta", ['{"completed": false}', "{}", "[]", '{"completed"', '{"completed": "true"}', None]
)
def test_what_a_stage_has_not_completed_is_no_model(world: World, meta: str | None) -> None:
    """Of an export that was cut, or goes on in another run, some files are there: half a model."""
    half = {"config.json": b"{}", "model-1-of-2.safetensors": b"w", "args_snapshot.json": b"{}"}
    world.put_folder("run/e", half)
    world.put("run/t/args_snapshot.json", "{}")
    world.put("run/t/tokenizer/tokenizer_config.json", "{}")
    if meta is not None:
        world.put("run/e/run_meta.json", meta)
        world.put("run/t/run_meta.json", meta)
    model = Model(name=f"{world.uri}/run/e", tokenizer=f"{world.uri}/run/t")
    with pytest.raises(DataError) as caught:
        world.fetch(stage(model=model))
    why = "the stage that writes it is not completed; run (or resume) it first"
    assert sorted(str(caught.value).splitlines()) == [
        f"model.name: {world.uri}/run/e: {why}", f"model.tokenizer: {world.uri}/run/t: {why}",
    ]  # fmt: skip
    assert not world.copies()


def test_a_damaged_checkpoint_gives_way_to_the_one_before(world: World) -> None:
    for step in (10, 20, 30, 40):
        world.checkpoint("s", step)
    world.put("s/checkpoints/step-40/model.safetensors", b"cut")
    world.put("s/checkpoints/step-30/model.safetensors", b"x" * 91)  # of the right size
    world.put("s/checkpoints/step-20/" + MANIFEST, "{")
    (found,) = world.fetch(stage(model=Model(name=f"{world.uri}/s")))
    assert found["model"]["name"] == str(world.here("s/checkpoints/step-10"))
    warned = [line for line in world.said if line.startswith("warning: model.name: skipping")]
    assert [line.split("step-")[1][:2] for line in warned] == ["40", "20", "30"] or len(warned) == 3
    assert not world.here("s/checkpoints/step-30/model.safetensors").exists()
    world.best("s", 30)
    with pytest.raises(DataError, match=r"best checkpoint, step-30: .* a sha256 differs.*@last"):
        world.fetch(stage(model=Model(name=f"{world.uri}/s@best")))
    world.put("s/checkpoints/step-10/" + MANIFEST, b"")
    with pytest.raises(DataError, match=r"model\.name: .*/s: there is no whole checkpoint"):
        world.fetch(stage(model=Model(name=f"{world.uri}/s")))


def test_a_manifest_of_a_checkpoint_never_leads_out_of_its_folder(world: World) -> None:
    world.checkpoint("s", 1)
    facts = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    evil = {"v": 1, "step": 1, "files": {"../../../evil": facts, STATE: facts}}
    world.put(f"s/checkpoints/step-1/{MANIFEST}", json.dumps(evil))
    with pytest.raises(DataError, match="no whole checkpoint"):
        world.fetch(stage(model=Model(name=f"{world.uri}/s")))
    assert "names a file outside the folder" in world.said[0]
    assert not list(world.tmp.rglob("evil"))
    for uri in (f"{world.uri}/../x", "gs://../x", "gs:///x", f"{world.uri}/a//b"):
        with pytest.raises(ConfigError, match=r"^model\.name: "):
            world.fetch(stage(model=Model(name=uri)))


def test_an_adapter_brings_its_base(world: World) -> None:
    from trainer import adapters, copies

    base = world.put_folder("base", {"config.json": b"{}", "model.safetensors": b"w"})
    config = json.dumps({"base_model_name_or_path": base}).encode()
    world.checkpoint("tuned", 5, adapter_config__json=config)
    local = world.tmp / "run" / "checkpoints" / "step-3"
    local.mkdir(parents=True)
    (local / adapters.CONFIG).write_bytes(config)
    for reference in (f"{world.uri}/tuned", str(world.tmp / "run"), f"{world.tmp}/run@best"):
        shutil.rmtree(world.folder, ignore_errors=True)
        world.fetch(stage(merge=Merge(adapter=reference)))
        assert world.here("base/model.safetensors").read_bytes() == b"w"
        copies.use(json.loads(world.file.read_text())["copies"])
        assert adapters.base_of(local) == str(world.here("base"))
    copies.use({})


def test_stored_answers_come_without_unfinished_shards(world: World) -> None:
    for shard, whole in (("shard-0", True), ("shard-1", False)):
        world.put(f"t/targets/{shard}/ids.npy", "x")
        if whole:
            world.put(f"t/targets/{shard}/meta.json", "{}")
    world.put("t/metrics/1.jsonl", "{}")
    world.put("logits/a.npy", "x")
    first = stage(kd=Distill(mode="precompute", targets=f"{world.uri}/t"))
    second = stage(kd=Distill(mode="precompute", logits_dir=f"{world.uri}/logits"))
    found = world.fetch(first, second)
    assert found[0]["kd"]["targets"] == str(world.here("t"))
    assert found[1]["kd"]["logits_dir"] == str(world.here("logits"))
    shards = {"t/targets/shard-0/ids.npy", "t/targets/shard-0/meta.json"}
    assert world.copies() == {*shards, "logits/a.npy"}


def test_what_the_job_makes_itself_is_taken_from_where_it_makes_it(world: World) -> None:
    to = f"{world.uri}/models/x"
    exports = stage("/w/e", export=Export(model="/m", to=to))
    reads = stage("/w/s", model=Model(name=to, tokenizer=f"{to}@best"))
    found = world.fetch(replace(exports, id="e"), reads)
    assert found[1]["model"]["name"] == "/w/e" and found[1]["model"]["tokenizer"] == "/w/e@best"
    assert found[0]["export"]["to"] == to


def test_a_completed_stage_and_one_that_has_begun_need_less(world: World, tmp_path: Path) -> None:
    done = tmp_path / "done"
    done.mkdir()
    (done / "run_meta.json").write_text('{"completed": true}')
    gone = reading(Source(path=f"{world.uri}/gone.jsonl"))
    assert world.fetch(replace(gone, output=str(done)))
    resumed = stage(tmp_path / "begun", train=Train(steps=1, resume=f"{world.uri}/gone"))
    with pytest.raises(DataError, match=r"train\.resume: .*/gone: there is no whole checkpoint"):
        world.fetch(resumed)
    own = tmp_path / "begun" / "checkpoints" / "step-2"
    own.mkdir(parents=True)
    (own / STATE).write_bytes(b"x")
    facts = {STATE: {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}}
    (own / MANIFEST).write_text(json.dumps({"v": 1, "step": 2, "files": facts}))
    assert world.fetch(resumed)


def test_resume_brings_the_newest_checkpoint_with_its_state_and_the_best(world: World) -> None:
    for step in (10, 20, 30):
        world.checkpoint("a", step)
    world.best("a", 10)

    def asked(reference: str) -> dict[str, Any]:
        shutil.rmtree(world.folder, ignore_errors=True)
        config = stage(train=Train(steps=1, resume=f"{world.uri}/{reference}"))
        found: dict[str, Any] = world.fetch(config)[0]["train"]
        return found

    at = "a/checkpoints/step-"
    for reference, step in (("a", 30), (f"{at}20", 20)):
        assert asked(reference)["resume"] == str(world.here(f"{at}{step}"))
        names = ("config.json", "model.safetensors", "tokenizer.json", STATE, MANIFEST)
        both = {f"{at}{n}/{name}" for n in (10, step) for name in names}
        assert world.copies() == {*both, "a/checkpoints/best.json"}
    world.put(f"{at}10/model.safetensors", b"y" * 91)
    asked("a")
    assert any("goes on without a best checkpoint" in line for line in world.said)


@pytest.mark.parametrize(
    "faults",
    [
        [("GET .*alt=media", Fault("status", 503))],
        [("GET .*alt=media", Fault("cut_download", at_bytes=1000))],
        [("GET .*alt=media", Fault("corrupt"))],
        [("GET .*/o\\?", Fault("cut_before")), ("GET .*alt=media", Fault("status", 429))],
    ],
    ids=["503", "cut", "damaged", "listing"],
)
def test_faults_on_the_way_change_nothing(world: World, faults: list[tuple[str, Fault]]) -> None:
    data = os.urandom(200_000)
    world.put("a.txt", data)
    world.server.faults = Script(faults)
    world.fetch(reading(Source(path=f"{world.uri}/a.txt")))
    assert world.here("a.txt").read_bytes() == data and not world.server.faults.left


@pytest.mark.parametrize(
    ("fault", "said"),
    [(Fault("status", 503), "try again later"), (Fault("corrupt"), "damaged on the way 3 times")],
)
def test_an_outage_is_one_line_that_names_the_field(world: World, fault: Fault, said: str) -> None:
    uri = world.put("a.txt", b"x" * 1000)
    world.patience = Patience(**QUICK, total=0.02)
    world.server.faults = Script([("GET .*alt=media", fault)] * 500)
    with pytest.raises(Transient, match=rf"^data\.train\[0\]\.path: .*{said}") as caught:
        world.fetch(reading(Source(path=uri)))
    assert "\n" not in str(caught.value) and not world.copies()
    with pytest.raises(StoreError, match=r"^data\.train\[0\]\.path: .*there is no bucket no-such"):
        world.fetch(reading(Source(path="gs://no-such/a.txt")))
    world.server.objects.denied.add("in")
    with pytest.raises(Denied, match=r"^data\.train\[0\]\.path: .*roles/storage\.objectViewer"):
        world.fetch(reading(Source(path=uri)))


def test_what_goes_away_meanwhile_is_an_outage_and_not_an_error_of_the_recipe(
    world: World,
) -> None:
    uri = world.put("a.txt", b"x")

    class Removes:
        def next(self, request: str) -> None:
            if "alt=media" in request and world.server.objects.find("in", f"{world.base}/a.txt"):
                world.server.objects.delete("in", f"{world.base}/a.txt")

    world.server.faults = Removes()
    with pytest.raises(Transient, match=r"^data\.train\[0\]\.path: .* was removed while"):
        world.fetch(reading(Source(path=uri)))


def test_what_takes_long_says_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    big, small = world.put("big.txt", b"x" * 3000), world.put("small.txt", b"y")
    told = threading.Event()

    class Lines(list[str]):
        def append(self, line: str) -> None:
            super().append(line)
            if "1 of 2 files" in line:
                told.set()

    class Slow:
        def next(self, request: str) -> None:
            if "alt=media" in request and "big.txt" in request:
                assert told.wait(60)

    world.said, world.server.faults = Lines(), Slow()
    monkeypatch.setattr(downloads, "EVERY", 0.01)
    world.fetch(reading(Source(path=big), Source(path=small)))
    assert f"inputs: 1 of 2 files, 0.0 MB; on the way {big} (0.0 MB)" in world.said
    assert world.copies() == {"big.txt", "small.txt"}


def test_a_disk_that_is_too_small_is_told_before_the_first_byte(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = world.put("a.txt", b"x" * 3000)
    monkeypatch.setattr(downloads, "free_bytes", lambda _: 2999)
    with pytest.raises(DiskFull, match=r"need 3,000 bytes, 2,999 are free in .*inputs"):
        world.fetch(reading(Source(path=uri)))
    assert not world.downloads()


def started(world: World, config: StageConfig) -> subprocess.Popen[str]:
    world.file.write_text(json.dumps(to_dict(Job(run="r", stages=(config,)))))
    return subprocess.Popen(
        [sys.executable, "-m", "trainer", "inputs", str(world.file), str(world.folder)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def command(world: World, config: StageConfig) -> subprocess.CompletedProcess[str]:
    with started(world, config) as process:
        output, error = process.communicate(timeout=60)
    return subprocess.CompletedProcess([], process.returncode, output, error)


def test_a_sigterm_ends_the_command_at_once_and_the_next_one_goes_on(world: World) -> None:
    for name in ("a.txt", "b.txt"):
        world.put(name, b"words")
    config = reading(Source(path=world.uri))
    processes: list[subprocess.Popen[str]] = []

    class Kills:
        def next(self, request: str) -> Fault | None:
            if "alt=media" not in request or "b.txt" not in request:
                return None
            processes[0].terminate()
            return Fault("cut_before")  # the client waits before it asks again

    world.server.faults = Kills()
    with started(world, config) as process:
        processes.append(process)
        process.communicate(timeout=60)
    assert process.returncode == 75 and "://" in world.file.read_text()
    world.server.faults = Script()
    world.fetch(config)
    assert world.copies() == {"a.txt", "b.txt"}


def test_the_command_says_what_it_did_by_its_exit_code(world: World) -> None:
    uri = world.put("a.txt", b"words")
    done = command(world, reading(Source(path=uri)))
    assert (done.returncode, done.stderr) == (0, "") and "inputs: 1 files" in done.stdout
    done = command(world, reading(Source(path=f"{world.uri}/b.txt")))
    assert done.returncode == 65
    assert done.stderr.startswith(f"error: data.train[0].path: {world.uri}/b.txt: there is no")
    done = command(world, reading(Source(path=f"{world.uri}/a//b.txt")))
    assert done.returncode == 64
    world.server.objects.denied.add("in")
    done = command(world, reading(Source(path=uri)))
    assert done.returncode == 78 and done.stderr.count("\n") == 1


def test_the_command_needs_neither_torch_nor_a_client_where_nothing_is_remote(
    tmp_path: Path,
) -> None:
    file = tmp_path / "job.json"
    file.write_text(json.dumps(to_dict(Job(run="r", stages=(reading(Source(path="/x")),)))))
    code = (
        "import sys; from trainer.__main__ import main\n"
        f"assert main(['inputs', {str(file)!r}, {str(tmp_path / 'in')!r}]) == 0\n"
        "print([n for n in ('torch', 'google.cloud.storage', 'boto3') if n in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.fixture
def s3_bucket() -> Iterator[Callable[[str, bytes], None]]:
    boto3 = pytest.importorskip("boto3", reason="s3:// needs the extra `s3`")
    pytest.importorskip("moto.server", reason="the S3 server of the tests is moto[server]")
    with moto_server() as url, environment(AWS_ENDPOINT_URL_S3=url, **AWS):
        client = boto3.session.Session().client("s3")
        client.create_bucket(Bucket="inputs")
        yield lambda key, data: client.put_object(Bucket="inputs", Key=key, Body=data)


def test_s3_is_read_like_gs(
    world: World, s3_bucket: Callable[[str, bytes], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_bucket("data/a.jsonl", texts("one").encode())
    s3_bucket("data/ab.jsonl", texts("two").encode())
    config = reading(
        Source(path="s3://inputs/data/a.jsonl"), Source(path="s3://inputs/data/*.jsonl")
    )
    (found,) = world.fetch(config)
    paths = [Source(path=source["path"]) for source in found["data"]["train"]]
    assert [doc.text for doc in documents(tuple(paths))] == ["one", "one", "two"]
    monkeypatch.setattr(downloads.Shelf, "_one", lambda *_: pytest.fail("fetched again"))
    assert world.fetch(config) == [found]
    with pytest.raises(DataError, match="there is no object of this name"):
        world.fetch(reading(Source(path="s3://inputs/data/b.jsonl")))
