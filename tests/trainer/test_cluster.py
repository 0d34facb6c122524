"""Ranks and rendezvous from the description that a cloud gives each node."""

from __future__ import annotations

import json
from typing import Any

import pytest

from trainer.cluster import PORT, ClusterError, Node, vertex_node

HOSTS = {"workerpool0": ["chief-0:2222"], "workerpool1": ["w-0:2222", "w-1:2222", "w-2:2222"]}


def spec(pool: str, index: int, cluster: Any = HOSTS) -> str:
    task = {"type": pool, "index": index, "trial": ""}
    return json.dumps({"cluster": cluster, "environment": "cloud", "task": task, "job": "{}"})


def test_every_node_has_a_rank_of_its_own_and_all_meet_at_the_chief() -> None:
    tasks = [("workerpool0", 0), *(("workerpool1", index) for index in range(3))]
    nodes = [vertex_node(spec(*task)) for task in tasks]
    assert [node.rank for node in nodes] == [0, 1, 2, 3]
    assert {(node.nodes, node.address, node.port) for node in nodes} == {(4, "chief-0", 2222)}


def test_one_node_meets_itself() -> None:
    assert vertex_node(spec("workerpool0", 0, {"workerpool0": ["h:1"]})) == Node(0, 1, "h", 1)


def test_pools_are_ranked_by_number_whatever_their_order_in_the_text() -> None:
    cluster = {f"workerpool{n}": [f"h{n}:1"] for n in (10, 2, 1, 0)}
    assert [vertex_node(spec(f"workerpool{n}", 0, cluster)).rank for n in (0, 1, 2, 10)] == [
        0, 1, 2, 3,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "address", "port"),
    [("host", "host", PORT), ("[fd00::1]:5", "fd00::1", 5), ("[fd00::1]", "fd00::1", PORT)],
)
def test_an_address_may_lack_a_port_or_be_of_version_6(text: str, address: str, port: int) -> None:
    node = vertex_node(spec("workerpool0", 0, {"workerpool0": [text]}))
    assert (node.address, node.port) == (address, port)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "cluster is missing"),
        (json.dumps({"cluster": HOSTS}), "task is missing"),
        (spec("workerpool1", 3), "task workerpool1-3 is not in cluster"),
        (spec("workerpool0", True, {"workerpool0": ["a:1"]}), "is not in cluster"),
        (spec("workerpool1", 0, {"workerpool1": ["a:1"]}), "workerpool0 names no host"),
        (spec("workerpool0", 0, {"workerpool0": "a:1"}), "is a list of hosts"),
        (spec("chief", 0, {"chief": ["a:1"]}), "'chief' is no worker pool"),
        (spec("workerpool0", 0, {"workerpool0": ["a:b"]}), "has no port number"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(ClusterError, match="CLUSTER_SPEC") as caught:
        vertex_node(text)
    assert said in str(caught.value) and "\n" not in str(caught.value)
