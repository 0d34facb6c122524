"""What a job's interpreter has, what is installed beside it, and wheels that do not work."""

from __future__ import annotations

import hashlib
import http.server
import json
import subprocess
import sys
import threading
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from launcher.spec import Environment
from tests.tiny_wheels import build, sha256
from trainer import environment
from trainer.environment import DIRECT, Unfit, Unreachable, ensure, lock

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which pip finds packages, and nowhere else; the path of this process is kept."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path / "index"


def pinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *wheels: Path, digest: str = ""
) -> None:
    """A lock of `wheels`, of which the trainer needs those whose names begin with `needed`."""
    lines, direct = [], {}
    for wheel in wheels:
        name, version = wheel.name.split("-")[:2]
        name = name.replace("_", "-")
        lines.append(f"{name}=={version} \\\n    --hash=sha256:{digest or sha256(wheel)}\n")
        if name.startswith("needed"):
            direct[name] = (1, 0)
    folder = tmp_path / "locks"
    folder.mkdir()
    (folder / "cpu.txt").write_text("".join(lines))
    (folder / "cuda.txt").write_text("-r cpu.txt\n")
    (folder / "asked.txt").write_text("".join(lines))
    monkeypatch.setattr(environment, "_LOCKS", folder)
    monkeypatch.setattr(environment, "DIRECT", direct)


def wheel_of(path: Path, **changed: Any) -> dict[str, Any]:
    name = path.name.split("-")[0].replace("_", "-")
    return {"name": name, "url": str(path), "sha256": sha256(path), **changed}


def test_where_nothing_is_missing_nothing_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = {name: (0,) for name in ("numpy", "transformers") if environment._installed(name)}
    monkeypatch.setattr(environment, "DIRECT", here)
    said: list[str] = []
    assert ensure(tmp_path / "made", [], said.append) == []
    assert not (tmp_path / "made").exists() and len(said) == 1 and "torch 2." in said[0]


