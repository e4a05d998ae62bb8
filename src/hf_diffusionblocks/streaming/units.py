"""A unit: a module whose weights come to the device together, and leave together."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

#: Modules whose weights autocast would cast, and nothing else of theirs.
CAST_BY_AUTOCAST = (nn.Linear, _ConvNd, Conv1D)
#: Elements of a weight that are looked at to see whether somebody has written into it, at least: one of each row, all of a vector.
NUM_SAMPLES = 8


class Unit:
    """Says which module comes and goes; the module itself carries it.

    Args:
        name: its path in the model.
        checkpointed_here: whether it runs again in the backward pass, since its model has no way to ask for that.
        stays: whether it never leaves the device.
    """

    def __init__(self, name: str, module: nn.Module, checkpointed_here: bool = False, stays: bool = False):
        self.name, self.checkpointed_here, self.stays = name, checkpointed_here, stays
        self.depth = 0  #: of calls that run it now
        self._module = weakref.ref(module)

    @property
    def module(self) -> nn.Module | None:
        return self._module()

    def belongs_to(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    def __deepcopy__(self, memo: dict) -> Unit:
        copy = Unit(self.name, self._module(), self.checkpointed_here, self.stays)  # (its module says at its first call)
        memo[id(self)] = copy
        return copy


class Key:
    """One weight as it is needed: the parameter, and the dtype of its copy."""

    def __init__(self, parameter: nn.Parameter, dtype: torch.dtype):
        self.parameter, self.dtype = parameter, dtype
        self.id: Hashable = (id(parameter), dtype)


def keys_of(module: nn.Module, autocast: torch.dtype | None) -> dict[tuple[nn.Module, str], Key]:
    """What a module and those inside need: (module, name) -> key. (What has been lent already is no parameter.)

    Args:
        autocast: the dtype that autocast is on for, or None.
    """
    adapters = _modules_of_adapters(module) if autocast is not None else ()
    return {
        (child, name): Key(parameter, parameter.dtype if child in adapters else _dtype_of_copy(child, parameter, autocast))
        for child in module.modules()
        for name, parameter in child._parameters.items()
        if isinstance(parameter, nn.Parameter)
    }


def _modules_of_adapters(module: nn.Module) -> set[nn.Module]:
    """Those of peft, which looks at the dtype of their weights before autocast would cast them (and they are small); and what
    they adapt, where a variant computes with its weight (DoRA's norm)."""
    lists = [
        child._modules[name]
        for child in module.modules()
        for name in getattr(type(child), "adapter_layer_names", ())
        if child._modules.get(name) is not None
    ]
    read = {child.get_base_layer() for child in module.modules() if getattr(child, "lora_variant", None)}
    return {adapter for each in lists for adapter in each.modules()} | read


def _dtype_of_copy(module: nn.Module, parameter: nn.Parameter, autocast: torch.dtype | None) -> torch.dtype:
    casts = autocast is not None and parameter.dtype == torch.float32 and isinstance(module, CAST_BY_AUTOCAST)
    return autocast if casts else parameter.dtype


@dataclass
class Copy:
    """A weight on the device, and how its parameter looked when it was made."""

    tensor: torch.Tensor
    parameter: nn.Parameter
    version: int
    sample: torch.Tensor | None
    updates: int
    looked_at: int

    @classmethod
    def of(cls, key: Key, tensor: torch.Tensor, updates: int, round_: int) -> Copy:
        return cls(tensor, key.parameter, key.parameter._version, _sample(key.parameter), updates, round_)

    def is_current(self, updates: int, round_: int) -> bool:
        """Whether the parameter is what it was: by its version, by the steps of optimizers since (fused ones leave versions as
        they are), and, once a round, by a few of its elements (`.data` that is written into tells nobody)."""
        if self.version != self.parameter._version or self.updates != updates:
            return False
        if self.looked_at != round_:
            self.looked_at = round_
            now = _sample(self.parameter)
            return now is None or self.sample is not None and torch.equal(now, self.sample)
        return True


def _sample(parameter: nn.Parameter) -> torch.Tensor | None:
    if isinstance(parameter, FakeTensor) or not parameter.numel() or parameter.is_meta:
        return None
    flat = parameter.detach().reshape(-1)
    rows = parameter.shape[:1].numel() if parameter.is_floating_point() else 0  # (4 bits are columns of bytes)
    return flat[:: max(1, flat.numel() // max(NUM_SAMPLES, rows))].clone()
