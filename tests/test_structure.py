"""Which way imports run (the contracts are in setup.cfg), and what the Trainer that we subclass has to have."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from importlinter.cli import lint_imports
from test_trainer import make_trainer
from transformers import Trainer

import hf_diffusionblocks as db
from hf_diffusionblocks.training.checkpoints import AtomicCheckpoints
from hf_diffusionblocks.training.run_report import RunReports

OURS = (db.DiffusionBlocksTrainer, RunReports, AtomicCheckpoints)


def test_imports_run_one_way_and_families_are_known_to_the_table_alone(monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    assert lint_imports(config_filename="setup.cfg", no_cache=True) == 0


def test_a_contract_that_is_broken_fails(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("setup.cfg").write_text(
        "[importlinter]\nroot_package = hf_diffusionblocks\n[importlinter:contract:control]\nname = control\n"
        "type = forbidden\nsource_modules = hf_diffusionblocks.training\nforbidden_modules = hf_diffusionblocks.models\n"
    )
    assert lint_imports(config_filename="setup.cfg", no_cache=True) != 0
