"""Tiny models of every family in every formulation, with all their randomness said.

No default of `convert` or of the training arguments is relied on: they may change, what a field does may not.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from datasets import Dataset
from digests import named_parameters
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    GPT2Config,
    LlamaConfig,
    Qwen3Config,
    ViTConfig,
)

import hf_diffusionblocks as db

VOCAB, WIDTH, LENGTH, ROWS, LABELS = 48, 32, 10, 3, 5
# Without an end token every generation has the length it is asked for.
ENDS = {"bos_token_id": None, "eos_token_id": None}
LLAMA = dict(
    num_hidden_layers=4, hidden_size=WIDTH, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=VOCAB, max_position_embeddings=32, tie_word_embeddings=False, **ENDS,
)  # fmt: skip


def gpt2(dropout: float = 0.0) -> GPT2Config:
    return GPT2Config(
        n_layer=4, n_embd=WIDTH, n_head=4, vocab_size=VOCAB, n_positions=32, attn_pdrop=dropout, resid_pdrop=dropout,
        embd_pdrop=dropout, tie_word_embeddings=True, **ENDS,
    )  # fmt: skip


def vit(dropout: float = 0.0) -> ViTConfig:
    return ViTConfig(
        num_hidden_layers=4, hidden_size=WIDTH, intermediate_size=48, num_attention_heads=4, image_size=8, patch_size=4,
        num_channels=1, num_labels=LABELS, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip


#: Family -> a fresh config of the plain model. (`-dropout`: for what differs in training mode.)
SOURCES = {
    "gpt2": gpt2, "llama": lambda: LlamaConfig(**LLAMA), "qwen3": lambda: Qwen3Config(head_dim=8, **LLAMA), "vit": vit,
    "gpt2-dropout": lambda: gpt2(0.1), "vit-dropout": lambda: vit(0.1),
}  # fmt: skip
FAMILIES = ("gpt2", "llama", "qwen3", "vit")
TEXT_FAMILIES = ("gpt2", "llama", "qwen3")

#: Every field of a user's that no formulation below says.
COMMON = dict(
    layers_per_block=None, sigma_min=0.002, sigma_max=80.0, p_mean=-1.2, p_std=1.2, sigma_data=0.5, overlap=0.1,
    noise_distribution="lognormal", prior_fraction=0.0, readout_layers=0, shared="common", loss_weighting=None,
    sampler="euler", bridge="soft", num_inference_steps=None, inference_seed=0,
)  # fmt: skip
HEAD, OWN = {"readout_layers": 1}, {"shared": "per_block"}


def _grid() -> dict[str, dict]:
    """Carried ones draw part of their levels at sigma_max, so that both ways of drawing are pinned."""
    grid = {}
    for denoiser, readout in (("joint", "edm"), ("joint", "posterior"), ("factorized", "posterior")):
        for context, fraction in (("independent", 0.0), ("carried", 0.5)):
            name = f"{denoiser}-{readout}-{context}" if denoiser == "joint" else f"{denoiser}-{context}"
            fields = dict(denoiser=denoiser, readout=readout, context=context, prior_fraction=fraction)
            for suffix, more in (("", {}), ("-own", OWN), ("-head", HEAD), ("-head-own", {**HEAD, **OWN})):
                if context == "carried" or "head" not in suffix:
                    grid[name + suffix] = {**COMMON, **fields, **more}
    return grid


GRID = _grid()
#: What `convert` is recommended with.
RECOMMENDED = {**GRID["factorized-carried"], "prior_fraction": 1.0}


def formulations_of(family: str) -> dict[str, dict]:
    """A joint text block has no local head."""
    text = not family.startswith("vit")
    return {
        name: fields for name, fields in GRID.items()
        if not (text and fields["denoiser"] == "joint" and fields["readout_layers"])
    }  # fmt: skip


def randomized(model: torch.nn.Module, name: str = "") -> torch.nn.Module:
    """Every parameter moved away from its start, by noise that is a function of its name: of no order."""
    with torch.no_grad():
        for key, parameter in named_parameters(model).items():
            seed = int.from_bytes(hashlib.sha256(f"{name} {key}".encode()).digest()[:7], "big")
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter += (0.1 * noise).to(parameter.dtype)
    return model


@lru_cache(maxsize=None)
def plain_of(family: str) -> torch.nn.Module:
    """The stock model, in evaluation mode; copied from, and never changed."""
    auto = AutoModelForImageClassification if family.startswith("vit") else AutoModelForCausalLM
    torch.manual_seed(0)
    return randomized(auto.from_config(SOURCES[family]())).eval()


def converted(family: str, fields: dict, num_blocks: int = 2) -> db.DiffusionBlocksPreTrainedModel:
    """From copied weights, AdaLN included away from its start."""
    torch.manual_seed(1)
    return randomized(db.convert(plain_of(family), num_blocks, None, None, **fields), "moved")


def fresh(family: str, fields: dict, resident_blocks=None, num_blocks: int = 2) -> db.DiffusionBlocksPreTrainedModel:
    torch.manual_seed(2)
    return db.convert(SOURCES[family](), num_blocks, None, resident_blocks, **fields)


def batch_of(family: str) -> dict[str, torch.Tensor]:
    """What the model is given, labels included."""
    generator = torch.Generator().manual_seed(3)
    if family.startswith("vit"):
        images = torch.randn(ROWS, 1, 8, 8, generator=generator)
        return {"pixel_values": images, "labels": torch.randint(LABELS, (ROWS,), generator=generator)}
    tokens = torch.randint(1, VOCAB, (ROWS, LENGTH), generator=generator)
    return {"input_ids": tokens, "labels": tokens}


def padded_batch() -> dict[str, torch.Tensor]:
    """Of text: one row begins later, one ends earlier, and padding has no label."""
    batch = batch_of("gpt2")
    mask = torch.ones_like(batch["input_ids"])
    mask[1, :3], mask[2, 7:] = 0, 0
    return {**batch, "attention_mask": mask, "labels": batch["labels"].masked_fill(mask == 0, -100)}


def without_labels(batch: dict) -> dict:
    return {name: value for name, value in batch.items() if name != "labels"}


def noise_of(family: str) -> torch.Tensor:
    shape = (ROWS, WIDTH) if family.startswith("vit") else (ROWS, LENGTH - 1, WIDTH)
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


def data_of(family: str, num_rows: int = 24) -> Dataset:
    generator = torch.Generator().manual_seed(5)
    if family.startswith("vit"):
        images = torch.randn(num_rows, 1, 8, 8, generator=generator)
        rows = {"pixel_values": images.tolist(), "labels": [k % LABELS for k in range(num_rows)]}
    else:
        tokens = torch.randint(VOCAB, (num_rows, LENGTH), generator=generator)
        # Rows with different numbers of labels: a mean over tokens is not one over rows.
        labels = tokens.masked_fill(torch.rand(tokens.shape, generator=generator) < 0.2, -100)
        rows = {"input_ids": tokens.tolist(), "labels": labels.tolist()}
    return Dataset.from_dict(rows).with_format("torch")
