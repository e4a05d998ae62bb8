"""Which way imports run (the contracts are in setup.cfg), and what the Trainer that we subclass has to have."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.cli import lint_imports
from test_trainer import make_trainer
from transformers import Trainer

import hf_diffusionblocks as db
from hf_diffusionblocks.training.averages import AveragingTrainer
from hf_diffusionblocks.training.checkpoints import AtomicCheckpoints
from hf_diffusionblocks.training.run_report import RunReports

OURS = (db.DiffusionBlocksTrainer, AveragingTrainer, RunReports, AtomicCheckpoints)


def test_imports_run_one_way_and_families_are_known_to_the_table_alone(monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    monkeypatch.setattr("logging.config.dictConfig", lambda config: None)  # it would switch off every logger there is
    assert lint_imports(config_filename="setup.cfg", no_cache=True) == 0


def overridden() -> dict[str, object]:
    """Methods of the stock Trainer that are not for users, and whose of ours overrides each."""
    return {
        name: owner for owner in OURS for name in vars(owner) if name.startswith("_") and not name.startswith("__")
        and hasattr(Trainer, name)
    }  # fmt: skip


def test_private_methods_that_are_overridden_are_few():
    assert len(overridden()) <= 14


@pytest.mark.parametrize("name", overridden())
def test_an_overridden_method_has_the_stock_trainer_s_parameters(name):
    ours, stock = (list(inspect.signature(getattr(each, name)).parameters) for each in (overridden()[name], Trainer))
    assert ours in (stock, ["self", "args", "kwargs"], ["self", "kwargs"])


def test_each_is_called_in_a_run_that_saves_resumes_and_pushes(plain_config, tmp_path, monkeypatch):
    called = set()
    for name, owner in overridden().items():
        method = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, n=name, m=method, **kw: called.add(n) or m(*args, **kw))
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda *args: None)
    arguments = {
        "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True
    }  # fmt: skip
    for steps, resume in ((1, None), (2, True)):
        trainer = make_trainer(db.convert(plain_config, 2), tmp_path, max_steps=steps, **arguments)
        trainer.args.push_to_hub = True
        trainer.train(resume_from_checkpoint=resume)
    assert called == set(overridden())


def test_the_code_is_formatted_and_has_no_lint():
    """`ruff format` mends the first; its settings are in pyproject.toml."""
    for command in (["check"], ["format", "--check"]):
        folders = ["src", "recipes", "tests", "benchmarks", "model_cards", "docs/site"]
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *folders], cwd=Path(__file__).parent.parent, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout
