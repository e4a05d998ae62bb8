"""Streamed models in two processes: gradients are averaged as in stock data parallelism."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from filelock import FileLock
from streaming_models import assert_same
from streaming_scenarios import SCENARIOS
from test_processes import launched

SCRIPT = Path(__file__).parent / "streaming_scenarios.py"


@pytest.fixture(scope="session")
def outcomes(folder_of_all_workers) -> Path:
    """Folder with what all scenarios left: one launch, shared by pytest's workers."""
    folder = folder_of_all_workers / "streaming_scenarios"
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            folder.mkdir()
            launched(2, str(SCRIPT), str(folder))
    return folder


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_train_as_two_of_the_stock_model(name, outcomes):
    stock, streamed = (torch.load(outcomes / f"{name}-{each}-0.pt") for each in (False, True))
    assert_same(stock, streamed)
    assert_same(streamed, torch.load(outcomes / f"{name}-True-1.pt"))
