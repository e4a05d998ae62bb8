"""What `convert` gives a model by default: one table of the formulations that we recommend, and the paper's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .backbones.base import Backbone

#: What recommended formulations of known targets have in common: no diffusion at inference, and a pretrained model is
#: unchanged.
_LOSSLESS = {"denoiser": "factorized", "context": "carried", "prior_fraction": 1.0}
#: (task, how the weights start) -> fields of DiffusionBlocksConfig that are not its defaults.
RECOMMENDED: dict[tuple[str, str], dict[str, Any]] = {
    ("text-generation", "pretrained"): _LOSSLESS,
    ("image-classification", "pretrained"): _LOSSLESS,
    # (A local head keeps early blocks from throwing away what later ones need. Pretrained ones begin with what they need.)
    ("text-generation", "fresh"): {**_LOSSLESS, "readout_layers": 1},
    # (p_mean places the blocks' boundaries, which the walk to one of few labels wants higher.)
    ("image-classification", "fresh"): {**_LOSSLESS, "p_mean": 0.5},
    # (Blocks that share patches and final layer pull these apart. Those of masked text do not: nothing is added there.)
    ("image-generation", "fresh"): {"shared": "per_block"},
}
PRESETS = ("recommended", "paper")
#: Naming one of these leaves the preset: the other fields of the table are chosen for its formulation, not for another.
LEAVING = ("denoiser", "context", "readout")


def recommended(task: str, start: str, architecture: Backbone) -> dict[str, Any]:
    """What the recommended preset says, of an architecture; arguments as in [`with_preset`]."""
    if any(name in architecture.fixed_fields for name in LEAVING):  # the table's formulations are others
        return dict(architecture.fixed_fields)
    return {**RECOMMENDED.get((task, start), {}), **architecture.fixed_fields}


def with_preset(preset: str, task: str, start: str, fields: Mapping[str, Any], architecture: Backbone) -> dict[str, Any]:
    """Fields of [`DiffusionBlocksConfig`]: these, and those that a preset adds.

    Args:
        preset: "recommended", or "paper": the class's own defaults.
        task: what the model is for, as in `pipeline(task)`.
        start: of the weights, "pretrained" or "fresh".
        fields: override the preset's; if they name `denoiser`, `context` or `readout`, whatever the value, nothing is
            added, and what they do not say is the paper's.
        architecture: of the plain model; what it leaves no choice in is added whatever the preset.

    Raises:
        ValueError: there is no such preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r} must be one of {', '.join(map(repr, PRESETS))}")
    if preset == "paper" or any(name in fields for name in LEAVING):
        return {**architecture.fixed_fields, **fields}
    return {**recommended(task, start, architecture), **fields}
