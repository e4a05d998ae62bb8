"""Folders that commands are given, and commands that must fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import randomized

import hf_diffusionblocks as db
from hf_diffusionblocks.cli import main

INDEX = "model.safetensors.index.json"


@pytest.fixture
def plain_folder(plain_model, tmp_path) -> Path:
    plain_model.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.fixture
def config_file(plain_config, tmp_path) -> Path:
    plain_config.architectures = ["ViTForImageClassification"]
    plain_config.save_pretrained(tmp_path / "config_alone")
    return tmp_path / "config_alone" / "config.json"


@pytest.fixture
def saved(model, tmp_path):
    """A saved model of each formulation, and its folder."""
    model.save_pretrained(tmp_path / "saved")
    return model, tmp_path / "saved"


@pytest.fixture
def blocks_folder(plain_model, tmp_path) -> Path:
    """A saved model of two blocks."""
    randomized(db.convert(plain_model, num_blocks=2, preset="paper")).save_pretrained(tmp_path / "blocks")
    return tmp_path / "blocks"


@pytest.fixture
def fail(capsys):
    """Run a command that must fail; returns its status and its one line on standard error."""

    def run(*args) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(arg) for arg in args])
        (line,) = capsys.readouterr().err.splitlines()
        return exit_.value.code, line

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
