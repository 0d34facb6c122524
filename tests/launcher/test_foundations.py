"""The foundations that a recipe needs: ours are declared, those of others are listed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from infra import google
from infra.google import Expiry, Foundations, Repository
from launcher import recipe
from launcher.errors import RecipeErrors, UsageError
from launcher.foundations import of_recipe

ROOT = Path(__file__).resolve().parents[2]
KD_L4 = ROOT / "recipes" / "kd_l4.yaml"
ENVIRON = {"GOOGLE_CLOUD_PROJECT": "proj-123", "LAUNCH_OWNER": "ann"}
OURS = (
    "hardware.vertex.project=proj-123",
    "hardware.vertex.service_account=trainer@proj-123.iam.gserviceaccount.com",
    "hardware.vertex.image=us-central1-docker.pkg.dev/proj-123/train/launch:1",
    "secrets={HF_TOKEN: 'secret-manager://proj-123/hf-token'}",
)


def _of(*overrides: str, environ: dict[str, str] = ENVIRON, path: Path = KD_L4) -> Foundations:
    loaded = recipe.load(path, [*OURS, *overrides], environ={"BUCKET": "bkt", **environ})
    return of_recipe(loaded.recipe, environ)


def test_what_the_recipe_names_in_its_project_is_declared() -> None:
    assert _of() == Foundations(
        name="kd-l4",
        project="proj-123",
        region="us-central1",
        services=tuple(
            f"{name}.googleapis.com"
            for name in ("cloudresourcemanager", "iam", "storage", "logging", "aiplatform",
                         "secretmanager", "artifactregistry")
        ),
        bucket="bkt",
        accounts=("trainer@proj-123.iam.gserviceaccount.com",),
        secrets=("hf-token",),
        repositories=(Repository("us-central1", "train"),),
        labels={"managed-by": "launch", "launch-owner": "ann"},
    )  # fmt: skip


def test_the_block_infra_says_how() -> None:
    found = _of(
        "infra={bucket_location: eu, storage_class: NEARLINE, retain_bucket: false, "
        "delete_after_days: {tmp/: 7, '*/crash_dump.pt': 30}, "
        "operators: ['user:ann@example.com'], viewers: ['group:all@example.com']}",
        "hardware.places=[europe-west4, us-west1]",
    )

    assert (found.region, found.bucket_location) == ("europe-west4", "eu")
    assert (found.storage_class, found.retain_bucket) == ("NEARLINE", False)
    assert found.expiries == (Expiry(7, prefix="tmp/"), Expiry(30, suffix="/crash_dump.pt"))
    assert found.operators == ("user:ann@example.com",)
    assert found.viewers == ("group:all@example.com",)


@pytest.mark.parametrize(
    ("override", "missing"),
    [
        ("hardware.vertex.service_account=trainer@other.iam.gserviceaccount.com",
         "service account trainer@other.iam.gserviceaccount.com: is not one of project proj-123"),
        ("hardware.vertex.service_account=null", "hardware.vertex.service_account is unset"),
        ("hardware.vertex.image=us-central1-docker.pkg.dev/other/train/launch:1",
         "image us-central1-docker.pkg.dev/other/train/launch:1: is not in a registry of project"),
        ("secrets={HF_TOKEN: 'secret-manager://other/hf-token'}",
         "secret hf-token of project other: has to be there"),
        ("data.train=[{path: gs://shared/train.jsonl}]",
         "gs://shared: has to be there; the job's account needs roles/storage.objectViewer on it"),
        ("tensorboard=gs://boards/{run}",
         "gs://boards: has to be there; the job's account needs roles/storage.objectUser on it"),
        ("infra.state=gs://states/launch", "gs://states: has to be there; it keeps the state"),
        ("model.name=gs://models/llama",
         "gs://models: has to be there; the job's account needs roles/storage.objectViewer on it"),
    ],
)  # fmt: skip
def test_what_lies_elsewhere_is_listed_and_not_declared(override: str, missing: str) -> None:
    found = _of(override)

    assert [line for line in found.missing if line.startswith(missing)], found.missing
    assert len(found.missing) == 1
    texts = str([(one.name, one.inputs) for one in google.resources(found)])
    assert not {"other", "shared", "boards", "models", "states"} & set(
        texts.replace("/", "'").split("'")
    )


def test_images_of_google_need_nothing() -> None:
    found = _of("hardware.vertex.image=us-docker.pkg.dev/vertex-ai/training/pytorch-gpu.2-4:latest")

    assert (found.repositories, found.missing) == ((), ())
    assert "artifactregistry.googleapis.com" not in found.services


def test_a_peered_network_needs_the_api_of_networks() -> None:
    assert "compute.googleapis.com" not in _of().services
    found = _of("hardware.vertex.network=projects/1/global/networks/n")
    assert "compute.googleapis.com" in found.services


def test_the_project_comes_from_the_environment_where_the_recipe_names_none() -> None:
    found = _of(
        "hardware.vertex.project=null", environ={**ENVIRON, "GOOGLE_CLOUD_PROJECT": "env-1"}
    )

    assert found.project == "env-1"
    with pytest.raises(UsageError, match="the project is not known"):
        _of("hardware.vertex.project=null", environ={"LAUNCH_OWNER": "ann"})


def test_the_state_is_not_kept_in_the_bucket_that_it_makes() -> None:
    with pytest.raises(UsageError, match="gs://bkt is the bucket that these foundations make"):
        _of("infra.state=gs://bkt/state")


def test_a_recipe_without_a_stage_in_the_cloud_has_no_foundations() -> None:
    loaded = recipe.load(ROOT / "recipes" / "quickstart.yaml")

    with pytest.raises(UsageError, match="no stage runs on Google Cloud"):
        of_recipe(loaded.recipe, ENVIRON)


def test_the_stages_of_a_pipeline_share_one_project(tmp_path: Path) -> None:
    text = """\
