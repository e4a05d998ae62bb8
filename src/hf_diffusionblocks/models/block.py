"""A block as a thing: its layers, its ways in and out, its range of noise levels, its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from ..backbones.modulation import Modulation
from ..backbones.stock_run import StockRun, head_of, in_place
from ..diffusion.gaussian import precondition
from ..diffusion.randomness import Generators
from ..streaming import weights_on_device


class BlockOutput(NamedTuple):
    """What a block has made of x, `[N, S, D]` each."""

    leaving: torch.Tensor  #: what the next block may start from
    read: torch.Tensor  #: what the stock model's head reads: after the local head, if there is one, and the final norm


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
        sigma_embedding: path of what embeds sigma for its layers; None where nothing modulates them.
        local_head: path of the layers of its local head, if it has one.
        prefixes: how the names of its parameters begin.
    """

    def __init__(
        self, model: nn.Module, index: int, layers: range, predecessors: range, embeddings: str, readout: str,
        sigma_embedding: str | None, local_head: str | None, prefixes: Sequence[str],
    ):  # fmt: skip
        self.model, self.index, self.layer_indices = model, index, layers
        self.predecessors, self.prefixes = predecessors, tuple(prefixes)
        self._embeddings, self._readout = embeddings, readout
        self._sigma_embedding, self._local_head = sigma_embedding, local_head
        self._head: Callable[[torch.Tensor], torch.Tensor] | None = None  # while rows are read out

    # ---- what it is

    @property
    def is_loaded(self) -> bool:
        return self.index in self.model.resident_blocks

    @property
    def layers(self) -> list[nn.Module]:
        """Its layers, of the stock model's."""
        layers = self.model.layers
        return [layers[index] for index in self.layer_indices]

    def parameters(self) -> list[nn.Parameter]:
        """All parameters of this block, and of no other."""
        named = self.model.named_parameters()
        return [parameter for name, parameter in named if self.model.block_of_parameter(name) == self.index]

    def interval(self, overlap: float = 0.0) -> tuple[float, float]:
        """`(low, high)`, its range of noise levels; see [`NoiseSchedule.interval`]."""
        return self.model.noise_schedule.interval(self.index, overlap)

    def draw_levels(self, shape: tuple[int, ...], generator: Generators) -> torch.Tensor:
        """Noise levels to train at, on the model's device."""
        device = self.model.device
        return self.model.noise_schedule.sample(self.index, shape, generator, device).to(device, torch.float32)

    # ---- inside the stock model

    @contextmanager
    def alone(self, entering: torch.Tensor | None = None) -> Iterator[StockRun]:
        """While this runs, this block is the one that trains in the stock model's forward, and has its own parts in it.

        Args:
            entering: what enters the block, `[N, S, D]`; None: it embeds, or the blocks before it run, without gradient and
                dropout.

        Raises:
            ValueError: the block is not loaded.
        """
        self._check_loaded()
        model, head = self.model, self._part(self._local_head) if self._local_head else ()
        if entering is not None:
            entering = entering.to(model.device, model.dtype)
        run = StockRun(model.backbone, model.layers, self.layer_indices, bool(self.predecessors), entering, head)
        with self._own_parts(), run.running():
            yield run

    def run_stock(self, inputs: Mapping[str, Any], entering: torch.Tensor | None = None) -> BlockOutput:
        """What the block makes of what the stock model takes, by the stock model's forward but for its head."""
        with self.alone(entering) as run:
            read = self.model.base(**inputs).last_hidden_state
        return BlockOutput(run.leaving, read)

    def head(self, rows: torch.Tensor) -> torch.Tensor:
        """`[R, D]` of `BlockOutput.read` to logits `[R, V]`, by all that the stock model does then."""
        if self._head is not None:
            return self._head(rows)
        with self._stock_head() as head:
            return head(rows)

    @contextmanager
    def _stock_head(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        with self._own_parts(), head_of(self.model.backbone, self.model.layers_path) as head:
            yield head

    @contextmanager
    def _own_parts(self) -> Iterator[None]:
        with ExitStack() as there:
            for own, paths in self.model.sharing.own_paths(self.index):
                there.enter_context(in_place(self.model.backbone, self._part(own), paths))
            yield

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
        return self._part(self._embeddings)

    @property
    def readout_parts(self) -> nn.Module:
        """What holds its final norm and head."""
        return self._part(self._readout)

    @contextmanager
    def reading_out(self) -> Iterator[list[torch.Tensor]]:
        """While this runs, what stands after the layers is in its place, and where it computes, however often it reads rows;
        gives its parameters there."""
        with ExitStack() as there:
            parts = [self.readout_parts.get_submodule(path) for path in self.model.readout_paths]
            for part in parts:
                there.enter_context(weights_on_device(part))
            if self.model.formulation.runs_stock:
                self._head = there.enter_context(self._stock_head())
            try:
                yield [parameter for part in parts for parameter in part.parameters()]
            finally:
                self._head = None

    def read_out(self, hidden: torch.Tensor, **conditions) -> torch.Tensor:
        """What has left a block, through final norm and head."""
        return self.model.architecture.read_out(self.readout_parts, hidden, **conditions)

    # ---- its layers

    def modulations(self, sigma: torch.Tensor) -> list[Modulation]:
        """What sigma `[N]` (or `[1]`, for the whole batch) does to each layer."""
        embedded = self._part(self._sigma_embedding)(precondition(sigma, self.model.config.sigma_data).noise)
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
        if not self.is_loaded:
            raise ValueError(f"block {self.index} is not loaded: resident_blocks={self.model.resident_blocks}")

    def _part(self, path: str) -> nn.Module:
        return self.model.get_submodule(path)
