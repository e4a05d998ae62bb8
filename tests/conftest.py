"""Tiny models, and the grid of formulations that shared checks run over."""

from __future__ import annotations

import copy
import gc
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import datasets
import pytest
import torch
from process_scenarios import VIT
from transformers import ViTConfig, ViTForImageClassification
from transformers.utils import logging

import hf_diffusionblocks as db

torch.set_num_threads(1)

NUM_LABELS = 5
#: Every formulation, and what `convert` is given for it.
FORMULATIONS = {
    "recommended": {"preset": "recommended", "local_head_layers": 0},
    "recommended-head": {"preset": "recommended", "local_head_layers": 1},
    "recommended-own": {"preset": "recommended", "local_head_layers": 0, "shared": "per_block"},
    "paper": {"preset": "paper"},
    "paper-own": {"preset": "paper", "shared": "per_block"},
}


def pytest_collection_finish():
    """What imports have made stays: without them `gc.collect()`, which each Trainer calls, is done in no time."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture
def in_threads() -> Iterator[Callable]:
    """A map whose calls run in threads, without gradients, which take turns as often as may be."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    with ThreadPoolExecutor(4) as pool:
        yield lambda call, given: list(pool.map(torch.no_grad()(call), given))
    sys.setswitchinterval(interval)


@pytest.fixture(autouse=True)
def logging_as_before():
    """What a test does to the volume of logs ends with it."""
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    """Data sets are cached in a folder that goes with the run."""
    cache = str(tmp_path_factory.getbasetemp() / "datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(cache))
    monkeypatch.setenv("HF_DATASETS_CACHE", cache)  # of sub-processes


@pytest.fixture(scope="session")
def folder_of_all_workers(tmp_path_factory) -> Path:
    """For what is made once for all of pytest's workers."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(params=FORMULATIONS.values(), ids=FORMULATIONS.keys())
def formulation(request) -> dict:
    return request.param


@pytest.fixture
def plain_config() -> ViTConfig:
    return copy.deepcopy(VIT)


@pytest.fixture
def plain_model(plain_config) -> ViTForImageClassification:
    torch.manual_seed(0)
    return randomized(ViTForImageClassification(plain_config)).eval()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(6, 1, 8, 8, generator=generator),
        "labels": torch.randint(NUM_LABELS, (6,), generator=generator),
    }


@pytest.fixture
def model(plain_model, formulation) -> db.DiffusionBlocksForImageClassification:
    """A converted model of each formulation, every parameter away from its start (AdaLN included)."""
    return randomized(db.convert(plain_model, num_blocks=2, **formulation))


def randomized(model):
    """Move every parameter, so that nothing passes a test by being zero or one."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model