def test_what_is_missing_is_installed_beside_the_environment_by_its_hash(
    tmp_path: Path, offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = metadata.version("pip")
    needed = build(offline, "needed-one", "1.2", source="answer = 42\n")
    also = build(offline, "also-this", "3.0")
    same = tmp_path / f"pip-{pip}-py3-none-any.whl"  # in the lock, and here in that very version
    same.write_bytes(b"never read")
    pinned(tmp_path, monkeypatch, needed, also, same)
    said: list[str] = []
    (path,) = ensure(tmp_path / "made", [], said.append)
    assert path == str(tmp_path / "made" / "packages") == sys.path[0]
    assert {one.name for one in Path(path).glob("*.py")} == {"needed_one.py", "also_this.py"}
    assert metadata.version("needed-one") == "1.2"
    assert "needed-one is missing: installing 2 packages" in said[1]
    # The service started boot again: what is there is whole, and is not installed again.
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setattr(sys, "path", sys.path[1:])
    assert ensure(tmp_path / "made", [], said.append) == [path]


@pytest.mark.parametrize(
    ("stage", "installed", "needed"),
    [
        ({"model": None, "export": None}, set(), ""),
        ({"model": {"adapter": {"quantization": "none"}, "float8": "off"}}, set(), ""),
        ({"model": {"adapter": {"quantization": "nf4"}}}, {"bitsandbytes"},
         r"model.adapter.quantization: nf4 needs bitsandbytes: pip install \"launch-llm.quantize"),
        ({"model": {"float8": "auto"}}, {"torchao"}, ""),
        ({"model": {"float8": "torchao"}}, {"torchao"}, "model.float8: torchao needs torchao: "),
        ({"model": {"float8": "transformer_engine"}}, set(),
         r"needs transformer-engine: pip install \"transformer-engine\[pytorch\]\""),
        ({"export": {"format": "gguf"}}, {"gguf", "sentencepiece"},
         "export.format: gguf needs gguf: "),
        ({"export": {"format": "huggingface"}}, set(), ""),
        ({"data": {"train": [{"hf": {"name": "a/b"}}]}}, {"datasets"},
         r"data.train: hf needs datasets: pip install \"launch-llm.hub"),
        ({"data": {"train": [{"path": "a.jsonl"}], "validation": []}}, set(), ""),
        ({"data": {"train": [{"hf": None}], "validation": [{"hf": {"name": "a/b"}}]}}, {"datasets"},
         r"data.validation: hf needs datasets: pip install \"launch-llm.hub"),
    ],
)  # fmt: skip
def test_a_job_s_own_packages_are_installed_on_a_machine_and_missed_at_once_elsewhere(
    stage: dict[str, Any], installed: set[str], needed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = {"stages": [{"id": "before"}, {"id": "it", **stage}]}
    assert environment.asked(job) == installed <= set(environment.ASKED)
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)
    if not needed:
        environment.check(job)
        return
    with pytest.raises(Unfit, match=rf"^stage it: .*{needed}"):
        environment.check(job)
    if "float8" in needed or "datasets" in needed:  # a dry run needs neither
        environment.check({**job, "dry_run": True})


def test_what_only_this_job_needs_is_installed_beside(
    tmp_path: Path, offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel, other = build(offline, "rare-one", "2.1"), build(offline, "rare-two", "1.0")
    pinned(tmp_path, monkeypatch, wheel, other)
    monkeypatch.setattr(environment, "ASKED", {"rare-one": (2,), "rare-two": (1,)})
    said: list[str] = []
    assert ensure(tmp_path / "made", [], said.append) == []
    (path,) = ensure(tmp_path / "made", [], said.append, beside={"rare-one"})
    assert path == str(tmp_path / "made" / "asked") == sys.path[0]
    assert [one.name for one in Path(path).glob("*.py")] == ["rare_one.py"]
    assert "rare-one is missing: the job asks for it" in said[-1]
    assert ensure(tmp_path / "made", [], said.append, beside={"rare-one"}) == []  # it is there


def test_what_datasets_needs_comes_with_it_where_it_is_not_there(
    tmp_path: Path, offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned(tmp_path, monkeypatch, build(offline, "datasets", "99.1"))
    own = build(offline, "rare-hub", "3.0")
    line = f"rare-hub==3.0 --hash=sha256:{sha256(own)}\npackaging==0.1 --hash=sha256:{'0' * 64}\n"
    (environment._LOCKS / "hub.txt").write_text(line)  # packaging is here in another version
    monkeypatch.setattr(environment, "ASKED", {"datasets": (99,)})
    ensure(tmp_path / "made", [], lambda _: None, beside={"datasets"})
    assert metadata.version("rare-hub") == "3.0" and metadata.version("packaging") != "0.1"
    assert metadata.version("datasets") == "99.1"


def test_an_older_version_than_the_trainer_needs_is_replaced(
    tmp_path: Path, offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = build(tmp_path, "needed-one", "0.9")
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(old), str(tmp_path / "old")],
                   check=True)  # fmt: skip
    sys.path.insert(0, str(tmp_path / "old"))
    pinned(tmp_path, monkeypatch, build(offline, "needed-one", "1.2"))
    assert environment.lacking(False) == ["needed-one 0.9 is older than 1.0"]
    ensure(tmp_path / "made", [], lambda _: None)
    assert environment.lacking(False) == []


def test_a_package_with_another_hash_is_refused_and_leaves_nothing(
    tmp_path: Path, offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned(tmp_path, monkeypatch, build(offline, "needed-one", "1.2"), digest="ab" * 32)
    with pytest.raises(Unfit, match="cannot install what the trainer needs: ") as refused:
        ensure(tmp_path / "made", [], lambda _: None)
    assert refused.value.code == 78 and "\n" not in str(refused.value)
    assert not (tmp_path / "made" / "packages").exists()


def test_an_index_that_does_not_answer_is_asked_another_time(
    tmp_path: Path, offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned(tmp_path, monkeypatch, build(tmp_path, "needed-one", "1.2"))
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody is there
    monkeypatch.setattr(environment, "_RETRIES", "1")
    with pytest.raises(Unreachable, match="connection broken by") as refused:
        ensure(tmp_path / "made", [], lambda _: None)
    assert refused.value.code == 75 and "\n" not in str(refused.value)
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # an index that has no such package is another matter
    with pytest.raises(Unfit) as lacking:
        ensure(tmp_path / "made", [], lambda _: None)
    assert lacking.value.code == 78


def test_a_wheel_comes_first_with_what_it_needs_from_the_lock(
    tmp_path: Path, offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned(tmp_path, monkeypatch, build(offline, "helper", "2.0", source="x = 7\n"))
    source = "import helper\nassert helper.x == 7\n"
    wheel = build(
        tmp_path, "flash-attn", "2.8.3", source=source, requires=["helper", "torch", "pip>1"]
    )
    said: list[str] = []
    paths = ensure(tmp_path / "made", [wheel_of(wheel)], said.append)
    assert [Path(path).name for path in paths] == ["flash-attn", "flash-attn-needs"]
    assert sys.path[: len(paths)] == paths
    assert said[-1] == "environment: wheel flash-attn is installed and can be imported"
    assert not list((tmp_path / "made" / "downloads").iterdir())


@pytest.mark.parametrize(
    ("source", "changed", "words"),
    [
        ("raise ImportError('undefined symbol: _ZN3c10')", {},
         "cannot be imported: ImportError: undefined symbol: _ZN3c10"),
        ("import os\nos.kill(os.getpid(), 11)", {}, "cannot be imported: exit code -11"),
        ("", {"sha256": "ab" * 32}, "is not the one that was planned: its sha256 is "),
        ("", {"url": "/nowhere/flash_attn-1.0-py3-none-any.whl"}, "cannot be read from /nowhere"),
        ("", {"url": "odd://host/flash_attn-1.0-py3-none-any.whl"}, "no store for odd://"),
        ("", {"tags": "cp27-cp27m-win32"}, "cannot be installed: "),
    ],
)  # fmt: skip
def test_a_wheel_that_does_not_work_costs_one_warning(
    tmp_path: Path, offline: Path, monkeypatch: pytest.MonkeyPatch, source: str,
    changed: dict[str, str], words: str,
) -> None:  # fmt: skip
    pinned(tmp_path, monkeypatch)
    tags = changed.pop("tags", "py3-none-any")
    wheel = wheel_of(build(tmp_path, "flash-attn", "2.8.3", tags, source), **changed)
    works = wheel_of(build(tmp_path, "other", "1.0"))
    said: list[str] = []
    paths = ensure(tmp_path / "made", [wheel, works], said.append)
    assert [Path(path).name for path in paths] == ["other"]
    (warning,) = (line for line in said if line.startswith("warning: "))
    assert warning.startswith("warning: wheel flash-attn ") and words in warning
    assert warning.endswith("training goes on without it (attention: auto takes torch's own)")


def test_a_wheel_is_read_from_a_bucket(
    tmp_path: Path, offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("google.cloud.storage", reason="gs:// needs the extra `google`")
    from launcher.rehearsal.gcs import GcsServer
    from trainer.store import open_store

    pinned(tmp_path, monkeypatch)
    file = build(tmp_path, "flash-attn", "2.8.3+cu12torch2.9", source="x = 1\n")
    with GcsServer() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        server.objects.create_bucket("wheels", {})
        open_store("gs://wheels/a").put_file(file.name, file)
        wheel = wheel_of(file, url=f"gs://wheels/a/{file.name}")
        paths = ensure(tmp_path / "made", [wheel], lambda _: None)
    assert [Path(path).name for path in paths] == ["flash-attn"]


def test_a_download_that_fails_for_a_moment_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, seen = [503, 200], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            self.send_response(answers.pop(0) if answers else 404)
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b"wheel")

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setattr(environment, "_WAITS", (0.0, 0.0))
    monkeypatch.setenv("no_proxy", "*")
    digest = hashlib.sha256(b"wheel").hexdigest()
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/a/flash_attn-2.8.3%2Bcu12-py3-none-any.whl"
        file = environment._fetched(url, digest, tmp_path)
        with pytest.raises(environment._WheelFailed, match="404"):
            environment._fetched(url, digest, tmp_path)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert file.name == "flash_attn-2.8.3+cu12-py3-none-any.whl" and file.read_bytes() == b"wheel"
    assert len(seen) == 3  # nobody asks again for what is not there


@pytest.mark.parametrize(
    ("found", "allowed"),
    [("2.9.0a0+50eac811a6.nv25.9", True), ("2.15.2", True), ("2.8.1+cu128", False),
     ("2.16.0", False), ("3.0", False)],
)  # fmt: skip
def test_torch_is_the_images_and_must_be_in_the_tested_range(
    tmp_path: Path, found: str, allowed: bool
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('not to be imported')")
    (tmp_path / "torch" / "version.py").write_text(f"__version__ = {found!r}\ncuda = '12.8'\n")
    said = asked(tmp_path)
    if allowed:
        assert said == f"({found!r}, '12.8')"
    else:
        assert said == (
            f"78 torch {found} is installed; the trainer runs on torch 2.9 to 2.15: use an image "
            "that has it (docker/Dockerfile builds one)"
        )


def test_an_image_without_torch_is_told_so(tmp_path: Path) -> None:
    said = asked(tmp_path)
    assert said.startswith("78 torch is not installed for ") and "docker/Dockerfile" in said


def test_the_image_says_what_it_has_in_the_words_of_a_recipe() -> None:
    lines = (ROOT / "docker" / "Dockerfile").read_text().splitlines()
    (command,) = (json.loads(line[4:]) for line in lines if line.startswith("CMD "))
    done = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = yaml.safe_load(done.stdout)["environment"]
    assert said["python"] == f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert environment.TORCH[0] <= environment._numbers(said["torch"])[:2] < environment.TORCH[1]
    assert said["cxx11_abi"] is True and isinstance(said["glibc"], str)
    Environment(**{**said, "cuda": None if said["cuda"] == "None" else said["cuda"]})


def asked(folder: Path) -> str:
    """What `torch_found` answers in a Python that has only what lies in `folder`."""
    code = (
        f"import sys; sys.path[:0] = [{str(folder)!r}, {str(ROOT)!r}]\n"
        "from trainer.environment import Unfit, torch_found\n"
        "try: print(torch_found())\n"
        "except Unfit as error: print(error.code, error)"
    )
    command = [sys.executable, "-I", "-S", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_what_the_trainer_needs_is_what_the_package_declares() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {}
    for extra in ("train", "google"):
        for text in extras["optional-dependencies"][extra]:
            requirement = Requirement(text)
            least = str(next(s for s in requirement.specifier if s.operator == ">=").version)
            declared[requirement.name] = tuple(int(part) for part in least.split("."))
    only_of_the_launcher = {"google-cloud-aiplatform"}
    checked_apart = {"torch"}
    expected = set(declared) - only_of_the_launcher - checked_apart
    assert {name: declared[name] for name in expected} == dict(DIRECT)
    assert declared["torch"] == environment.TORCH[0]
    texts = [
        text for extra in ("quantize", "hub") for text in extras["optional-dependencies"][extra]
    ]
    asked = {(one := Requirement(text)).name: one for text in texts}
    for name, least in environment.ASKED.items():
        assert str(asked.pop(name).specifier) == ">=" + ".".join(map(str, least))
    assert not asked


@pytest.mark.parametrize("name", ["cpu", "cuda", "asked", "hub"])
def test_the_locks_hold_what_is_tested_with_hashes_for_every_python(name: str) -> None:
    text = (ROOT / "trainer" / "locks" / f"{name}.txt").read_text()
    tested = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if "==" in line:
            requirement = Requirement(line)
            tested.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    pins = lock(name)
    found = {pin.name: pin.version for pin in pins}
    assert len(found) == len(pins) > {"asked": 4, "hub": 4}.get(name, 50)
    for version in environment.PYTHONS:
        assert f'python_version == "{version}"' in text or name in ("cuda", "asked", "hub")
    for pin in pins:
        assert " --hash=sha256:" in pin.text
        marked = [
            one for one in tested[canonicalize_name(pin.name)]
            if one.marker is None or one.marker.evaluate()
        ]  # fmt: skip
        assert [str(one.specifier) for one in marked] == [f"=={pin.version}"]
    wanted = set(environment.ASKED if name == "asked" else DIRECT)
    if name == "hub":  # with what every job has: all that datasets needs
        needed = [Requirement(text) for text in metadata.requires("datasets") or ()]
        wanted = {canonicalize_name(one.name) for one in needed
                  if one.marker is None or one.marker.evaluate({"extra": ""})}  # fmt: skip
        assert wanted > set(found) & wanted
        wanted -= {pin.name for pin in lock("cpu")} | {"setuptools"}
    missing = wanted - set(found) - (set(environment._GPU_ONLY) if name == "cpu" else set())
    assert not missing
    theirs = {"torch", "triton", "nvidia-cublas", "sympy", "networkx", "jinja2"}
    assert not theirs & set(found)
