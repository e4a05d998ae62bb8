"""Saved models are the same, bit by bit, in a process in which nothing but the package is imported."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import torch
from conftest import FORMULATIONS, randomized
from families import RECURRENT, VOCAB
from test_image_pipeline import made, made_vae, quiet
from transformers import AutoModelForCausalLM

import hf_diffusionblocks as db

FRESH = """
import sys, torch
from pathlib import Path
import hf_diffusionblocks as db
assert "diffusers" not in sys.modules
from transformers import AutoModelForCausalLM, AutoModelForImageClassification
torch.set_num_threads(1)

@torch.no_grad()
def found(folder):
    if folder.name.startswith("pipeline"):
        return db.DiffusionBlocksImagePipeline.from_pretrained(folder)(["owl", 0], 4, output_type="pt").images
    inputs = torch.load(folder / "inputs.pt")
    if folder.name == "recurrent":
        return AutoModelForCausalLM.from_pretrained(folder)(inputs).logits
    model = AutoModelForImageClassification.from_pretrained(folder)
    return torch.stack([model(inputs).logits.softmax(-1), *model.predict(inputs).trajectory.unbind(1)])

for folder in Path(sys.argv[1]).iterdir():
    torch.save(found(folder), folder / "found.pt")
"""


@torch.no_grad()
def test_a_round_trip_is_bit_equal(plain_model, batch, tmp_path):
    """Noise that is keyed included: of walks, of a recurrent model's state, of images."""
    ids, expected = torch.randint(1, VOCAB, (3, 8)), {}
    for name, fields in FORMULATIONS.items():
        model, inputs = randomized(db.convert(plain_model, num_blocks=2, **fields)).eval(), batch["pixel_values"]
        model.save_pretrained(tmp_path / name)
        torch.save(inputs, tmp_path / name / "inputs.pt")
        expected[name] = torch.stack([model(inputs).logits.softmax(-1), *model.predict(inputs).trajectory.unbind(1)])
    for name, pipe in (("pipeline", quiet(made())), ("pipeline of latents", quiet(made(4), made_vae()))):
        pipe.save_pretrained(tmp_path / name)
        expected[name] = pipe(["owl", 0], 4, output_type="pt").images
    plain = randomized(AutoModelForCausalLM.from_config(copy.deepcopy(RECURRENT))).eval()
    plain.save_pretrained(tmp_path / "recurrent")
    torch.save(ids, tmp_path / "recurrent" / "inputs.pt")
    expected["recurrent"] = plain(ids).logits
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", FRESH, str(tmp_path)], env=environment, check=True, timeout=120)
    for name, outcome in expected.items():
        assert torch.equal(torch.load(tmp_path / name / "found.pt"), outcome), name
