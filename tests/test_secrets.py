"""No secret in anything that launch writes: a trainer does its worst, then everything is searched.

What it writes into files of its own by its own hands (`own.txt`) is not ours to change, and shows
that the search finds what is there.
"""

from __future__ import annotations

import bz2
import contextlib
import io
import json
import secrets
import tarfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.served import LOCAL, RECIPE, VERTEX, Launch, package
from tests.stub_jobs import eventually

pytest.importorskip("google.cloud.aiplatform_v1", reason="needs the extra `rehearse`")
pytest.importorskip("google.cloud.logging_v2", reason="needs the extra `rehearse`")
pytest.importorskip("google.cloud.secretmanager_v1", reason="needs the extra `rehearse`")
pytest.importorskip("google.cloud.storage", reason="needs the extra `google`")

from launcher.clock import SystemClock
from launcher.rehearsal.google import Google

from launcher.rehearsal.vertex import Real  # isort: skip

#: Tells whatever it can wherever it can. On its first attempt on Vertex AI it asks for another.
TRAINER = """
import json, os, sys, traceback
from pathlib import Path
from urllib.parse import quote

from trainer.metrics import Metrics
from trainer.sinks import without_secrets

values = [os.environ[name] for name in ("HF_TOKEN", "LOGIN", "PIN", "SIGNING")]
for value in values:
    print(value)
    print("it is", value, repr(value), [value], json.dumps({"it": value}), value.encode())
    print(f"https://me:{quote(value, safe='')}@host/{quote(value)}?token={value}")
    print("10%\\r" + value + "\\r100% of", value, file=sys.stderr)
    print("x" * 60000 + value.strip().splitlines()[0] + "x" * 60000)
print(dict(os.environ), flush=True)
if sys.argv[1] == "inputs":
    sys.exit(0)
job = json.loads(Path(sys.argv[2]).read_text())
(stage,) = job["stages"]
folder, attempt = Path(stage["output"]), int(os.environ["LAUNCH_ATTEMPT"])
folder.mkdir(parents=True, exist_ok=True)
told = {"values": values, "text": " ".join(values), "url": f"https://me:{values[2]}@host/"}
snapshot = without_secrets({**stage, **told}, os.environ)
(folder / "args_snapshot.json").write_text(json.dumps(snapshot))
(folder / "own.txt").write_text("".join(values))
metrics = Metrics(folder, stage["id"], attempt, warn=print)
metrics.step(1, train_loss=2.0)
metrics.event("trouble", 1, why=told)
metrics.close()
meta = {"v": 1, "stage": stage["stage"], "id": stage["id"], "steps": 1, "global_step": 1}
meta["hf_token_present"], meta["completed"] = True, attempt == 2
(folder / "run_meta.json").write_text(json.dumps(meta))
if attempt == 2:
    sys.exit(0)
try:
    raise RuntimeError(f"refused: {' '.join(values)}")
except RuntimeError as error:
    traceback.print_exc()
    print(f"error: {error}".replace("\\n", " "), file=sys.stderr)
sys.exit(FIRST)
"""


@pytest.fixture
def values() -> dict[str, str]:
    """As people have them: with characters that URLs and JSON write otherwise, of several lines,
    short, and in variables whose names say nothing."""
    lines = "".join(f"{secrets.token_urlsafe(48)}\n" for _ in range(3))
    return {
        "HF_TOKEN": f"hf_{secrets.token_hex(12)}",
        "LOGIN": f"it's/{secrets.token_hex(6)}+\"{secrets.token_hex(6)}\\==\n",
        "PIN": f"Z{secrets.token_hex(2)}q",  # no digits of a hash
        "SIGNING": f"-----BEGIN PRIVATE KEY-----\n{lines}-----END PRIVATE KEY-----\n",
    }


