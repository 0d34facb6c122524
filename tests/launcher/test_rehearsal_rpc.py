"""The loopback services over gRPC, asked by the official clients: the same state as over REST."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.rehearsal.faults import Fault, Script
from tests.launcher.rehearsed import Scene, scene

from google.api_core import exceptions  # isort: skip
from google.cloud import aiplatform_v1, logging_v2, secretmanager_v1  # isort: skip
from launcher.rehearsal.rpc import Rpc  # isort: skip
from launcher.rehearsal.vertex import Said, Stub  # isort: skip

grpc = pytest.importorskip("grpc", reason="needs the extra `rehearse`")
PARENT = "projects/proj/locations/us-central1"


class Clients:
    """One of each, on one channel without encryption."""

    def __init__(self, it: Scene, address: str) -> None:
        self.it, self.channel = it, grpc.insecure_channel(address)
        jobs = aiplatform_v1.services.job_service.transports.JobServiceGrpcTransport
        self.jobs = aiplatform_v1.JobServiceClient(transport=jobs(channel=self.channel))
        logs = logging_v2.services.logging_service_v2
        self.logs = logs.LoggingServiceV2Client(
            transport=logs.transports.LoggingServiceV2GrpcTransport(channel=self.channel)
        )
        secrets = secretmanager_v1.services.secret_manager_service
        self.secrets = secrets.SecretManagerServiceClient(
            transport=secrets.transports.SecretManagerServiceGrpcTransport(channel=self.channel)
        )

    def create(self, name: str = "j", **labels: str) -> Any:
        return self.jobs.create_custom_job(
            parent=PARENT, custom_job={"display_name": name, "labels": labels}, retry=None
        )


@pytest.fixture
def by(tmp_path: Path) -> Iterator[Clients]:
    with scene(tmp_path, faults=Script()) as it, Rpc(it.server) as server:
        clients = Clients(it, server.address)
        yield clients
        clients.channel.close()


def test_a_job_lives_and_goes_over_grpc_and_rest_sees_it(by: Clients) -> None:
    by.it.server.vertex.fates.append(Stub(1, 1, None, lines=(Said(1, "one"), Said(2, "two"))))
    job = by.create("over-grpc", team="a")
    assert job.state.name == "JOB_STATE_QUEUED"
    assert by.it.server.vertex.states() == {"over-grpc": "QUEUED"}
    rest = by.it.attempt()
    by.it.clock.sleep(10)
    assert by.jobs.get_custom_job(name=job.name).state.name == "JOB_STATE_RUNNING"
    names = [found.display_name for found in by.jobs.list_custom_jobs(parent=PARENT)]
    assert names == [f"kd-l4-0000ff-j0-a{rest.attempt}", "over-grpc"]
    (mine,) = by.jobs.list_custom_jobs(request={"parent": PARENT, "filter": 'labels.team="a"'})
    assert mine.name == job.name
    number = job.name.rpartition("/")[2]
    asked = {"resource_names": ["projects/proj"], "filter": f'resource.labels.job_id="{number}"'}
    entries = list(by.logs.list_log_entries(request={**asked, "page_size": 1}))
    assert [entry.json_payload["message"] for entry in entries] == ["one", "two"]
    assert entries[0].resource.labels["task_name"] == "workerpool0-0"
    by.jobs.cancel_custom_job(name=job.name)
    by.it.clock.sleep(10)
    by.jobs.delete_custom_job(name=job.name).result(timeout=30)
    with pytest.raises(exceptions.NotFound):
        by.jobs.get_custom_job(name=job.name)


def test_a_secret_is_read_and_a_refusal_has_its_code(by: Clients) -> None:
    secrets = by.it.server.secrets
    secrets.values["proj/token"] = "hf_x"
    name = "projects/proj/secrets/token/versions/latest"
    assert by.secrets.access_secret_version(name=name).payload.data == b"hf_x"
    secrets.denied.add("proj/token")
    with pytest.raises(exceptions.PermissionDenied, match=r"secretmanager\.versions\.access"):
        by.secrets.access_secret_version(name=name)
    with pytest.raises(exceptions.InvalidArgument):
        by.jobs.create_custom_job(parent=PARENT, custom_job={})
    assert not by.it.server.vertex.created


@pytest.mark.parametrize(
    ("fault", "kind", "applied"),
    [
        (Fault("status", 429), "ResourceExhausted", False),
        (Fault("status", 503), "ServiceUnavailable", False),
        (Fault("status", 500), "InternalServerError", False),
        (Fault("cut_before"), "ServiceUnavailable", False),
        (Fault("cut_after"), "ServiceUnavailable", True),
    ],
)
def test_faults_are_those_of_the_schedule(
    by: Clients, fault: Fault, kind: str, applied: bool
) -> None:
    faults = by.it.server.faults
    assert isinstance(faults, Script)
    faults.add(r"^GRPC /google\.cloud\.aiplatform\.v1\.JobService/CreateCustomJob$", fault)
    with pytest.raises(getattr(exceptions, kind)):
        by.create()
    assert bool(by.it.server.vertex.states()) is applied
    assert by.create("again").display_name == "again"
