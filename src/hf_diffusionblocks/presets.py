"""What `convert` gives a model by default: the formulation by name, and what we recommend beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .backbones.base import Backbone

PRESETS = ("recommended", "paper")
#: (task, how the weights start) -> fields of DiffusionBlocksConfig, beside the formulation, that are not its defaults.
RECOMMENDED: dict[tuple[str, str], dict[str, Any]] = {
    # (A local head keeps early blocks from throwing away what later ones need. Pretrained ones begin with what they need.)
    ("text-generation", "fresh"): {"local_head_layers": 1},
    # (Blocks that share patches and final layer pull these apart. Those of masked text do not: nothing is added there.)
    ("image-generation", "fresh"): {"shared": "per_block"},
}


def with_preset(preset: str, task: str, start: str, fields: Mapping[str, Any], architecture: Backbone) -> dict[str, Any]:
    """Fields of [`DiffusionBlocksConfig`]: these, and those that a preset adds.

    Args:
        preset: "recommended" or "paper"; of an architecture that leaves no choice, its own.
        task: what the model is for, as in `pipeline(task)`.
        start: of the weights, "pretrained" or "fresh".
        fields: override the preset's.
        architecture: of the plain model.

    Raises:
        ValueError: there is no such preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r} must be one of {', '.join(map(repr, PRESETS))}")
    preset = architecture.fixed_fields.get("preset", preset)
    added = RECOMMENDED.get((task, start), {}) if preset == "recommended" else {}
    return {**added, **architecture.fixed_fields, **fields, "preset": preset}
