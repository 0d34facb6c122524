"""The requests that the vertex backend plans: golden for one node, and what varies."""

from __future__ import annotations

from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

import launcher.plan as planning
from launcher import backends, recipe, start
from launcher.backends.base import Env, Held, Intent, Phase
from launcher.backends.vertex import VertexBackend, request
from launcher.backends.vertex.request import FETCH, IMAGES
from launcher.bundle import Bundle
from launcher.claim import claimed
from launcher.clock import ManualClock
from launcher.engine import Engine
from launcher.errors import BadRequest, NoCapacity
from launcher.spec import Hardware, Vertex
from tests.launcher.test_plan import BUNDLE, environment
from trainer.config import to_dict

KD_L4 = Path(__file__).resolve().parents[2] / "recipes" / "kd_l4.yaml"
ENV = environment()


def planned(*overrides: str, offer: int = 0) -> list[Intent]:
    made = recipe.load(KD_L4, overrides, environ={"PROJECT": "proj", "BUCKET": "bkt"}).recipe
    spec = planning.job_spec(
        made, "00000000000000ff", "kd-l4-0000ff", 0, "gs://bkt/runs/kd-l4-0000ff", ENV.home,
        BUNDLE, "ann", ENV,  # type: ignore[arg-type]
    )  # fmt: skip
    backend = VertexBackend()
    place = list(backend.offers(spec.hardware, ENV))[offer]
    spec = planning.placed(spec, made.budget, place)
    intents = backend.plan(spec, place).intents
    holes = {"attempt": 2, "deadline": spec.hours and round(spec.hours * 3600)}
    return [replace(i, **planning.fill({"name": i.name, "request": i.request}, holes))
            for i in intents]  # fmt: skip


def body(*overrides: str, offer: int = 0) -> Any:
    return planned(*overrides, offer=offer)[-1].request["body"]


def test_the_custom_job_of_one_node_is_exactly_this() -> None:
    job = planned("hardware.vertex.image=eu/own:1", "hardware.vertex.service_account=t@proj.iam")[2]
    assert (job.kind, job.name, job.billable) == ("custom_job", "kd-l4-0000ff-j0-a2", True)
    assert job.request["method"] == "POST"
    assert job.request["url"] == (
        "https://us-central1-aiplatform.googleapis.com/v1/projects/proj/locations/us-central1"
        "/customJobs"
    )
    root = "gs://bkt/runs/kd-l4-0000ff"
    assert job.request["body"] == {
        "displayName": "kd-l4-0000ff-j0-a2",
        "labels": {"launch-run": "00000000000000ff", "launch-owner": "ann",
                   "launch-job": "kd-l4-0000ff-j0", "launch-attempt": "a2"},
        "jobSpec": {
            "workerPoolSpecs": [{
                "machineSpec": {"machineType": "g2-standard-8", "acceleratorType": "NVIDIA_L4",
                                "acceleratorCount": 1},
                "containerSpec": {
                    "imageUri": "eu/own:1",
                    "command": ["python3", "-c", FETCH],
                    "args": [f"gs://bkt/launch/bundles/{BUNDLE.sha256}.tar.gz", BUNDLE.sha256,
                             f"{root}/boot/kd-l4-0000ff-j0-a2.json"],
                },
                "replicaCount": "1",
            }],
            "scheduling": {"strategy": "SPOT", "timeout": "43200s"},
            "serviceAccount": "t@proj.iam",
        },
    }  # fmt: skip


def test_what_the_job_reads_is_uploaded_before_it_and_does_not_bill() -> None:
    bundle, boot, job = planned()
    assert [i.kind for i in (bundle, boot, job)] == ["gcs_object", "gcs_object", "custom_job"]
    assert not bundle.billable and not boot.billable
    assert bundle.request["file"] == str(BUNDLE.path)
    args = job.request["body"]["jobSpec"]["workerPoolSpecs"][0]["containerSpec"]["args"]
    assert [bundle.name, bundle.request["sha256"], boot.name] == args
    assert boot.request["url"] == (
        "https://storage.googleapis.com/upload/storage/v1/b/bkt/o?uploadType=media"
        "&name=runs%2Fkd-l4-0000ff%2Fboot%2Fkd-l4-0000ff-j0-a2.json&ifGenerationMatch=0"
    )
    spec = boot.request["json"]
    assert (spec["attempt"], spec["job"]["attempt"]) == (2, 2)
    assert spec["bundle"]["url"] == bundle.name and spec["python"] == "python3"
    assert spec["secrets"] == {"HF_TOKEN": "secret-manager://proj/hf-token"}


def test_several_nodes_are_a_chief_and_a_pool_of_the_same_machine() -> None:
    network = "hardware.vertex.network=projects/1/global/networks/n"
    job = body("hardware.nodes=4", network)["jobSpec"]
    first, second = job["workerPoolSpecs"]
    assert (first["replicaCount"], second["replicaCount"]) == ("1", "3")
    assert {**first, "replicaCount": "3"} == second
    # A worker that starts alone would wait for peers that are in the middle of a step.
    assert job["scheduling"]["restartJobOnWorkerRestart"] is True
    assert job["network"] == "projects/1/global/networks/n"


