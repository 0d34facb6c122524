"""What it costs to start `launch`: CPU time and peak memory of commands, as ratios in one run.

`import typer` is the unit. Every command is a fresh process; the commands take turns, so that a
busy minute of the machine falls on all of them; the median of the rounds counts. `--check` exits 1
when a budget is exceeded.

    python benchmarks/startup.py [--check] [--rounds 7]
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

RUNS, RECORDS = 1000, 200
#: Runs that go on, on Vertex AI, with artifacts in a bucket: one has a driver here, one has none.
LIVE, ALONE = "kd-l4-ffffff", "kd-l4-eeeeee"
_BUNDLE = {"path": "b.tar.gz", "sha256": "0" * 64, "bytes": 1}
#: Of `import typer`: the client of the bucket is most of it.
BUDGET_LIVE = 10
ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "pretrain_local.yaml"


@dataclass(frozen=True)
class Cost:
    cpu_ms: float
    rss_mib: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 when a budget is exceeded")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        started = time.perf_counter()
        make_home(home)
        seconds = time.perf_counter() - started
        print(f"{RUNS} finished runs of {RECORDS} records generated in {seconds:.1f} s")
        with live_runs(home):
            costs = measure(commands(), home, options.rounds)
    report(costs)
    broken = [line for line, holds in budgets(costs) if not holds]
    for line, holds in budgets(costs):
        print(f"{'ok  ' if holds else 'OVER'}  {line}")
    return 1 if options.check and broken else 0


def commands() -> dict[str, list[str]]:
    launch = [sys.executable, "-m", "launcher"]
    return {
        "python -c pass": [sys.executable, "-c", "pass"],
        "import typer": [sys.executable, "-c", "import typer"],
        "--help": [*launch, "--help"],
        "up --help": [*launch, "up", "--help"],
        "logs --help": [*launch, "logs", "--help"],
        "status": [*launch, "status"],
        "status --json": [*launch, "status", "--json"],
        "status LIVE": [*launch, "status", LIVE],
        "status ALONE": [*launch, "status", ALONE],
        "validate": [*launch, "validate", str(RECIPE)],
        "plan": [*launch, "plan", str(RECIPE)],
    }


def measure(named: dict[str, list[str]], home: Path, rounds: int) -> dict[str, Cost]:
    """Median cost of each command over `rounds`, after one round that warms the caches."""
    seen: dict[str, list[Cost]] = {name: [] for name in named}
    for turn in range(rounds + 1):
        for name, arguments in named.items():
            cost = once(arguments, home)
            if turn:
                seen[name].append(cost)
    return {
        name: Cost(
            statistics.median(c.cpu_ms for c in found), statistics.median(c.rss_mib for c in found)
        )
        for name, found in seen.items()
    }


def once(arguments: Sequence[str], home: Path) -> Cost:
    """CPU milliseconds (user and system) and peak resident MiB of one process."""
    if arguments[-1] in (LIVE, ALONE):
        home = home / "live"
        forget_looks(home)
    environ = {**os.environ, "LAUNCH_HOME": str(home), "NO_COLOR": "1"}
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ, cwd=ROOT
    )
    # Files would do, but a pipe that is read to its end is what a shell gives.
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read()
    errors = process.stderr.read()
    _, state, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(state)
    process.stdout.close()
    process.stderr.close()
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit {process.returncode}\n{errors.decode()}")
    return Cost((usage.ru_utime + usage.ru_stime) * 1000, usage.ru_maxrss / 1024)


def report(costs: dict[str, Cost]) -> None:
    typer = costs["import typer"].cpu_ms
    help_ms = costs["--help"].cpu_ms
    print(f"{'command':<16}{'CPU ms':>8}{'x typer':>9}{'x --help':>10}{'RSS MiB':>9}")
    for name, cost in costs.items():
        print(
            f"{name:<16}{cost.cpu_ms:>8.0f}{cost.cpu_ms / typer:>9.2f}"
            f"{cost.cpu_ms / help_ms:>10.2f}{cost.rss_mib:>9.1f}"
        )


def budgets(costs: dict[str, Cost]) -> list[tuple[str, bool]]:
    """Each budget as a sentence, and whether it holds."""
    typer = costs["import typer"].cpu_ms

    def ratio(name: str, unit: float, most: float) -> tuple[str, bool]:
        found = costs[name].cpu_ms / unit
        return f"{name}: {found:.2f} of at most {most} times", found <= most

    def memory(name: str, most: float) -> tuple[str, bool]:
        found = costs[name].rss_mib
        return f"{name}: {found:.1f} of at most {most} MiB", found <= most

    both = costs["validate"].cpu_ms + costs["plan"].cpu_ms
    return [
        ratio("--help", typer, 2.5),
        memory("--help", 30),
        ratio("up --help", typer, 4.5),
        memory("up --help", 45),
        ratio("logs --help", typer, 4.5),
        memory("logs --help", 45),
        ratio("status", costs["--help"].cpu_ms, 3),
        ratio("status LIVE", typer, BUDGET_LIVE),
        ratio("status ALONE", typer, BUDGET_LIVE),
        (f"validate and plan: {both:.0f} of at most 1000 ms of CPU", both <= 1000),
    ]


def make_home(home: Path, runs: int = RUNS, records: int = RECORDS) -> None:
    """`runs` finished runs under `home`, each with a journal of `records` records and what a run
    that ended leaves behind (docs/contracts.md)."""
    start = 1_790_000_000.0
    for number in range(runs):
        created = start + number * 100
        run_id = f"{int(created * 100):010x}{number:06x}"
        name = f"quickstart-{run_id[-6:]}"
        place = home / "runs" / run_id
        (place / "journal").mkdir(parents=True)
        identity = {
            "id": run_id, "name": name, "recipe": "quickstart", "fingerprint": "0" * 64,
            "owner": "someone", "root": str(place / "artifacts"), "created": created,
        }  # fmt: skip
        (place / "run.json").write_text(json.dumps({"v": 1, **identity}))
        for seq, record in enumerate(_journal(identity, records), start=1):
            facts = {
                "v": 1, "seq": seq, "epoch": 1, "time": created + seq * 0.1,
                "driver": {"host": "here", "pid": 1}, **record,
            }  # fmt: skip
            (place / "journal" / f"{seq:08d}.json").write_text(json.dumps(facts))
        (place / "summary.json").write_text(json.dumps(_summary(identity, created + 30)))


@contextmanager
def live_runs(home: Path) -> Iterator[None]:
    """The runs LIVE and ALONE in a home of their own below `home`, their artifacts on a server of
    this machine. The driver of LIVE is this process; all else is done in others: what this one
    weighs when it starts a command counts as the command's."""
    from launcher.home import DriverLock

    argv = [sys.executable, "-m", "launcher.rehearsal", "--stubs", "--while-open",
            "--project", "proj", "--bucket", "bkt"]  # fmt: skip
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        for line in iter(server.stdout.readline, ""):
            name, is_set, value = line.strip().removeprefix("export ").partition("=")
            if not is_set:
                break  # it serves
            os.environ[name] = shlex.split(value)[0]
        make = f"from benchmarks.startup import *; make_live(Path({str(home / 'live')!r}), {{!r}})"
        for run_name in (LIVE, ALONE):
            subprocess.run([sys.executable, "-c", make.format(run_name)], cwd=ROOT, check=True)
        (place,) = (home / "live" / "runs").glob(f"*{LIVE[-6:]}")
        lock = DriverLock.acquire(place)
        assert lock is not None
        lock.claim(os.getpid(), time.time())
        yield
        lock.close()
        server.stdin.close()


