"""Vertex AI custom jobs: priced places and the exact requests of a job.

This version plans and does not submit: whatever would reach the API raises `Denied`. Field names
are those of the REST resource projects.locations.customJobs (v1): 64-bit integers are strings.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Optional
from urllib.parse import quote, urlencode

from launcher import hardware
from launcher.backends.base import (
    Capabilities,
    Check,
    Env,
    Held,
    Intent,
    JobHandle,
    JobSpec,
    Line,
    LogQuery,
    Offer,
    Plan,
    Ref,
    Seen,
)  # fmt: skip
from launcher.errors import BadRequest, Denied, NoCapacity
from launcher.spec import Hardware, Vertex

DEFAULT_PLACES = ("us-central1",)
_CLOUD = "gcp"
_ACCELERATOR_TYPES = {
    "L4": "NVIDIA_L4",
    "A100-40GB": "NVIDIA_TESLA_A100",
    "A100-80GB": "NVIDIA_A100_80GB",
    "H100": "NVIDIA_H100_80GB",
    "H100-MEGA": "NVIDIA_H100_MEGA_80GB",
    "H200": "NVIDIA_H200_141GB",
    "B200": "NVIDIA_B200",
}
_STRATEGIES = {"standard": "STANDARD", "spot": "SPOT", "flex": "FLEX_START"}
_LONGEST_HOURS = 7 * 24  # the service's own limit, and its default


@dataclass(frozen=True)
class Image:
    """A prebuilt training image; after `available_until` it may be removed."""

    uri: str
    torch: str
    available_until: datetime.date


#: From Google's page of supported frameworks, read 2026-11-21; the last entry is the newest.
IMAGES = (
    Image("us-docker.pkg.dev/vertex-ai/training/pytorch-gpu.2-3.py310:latest", "2.3",
          datetime.date(2026, 4, 24)),
    Image("us-docker.pkg.dev/vertex-ai/training/pytorch-gpu.2-4.py310:latest", "2.4",
          datetime.date(2026, 7, 24)),
)  # fmt: skip

#: Runs in the container before anything of ours is there: takes the bundle from the bucket with
#: the job's identity, and starts the boot.py inside it. `sha256` is of the tar inside the gzip.
_FETCH = """\
import gzip, hashlib, io, json, os, sys, tarfile, urllib.parse, urllib.request
def get(url, **headers):
    request = urllib.request.Request(url, headers=headers)
    return urllib.request.urlopen(request, timeout=300).read()
identity = get("http://metadata.google.internal/computeMetadata/v1/instance/service-accounts/"
               "default/token", **{"Metadata-Flavor": "Google"})
bearer = {"Authorization": "Bearer " + json.loads(identity)["access_token"]}
def read(uri):
    bucket, _, name = uri[len("gs://"):].partition("/")
    name = urllib.parse.quote(name, safe="")
    return get("https://storage.googleapis.com/storage/v1/b/%s/o/%s?alt=media" % (bucket, name),
               **bearer)
bundle, sha256, spec = sys.argv[1:]
data = gzip.decompress(read(bundle))
if hashlib.sha256(data).hexdigest() != sha256:
    sys.exit("the bundle " + bundle + " is damaged: its sha256 differs")
boot = tarfile.open(fileobj=io.BytesIO(data)).extractfile("trainer/boot.py").read()
os.makedirs("/tmp/launch", exist_ok=True)
for path, content in (("/tmp/launch/boot.py", boot), ("/tmp/launch/boot.json", read(spec))):
    with open(path, "wb") as file:
        file.write(content)
