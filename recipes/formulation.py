"""Which fields the DiffusionBlocks model of a recipe has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig

from hf_diffusionblocks.tasks import backbone_for
from hf_diffusionblocks.cli.arguments import BlocksArguments, config_fields
from hf_diffusionblocks.presets import with_preset
from hf_diffusionblocks.recipes.common import ModelArguments


def blocks_fields(
    args: ModelArguments, blocks_args: BlocksArguments, task: str, config: PreTrainedConfig
) -> dict[str, Any] | None:
    """The fields of the DiffusionBlocks model that are given, and the preset's; None with end_to_end."""
    if args.end_to_end:
        return None
    start, given = "pretrained" if args.model_name_or_path else "fresh", config_fields(blocks_args)
    return with_preset(given.pop("preset", "recommended"), task, start, given, backbone_for(config, task))


def denoiser_fields(args: ModelArguments, blocks_args: BlocksArguments, task: str, config: PreTrainedConfig) -> dict[str, Any]:
    """As [`blocks_fields`], of a task whose plain model is a model of one block: that is what end_to_end gives."""
    fields = blocks_fields(replace(args, end_to_end=False), blocks_args, task, config)
    return fields | {"num_blocks": 1, "layers_per_block": None} if args.end_to_end else fields
