"""Batches for tiny models of every task, and the loss whose gradients are compared.

Most models of text with towers of images or sound get text alone; their towers then have no gradient, streamed or not.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from tiny_models import IMAGE, NUM_LABELS
from torch import Tensor, nn

ROWS, LENGTH = 2, 16
#: Ids of text: no special tokens among them.
FIRST_ID, END_ID = 10, 100


def tiny_batch(mapping: str, name: str, model: nn.Module) -> dict[str, Any]:
    """What the model is called with; the same at each call."""
    generator = torch.Generator().manual_seed(2)
    accepted = inspect.signature(model.forward).parameters
    batch = _image(model, generator) if mapping == "image-classification" else _text(generator)
    if "input_ids" in batch:
        batch["input_ids"] %= _vocabulary(model)
        if mapping == "sequence-classification" and model.config.is_encoder_decoder:
            batch["input_ids"][:, -1] = model.config.eos_token_id  # they read what is there
    batch.update(_labels(mapping, batch, generator))
    batch.update(_more(mapping, name, model, generator))
    return {key: value for key, value in batch.items() if value is not None and (key in accepted or "kwargs" in accepted)}


def loss_of(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The model's own loss, or else all of its outputs along a fixed random direction."""
    output = model(**batch)
    loss = getattr(output, "loss", None)
    if loss is not None and loss.requires_grad:
        return loss.sum()
    generator = torch.Generator().manual_seed(3)
    found = [value for value in tensors_of(output) if value.is_floating_point() and value.requires_grad]
    return sum((value.float() * torch.randn(value.shape, generator=generator)).sum() for value in found) / len(found)


def tensors_of(output: Any) -> list[Tensor]:
    """All that an output holds."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    return [tensor for part in output for tensor in tensors_of(part)] if isinstance(output, (list, tuple)) else []


def _vocabulary(model: nn.Module) -> int:
    """A few are smaller than the usual (of bytes, of proteins)."""
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", END_ID)
    except NotImplementedError:
        return END_ID


def _ids(generator: torch.Generator, length: int = LENGTH, rows: int = ROWS) -> Tensor:
    return torch.randint(FIRST_ID, END_ID, (rows, length), generator=generator)


def _text(generator: torch.Generator) -> dict[str, Tensor]:
    return {"input_ids": _ids(generator), "attention_mask": torch.ones(ROWS, LENGTH, dtype=torch.long)}


def _image(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    vision = getattr(model.config, "vision_config", model.config)
    side = getattr(vision, "image_size", IMAGE)
    side = side[0] if isinstance(side, (list, tuple)) else side
    return {"pixel_values": torch.randn(ROWS, 3, side, side, generator=generator)}


def _labels(mapping: str, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    if mapping.endswith("classification"):
        each = (ROWS, LENGTH) if mapping.startswith("token") else (ROWS,)
        return {"labels": torch.randint(NUM_LABELS, each, generator=generator)}
    if mapping == "question-answering":
        return {"start_positions": torch.tensor([2, 5]), "end_positions": torch.tensor([4, 9])}
    if mapping == "masked-lm":
        hidden = torch.rand(ROWS, LENGTH, generator=generator) < 0.4
        return {"labels": batch["input_ids"].masked_fill(~hidden, -100)}
    if mapping == "seq2seq":
        return {"labels": _ids(generator)}
    return {"labels": batch["input_ids"]}


def _boxes(generator: torch.Generator, top: int = 60) -> Tensor:
    corners = torch.randint(top // 2, (ROWS, LENGTH, 2), generator=generator)
    return torch.cat([corners, corners + top // 4], dim=-1)


def _more(mapping: str, name: str, model: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    """What an architecture takes beside, or instead (None: it takes no such thing)."""
    match name:
        case "layoutlm" | "layoutlmv2" | "layoutlmv3" | "lilt":
            return {"bbox": _boxes(generator)}
        case "bros":
            return {"bbox": _boxes(generator).float() / 60}
        case "gemma3" | "shieldgemma2":  # an image that is four tokens, and text
            ids, kinds = _ids(generator), torch.zeros(ROWS, LENGTH, dtype=torch.long)
            labels = {"labels": None} if name == "shieldgemma2" else {}
            ids[:, 2:6], kinds[:, 2:6] = model.config.image_token_index, 1
            return {"input_ids": ids, "token_type_ids": kinds, **_image(model, generator), **labels}
        case "siglip2":
            patches = torch.randn(ROWS, 16, 3 * 16 * 16, generator=generator)
            mask, shapes = torch.ones(ROWS, 16, dtype=torch.long), torch.full((ROWS, 2), 4)
            return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
        case "gemma4" | "gemma4_unified":
            zeros = torch.zeros(ROWS, LENGTH, dtype=torch.long)
            return {"token_type_ids": zeros, "mm_token_type_ids": zeros}
        case "git":
            return _image(model, generator)
        case "musicgen" | "musicgen_melody":  # a row of ids for each codebook
            books = model.config.get_text_config(decoder=True).num_codebooks
            return {"input_ids": _ids(generator, rows=ROWS * books), "attention_mask": None, "labels": None}
        case "voxtral_realtime":
            frames = LENGTH * model.config.audio_length_per_tok
            return {"input_features": torch.randn(ROWS, model.config.audio_config.num_mel_bins, frames, generator=generator)}
        case "imagegpt":  # its images are ids of colours
            return {"input_ids": _ids(generator), "pixel_values": None}
        case "longformer":  # (for answers it would look for separators else)
            first = torch.zeros(ROWS, LENGTH, dtype=torch.long).index_fill(1, torch.tensor([0]), 1)
            return {"global_attention_mask": first}
        case "lxmert":
            return {
                "visual_feats": torch.randn(ROWS, 4, model.config.visual_feat_dim, generator=generator),
                "visual_pos": torch.rand(ROWS, 4, 4, generator=generator), "labels": None,
            }  # fmt: skip
    return {}
