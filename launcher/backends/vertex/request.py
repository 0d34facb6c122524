"""The exact requests of a job on Vertex AI, and its priced places. Pure: nothing is sent here.

Field names are those of the REST resource projects.locations.customJobs (v1): 64-bit integers are
strings, durations end in `s`.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Optional
from urllib.parse import quote, urlencode

from launcher import hardware
from launcher.backends.base import Intent, JobSpec, Offer, Plan
from launcher.bundle import kind as packing
from launcher.errors import BadRequest, NoCapacity
from launcher.spec import OWN_PRICE, Hardware, Vertex
from launcher.wheels import TORCH, is_remote

NAME = "vertex"
JOB, OBJECT = "custom_job", "gcs_object"
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
#: the job's identity, and starts the boot.py inside it, which reads the file left beside it.
#: `sha256` is of the tar inside the archive. Exit code 75: the network did not serve; again.
#: The two variables are those of Google's own libraries.
FETCH = """\
import bz2, gzip, hashlib, http.client, io, json, os, sys, tarfile, tempfile, time
import urllib.parse, urllib.request
def get(url, **headers):
    for wait in (1, 2, 4, 8, None):  # the network of a fresh machine may need a moment
        try:
            request = urllib.request.Request(url, headers=headers)
            return urllib.request.urlopen(request, timeout=300).read()
        except (OSError, http.client.HTTPException) as error:  # also in the middle of the body
            code = getattr(error, "code", 500)
            final = code < 500 and code not in (408, 429)
            if final or wait is None:
                print("cannot read " + url.partition("?")[0] + ": " + str(error), file=sys.stderr)
                sys.exit(1 if final else 75)
        time.sleep(wait)
metadata = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
identity = get("http://" + metadata + "/computeMetadata/v1/instance/service-accounts/default/token",
               **{"Metadata-Flavor": "Google"})
bearer = {"Authorization": "Bearer " + json.loads(identity)["access_token"]}
storage = os.environ.get("STORAGE_EMULATOR_HOST", "https://storage.googleapis.com").rstrip("/")
def read(uri):
    bucket, _, name = uri[len("gs://"):].partition("/")
    name = urllib.parse.quote(name, safe="")
    return get("%s/storage/v1/b/%s/o/%s?alt=media" % (storage, bucket, name), **bearer)
bundle, sha256, spec = sys.argv[1:]
packed = read(bundle)
data = (gzip if packed[:2] == b"\\x1f\\x8b" else bz2).decompress(packed)  # gzip: of older runs
if hashlib.sha256(data).hexdigest() != sha256:
    sys.exit("the bundle " + bundle + " is damaged: its sha256 differs")
boot = tarfile.open(fileobj=io.BytesIO(data)).extractfile("trainer/boot.py").read()
folder = tempfile.mkdtemp(prefix="launch-")
paths = [os.path.join(folder, name) for name in ("boot.py", "boot.json", "bundle.tar")]
for path, content in zip(paths, (boot, read(spec), packed)):
    with open(path, "wb") as file:
        file.write(content)
