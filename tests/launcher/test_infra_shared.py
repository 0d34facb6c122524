"""`launch infra` for recipes that share a bucket, against the stand-in for the engine's command
line: what an update or a destroy for one does to the resources of another."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pulumi_gcp", reason="needs the extra `infra`")

from launcher import cli
from launcher.commands import infra_stack
from launcher.errors import HeldElsewhere
from tests.infra.stand_in import StandIn

RECIPE = """
launch: 1
name: {name}
stage: smoke
smoke: {{}}
hardware:
  backend: vertex
  accelerator: L4:1
  vertex: {{project: proj-1, service_account: {name}-runs@proj-1.iam.gserviceaccount.com}}
budget: {{usd: 5, hours: 1}}
artifacts: gs://our-models/runs/{{run}}
secrets:
  HF_TOKEN: secret-manager://proj-1/hf-token
  TOKEN: secret-manager://proj-1/{secret}
infra: {infra}
"""
Told = tuple[int, str, str]
Launch = Callable[..., Told]


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return _engine(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[StandIn, Path]]:
    """A stand-in and a $LAUNCH_HOME after one `up` of tuna, and after one of bass too."""
    made: dict[str, tuple[StandIn, Path]] = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("tuna", "bass"):
            folder = tmp_path_factory.mktemp(name)
            engine = _engine(folder, patch)
            if made:
                engine.copy(*made["tuna"], folder / "home")
            assert cli.run(["infra", "up", f"{name}.yaml", "--yes"]) == 0
            made[name] = (engine, folder / "home")
    return made


@pytest.fixture
def tuna(templates: dict[str, tuple[StandIn, Path]], engine: StandIn, tmp_path: Path) -> StandIn:
    """The stand-in after an `up` of tuna."""
    engine.copy(*templates["tuna"], tmp_path / "home")
    return engine


@pytest.fixture
def both(templates: dict[str, tuple[StandIn, Path]], engine: StandIn, tmp_path: Path) -> StandIn:
    """The stand-in after an `up` of tuna and one of bass."""
    engine.copy(*templates["bass"], tmp_path / "home")
    return engine


def _engine(folder: Path, patch: pytest.MonkeyPatch) -> StandIn:
    """A stand-in, and an environment and folder of recipes for it."""
    engine = StandIn(folder / "stand-in")
    patch.setenv("LAUNCH_HOME", str(folder / "home"))
    patch.setenv("PATH", f"{engine.bin}:{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith("PULUMI")]:
        patch.delenv(name)
    patch.chdir(folder)
    _write("tuna")
    _write("bass")
    return engine


@pytest.fixture
def launch(engine: StandIn, capsys: pytest.CaptureFixture[str]) -> Launch:
    def run(*words: str) -> Told:
        capsys.readouterr()
        code = cli.run(["infra", *words])
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


def _write(name: str, secret: str = "", infra: str = "{}") -> None:
    text = RECIPE.format(name=name, secret=secret or f"{name}-token", infra=infra)
    Path(f"{name}.yaml").write_text(text)


def _done(launch: Launch, *words: str) -> dict[str, Any]:
    code, out, err = launch(*words, "--json")
    assert code == 0, err
    document: dict[str, Any] = json.loads(out)
    return document


def _changes(launch: Launch, *words: str) -> dict[str, str]:
    """What is changed, without what stays."""
    changes = _done(launch, *words, "--yes")["changes"]
    return {one["name"]: one["change"] for one in changes if one["change"] != "same"}


def _cloud(engine: StandIn) -> set[str]:
    """The accounts, secrets and buckets that there are."""
    kinds = ("serviceaccount/account:", "secretmanager/secret:", "storage/bucket:")
    return {key.rpartition("/")[2] for key in engine.cloud if any(kind in key for kind in kinds)}


def test_each_recipe_changes_and_deletes_its_own_until_the_last_one_takes_all(
    launch: Launch, engine: StandIn
) -> None:
    assert set(_changes(launch, "up", "tuna.yaml").values()) == {"create"}
    assert _cloud(engine) == {"our-models", "tuna-runs", "hf-token", "tuna-token"}

    bass = _changes(launch, "up", "bass.yaml")
    assert set(bass.values()) == {"create"}
    assert {"account-bass-runs", "secret-bass-token"} < bass.keys()
    assert not {"bucket", "secret-hf-token", "account-tuna-runs"} & bass.keys()
    both = {"our-models", "tuna-runs", "hf-token", "tuna-token", "bass-runs", "bass-token"}
    assert _cloud(engine) == both

    _write("tuna", secret="new-token")
    changed = _changes(launch, "up", "tuna.yaml")
    assert (changed["secret-new-token"], changed["secret-tuna-token"]) == ("create", "delete")
    assert not [name for name in changed if "bass" in name or "hf-token" in name]
    assert _cloud(engine) == both - {"tuna-token"} | {"new-token"}
    assert _changes(launch, "up", "bass.yaml") == {}

    code, out, err = launch("destroy", "tuna.yaml", "--yes")
    assert code == 0
    assert "nothing is left of what only tuna declared; the rest stays for bass" in out
    assert "more stay as they are, for bass" in err
    assert _cloud(engine) == {"our-models", "hf-token", "bass-runs", "bass-token"}
    assert _changes(launch, "up", "bass.yaml") == {}
    code, out, _ = launch("destroy", "tuna.yaml", "--yes")
    assert (code, out) == (0, "proj-1.our-models: nothing was made for tuna; it has: bass\n")

    assert launch("destroy", "bass.yaml", "--yes")[0] == 0
    assert _cloud(engine) == {"our-models"}
    assert "nothing was made" in launch("status", "bass.yaml")[1]


def test_an_input_that_another_recipe_has_otherwise_is_told_and_the_applied_one_wins(
    launch: Launch, tuna: StandIn
) -> None:
    _write("bass", infra="{storage_class: NEARLINE}")

    _, out, _ = launch("plan", "bass.yaml")
    (line,) = (line for line in out.splitlines() if line.startswith("~"))
    assert line.split() == [
        "~", "update", "storage.Bucket", "bucket", "storageClass;", "otherwise", "in", "tuna",
    ]  # fmt: skip
    assert _changes(launch, "up", "bass.yaml")["bucket"] == "update"
    (bucket,) = (one for key, one in tuna.cloud.items() if "storage/bucket:" in key)
    assert bucket["storageClass"] == "NEARLINE"
    assert "bucket" not in _changes(launch, "destroy", "bass.yaml")  # tuna's by now, as it is
    (bucket,) = (one for key, one in tuna.cloud.items() if "storage/bucket:" in key)
    assert bucket["storageClass"] == "NEARLINE"


def test_what_a_killed_update_left_is_its_recipes_and_no_others(
    launch: Launch, engine: StandIn
) -> None:
    account = "serviceAccount:tuna-runs@proj-1.iam.gserviceaccount.com"
    last = f"secret-tuna-token-secretmanager.secretAccessor-{account}"
    engine.faults(die_after=last)
    assert launch("up", "tuna.yaml", "--yes")[0] != 0
    engine.faults()

    changed = _changes(launch, "up", "bass.yaml")

    assert "delete" not in changed.values()
    assert not [name for name in changed if "tuna" in name]
    assert {"tuna-runs", "bass-runs", "bass-token", "tuna-token"} < _cloud(engine)
    assert "account-tuna-runs" not in _changes(launch, "up", "tuna.yaml")
    assert {"tuna-runs", "tuna-token", "bass-runs"} < _cloud(engine)


def test_a_destroy_of_one_that_does_not_end_is_gone_on_with(launch: Launch, both: StandIn) -> None:
    both.faults(fail={"account-tuna-runs": "googleapi: Error 403: denied"})

    code, _, err = launch("destroy", "tuna.yaml", "--yes")

    assert code == 7
    assert "account-tuna-runs: googleapi: Error 403: denied" in err
    both.faults()
    assert not [name for name in _changes(launch, "up", "bass.yaml") if "tuna" in name]
    assert "account-tuna-runs" in _changes(launch, "destroy", "tuna.yaml")
    assert _cloud(both) == {"our-models", "hf-token", "bass-runs", "bass-token"}


def test_a_recipe_whose_file_is_gone_is_listed_and_can_be_forgotten(
    launch: Launch, both: StandIn
) -> None:
    Path("tuna.yaml").unlink()

    _, out, _ = launch("status", "bass.yaml")
    lines = out.splitlines()
    at = lines.index("recipe tuna: 6 declared by it alone")
    assert lines[at + 1 : at + 3] == ["  account-tuna-runs", "  secret-tuna-token"]
    assert not [line for line in lines[at + 1 : at + 7] if "tuna" not in line]
    assert "recipes:" not in out
    code, _, err = launch("destroy", "bass.yaml", "--forget", "cod", "--yes")
    assert code == 2
    assert "proj-1.our-models has no recipe cod; it has: bass, tuna" in err

    assert (
        _changes(launch, "destroy", "bass.yaml", "--forget", "tuna")["account-tuna-runs"]
        == "delete"
    )

    assert _cloud(both) == {"our-models", "hf-token", "bass-runs", "bass-token"}
    assert _done(launch, "status", "bass.yaml")["recipes"].keys() == {"bass"}


def test_an_export_beside_others_has_a_stack_of_its_own_and_says_so(
    launch: Launch, both: StandIn
) -> None:

    code, _, err = launch("export", "bass.yaml", "--to", "own")

    assert code == 0
    assert "proj-1.our-models also has what tuna declared" in err
    assert Path("own/Pulumi.proj-1.our-models.bass.yaml").exists()
    assert "tuna" not in Path("own/__main__.py").read_text()


def test_declarations_that_cannot_be_read_stop_every_command_before_it_changes_anything(
    launch: Launch, tuna: StandIn, tmp_path: Path
) -> None:
    (file,) = (tmp_path / "home" / "infra" / "state").rglob("stacks/*/*.json")
    newer = file.read_text().replace('\\"version\\": 1', '\\"version\\": 2')
    assert newer != file.read_text()
    file.write_text(newer)
    before = tuna.cloud

    for words in (("plan",), ("up", "--yes"), ("destroy", "--yes"), ("status",)):
        code, _, err = launch(words[0], "bass.yaml", *words[1:])
        assert code == 2
        assert "by a newer launch (version 2; this one reads 1)" in err
        assert "nothing was changed" in err
    assert tuna.cloud == before


def test_an_update_of_another_recipe_since_the_preview_stops_this_one(
    launch: Launch, tuna: StandIn
) -> None:
    f, stack = infra_stack.opened("tuna.yaml", yes=True)
    _, seen = infra_stack.look(stack, f)
    _changes(launch, "up", "bass.yaml")
    before = tuna.cloud

    with pytest.raises(HeldElsewhere, match="another update has changed what"):
        infra_stack.make(f, seen, stack, yes=True, unlock=False)
    with pytest.raises(HeldElsewhere, match="another update has changed what"):
        infra_stack.unmake("tuna", seen, stack, yes=True, unlock=False)
    assert tuna.cloud == before


def test_what_no_recipe_declares_is_never_deleted_along_the_way(
    launch: Launch, tuna: StandIn, tmp_path: Path
) -> None:
    (file,) = (tmp_path / "home" / "infra" / "state").rglob("stacks/*/*.json")
    state = json.loads(file.read_text())
    own = "urn:pulumi:proj-1.our-models::launch::gcp:storage/bucket:Bucket::somebodys"
    resources = state["checkpoint"]["latest"]["resources"]
    resources.append({"urn": own, "type": "gcp:storage/bucket:Bucket", "id": "x", "inputs": {}})
    file.write_text(json.dumps(state))

    for words in (("up", "--yes"), ("destroy", "--yes")):
        code, _, err = launch(words[0], "tuna.yaml", *words[1:])
        assert code == 2
        assert "has what no recipe declares: somebodys" in err
    assert "no recipe declares somebodys" in launch("status", "tuna.yaml")[1]


def test_what_another_stack_made_stays_when_this_one_that_adopted_it_is_destroyed(
    launch: Launch, engine: StandIn
) -> None:
    """Two recipes of one project with a bucket each, and one service account and secret."""
    for name in ("tuna", "bass"):
        text = RECIPE.format(name=name, secret=f"{name}-token", infra="{}")
        text = text.replace(f"{name}-runs@", "trainer@").replace("our-models", f"{name}-models")
        Path(f"{name}.yaml").write_text(text)
    launch("up", "tuna.yaml", "--yes")
    before = engine.cloud
    _, _, err = launch("up", "bass.yaml", "--yes")
    assert "a destroy leaves it where it is" in err
    assert "adopted account-trainer" in err
    assert "there before: account-trainer, secret-hf-token" in launch("status", "bass.yaml")[1]

    without = Path("bass.yaml").read_text().replace("  HF_TOKEN: secret-manager", "  #")
    Path("bass.yaml").write_text(without)
    assert _changes(launch, "up", "bass.yaml")["secret-hf-token"] == "leave"
    code, _, err = launch("destroy", "bass.yaml", "--yes")

    assert code == 0
    lines = [" ".join(line.split()) for line in err.splitlines()]
    assert "- leave serviceaccount.Account account-trainer (was there before)" in lines
    member = "serviceAccount:trainer@proj-1.iam.gserviceaccount.com"
    grant = f"project-logging.logWriter-{member}"
    assert f"- leave projects.IAMMember {grant} (was there before)" in lines
    assert (
        "left account-trainer: it was there before; `gcloud iam service-accounts delete "
        "trainer@proj-1.iam.gserviceaccount.com --project=proj-1` deletes it" in lines
    )
    assert {key: one for key, one in engine.cloud.items() if key in before} == before
    assert _cloud(engine) == {"tuna-models", "bass-models", "trainer", "hf-token", "tuna-token"}
    assert _changes(launch, "up", "tuna.yaml") == {}


def test_what_a_killed_update_had_begun_to_adopt_is_adopted_by_the_next_one(
    launch: Launch, tuna: StandIn
) -> None:
    cloud = {**tuna.cloud, "gcp:serviceaccount/account:Account/proj-1/bass-runs": {}}
    tuna.cloud = cloud
    tuna.faults(die_after="account-bass-runs")
    assert launch("up", "bass.yaml", "--yes")[0] != 0
    tuna.faults()

    launch("up", "bass.yaml", "--yes")

    assert _changes(launch, "destroy", "bass.yaml")["account-bass-runs"] == "leave"
    assert "bass-runs" in _cloud(tuna)