def test_a_larger_disk_is_asked_for_on_every_node() -> None:
    pools = body("hardware.nodes=2", "hardware.vertex.disk_gb=300")["jobSpec"]["workerPoolSpecs"]
    assert [pool["diskSpec"] for pool in pools] == [{"bootDiskSizeGb": 300}] * 2
    assert "diskSpec" not in body()["jobSpec"]["workerPoolSpecs"][0]


def test_capacity_chooses_the_strategy_and_the_budget_the_timeout() -> None:
    offers = list(VertexBackend().offers(Hardware("vertex", "L4:1", capacity=("spot", "standard"),
                                                  places=("a", "b")), ENV))  # fmt: skip
    assert [(o.capacity, o.place) for o in offers] == [
        ("spot", "a"), ("spot", "b"), ("standard", "a"), ("standard", "b"),
    ]  # fmt: skip
    assert body(offer=2)["jobSpec"]["scheduling"]["strategy"] == "STANDARD"
    flex = body("hardware.capacity=[flex]", "budget.hours=0.5")["jobSpec"]["scheduling"]
    assert (flex["strategy"], flex["timeout"]) == ("FLEX_START", "1800s")
    assert flex["maxWaitDuration"] == "7200s"  # budget.wait: 2h
    assert "maxWaitDuration" not in body(offer=2)["jobSpec"]["scheduling"]
    no_wait = body("hardware.capacity=[flex]", "budget.wait=null")["jobSpec"]["scheduling"]
    assert "maxWaitDuration" not in no_wait
    no_hours = ("budget.hours=null", "budget.usd=null")
    assert "timeout" not in body(*no_hours)["jobSpec"]["scheduling"]
    with pytest.raises(BadRequest, match="ends after 168 hours"):
        planned("budget.hours=200", "budget.usd=null")
    with pytest.raises(BadRequest, match="vertex has no 'reserved' capacity"):
        list(VertexBackend().offers(Hardware("vertex", "L4:1", capacity=("reserved",)), ENV))


def test_a_preview_equals_what_is_recorded_whatever_is_left_of_the_budget(tmp_path: Path) -> None:
    """The engine's own intents, without the service: this version submits nothing."""
    made = recipe.load(KD_L4, ["budget.usd=1000"], environ={"PROJECT": "p", "BUCKET": "b"}).recipe
    made = replace(made, artifacts=str(tmp_path / "{run}"))  # the engine keeps its runs here
    env = replace(ENV, home=tmp_path / "home")
    bundle = Bundle(tmp_path / "b.tar.gz", "ab" * 32, 1000)
    bundle.path.write_bytes(b"trainer")
    loaded = recipe.Loaded(made, to_dict(made), "f" * 64, KD_L4)
    run_id = start.create(loaded, bundle, env)["id"]
    commit = start.commit_of(KD_L4)
    (job,) = planning.make(made, env, bundle, run_id, commit).jobs
    with claimed(run_id, env, backends.load, None, False) as claim:
        state, offer = claim.run.jobs[0], job.offers[0]
        claim.record("intent", job=0, attempt=1, intent=asdict(job.intents[0]), offer=asdict(offer))
        seen = {"held": Held.LIVE, "why": "", "exit_code": None, "cause": ""}
        claim.record("phase", job=0, attempt=1, phase=Phase.RUNNING, **seen)
        claim.clock.sleep(3000.0)  # an attempt that has used some of the budget
        sent = list(Engine(claim)._intents(state, 2, offer))
    left = 12 * 3600 - 3000
    assert sent[1].request["json"]["deadline_seconds"] == left
    assert sent[2].request["body"]["jobSpec"]["scheduling"]["timeout"] == f"{left}s"
    holes = {"attempt": 2, "resume": True, "deadline": left}
    assert [asdict(intent) for intent in sent] == [
        planning.fill(asdict(intent), holes) for intent in job.intents
    ]


def test_dollars_bound_the_timeout_where_the_price_is_known() -> None:
    where = ("hardware.accelerator=H100:8", "hardware.vertex.machine=null",
             "hardware.capacity=[spot]", "hardware.places=[us-east4]")  # fmt: skip
    job = body(*where, "budget.hours=null", "budget.usd_per_hour=null", "budget.usd=34.16")
    assert job["jobSpec"]["scheduling"]["timeout"] == "3600s"


def test_the_plan_of_kd_l4_has_a_price_and_its_budget_in_dollars_binds() -> None:
    def made(*overrides: str) -> planning.RunPlan:
        loaded = recipe.load(KD_L4, overrides, environ={}).recipe
        return planning.make(loaded, ENV, BUNDLE)  # type: ignore[arg-type]

    plan = made()
    assert (plan.usd_per_hour, plan.usd_total) == (0.43623, pytest.approx(12 * 0.85362))
    assert "cost: 0.44 USD/h, at most 10.24 USD (12 h)" in plan.lines()
    assert not any("price is unknown" in note for note in plan.notes)
    assert made("budget.usd=5").usd_total == 5
    assert body("budget.usd=4.3623")["jobSpec"]["scheduling"]["timeout"] == "36000s"