class Watcher:
    """The command line of every process of this machine, as long as it is open."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def text(self) -> bytes:
        return b"\n".join(sorted(self.seen))

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    self.seen.add(path.read_bytes())


def contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every file below `folder`, packed ones also unpacked."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        yield str(path), data
        if data[:3] == b"BZh":
            data = bz2.decompress(data)
            with tarfile.open(fileobj=io.BytesIO(data)) as archive:
                assert "trainer/__main__.py" in archive.getnames()
            yield f"{path} unpacked", data


def leaks(places: Iterable[tuple[str, bytes]], values: Iterable[str]) -> list[str]:
    """The places that hold one of the values, or a whole line of one."""
    words: set[bytes] = set()
    for line in (line for value in values for line in value.splitlines()):
        forms = (line, quote(line, safe=""), quote(line), json.dumps(line)[1:-1], repr(line)[1:-1])
        words |= {form.encode() for form in forms}
    return [place for place, data in places if any(word in data for word in words)]


def test_the_search_finds_every_form(tmp_path: Path, values: dict[str, str]) -> None:
    for number, value in enumerate(values.values()):
        line = value.splitlines()[-1]
        for form in (line, quote(line, safe=""), json.dumps([line]), repr([line])):
            assert leaks([("it", f"a{form}b".encode())], [value]) == ["it"]
        file = tmp_path / f"{number}.bz2"
        with tarfile.open(file, "w:bz2") as archive:
            member = tarfile.TarInfo("trainer/__main__.py")
            member.size = len(line.encode())
            archive.addfile(member, io.BytesIO(line.encode()))
    assert len(leaks(contents(tmp_path), values.values())) == len(values)


@pytest.mark.slow
def test_a_run_on_vertex_writes_no_secret(tmp_path: Path, values: dict[str, str]) -> None:
    packages = package(tmp_path, TRAINER.replace("FIRST", "75"))
    mine = {"HF_TOKEN": f"hf_{secrets.token_hex(12)}", "MY_PASSWORD": secrets.token_hex(8)}
    every = [*values.values(), *mine.values()]
    with Google(SystemClock(), folder=tmp_path / "cloud", project="proj") as server:
        server.objects.create_bucket("bkt", {})
        server.vertex.fate = Real(queued=0, pending=0)
        server.secrets.values.update({f"proj/{name}": value for name, value in values.items()})
        launch = Launch(tmp_path / "laptop", packages, {**server.environ(), **mine})
        launch.folder.mkdir()
        named = "".join(f"  {name}: secret-manager://proj/{name}\n" for name in values)
        (launch.folder / "thing.yaml").write_text(f"{RECIPE}{VERTEX}secrets:\n{named}")
        said = [launch("plan", "thing.yaml", "--json")]
        with Watcher() as watcher:
            said += [launch("up", "thing.yaml", "-d", "--yes")]
            eventually(lambda: [*launch.home.glob("runs/*/summary.json")], "the run is over", 240)
        (run,) = json.loads(launch("status", "--json"))["runs"]
        name, pulled = run["name"], tmp_path / "laptop" / "pulled"
        said += [launch("status", name, "--json"), launch("logs", name), launch("report", name),
                 launch("pull", name, "--to", str(pulled)), launch("teardown", name, "--yes"),
                 launch("sweep", "--yes"), json.dumps(run)]  # fmt: skip
        said += [json.dumps(job) for job in server.vertex.created]
        entries = [entry.text for entry in server.logging._entries]
        asked = [f"{verb} {target}" for verb, target, _ in server.log]

    assert run["phase"] == "succeeded" and len(server.vertex.created) == 2
    files = dict(contents(tmp_path))
    assert any(b"refused: ***" in data for data in files.values()), "why the first attempt ended"
    assert any("it is ***" in line for line in entries) and "it is ***" in "\n".join(said)
    for words in (b"launcher.driver", b"boot.py", b"trainer\x00run", b"launcher\x00up"):
        assert words in watcher.text()
    for folder in (launch.home, pulled, tmp_path / "cloud"):
        assert any(b"trouble" in data for _, data in contents(folder)), f"no metrics in {folder}"
    assert any(place.endswith("report.html") for place in files)

    texts = [("what was said", "\n".join(said).encode()), ("argv", watcher.text()),
             ("log entries", "\n".join(entries).encode()),
             ("URLs", "\n".join(asked).encode())]  # fmt: skip
    assert leaks(texts, every) == []
    found = leaks(files.items(), every)
    assert found and {files[place] for place in found} == {"".join(values.values()).encode()}


def test_a_failed_run_on_this_machine_writes_no_secret(
    tmp_path: Path, values: dict[str, str]
) -> None:
    packages = package(tmp_path, TRAINER.replace("FIRST", "1"))
    mine = {f"MY_{name}": value for name, value in values.items()}
    launch = Launch(tmp_path / "laptop", packages, mine)
    launch.folder.mkdir()
    named = "".join(f"  {name}: env://MY_{name}\n" for name in values)
    (launch.folder / "thing.yaml").write_text(f"{RECIPE}{LOCAL}secrets:\n{named}")
    with Watcher() as watcher:
        said = [launch("up", "thing.yaml", "--yes", code=6)]
    (run,) = json.loads(launch("status", "--json"))["runs"]
    name = run["name"]
    said += [launch("status", name, "--json"), launch("logs", name), launch("report", name),
             json.dumps(run)]  # fmt: skip
    assert "refused: ***" in said[0] and "it is ***" in "\n".join(said)
    assert b"trainer\x00run" in watcher.text()
    texts = [("what was said", "\n".join(said).encode()), ("argv", watcher.text())]
    assert leaks(texts, values.values()) == []
    found = leaks(contents(tmp_path), values.values())
    assert [Path(place).name for place in found] == ["own.txt"]


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ("env: {HF_TOKEN: VALUE}", "env.HF_TOKEN: looks like a secret; move it to `secrets`"),
        ("env: {TRACKER: 'https://me:VALUE@host'}", "holds a password in a URL"),
        ("description: 'https://me:VALUE@host/x'", "holds a password in a URL"),
        ("env: {X: '${MY_TOKEN}'}", "${MY_TOKEN} looks like a secret"),
        ("description: 'with ${MY_TOKEN:-none}'", "${MY_TOKEN} looks like a secret"),
        ("secrets: {HF_TOKEN: VALUE}", "secrets.HF_TOKEN: must be a reference"),
        ("secrets: {HF_TOKEN: 'env://MY_TOKEN'}", "reads secret-manager://PROJECT/NAME only"),
    ],
)
def test_a_secret_in_a_recipe_is_refused_and_not_repeated(
    block: str, words: str, tmp_path: Path
) -> None:
    value = f"hf_{secrets.token_hex(12)}"
    given = {"MY_TOKEN": value, "LAUNCH_DEBUG": "1", "GOOGLE_CLOUD_PROJECT": "proj"}
    launch = Launch(tmp_path, tmp_path / "none", given)
    recipe = tmp_path / "thing.yaml"
    recipe.write_text(f"{RECIPE}{VERTEX}{block.replace('VALUE', value)}\n")
    said = launch("up", "thing.yaml", "--yes", code=2)
    assert words in said and value not in said
    recipe.unlink()
    assert leaks(contents(tmp_path), [value]) == []
