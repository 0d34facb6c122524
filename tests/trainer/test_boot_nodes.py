"""boot on several nodes: two processes on loopback that CLUSTER_SPEC brings together."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.bundle import build
from tests.stub_jobs import eventually, finish, specification
from tests.stub_jobs import start as start_boot
from tests.trainer.cloud_jobs import ROOT, Cloud, cloud, ended

MEETS = """
say("rank", rank, "of", os.environ["WORLD_SIZE"], "local", os.environ["LOCAL_RANK"])
"""


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Cloud]:
    with cloud(tmp_path) as made:
        yield made


def cluster(nodes: int = 2) -> list[str]:
    """CLUSTER_SPEC of each node."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pools = {"workerpool0": [f"127.0.0.1:{port}"], "workerpool1": ["127.0.0.1:1"] * (nodes - 1)}
    tasks = [("workerpool0", 0), *(("workerpool1", index) for index in range(nodes - 1))]
    return [
        json.dumps({"cluster": pools, "task": {"type": pool, "index": index}})
        for pool, index in tasks
    ]


def start(it: Cloud, spec: dict[str, Any]) -> list[subprocess.Popen[str]]:
    """A boot for each of two nodes, as on one machine: they share the specification's folders."""
    return [it.start(spec, CLUSTER_SPEC=given) for given in cluster()]


def test_two_nodes_meet_and_each_sends_the_logs_of_its_own_ranks(it: Cloud) -> None:
    source = MEETS + "write(0, completed=True) if rank == 0 else 0; sys.exit(0)"
    first, second = start(it, it.spec(source, nodes=2))
    (code, said), (other, heard) = ended(first, 90), ended(second, 90)
    assert (code, other) == (0, 0), said + heard
    lines = [[f"rank {rank} of 2 local 0"] for rank in (0, 1)]
    assert [it.log(rank) for rank in (0, 1)] == lines
    assert said.splitlines().count(f"[worker 0] {lines[0][0]}") == 1 and lines[1][0] not in said
    assert heard.splitlines().count(f"[worker 1] {lines[1][0]}") == 1 and lines[0][0] not in heard
    assert it.names("attempts/") == ["attempts/00-0001.json"]
    assert it.json("attempts/00-0001.json")["ranks"] == {"0": 0}
    assert it.json("s/run_meta.json") == {"completed": True}
    assert "exit code 0" in it.read("logs/boot-1/00-0001-00000.log")


def test_each_node_exits_with_the_worst_code_of_its_own_workers(it: Cloud) -> None:
    source = (
        MEETS
        + "if rank == 3: say('error: it was me'); sys.exit(65)\nwait_until_asked(); sys.exit(75)"
    )
    first, second = start(it, it.spec(source, nodes=2, workers=2, grace_seconds=5))
    code, said = ended(second, 90)
    assert code == 65, said
    assert it.result(node="workerpool1-0")["why"] == "worker 3: it was me"
    assert [it.log(rank)[0] for rank in (2, 3)] == [
        "rank 2 of 4 local 0",
        "rank 3 of 4 local 1",
    ]
    assert f"{it.log(3)[0]}\n" in said and f"{it.log(2)[0]}\n" in said
    first.terminate()
    code, said = ended(first, 90)
    assert (code, it.result(node="workerpool0-0")["why"]) == (75, "signal"), said


def test_a_node_whose_peer_never_comes_gives_up_with_75(it: Cloud) -> None:
    (given, _) = cluster()
    spec = it.spec("say('began')", nodes=2, join_seconds=4)
    code, said = ended(it.start(spec, CLUSTER_SPEC=given), 90)
    assert code == 75, said
    why = it.result(node="workerpool0-0")["why"]
    assert why.startswith("the 2 nodes did not meet at 127.0.0.1:")
    assert why.endswith("within 4 s")
    assert it.result(node="workerpool0-0")["cause"] == "infrastructure"


def test_a_node_that_starts_again_gives_its_logs_another_name(it: Cloud) -> None:
    it.put("logs/worker-1/00-0001-00000.log", b"2026-11-21T08:32:46.123456Z before\n")
    it.put("logs/worker-10/00-0001r4-00000.log", b"2026-11-21T08:32:46.123456Z another node\n")
    (_, given) = cluster()
    code, said = ended(it.start(it.spec(nodes=2, join_seconds=1), CLUSTER_SPEC=given), 90)
    assert code == 75, said
    assert "logs/boot-1/00-0001r1-00000.log" in it.names("logs/")
    assert it.names("attempts/") == []


def test_a_node_of_a_job_that_was_created_twice_leaves(it: Cloud) -> None:
    record = {"v": 1, "job": 0, "attempt": 1, "restart": 0, "started": 1.0, "service_job": "111"}
    it.put("attempts/00-0001.json", json.dumps(record).encode())
    (_, given) = cluster()
    code, said = ended(it.start(it.spec(nodes=2), CLUSTER_SPEC=given, CLOUD_ML_JOB_ID="222"), 60)
    assert (code, said.count("\n")) == (64, 1), said
    assert "attempt 1 is job 111" in said and it.names("logs/") == []


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"nodes": 3}, "nodes: 3, but CLUSTER_SPEC has 2"),
        ({"job": {"stages": [{"id": "s", "output": f"{ROOT}/s", "train": {"sharded": True}}]}},
         "stage s: train.sharded on 2 nodes needs a disk that they share, and artifacts are in "
         f"{ROOT}; use one node"),
        ({"job": {"stages": [{"id": "a", "output": f"{ROOT}/a"},
                             {"id": "b", "output": f"{ROOT}/b", "model": {"name": f"{ROOT}/a@best"}}
                             ]}},
         "stage b reads what a writes in the same job: on several nodes run a before it"),
    ],
)  # fmt: skip
def test_what_several_nodes_cannot_do_is_one_line_and_64(
    it: Cloud, changes: dict[str, Any], why: str
) -> None:
    (given, _) = cluster()
    code, said = ended(it.start(it.spec(**{"nodes": 2, **changes}), CLUSTER_SPEC=given), 60)
    assert code == 64, said
    assert it.result(node="workerpool0-0")["why"] == why


def test_a_cluster_that_does_not_say_who_this_is_is_one_line_and_64(tmp_path: Path) -> None:
    for given in ("", "{}", '{"task": {"type": "../x", "index": 0}}'):
        process = start_boot(tmp_path, specification(tmp_path, nodes=2), {"CLUSTER_SPEC": given})
        code, said = finish(process)
        assert code == 64
        assert said.startswith("error: ") and said.count("\n") == 1 and "CLUSTER_SPEC" in said


def test_the_smoke_test_runs_on_two_nodes(it: Cloud) -> None:
    pytest.importorskip("transformers", reason="the trainer needs the extra `train`")
    made = build(it.folder / "home")
    stage = {"id": "smoke", "stage": "smoke", "output": f"{ROOT}/smoke", "smoke": {"epochs": 1}}
    job = {"schema": 1, "run": "0123456789abcdef", "stages": [stage], "control": f"{ROOT}/control"}
    bundle = {"url": str(made.path), "sha256": made.sha256, "bytes": made.bytes}
    first, second = start(it, it.spec(nodes=2, job=job, bundle=bundle))
    eventually(lambda: it.names("logs/worker-0/"), "the trainer", 120)
    (code, said), (other, heard) = ended(first, 180), ended(second, 60)
    assert (code, other) == (0, 0), said + heard
    assert it.json("smoke/run_meta.json")["completed"] is True
    assert "2 processes" in said or "world size 2" in said, said