def test_a_plan_says_where_dollars_are_not_capped_and_what_is() -> None:
    def notes(*overrides: str) -> list[str]:
        loaded = recipe.load(KD_L4, ["hardware.places=[us-west1, us-east1]", *overrides],
                             environ={}).recipe  # fmt: skip
        plan = planning.make(loaded, ENV, BUNDLE)  # type: ignore[arg-type]
        assert plan.usd_total is None and plan.usd_per_hour == 0.43623
        return [note for note in plan.notes if "price is unknown" in note]

    where = "the price is unknown: spot in us-east1, standard in us-east1; "
    both = "budget.usd and budget.usd_per_hour do not cap what runs there, "
    assert notes() == [f"{where}{both}budget.hours (12) does"]
    usd = ("budget.usd_per_hour=null", "budget.hours=null")
    alone = "budget.usd does not cap what runs there, nothing else does: set budget.hours"
    assert notes(*usd) == [where + alone]
    assert notes("budget.usd=null", "budget.usd_per_hour=null") == []


def test_prices_are_those_of_the_table_for_that_place_and_machine_or_unknown() -> None:
    def prices(spec: Hardware) -> list[float | None]:
        return [offer.usd_per_hour for offer in VertexBackend().offers(spec, ENV)]

    h100 = Hardware("vertex", "H100:8", 2, ("standard", "spot", "flex"), ("us-east4",))
    assert prices(h100) == [2 * 87.8325, 2 * 34.16, None]
    assert prices(replace(h100, places=("us-west1",))) == [None, None, None]
    assert prices(replace(h100, vertex=Vertex(machine="a3-edgegpu-8g"))) == [None, None, None]
    assert prices(Hardware("vertex", "L4:1", places=("us-west1",))) == [0.85362]
    assert prices(Hardware("vertex", "L4:1", places=("us-east1",))) == [None]
    offer = next(iter(VertexBackend().offers(h100, ENV)))
    assert (
        "2026-11-21" in offer.price_source and "without what Vertex AI adds" in offer.price_source
    )
    with pytest.raises(NoCapacity, match="no machine holds L4:3"):
        prices(Hardware("vertex", "L4:3"))


def test_every_accelerator_with_a_machine_has_a_name_in_the_api() -> None:
    from launcher import hardware

    for kind in hardware.kinds("gcp"):
        count = hardware.counts(hardware.parse(kind).kind, "gcp")[0]
        spec = body(f"hardware.accelerator={kind}:{count}", "hardware.vertex.machine=null")
        machine = spec["jobSpec"]["workerPoolSpecs"][0]["machineSpec"]
        assert machine["acceleratorType"].startswith("NVIDIA_")
        assert machine["acceleratorCount"] == count


def test_label_values_keep_to_what_the_api_allows() -> None:
    made = recipe.load(KD_L4, environ={}).recipe
    spec = planning.job_spec(made, "0f", "n-0f", 0, "gs://b/r", ENV.home, BUNDLE,  # type: ignore[arg-type]
                             "Ann.Example@corp " + "x" * 90, ENV)  # fmt: skip
    backend = VertexBackend()
    offer = next(iter(backend.offers(spec.hardware, ENV)))
    owner = backend.plan(spec, offer).intents[-1].request["body"]["labels"]["launch-owner"]
    assert owner == ("ann-example-corp-" + "x" * 90)[:63]


def at(year: int) -> Env:
    moment = datetime(year, 6, 1, tzinfo=timezone.utc).timestamp()
    return replace(ENV, clock=ManualClock(moment))


def test_without_a_project_there_is_no_plan() -> None:
    with pytest.raises(BadRequest, match=r"hardware\.vertex\.project: is unset") as caught:
        planned("hardware.vertex.project=null")
    assert "GOOGLE_CLOUD_PROJECT" in caught.value.hint


def test_warnings_tell_of_a_dated_image() -> None:
    backend, spec = VertexBackend(), Hardware("vertex", "L4:1")
    dated = replace(spec, vertex=Vertex(image=IMAGES[-1].uri))
    late, early = list(backend.warnings(dated, at(2027))), list(backend.warnings(dated, at(2026)))
    assert any("has torch 2.4" in line and "2026-07-24, is past;" in line for line in late)
    assert any("2026-07-24, is not past yet" in line for line in early)
    own = replace(spec, vertex=Vertex(project="p", image="own:1"))
    assert list(backend.warnings(own, at(2027))) == []


def test_without_an_image_whose_torch_suffices_there_is_no_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(BadRequest, match=r"newest prebuilt image has torch 2\.4") as caught:
        planned("hardware.vertex.image=null")
    assert "hardware.vertex.image" in str(caught.value)
    assert "docker/Dockerfile" in caught.value.hint
    newer = replace(IMAGES[-1], uri="us/newer:1", torch="2.10")
    monkeypatch.setattr(request, "IMAGES", (*IMAGES, newer))
    spec = body("hardware.vertex.image=null")["jobSpec"]["workerPoolSpecs"][0]
    assert spec["containerSpec"]["imageUri"] == "us/newer:1"
