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
    codes = ((name, parameter) for name, parameter in model.named_parameters() if _is_code(parameter))
    name, code = next(codes, (None, None))
    if code is None and not getattr(model, "is_quantized", False):
        return
    found = f"{type(model).__name__} is quantised"  # its codes may be buffers (GPTQ, AWQ)
    if code is not None:
        found = f"{name} is quantised ({type(code.data).__name__}, {code.dtype})"
    raise ValueError(f"{found}: {why}. Take the model in full precision, or stream_layers() the stock one")


def _is_code(parameter: torch.Tensor) -> bool:
    return (
        not parameter.is_floating_point()
        or parameter.element_size() < 2  # float8
        or is_traceable_wrapper_subclass(parameter.data)
    )


def has_adapters(model: nn.Module) -> bool:
    """Whether a model is a PeftModel, or has modules of one: each wraps the one that it adapts, or keeps a copy of."""
    wraps = ("base_layer", "original_module")
    return hasattr(model, "peft_config") or any(
        isinstance(getattr(module, name, None), nn.Module) for module in model.modules() for name in wraps
    )


def check_no_adapters(model: nn.Module, what: str = "source") -> None:
    """Raise ValueError if a model has adapters of PEFT."""
    if has_adapters(model):
        raise ValueError(
            f"{what}={type(model).__name__} has adapters (PEFT): merge them into their model first, by merge_and_unload() of the "
            "PeftModel, whose save_pretrained() saves them alone"
        )


def check_no_adapter_folder(folder: Path) -> None:
    """Raise ValueError if a folder is of adapters alone."""
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG_NAME).is_file():
        raise ValueError(
            f"{folder} has adapters alone: load the model that they were trained on, and "
            "PeftModel.from_pretrained(model, folder).merge_and_unload() merges them into it"
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
