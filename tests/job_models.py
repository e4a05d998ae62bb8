"""Tiny models that jobs train block by block, and their data; its fixtures are imported."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from process_scenarios import GPT2, LLAMA, VIT

import hf_diffusionblocks as db

CONFIGS = {"gpt2": GPT2, "llama": LLAMA, "vit": VIT}
FORMULATIONS = {
    "paper": {},
    "paper-own": {"shared": "per_block"},
    "carried": {"preset": "recommended", "local_head_layers": 0},
    "carried-own": {"preset": "recommended", "local_head_layers": 0, "shared": "per_block"},
}
CARRIED = {"preset": "recommended", "local_head_layers": 0, "shared": "per_block"}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture(params=FORMULATIONS)
def fields(request) -> dict:
    return FORMULATIONS[request.param]


@pytest.fixture
def texts() -> Dataset:
    tokens = torch.randint(64, (16, 12), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": tokens, "labels": tokens})


@pytest.fixture
def images() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    return Dataset.from_dict(
        {"pixel_values": torch.randn(16, 1, 8, 8, generator=generator).tolist(), "labels": [k % 5 for k in range(16)]}
    )


def trained(model, folder, texts, saves: bool = True, **arguments):
    """The trainer of a job, run."""
    args = db.DiffusionBlocksTrainingArguments(
        str(folder), updates_per_block=3, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True, report_to=[],
        disable_tqdm=True, save_strategy="no", **arguments,
    )  # fmt: skip
    trainer = db.DiffusionBlocksTrainer(model=model, args=args, train_dataset=texts, eval_dataset=texts)
    trainer.train()
    if saves:
        trainer.save_model()
    return trainer


def same_weights(part: dict, whole: dict) -> bool:
    return all(torch.equal(tensor, whole[name]) for name, tensor in part.items())