os.execv(sys.executable, [sys.executable, paths[0], "run", *paths[1:]])
"""


def offers(spec: Hardware) -> Iterator[Offer]:
    """Capacities in the order of the recipe, and of each the places in the order of the
    recipe. Prices are the recipe's own, else those of Compute Engine; what Vertex AI adds is not in
    the table."""
    accelerator = hardware.parse(spec.accelerator)
    machine = _machine(spec)
    for capacity in spec.capacity:
        if capacity not in _STRATEGIES:
            raise BadRequest("hardware.capacity", f"vertex has no '{capacity}' capacity",
                             f"allowed: {', '.join(_STRATEGIES)}")  # fmt: skip
        for place in spec.places or DEFAULT_PLACES:
            price, source = _price(accelerator, machine, place, capacity)
            rate = None if price is None else price * spec.nodes
            if spec.own_rate is not None:
                rate, source = spec.own_rate, OWN_PRICE
            yield Offer(NAME, place, str(accelerator), capacity, rate, source, machine)


def plan(spec: JobSpec, offer: Offer) -> Plan:
    """The objects in the run's bucket (bundle, wheels, the user's code, boot specification), then
    the custom job, which is what bills. All but the specification lie outside the run, so that the
    next run need not send them."""
    if spec.hours is not None and spec.hours > _LONGEST_HOURS:
        raise BadRequest("budget.hours", f"a Vertex AI job ends after {_LONGEST_HOURS} hours",
                         "set fewer; the run goes on from its last checkpoint")  # fmt: skip
    if not (spec.hardware.vertex and spec.hardware.vertex.project):
        raise BadRequest("hardware.vertex.project", "is unset, and so is it in the environment",
                         "name it there, or set GOOGLE_CLOUD_PROJECT")  # fmt: skip
    image = _image(spec.hardware)
    root, bundle = str(spec.boot["root"]).rstrip("/"), spec.boot["bundle"]
    bucket = root.removeprefix("gs://").partition("/")[0]
    bundle_uri = f"gs://{bucket}/launch/bundles/{bundle['sha256']}{packing(str(bundle['url']))}"
    boot_uri = f"{root}/boot/{spec.name}-a${{attempt}}.json"
    wheels, uploads = _wheels(spec, bucket)
    boot = {
        **spec.boot, "bundle": {**bundle, "url": bundle_uri}, "environment": True, **wheels,
    }  # fmt: skip
    if (code := spec.boot.get("code")) is not None:
        uri = f"gs://{bucket}/launch/code/{code['sha256']}{packing(str(code['url']))}"
        uploads[uri] = {"file": code["url"], "sha256": code["sha256"]}
        boot["code"] = {**code, "url": uri}
    facts = {"project": project_of(spec.hardware), "labels": labels(spec)}
    sha256 = {"sha256": bundle["sha256"]}
    intents = (
        _object(bundle_uri, offer.place, {"file": bundle["url"], **facts, **sha256}),
        *(_object(uri, offer.place, {**file, **facts}) for uri, file in uploads.items()),
        _object(boot_uri, offer.place, {"json": boot, **facts}),
        Intent(JOB, f"{spec.name}-a${{attempt}}", offer.place, {
            "method": "POST",
            "url": _jobs_url(spec.hardware, offer.place),
            "body": _custom_job(spec, offer, image, (bundle_uri, bundle["sha256"], boot_uri)),
        }),
    )  # fmt: skip
    return Plan(offer, intents)


def warnings(spec: Hardware, today: datetime.date) -> Iterator[str]:
    """What a plan for `spec` should say today."""
    vertex = spec.vertex or Vertex()
    for image in IMAGES:
        if vertex.image == image.uri:
            ends = "is past" if today > image.available_until else "is not past yet"
            yield (
                f"hardware.vertex.image {image.uri} has torch {image.torch} (the trainer needs "
                f"{_torch()}), and its end of availability, {image.available_until}, {ends}; "
                "name an image of your own"
            )


def project_of(spec: Hardware) -> str:
    """The project; `plan` refuses where there is none."""
    return (spec.vertex and spec.vertex.project) or ""


def labels(spec: JobSpec) -> dict[str, str]:
    """What every resource of a job carries; values as the API allows them."""
    given = {**spec.labels, "launch-job": spec.name, "launch-attempt": "${attempt}"}
    return {key: label(value) for key, value in given.items()}


def label(value: str) -> str:
    """A label value: at most 63 of lower-case letters, digits, `_` and `-`."""
    if value == "${attempt}":
        return "a${attempt}"  # a text, also after the hole has taken its number
    return re.sub(r"[^a-z0-9_-]", "-", value.lower())[:63]


def _image(spec: Hardware) -> str:
    """The recipe's image, or the newest prebuilt one if the trainer runs on its torch."""
    if spec.vertex and spec.vertex.image:
        return spec.vertex.image
    newest = IMAGES[-1]
    if tuple(int(part) for part in newest.torch.split(".")) >= TORCH[0]:
        return newest.uri
    raise BadRequest(
        "hardware.vertex.image",
        f"is unset, and the newest prebuilt image has torch {newest.torch}: the trainer needs "
        f"{_torch()}",
        "build docker/Dockerfile, push it to Artifact Registry, and name it there",
    )