def put(name: str, data: str) -> None:
    """An object in the bucket, without its client."""
    import urllib.parse
    import urllib.request

    query = urllib.parse.urlencode({"uploadType": "media", "name": name})
    url = f"{os.environ['STORAGE_EMULATOR_HOST']}/upload/storage/v1/b/bkt/o?{query}"
    with urllib.request.urlopen(urllib.request.Request(url, data.encode(), method="POST")):
        pass


def forget_looks(home: Path) -> None:
    """Every look shall ask the bucket: what another one has just brought counts as old."""
    for file in home.glob("runs/*/copy/.index.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "time": 0.0}))


def make_live(home: Path, run_name: str) -> None:
    """A run on Vertex AI that goes on: its journal until a job runs, here and in the bucket, and
    there a minute of metrics."""
    created = time.time() - 3600
    run_id = f"{int(created * 100):010x}{run_name[-6:]}"
    place, root = home / "runs" / run_id, f"gs://bkt/runs/{run_name}"
    identity = {
        "id": run_id, "name": run_name, "recipe": "kd-l4", "fingerprint": "0" * 64,
        "owner": "someone", "root": root, "created": created,
    }  # fmt: skip
    job, name = f"{run_name}-j0", f"{run_name}-j0-a1"
    at = {"job": 0, "attempt": 1}
    offer = {"place": "us-central1", "capacity": "spot", "usd_per_hour": 0.5}
    resource = "projects/proj/locations/us-central1/customJobs/1"
    ref = {
        "backend": "vertex", "kind": "custom_job", "name": name, "place": "us-central1",
        "run": run_id, "billable": True, "data": {"resource": resource},
    }  # fmt: skip
    intent = {"kind": "custom_job", "name": name, "place": "us-central1", "request": {}}
    phase = {"kind": "phase", **at, "held": "live", "why": "", "exit_code": None, "cause": ""}
    records: list[dict[str, object]] = [
        {
            "kind": "created", **identity, "recipe": {"name": "kd-l4"}, "bundle": _BUNDLE,
            "stages": [{"id": "kd", "stage": "kd", "job": 0, "folder": root}],
            "jobs": [{"index": 0, "name": job, "backend": "vertex", "stages": ["kd"]}],
        },
        {"kind": "driver"},
        {"kind": "intent", **at, "intent": intent, "offer": offer},
        {"kind": "ref", **at, "ref": ref},
        *({**phase, "phase": phase_name} for phase_name in ("queued", "provisioning")),
        {**phase, "phase": "running", "began": created + 300},
    ]  # fmt: skip
    (place / "journal").mkdir(parents=True)
    (place / "run.json").write_text(json.dumps({"v": 1, **identity}))
    for seq, record in enumerate(records, start=1):
        facts = {
            "v": 1, "seq": seq, "epoch": 1, "time": created + seq,
            "driver": {"host": "here", "pid": 1}, **record,
        }  # fmt: skip
        record = f"journal/{seq:08d}.json"
        (place / record).write_text(json.dumps(facts))
        put(f"runs/{run_name}/{record}", json.dumps(facts))
    lines = [
        {"v": 1, "kind": "step", "attempt": 1, "stage": "kd", "global_step": step, "steps": 20000,
         "train_loss": 3.0, "tokens_per_sec": 9000.0, "time": created + 300 + step}
        for step in range(1, 61)
    ]  # fmt: skip
    part = "".join(json.dumps(line) + "\n" for line in lines)
    put(f"runs/{run_name}/metrics/0001-00000.jsonl", part)


def _journal(identity: dict[str, object], records: int) -> list[dict[str, object]]:
    job = {"index": 0, "name": f"{identity['name']}-j0", "backend": "local", "stages": ["train"]}
    stage = {"id": "train", "stage": "pretrain", "job": 0, "folder": str(identity["root"])}
    created = {
        "kind": "created", **identity, "recipe": {"name": "quickstart"}, "stages": [stage],
        "jobs": [job], "bundle": {},
    }  # fmt: skip
    end = {"kind": "end", "phase": "succeeded", "why": "", "exit_code": 0}
    phases = [
        {"kind": "phase", "job": 0, "attempt": 1, "phase": "running", "held": "live", "why": "",
         "exit_code": None}
    ] * (records - 3)  # fmt: skip
    intent = {
        "kind": "intent", "job": 0, "attempt": 1,
        "intent": {"kind": "process", "name": f"{job['name']}-a1", "place": "here", "request": {}},
    }  # fmt: skip
    return [created, intent, *phases, end]


def _summary(identity: dict[str, object], ended: float) -> dict[str, object]:
    from launcher.backends.base import Held, Phase
    from launcher.run import Attempt, JobState, Run, StageState

    run = Run(**identity)  # type: ignore[arg-type]
    run.stages = [StageState("train", "pretrain", 0, str(identity["root"]), Phase.SUCCEEDED)]
    attempt = Attempt(1, Phase.SUCCEEDED, Held.GONE, place="here", started=run.created, ended=ended)
    run.jobs = [JobState(0, f"{run.name}-j0", "local", ["train"], [attempt])]
    run.phase, run.held = Phase.SUCCEEDED, Held.GONE
    run.ended, run.exit_code, run.spent_usd = ended, 0, 0.0
    run.progress = {"stage": "train", "global_step": 100, "steps": 100, "train_loss": 5.5,
                    "tokens_per_sec": 8000.0}  # fmt: skip
    return run.to_json()


if __name__ == "__main__":
    sys.exit(main())
