"""Who is who among the nodes of a job, from what the cloud tells each of them. Pure; standard
library only."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: The port of the rendezvous where the cluster's description has none.
PORT = 3333
_POOL = re.compile(r"workerpool(\d+)")


class ClusterError(Exception):
    """One line: what is wrong with the description."""


@dataclass(frozen=True)
class Node:
    """This node's rank among `nodes`, and where rank 0 listens for the others."""

    rank: int
    nodes: int
    address: str
    port: int


def vertex_node(cluster_spec: str) -> Node:
    """This node, from the variable CLUSTER_SPEC of a Vertex AI worker:
    `{"cluster": {"workerpool0": ["host:port"], ...}, "task": {"type": "workerpool0", "index": 0}}`.

    Pools are ranked by their number and replicas by their index, so that the chief, pool 0, is rank
    0 and the rendezvous. Errors: `ClusterError`.
    """
    try:
        spec = json.loads(cluster_spec)
    except ValueError as error:
        raise ClusterError(f"CLUSTER_SPEC is not JSON: {error}") from error
    cluster = _mapping(spec, "cluster")
    task = _mapping(spec, "task")
    if not all(isinstance(hosts, list) for hosts in cluster.values()):
        raise ClusterError("CLUSTER_SPEC: a worker pool is a list of hosts")
    # Pools 2 and 3 are parameter servers and evaluators; jobs of ours have none.
    pools = sorted((_number(name), name) for name in cluster)
    hosts = [(name, index) for _, name in pools for index in range(len(cluster[name]))]
    me = (str(task.get("type")), task.get("index"))
    if not isinstance(me[1], int) or me not in hosts:
        raise ClusterError(
            f"CLUSTER_SPEC: task {me[0]}-{me[1]} is not in cluster {sorted(cluster)}"
        )
    chief = cluster.get("workerpool0") or [None]
    if not isinstance(chief[0], str) or not chief[0]:
        raise ClusterError("CLUSTER_SPEC: cluster.workerpool0 names no host")
    address, port = _address(chief[0])
    return Node(hosts.index(me), len(hosts), address, port)


def _mapping(spec: Any, name: str) -> Mapping[str, Any]:
    found = spec.get(name) if isinstance(spec, dict) else None
    if not isinstance(found, dict):
        raise ClusterError(f"CLUSTER_SPEC: {name} is missing")
    return found


def _number(name: str) -> int:
    found = _POOL.fullmatch(name)
    if found is None:
        raise ClusterError(f"CLUSTER_SPEC: {name!r} is no worker pool")
    return int(found[1])


def _address(text: str) -> tuple[str, int]:
    """`host:port`, `host`, `[v6]:port`."""
    host, _, port = text.rpartition(":")
    if not host or (text.startswith("[") and text.endswith("]")):
        return text.strip("[]"), PORT
    if not port.isdigit():
        raise ClusterError(f"CLUSTER_SPEC: {text!r} has no port number")
    return host.strip("[]"), int(port)
