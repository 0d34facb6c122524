"""What tells the weights of model folders apart."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.trainer.test_adapters_families import tiny
from trainer.fingerprint import fingerprint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_copy_has_that_of_its_original_and_a_model_trained_again_another(
    folder: Path, tmp_path: Path
) -> None:
    first = fingerprint(str(folder))
    assert first is not None
    shutil.copytree(folder, tmp_path / "copy")
    assert fingerprint(str(tmp_path / "copy")) == fingerprint(f"file://{folder}") == first
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:  # a change of one tensor is seen, whichever it is
        save_file({**tensors, name: tensors[name] * 1.001 + 1e-3}, path, {"format": "pt"})
        assert fingerprint(str(folder)) != first, name
    save_file(tensors, path, {"format": "pt"})
    assert fingerprint(str(folder)) == first
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"rope_theta": ', '"rope_theta": 1'))
    assert fingerprint(str(folder)) != first


def test_of_weights_that_are_not_here_there_is_none(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.safetensors"
    for content in (b"", b"damaged", bytes(200), b"\xff" * 200, path.read_bytes()[:200]):
        path.write_bytes(content)  # it is another one's task to say so
        assert fingerprint(str(folder)) is None, content
    path.unlink()
    stage = tmp_path / "stage"
    (stage / "checkpoints").mkdir(parents=True)
    (stage / "run_meta.json").write_text("{}")
    for name in (folder, tmp_path / "nothing", stage, f"{stage}@best", "gs://bucket/model"):
        assert fingerprint(str(name)) is None, name


def test_a_name_on_the_hub_is_looked_up_in_its_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert fingerprint("org/model") is None
    place = tmp_path / "models--org--model"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("abc")
    shutil.copytree(folder, place / "snapshots" / "abc")
    assert fingerprint("org/model") == fingerprint(str(folder))