launch: 1
name: two
artifacts: gs://bkt/runs/{run}
hardware: {backend: vertex, accelerator: "L4:1", vertex: {image: a-docker.pkg.dev/p/r/i:1}}
pipeline:
  - {id: a, stage: smoke, smoke: {}, hardware: {vertex: {project: proj-a, service_account: SA}}}
  - {id: b, stage: smoke, smoke: {}, hardware: {vertex: {project: proj-b}}}
"""
    (tmp_path / "two.yaml").write_text(text)
    loaded = recipe.load(tmp_path / "two.yaml")
    with pytest.raises(UsageError, match="its stages run in 2 projects: proj-a, proj-b"):
        of_recipe(loaded.recipe, ENVIRON)

    (tmp_path / "two.yaml").write_text(text.replace("proj-b", "proj-a"))
    found = of_recipe(recipe.load(tmp_path / "two.yaml").recipe, ENVIRON)
    assert found.project == "proj-a"


def test_who_may_look_does_not_make_it_another_run() -> None:
    def digest(*overrides: str) -> str:
        return recipe.load(KD_L4, overrides, environ={}).fingerprint

    assert digest("infra.viewers=['user:ann@example.com']") == digest()
    assert digest("train.seed=7") != digest()


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("infra.state=/tmp/here", "must be gs://BUCKET or gs://BUCKET/FOLDER"),
        ("infra.storage_class=FAST", "'FAST' is not allowed"),
        ("infra.delete_after_days={tmp/: 0}", "must be NAME/: DAYS or '*NAME': DAYS"),
        ("infra.delete_after_days={'*': 3}", "must be NAME/: DAYS or '*NAME': DAYS"),
        ("infra.delete_after_days={'': 3}", "must be NAME/: DAYS or '*NAME': DAYS"),
        ("infra.operators=[ann@example.com]", "must be user:EMAIL, group:EMAIL"),
        ("infra.viewers=[allUsers]", "must be user:EMAIL, group:EMAIL"),
        ("infra.viewer=[x]", "unknown key"),
    ],
)
def test_a_wrong_block_is_refused_when_the_recipe_is_read(override: str, told: str) -> None:
    with pytest.raises(RecipeErrors) as caught:
        _of(override)

    assert told in str(caught.value)


def test_reading_the_foundations_loads_no_client() -> None:
    probe = (
        "import sys\nat_start = set(sys.modules)\n"
        "from launcher import recipe\nfrom launcher.foundations import of_recipe\n"
        "from infra import google\n"
        f"found = recipe.load({str(KD_L4)!r}).recipe\n"
        f"google.resources(of_recipe(found, {ENVIRON!r}))\n"
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - at_start}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded: Any = set(eval(done.stdout))

    assert loaded.isdisjoint({"pulumi", "pulumi_gcp", "google", "requests", "torch", "numpy"})
