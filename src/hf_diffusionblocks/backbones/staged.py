"""Image classifiers whose layers are of several widths (Swin, ConvNeXt, ResNet, ...): what is cut are their stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from .base import Backbone
from .stock_run import StockRun, hidden_of, layers_of


class Stages(NamedTuple):
    """The stages of a stock model, whose paths are of the lists that each has an element of."""

    paths: tuple[str, ...]
    widths: tuple[int, ...]  #: of what leaves each


#: Class and config of a stock model, as JSON -> its stages.
_FOUND: dict[tuple[type[nn.Module], str], Stages] = {}


class StagedBackbone(Backbone):
    """A stock model whose layers are its stages, as a run without memory finds them: no config says how many there are.

    Args:
        plain_class: the stock model that is converted.
        example: `(config, rows, None) -> batch`.
    """

    layers_are_alike = False

    def __init__(self, plain_class: type[nn.Module], example: Callable[..., dict[str, torch.Tensor]]):
        super().__init__(plain_class)
        self._example = example

    def num_layers(self, config: PreTrainedConfig) -> int:
        return len(self.stages(config).widths)

    def layers_path(self, plain: nn.Module, num_layers: int) -> str:
        return self.stages(plain.config).paths[-1]

    def layer_lists(self, plain: nn.Module, layers_path: str) -> list[str]:
        return [*self.stages(plain.config).paths]

    def stages(self, config: PreTrainedConfig) -> Stages:
        """
        Raises:
            ValueError: there are none, or what is called in turn is less than half of the model.
        """
        key = self.plain_class, config.to_json_string(use_diff=False)
        if key not in _FOUND:
            _FOUND[key] = self._found(config)
        return _FOUND[key]

    @torch.no_grad()
    def _found(self, config: PreTrainedConfig) -> Stages:
        with torch.device("meta"):
            plain = self.plain_class(config).eval()
            images = self._example(config, 1, None)["pixel_values"].to(plain.dtype)
        named = dict(plain.named_modules())
        lists = [path for path, module in named.items() if isinstance(module, nn.ModuleList) and len(module) > 1]
        beside: dict[tuple[str, int], tuple[str, ...]] = {}  # those of one length, together a list
        for path in lists:
            key = path.rpartition(".")[0], len(named[path])
            beside[key] = (*beside.get(key, ()), path)
        found = {paths: layers_of(plain, paths) for paths in {*((path,) for path in lists), *beside.values()}}
        calls: list[tuple[nn.Module, int]] = []
        for part in {part for layers in found.values() for layer in layers for part in layer}:
            part.register_forward_hook(lambda module, args, output: calls.append((module, _width_of(output))))
        try:
            plain(images).logits  # (PP-LCNet says them by another name)
        except Exception as error:
            raise self._refused(config, f"of random images it says {type(error).__name__}: {error}") from error
        sizes = {}
        for paths, layers in found.items():
            parts = [part for layer in layers for part in layer]
            if [called for called, _ in calls if called in parts] == parts:
                sizes[paths] = _size(parts)
        paths = max(sizes, key=sizes.get, default=())
        if 2 * sizes.get(paths, 0) < _size([plain]):
            raise self._refused(config, "it has no list of stages, called one after the other, that is half of it or more")
        return Stages(paths, tuple(dict(calls)[layer[-1]] for layer in found[paths]))

    def _refused(self, config: PreTrainedConfig, why: str) -> ValueError:
        return ValueError(f"model_type={config.model_type!r} cannot be cut into blocks: {why}")


def _size(modules: list[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _width_of(output: Any) -> int:
    """D of what leaves a stage: of maps `[N, D, H, W]` or of tokens `[N, S, D]`."""
    hidden = hidden_of(output)
    return hidden.shape[1 if hidden.dim() == 4 else -1]


class _HasLeft(Exception):
    """The block has run, and no more is asked for."""


class StageRun(StockRun):
    """The same of stages: the forward ends where the block does, unless that is the last: what follows is of another width."""

    def __exit__(self, kind: type[BaseException] | None, *error) -> bool:
        super().__exit__(kind, *error)
        return kind is _HasLeft

    def _run(self, index: int, number: int, forward: Callable, *args, **kwargs) -> Any:
        output = super()._run(index, number, forward, *args, **kwargs)
        if self.leaving is not None and index + 1 < len(self._layers):
            raise _HasLeft
        return output


class StageHead(nn.Module):
    """What leaves a stage, to logits `[N, num_labels]`: averaged over its positions, normalised, and mapped.

    Args:
        width: D of what it reads.
        num_labels: V.
    """

    def __init__(self, width: int, num_labels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_labels, width))
        self.bias = nn.Parameter(torch.empty(num_labels))

    def forward(self, output: Any) -> torch.Tensor:
        hidden = hidden_of(output)
        pooled = hidden.flatten(2).mean(-1) if hidden.dim() == 4 else hidden.mean(1)
        return F.linear(F.layer_norm(pooled, pooled.shape[-1:]), self.weight, self.bias)
