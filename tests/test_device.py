"""A training step on an accelerator waits for it nowhere, and draws nothing on the CPU; but where the stock model's forward runs
a block, this looks at masks and positions as under the stock Trainer. It needs none: see no_waits.py. What
is computed there: test_gpu.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from families import CASES
from filelock import FileLock
from transformers import default_data_collator

from hf_diffusionblocks.training.checks import WithoutFullMask

#: Name -> case, fields of `convert`, columns of ones in the batch, training arguments.
STEPS = {
    **{name: (name, {}, (), {}) for name, case in CASES.items() if case.trained and not case.is_own},
    **{
        f"{name}, together": (name, {}, (), {"block_schedule": "together"})
        for name in ("vit, recommended", "gpt2, recommended")
    },
    "text, shared part frozen": ("gpt2, recommended", {}, (), {"train_shared": False}),
    **{
        f"{name}, padded": (name, {}, ("attention_mask",), {})
        for name in ("gpt2, recommended", "gpt2, paper", "llama, masked", "bert")
    },
}  # fmt: skip
CONTROLS = (
    "value", "choice", "rows of a mask", "look of Transformers", "copy to the device", "numbers to the device",
    "copy to the host", "draw on the CPU", "draw on the CPU by a row's generator",
)  # fmt: skip


@pytest.fixture(scope="session")
def waits(folder_of_all_workers) -> dict[str, str | None]:
    """Of each step, the first operation that it must not have; found once for all of pytest's workers."""
    found = folder_of_all_workers / "waits.json"
    with FileLock(f"{found}.lock"):
        if not found.is_file():
            command = [sys.executable, Path(__file__).with_name("no_waits.py"), found]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads(found.read_text())


@pytest.mark.parametrize("name", STEPS)
def test_a_step_neither_waits_for_the_device_nor_draws_on_the_cpu(name, waits):
    assert waits[name] is None


@pytest.mark.parametrize("name", CONTROLS)
def test_what_does_is_found(name, waits):
    assert waits[name] is not None


@pytest.mark.parametrize("mask, kept", [([1, 1], False), ([1, 0], True), ([[[1, 1], [1, 1]]], True)])
def test_a_mask_that_hides_nothing_is_left_out_where_the_batch_is_made(mask, kept):
    batch = WithoutFullMask(default_data_collator)([{"input_ids": [3, 4], "attention_mask": mask}] * 2)
    assert ("attention_mask" in batch) == kept and batch["input_ids"].shape == (2, 2)


def test_a_mask_is_kept_beside_positions():
    """Without one, texts that are packed in a row would not see one another, and with padding in the batch they would."""
    row = {"input_ids": [3, 4], "attention_mask": [1, 1], "position_ids": [0, 0]}
    assert "attention_mask" in WithoutFullMask(default_data_collator)([row])
