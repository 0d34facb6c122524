"""Exports that cannot be written: one line each, and nothing half done is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.trainer.disk import file_size_limit
from tests.trainer.test_gguf import make_model
from trainer.checkpoint import CheckpointError
from trainer.config import ConfigError, Export
from trainer.export import _move, export_model


@pytest.mark.parametrize("form", ["gguf", "huggingface"])
def test_a_file_size_limit_is_one_line_and_leaves_nothing(
    form: Any, tokenizer: str, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "m", "Llama", tokenizer)
    said = r"^disk full.* not written to .* MB were free"
    with file_size_limit(200_000), pytest.raises(CheckpointError, match=said):
        export_model(Export(model, format=form), tmp_path / "out", print)
    assert not list((tmp_path / "out").iterdir())


def test_a_place_that_cannot_be_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    to = tmp_path / "file" / "mine"
    with pytest.raises(ConfigError, match=r"^export.to: .*/file is no folder, so that .*/mine can"):
        export_model(Export("nobody/nothing", to=str(to)), tmp_path / "out", print)


def test_a_place_that_goes_away_is_one_line(tmp_path: Path) -> None:
    written = tmp_path / "out" / ".writing"
    written.mkdir(parents=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"^export.to: cannot write .*/file/mine: "):
        _move(written, tmp_path / "file" / "mine")
    assert not written.exists()
