"""Adapters on disk: a folder a block, in peft's files, under the plain model's names."""

from __future__ import annotations

import copy
from os import PathLike
from pathlib import Path

from safetensors.torch import save_file
from transformers import PreTrainedModel

#: Where the plain model is in ours; saved names go without.
BACKBONE = "backbone."
#: Before every name in a file of peft's.
PEFT_PREFIX = "base_model.model."


def save_block_adapters(model: PreTrainedModel, folder: str | PathLike) -> None:
    """Write each block's adapter to a folder of its own: `block_0/adapter_model.safetensors` and its config."""
    from peft import get_peft_model_state_dict
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    for name, config in model.peft_config.items():
        target = Path(folder) / name
        target.mkdir(parents=True, exist_ok=True)
        # (Left to itself, peft would ask the Hub whether the vocabulary has changed.)
        state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        state = {PEFT_PREFIX + key.removeprefix(BACKBONE): tensor.contiguous() for key, tensor in state.items()}
        save_file(state, target / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config = copy.copy(config)
        config.modules_to_save = [path.removeprefix(BACKBONE) for path in config.modules_to_save or ()] or None
        config.save_pretrained(target)