os.execv(sys.executable, [sys.executable, "/tmp/launch/boot.py", "run", "/tmp/launch/boot.json"])
"""


class VertexBackend:
    name = "vertex"
    can = Capabilities(spot=True, nodes=True, follow=True, create=False)

    def check(self, env: Env) -> Iterable[Check]:
        yield Check(
            "vertex", "warn", "this version plans Vertex AI jobs but does not submit them",
            "`launch plan RECIPE --json` prints the requests; `--on local` runs the recipe here",
        )  # fmt: skip

    def offers(self, spec: Hardware, env: Env) -> Iterable[Offer]:
        """Capacities in the order of the recipe, and of each the places in the order of the
        recipe. Prices are those of Compute Engine; what Vertex AI adds is not in the table."""
        accelerator = hardware.parse(spec.accelerator)
        machine = _machine(spec)
        for capacity in spec.capacity:
            if capacity not in _STRATEGIES:
                raise BadRequest("hardware.capacity", f"vertex has no '{capacity}' capacity",
                                 f"allowed: {', '.join(_STRATEGIES)}")  # fmt: skip
            for place in spec.places or DEFAULT_PLACES:
                price, source = _price(accelerator, machine, place, capacity)
                rate = None if price is None else price * spec.nodes
                yield Offer(self.name, place, str(accelerator), capacity, rate, source, machine)

    def plan(self, spec: JobSpec, offer: Offer) -> Plan:
        """Two objects in the run's bucket (bundle, boot specification), then the custom job, which
        is what bills."""
        if spec.hours is not None and spec.hours > _LONGEST_HOURS:
            raise BadRequest("budget.hours", f"a Vertex AI job ends after {_LONGEST_HOURS} hours",
                             "set fewer; the run goes on from its last checkpoint")  # fmt: skip
        root, bundle = str(spec.boot["root"]).rstrip("/"), spec.boot["bundle"]
        bundle_uri = f"{root}/bundles/{bundle['sha256']}.tar.gz"
        boot_uri = f"{root}/boot/{spec.name}-a${{attempt}}.json"
        boot = {**spec.boot, "bundle": {**bundle, "url": bundle_uri}}
        intents = (
            _object(bundle_uri, offer.place, {"file": bundle["url"], "sha256": bundle["sha256"]}),
            _object(boot_uri, offer.place, {"json": boot}),
            Intent("custom_job", f"{spec.name}-a${{attempt}}", offer.place, {
                "method": "POST",
                "url": _jobs_url(spec.hardware, offer.place),
                "body": _custom_job(spec, offer, (bundle_uri, bundle["sha256"], boot_uri)),
            }),
        )  # fmt: skip
        return Plan(offer, intents)

    def warnings(self, spec: Hardware, env: Env) -> Iterable[str]:
        """What a plan for `spec` should say today."""
        yield "this version plans Vertex AI jobs but does not submit them"
        vertex = spec.vertex or Vertex()
        if not vertex.project:
            yield "no project: set hardware.vertex.project or GOOGLE_CLOUD_PROJECT"
        today = datetime.datetime.fromtimestamp(env.clock.now(), datetime.timezone.utc).date()
        image = IMAGES[-1]
        if vertex.image is None:
            ends = "is past" if today > image.available_until else "is not past yet"
            yield (
                f"hardware.vertex.image is unset: {image.uri} has torch {image.torch} (the trainer "
                f"needs 2.9), and its end of availability, {image.available_until}, {ends}; "
                "name an image of your own"
            )

    def create(self, intent: Intent, env: Env) -> Ref:
        _deny()

    def observe(self, job: JobHandle, env: Env) -> Seen:
        _deny()

    def logs(self, job: JobHandle, query: LogQuery, env: Env) -> Iterator[Line]:
        _deny()

    def stop(self, job: JobHandle, env: Env, grace: float) -> None:
        _deny()

    def delete(self, ref: Ref, env: Env) -> Held:
        _deny()

    def sweep(self, env: Env) -> Iterator[Ref]:
        """Nothing: this version has never created anything there."""
        return iter(())


def _deny() -> NoReturn:
    raise Denied(
        "this version plans Vertex AI jobs but does not submit them",
        "`launch plan RECIPE --json` prints the requests; `--on local` runs the recipe here",
    )


def _machine(spec: Hardware) -> str:
    named = spec.vertex.machine if spec.vertex else None
    machine = named or hardware.machine(hardware.parse(spec.accelerator), _CLOUD)
    if machine is None:
        raise NoCapacity(_CLOUD, f"no machine holds {spec.accelerator}; see hardware.accelerator")
    return machine


def _price(
    accelerator: hardware.Accelerator, machine: str, place: str, capacity: str
) -> tuple[Optional[float], str]:
    """USD an hour of one machine, and where the price comes from or why there is none."""
    for price in hardware.prices(accelerator, _CLOUD):
        if price.machine != machine or price.region != place:
            continue
        dollars = {"standard": price.on_demand, "spot": price.spot}.get(capacity)
        if dollars is not None:
            return dollars, (
                f"Compute Engine, without what Vertex AI adds; {price.source}, {price.snapshot}"
            )
    return None, f"no dated {capacity} price for {machine} in {place}"


def _object(uri: str, place: str, source: Mapping[str, Any]) -> Intent:
    """An upload that never replaces an object: one that exists is the one meant."""
    bucket, _, name = uri.removeprefix("gs://").partition("/")
    query = urlencode({"uploadType": "media", "name": name, "ifGenerationMatch": 0}, safe="${}")
    url = f"https://storage.googleapis.com/upload/storage/v1/b/{quote(bucket)}/o?{query}"
    return Intent("gcs_object", uri, place, {"method": "POST", "url": url, **source}, False)


def _jobs_url(asked: Hardware, place: str) -> str:
    project = asked.vertex.project if asked.vertex else None
    host = f"https://{place}-aiplatform.googleapis.com/v1"
    return f"{host}/projects/{project or '${project}'}/locations/{place}/customJobs"


def _custom_job(spec: JobSpec, offer: Offer, boot: tuple[str, str, str]) -> dict[str, Any]:
    vertex = spec.hardware.vertex or Vertex()
    accelerator = hardware.parse(spec.hardware.accelerator)
    worker = {
        "machineSpec": {
            "machineType": offer.machine,
            "acceleratorType": _ACCELERATOR_TYPES[accelerator.kind.name],
            "acceleratorCount": accelerator.count,
        },
        "containerSpec": {
            "imageUri": vertex.image or IMAGES[-1].uri,
            "command": ["python3", "-c", _FETCH],
            "args": list(boot),
        },
    }
    pools = [{**worker, "replicaCount": "1"}]
    if spec.hardware.nodes > 1:
        pools.append({**worker, "replicaCount": str(spec.hardware.nodes - 1)})
    # The engine counts attempts and chooses places, so the service must not start again by itself.
    scheduling: dict[str, Any] = {
        "strategy": _STRATEGIES[offer.capacity],
        "restartJobOnWorkerRestart": False,
        "disableRetries": True,
    }
    if spec.hours is not None:
        scheduling["timeout"] = "${deadline}s"
    job: dict[str, Any] = {"workerPoolSpecs": pools, "scheduling": scheduling}
    if vertex.service_account:
        job["serviceAccount"] = vertex.service_account
    labels = {**spec.labels, "launch-job": spec.name, "launch-attempt": "${attempt}"}
    return {
        "displayName": f"{spec.name}-a${{attempt}}",
        "labels": {key: _label(value) for key, value in labels.items()},
        "jobSpec": job,
    }


def _label(value: str) -> str:
    """A label value: at most 63 of lower-case letters, digits, `_` and `-`."""
    if value == "${attempt}":
        return "a${attempt}"  # a text, also after the hole has taken its number
    return re.sub(r"[^a-z0-9_-]", "-", value.lower())[:63]