def _torch() -> str:
    return ".".join(map(str, TORCH[0]))


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


def _wheels(spec: JobSpec, bucket: str) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """The key `wheels` of the boot specification, and what has to be uploaded for it: wheels that
    lie on this machine, under their sha256, where the next run finds them too."""
    listed, uploads = [], {}
    for wheel in spec.boot.get("wheels") or ():
        if not is_remote(wheel["url"]):
            name = wheel["url"].rpartition("/")[2]
            uri = f"gs://{bucket}/launch/wheels/{wheel['sha256']}/{name}"
            uploads[uri] = {"file": wheel["url"], "sha256": wheel["sha256"]}
            wheel = {**wheel, "url": uri}
        listed.append(wheel)
    return ({"wheels": listed} if listed else {}), uploads


def _object(uri: str, place: str, source: Mapping[str, Any]) -> Intent:
    """An upload that never replaces an object: one that exists is the one meant."""
    bucket, _, name = uri.removeprefix("gs://").partition("/")
    query = urlencode({"uploadType": "media", "name": name, "ifGenerationMatch": 0}, safe="${}")
    url = f"https://storage.googleapis.com/upload/storage/v1/b/{quote(bucket)}/o?{query}"
    return Intent(OBJECT, uri, place, {"method": "POST", "url": url, **source}, False)


def _jobs_url(asked: Hardware, place: str) -> str:
    host = f"https://{place}-aiplatform.googleapis.com/v1"
    return f"{host}/projects/{project_of(asked)}/locations/{place}/customJobs"


def _custom_job(
    spec: JobSpec, offer: Offer, image: str, boot: tuple[str, str, str]
) -> dict[str, Any]:
    vertex = spec.hardware.vertex or Vertex()
    accelerator = hardware.parse(spec.hardware.accelerator)
    worker: dict[str, Any] = {
        "machineSpec": {
            "machineType": offer.machine,
            "acceleratorType": _ACCELERATOR_TYPES[accelerator.kind.name],
            "acceleratorCount": accelerator.count,
        },
        "containerSpec": {
            "imageUri": image,
            "command": ["python3", "-c", FETCH],
            "args": list(boot),
        },
    }
    if vertex.disk_gb is not None:
        worker["diskSpec"] = {"bootDiskSizeGb": vertex.disk_gb}
    pools = [{**worker, "replicaCount": "1"}]
    if spec.hardware.nodes > 1:
        pools.append({**worker, "replicaCount": str(spec.hardware.nodes - 1)})
    # The service starts a failed worker again by itself, and that stays on (no disableRetries): it
    # is faster than a new job, and boot resumes.
    scheduling: dict[str, Any] = {"strategy": _STRATEGIES[offer.capacity]}
    if spec.hardware.nodes > 1:
        # The peers of a restarted worker are in the middle of a step: all have to start again.
        scheduling["restartJobOnWorkerRestart"] = True
    if spec.hours is not None:
        scheduling["timeout"] = "${deadline}s"
    if offer.capacity == "flex" and spec.wait_hours is not None:
        scheduling["maxWaitDuration"] = f"{round(spec.wait_hours * 3600)}s"
    job: dict[str, Any] = {"workerPoolSpecs": pools, "scheduling": scheduling}
    if vertex.service_account:
        job["serviceAccount"] = vertex.service_account
    if vertex.network:
        job["network"] = vertex.network
    return {"displayName": f"{spec.name}-a${{attempt}}", "labels": labels(spec), "jobSpec": job}
