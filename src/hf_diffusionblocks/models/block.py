"""A block as a thing: its layers, its ways in and out, its range of noise levels, its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ..backbones.modulation import Modulation
from ..backbones.staged import StageRun
from ..backbones.stock_run import StockRun, base_of, head_of, layers_of
from ..streaming import weights_on_device


class BlockOutput(NamedTuple):
    """What a block has made of x."""

    leaving: Any  #: what the next block may start from: all that the last layer has returned
    read: torch.Tensor  #: `[N, S, D]`, what the stock model's head reads: after local head, if there is one, and final norm


class Block:
    """A view of one block of a model.

    It holds no tensors, and looks modules up when it is called: no key doubles, and others may replace modules.

    Args:
        model: whose block.
        index: 0 for the first layers and the highest noise.
        layers: global indices of its layers.
        predecessors: blocks whose clean output is its input: they run before it, without gradient.
        embeddings, readout: paths of what holds the modules that embed its input, and that read it out: the stock model,
            or parts of its own.
        own_paths: of the stock model's modules that it has copies of, and of these.
        sigma_embedding: path of what embeds sigma for its layers; None where nothing modulates them.
        local_head: path of the layers of its local head, if it has one.
        prefixes: how the names of its parameters begin.
    """

    def __init__(
        self, model: nn.Module, index: int, layers: range, predecessors: range, embeddings: str, readout: str,
        own_paths: Mapping[str, str], sigma_embedding: str | None, local_head: str | None, prefixes: Sequence[str],
    ):  # fmt: skip
        self.model, self.index, self.layer_indices = model, index, layers
        self.predecessors, self.prefixes = predecessors, tuple(prefixes)
        self._embeddings, self._readout, self._own_paths = embeddings, readout, own_paths
        self._sigma_embedding, self._local_head = sigma_embedding, local_head

    # ---- what it is

    @property
    def layers(self) -> list[nn.Module]:
        """Its layers, of the stock model's."""
        return list(self.model.layers)[self.layer_indices.start : self.layer_indices.stop]

    def parameters(self) -> list[nn.Parameter]:
        """All parameters of this block, and of no other."""
        named = self.model.named_parameters()
        return [parameter for name, parameter in named if self.model.block_of_parameter(name) == self.index]

    # ---- inside the stock model

    def alone(self, entering: Any = None) -> StockRun:
        """While this is entered, this block is the one that trains in the stock model's forward, and has its own parts in it.

        Args:
            entering: what has left the one before; None: it embeds, or the blocks before it run, without gradient and dropout.

        Raises:
            ValueError: the block is not loaded.
        """
        self._check_loaded()
        model, head = self.model, self.model.get_submodule(self._local_head) if self._local_head else ()
        if entering is not None:
            # (Under autocast Accelerate makes float32 of what leaves `forward`.)
            dtype = model.dtype if torch.is_autocast_enabled(model.device.type) else None
            entering = tree_map_only(
                torch.Tensor, lambda each: each.to(model.device, dtype if each.is_floating_point() else None), entering
            )
        runs_earlier, kind = bool(self.predecessors), StockRun if model.architecture.layers_are_alike else StageRun
        layers = layers_of(model.backbone, model.layer_lists)
        return kind(model.backbone, layers, self.layer_indices, self._own_parts(), runs_earlier, entering, head)

    def classify(self, inputs: Mapping[str, Any], entering: Any = None) -> tuple[Any, torch.Tensor]:
        """What has left the block, and its logits: the stock model's, or its stage head's.

        Raises:
            ValueError: the stock model's forward does not call its layers.
        """
        logits = None
        with self.alone(entering) as run:
            logits = self.model.backbone(**inputs).logits
        if run.leaving is None:
            raise ValueError(f"its forward does not call the layers of {self.model.layers_path}")
        return run.leaving, self.model.local_heads[self.index](run.leaving) if logits is None else logits

    def run_stock(self, inputs: Mapping[str, Any], entering: Any = None) -> BlockOutput:
        """What the block makes of what the stock model takes, by the stock model's forward but for its head."""
        with self.alone(entering) as run:
            read = base_of(self.model.backbone, self.model.layers_path)(**inputs).last_hidden_state
        return BlockOutput(run.leaving, read)

    def head(self, rows: torch.Tensor) -> torch.Tensor:
        """`[R, D]` of `BlockOutput.read` to logits `[R, V]`, by all that the stock model does then."""
        with head_of(self.model.backbone, self.model.layers_path, self._own_parts()) as head:
            return head(rows)

    @contextmanager
    def reading_out(self) -> Iterator[tuple[Callable[[torch.Tensor], torch.Tensor], list[nn.Parameter]]]:
        """While this runs, what stands after the layers is in its place, and where it computes, however often it reads rows;
        gives what [`head`] does (or [`read_out`], where blocks run piece by piece), and the parameters there."""
        model = self.model
        parts = [*map(self.readout_parts.get_submodule, model.readout_paths)]
        runs_stock = model.formulation.runs_stock
        stock = head_of(model.backbone, model.layers_path, self._own_parts()) if runs_stock else nullcontext(self.read_out)
        with weights_on_device(*parts), stock as head:
            yield head, [parameter for part in parts for parameter in part.parameters()]

    def _own_parts(self) -> dict[str, nn.Module]:
        """By the paths of the stock model's."""
        return {path: self.model.get_submodule(own) for path, own in self._own_paths.items()}

    # ---- its ways in and out, piece by piece

    def embed(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The hidden states `[N, S, D]` that a block starts from, where none are passed on to it."""
        return self.model.architecture.embed(self.embedding_parts, **inputs)

    @property
    def embeds_apart(self) -> bool:
        """Whether it starts from embeddings of its own, which the stock model has not."""
        return self._embeddings != "backbone" and not self.predecessors

    @property
    def embedding_parts(self) -> nn.Module:
        """What holds the modules that embed its input."""
        return self.model.get_submodule(self._embeddings)

    @property
    def readout_parts(self) -> nn.Module:
        """What holds its final norm and head."""
        return self.model.get_submodule(self._readout)

    def read_out(self, hidden: torch.Tensor, **conditions) -> torch.Tensor:
        """What has left a block, through final norm and head."""
        return self.model.architecture.read_out(self.readout_parts, hidden, **conditions)

    # ---- its layers

    def modulations(self, sigma: torch.Tensor) -> list[Modulation]:
        """What sigma `[N]` (or `[1]`, for the whole batch) does to each layer."""
        embedded = self.model.get_submodule(self._sigma_embedding)(sigma)
        return [self.model.modulations[index](embedded) for index in self.layer_indices]

    def clean_modulations(self) -> list[Modulation]:
        """The clean input is conditioned on sigma_min, whatever the noise level of the target."""
        return self.modulations(torch.full((1,), self.model.config.sigma_min, device=self.model.device))

    def run(self, hidden: torch.Tensor, modulations: Sequence[Modulation | None] | None = None, **attention) -> torch.Tensor:
        """`[N, S, D]` through its layers, modulated or (None) as they are; `attention` as in [`PiecewiseBackbone.run_layer`].

        Raises:
            ValueError: the block is not loaded.
        """
        self._check_loaded()
        for layer, modulation in zip(self.layers, modulations or [None] * len(self.layer_indices)):
            hidden = self.model.run_layer(layer, hidden, modulation, **attention)
        return hidden

    def _check_loaded(self) -> None:
        if self.index not in self.model.resident_blocks:
            raise ValueError(f"block {self.index} is not loaded: resident_blocks={self.model.resident_blocks}")
