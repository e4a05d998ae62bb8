"""Pins of fresh weights, of what is on disk, of the stock model inside, and of estimates."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from digests import Pins
from grid import (
    FAMILIES, GRID, RECOMMENDED, SOURCES, batch_of, converted, formulations_of, fresh, plain_of, without_labels
)  # fmt: skip
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification

import hf_diffusionblocks as db


def auto_class(family: str):
    return AutoModelForImageClassification if family.startswith("vit") else AutoModelForCausalLM


def weights_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Of every file of weights below a folder, what it holds."""
    return {path.relative_to(folder).as_posix(): load_file(path) for path in sorted(folder.rglob("*.safetensors"))}


def parts_of(folder: Path) -> dict[str, str]:
    """Which file holds which block, as the index has it."""
    return json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]["blocks"]


def logits(model, family: str) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**without_labels(batch_of(family))).logits


def pin_files(pins: Pins, folder: Path) -> None:
    for family in FAMILIES:
        for name, fields in formulations_of(family).items():
            pin_fresh(pins, f"{family}/{name}", family, fields)
            pin_saved(pins, f"{family}/{name}", family, fields, folder / family / name)
        pin_plain(pins, family, folder / family)
    pin_saved_again(pins, folder / "again")
    pin_estimates(pins)


def pin_fresh(pins: Pins, name: str, family: str, fields: dict) -> None:
    pins[f"{name}/fresh"] = fresh(family, fields).state_dict()
    for block in (0, 1):
        pins[f"{name}/fresh/block{block} alone"] = fresh(family, fields, [block]).state_dict()


def pin_saved(pins: Pins, name: str, family: str, fields: dict, folder: Path) -> None:
    model = converted(family, fields)
    model.save_pretrained(folder)
    pins[f"{name}/saved/files"] = sorted(path.name for path in folder.iterdir())
    pins[f"{name}/saved/parts"] = parts_of(folder)
    pins[f"{name}/saved/weights"] = weights_of(folder)
    again = auto_class(family).from_pretrained(folder)
    pins[f"{name}/loaded/class"] = type(again).__name__
    pins[f"{name}/loaded/logits"] = logits(again, family)
    pins[f"{name}/loaded/fields"] = {key: getattr(AutoConfig.from_pretrained(folder), key) for key in sorted(fields)}
    part = type(model).from_pretrained(folder, resident_blocks=[1])
    pins[f"{name}/loaded/block1 alone"] = part.state_dict()
    pins[f"{name}/loaded/block1 by itself"] = db.load_block_state_dict(folder, 1)


def pin_plain(pins: Pins, family: str, folder: Path) -> None:
    """Converted without loss from a model and from a folder, and back."""
    plain_of(family).save_pretrained(folder / "plain")
    pins[f"{family}/plain/logits"] = logits(plain_of(family), family)
    for name, fields in (("recommended", RECOMMENDED), ("own", GRID["factorized-carried-own"])):
        for origin, source in (("model", plain_of(family)), ("folder", folder / "plain")):
            torch.manual_seed(1)
            model = db.convert(source, 2, None, None, **fields)
            pins[f"{family}/{name}/from a {origin}"] = model.state_dict()
            pins[f"{family}/{name}/from a {origin}/logits"] = logits(model, family)
    # (Block 1 alone fails as this is written: it has no head of its own, and block 0's is not there to copy to.)
    torch.manual_seed(1)
    part = db.convert(folder / "plain", 2, None, [0], **GRID["factorized-carried-head"])
    pins[f"{family}/factorized-carried-head/from a folder/block0 alone"] = part.state_dict()
    plain = converted(family, RECOMMENDED).to_plain()
    pins[f"{family}/to_plain/class"] = type(plain).__name__
    pins[f"{family}/to_plain"] = plain.state_dict()
    pins[f"{family}/to_plain/logits"] = logits(plain, family)


def pin_saved_again(pins: Pins, folder: Path) -> None:
    """Over another cut, and over a plain model: nothing of either is left."""
    plain_of("llama").save_pretrained(folder)
    for blocks in (4, 2):
        converted("llama", RECOMMENDED, num_blocks=blocks).save_pretrained(folder)
        pins[f"llama/saved again/B={blocks}/files"] = sorted(path.name for path in folder.iterdir())


def pin_estimates(pins: Pins) -> None:
    """By their bytes: ways may get other names."""
    for family in ("gpt2", "llama", "vit"):
        length = None if family == "vit" else 16
        for name in ("joint-edm-independent", "factorized-carried", "factorized-carried-head-own"):
            fields = GRID[name]
            estimate = db.estimate_memory(SOURCES[family](), 2, 4, length, "fp32", None, **fields)
            ledgers = [[asdict(each.parts), asdict(each.peak)] for each in estimate.ledgers.values()]
            found = sorted(ledgers, key=lambda parts: json.dumps(parts, sort_keys=True))
            pins[f"{family}/{name}/estimate/totals"] = sorted(each.total for each in estimate.ledgers.values())
            pins[f"{family}/{name}/estimate/parts"] = found
