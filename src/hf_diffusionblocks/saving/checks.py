"""What can neither be cut into blocks nor saved as such: adapters, and weights that are no plain numbers."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.utils import CONFIG_NAME

ADAPTER_CONFIG = "adapter_config.json"


def check_weights(model: nn.Module, why: str) -> None:
    """Raise ValueError if weights are quantised: codes whose scales are kept elsewhere, or tensors of another kind."""
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or is_traceable_wrapper_subclass(parameter.data):
            raise ValueError(
                f"{name} is quantised ({type(parameter.data).__name__}, {parameter.dtype}): {why}. Take the model in full "
                "precision, or stream_layers() the stock one"
            )


def check_no_adapters(source: nn.Module | Path) -> None:
    """Raise ValueError if a model, or a folder, has adapters of PEFT."""
    if isinstance(source, nn.Module):
        found = getattr(source, "_hf_peft_config_loaded", False) or hasattr(source, "peft_config")
        found = found or any(".lora_" in name or ".base_layer." in name for name, _ in source.named_modules())
        named = f"source={type(source).__name__}"
    else:
        found, named = (source / ADAPTER_CONFIG).is_file() and not (source / CONFIG_NAME).is_file(), f"{source}"
    if found:
        raise ValueError(
            f"{named} has adapters ({'a folder of them alone' if isinstance(source, Path) else 'PEFT'}): merge them into their "
            "model first, by merge_and_unload() of the PeftModel"
        )


def is_untied(plain: nn.Module) -> bool:
    """Whether a stock model whose config ties its head to its embedding has two different ones, as a merged adapter leaves."""
    if not getattr(plain.config, "tie_word_embeddings", False):
        return False
    head, embedding = plain.get_output_embeddings(), plain.get_input_embeddings()
    weights = [getattr(part, "weight", None) for part in (head, embedding)]
    if not all(isinstance(weight, torch.Tensor) for weight in weights) or weights[0] is weights[1]:
        return False
    return weights[0].shape != weights[1].shape or not torch.equal(*weights)
