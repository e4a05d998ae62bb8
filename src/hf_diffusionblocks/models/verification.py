"""What was cut, against the stock model, on one small batch: before a converted model is handed out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.utils import logging

from ..backbones.stock_run import base_of, without_dropout
from ..diffusion.objectives import IGNORED
from .base import DiffusionBlocksPreTrainedModel

logger = logging.get_logger(__name__)

#: Elements of the largest parameters whose gradients are compared: of a large model norms and biases, so that none is held.
LARGEST = 2**16
#: How far apart gradients may be, of the largest: blocks add up in another order what several of them use.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
TOLERANCE_OF_HALF = 3e-2


def check_cut(
    model: DiffusionBlocksPreTrainedModel, batch: Mapping[str, torch.Tensor], source: nn.Module | None = None
) -> bool:
    """Run a stock model, and its blocks one after the other, each on what the one before it has put out.

    Args:
        model: whose blocks the stock model's own forward runs.
        batch: as `forward` takes it.
        source: that the weights are copied from, if there is one.

    Returns:
        Whether they could be compared: the stock model may not run where it is now, or in this dtype.

    Raises:
        ValueError: the stock model runs no such batch; logits differ, or gradients; or the source's; or a block reads another's
            own parameters; or tokens see later ones, and must not, or the reverse. Says by how much, and what is known of why.
    """
    # (Not every stock model casts images to what it computes in.)
    there = {name: each.to(model.device, model.dtype if each.is_floating_point() else None) for name, each in batch.items()}
    inputs = model.stock_inputs(there)
    with _kept(model.backbone), without_dropout(model.backbone), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        try:
            expected = model.backbone(**inputs).logits
        except Exception as error:
            says, there = f"{type(model.backbone).__name__}, which says: {error}", model.backbone.config
            if (model.device.type, model.dtype) == ("cpu", torch.float32) and "flash" not in str(there._attn_implementation):
                raise ValueError(f"what was cut cannot be compared with {says}") from error
            logger.warning(f"what was cut could not be compared with {says}")  # (a kernel may be missing here)
            return False
        comparison = _Comparison(model, inputs, expected)
        if source is not None and source.dtype == model.dtype and model.sees_later_tokens is not True:  # (else it may differ)
            comparison.check_source(source)
        comparison.check_blocks()
        if model.reads_rows:
            comparison.check_head()
        if model.sees_later_tokens is not None:
            comparison.check_order()
        if model.sees_later_tokens is False:
            comparison.check_loss(batch["labels"].to(model.device))
    return True


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Numbers that modules note as they run are as before in the end: a Swin that has seen images of few windows shifts none
    in larger ones."""
    noted = [(vars(module), {**vars(module)}) for module in model.modules()]
    try:
        yield
    finally:
        for now, before in noted:
            now.update({name: value for name, value in before.items() if isinstance(value, (int, float, tuple))})


class _Comparison:
    """A stock model on one batch, beside what was made of it.

    Args:
        inputs: what the stock model takes.
        expected: its logits, with their graph.
    """

    def __init__(self, model: DiffusionBlocksPreTrainedModel, inputs: dict[str, Any], expected: torch.Tensor):
        self._model, self._inputs, self._expected = model, inputs, expected
        self._tolerance = _tolerance(expected.dtype)
        named = [(f"backbone.{name}", each) for name, each in model.backbone.named_parameters()]
        watched = [(name, each) for name, each in named if each.requires_grad and each.numel() <= LARGEST]
        self._names, self._watched = [name for name, _ in watched], [each for _, each in watched]

    def _refused(self, why: str, where: str = "into blocks") -> ValueError:
        return ValueError(f"{type(self._model.backbone).__name__} cannot be cut {where}: {why}")

    def _gradients(self, end: torch.Tensor) -> Sequence[torch.Tensor | None]:
        """Of what is watched."""
        return torch.autograd.grad(end, self._watched, allow_unused=True) if self._watched and end.requires_grad else ()

    @torch.no_grad()
    def check_source(self, source: nn.Module) -> None:
        """Whether the source is a stock model still: its modules may be others, or have hooks."""
        with _kept(source), without_dropout(source):
            try:
                found = source(**self._inputs).logits
            except Exception:  # (weights of several dtypes, which autocast computes with)
                return
        if (difference := _difference(found, self._expected)) > self._tolerance:
            raise ValueError(
                f"source={type(source).__name__} must be as its class and config make it: logits of a stock model with its weights "
                f"differ by {difference:.2g} of the largest. Its modules, hooks or config were changed"
            )

    # ---- block by block

    def check_blocks(self) -> None:
        weights = torch.randn(self._expected.shape, generator=torch.Generator().manual_seed(0)).to(self._expected)
        of_stock = self._gradients((self._expected * weights).float().sum())
        try:
            found, of_blocks = self._block_by_block(weights)
        except Exception as error:
            raise self._refused(str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}") from error
        if (difference := _difference(found, self._expected)) > 0:
            raise self._refused(
                f"their logits differ from the model's by {difference:.2g} of the largest. Layers that run twice, or hand on "
                "more than they return, cannot be told apart so"
            )
        self._compare(of_stock, of_blocks)

    def _block_by_block(self, weights: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """The last block's logits, and gradients, passed back from block to block."""
        entering, leaving, given = [], [], None
        for block in self._model.blocks:
            with without_dropout(self._model.backbone):
                left, logits = block.classify(self._inputs, given)
            entering.append(_with_gradients(given))
            given = tree_map_only(torch.Tensor, lambda each: each.detach().requires_grad_(each.requires_grad), left)
            leaving.append(_with_gradients(left))
        total: list[torch.Tensor | None] = [None] * len(self._watched)
        ends, above = [(logits * weights).float().sum()], [None]
        for block, before, after in zip(self._model.blocks[::-1], entering[::-1], [*leaving[-2::-1], []]):
            asked = [*self._watched, *before]
            if not asked or not any(end.requires_grad for end in ends):
                break
            gradients = torch.autograd.grad(ends, asked, above, allow_unused=True)
            self._check_owners(block.index, gradients)
            total = [_sum(one, other) for one, other in zip(total, gradients)]
            passed = [(end, gradient) for end, gradient in zip(after, gradients[len(self._watched) :]) if gradient is not None]
            ends, above = zip(*passed) if passed else ((), ())
        return logits, total

    def _check_owners(self, block_index: int, gradients: Sequence[torch.Tensor | None]) -> None:
        for name, gradient in zip(self._names, gradients):
            owner = self._model.block_of_parameter(name)
            if gradient is not None and owner not in (None, block_index) and bool(gradient.any()):
                shared = self._model.config.shared
                raise ValueError(f"block {block_index} reads {name}, which shared={shared!r} makes block {owner}'s")

    def _compare(self, of_stock: Sequence[torch.Tensor | None], found: Sequence[torch.Tensor | None]) -> None:
        sizes = [float(each.abs().max()) for each in of_stock if each is not None and each.numel()]
        least = 1e-4 * max(sizes, default=0.0)  # below, rounding
        differences = [_difference(mine, stock, least) for mine, stock in zip(found, of_stock)]
        worst, name = max(zip(differences, self._names), default=(0.0, ""))
        if worst > _tolerance(self._model.dtype):
            raise self._refused(
                f"their gradient of {name} differs from the model's by {worst:.2g} of the largest. Layers that hand on more "
                "than they return cannot train apart"
            )

    # ---- tokens

    def check_head(self) -> None:
        """Whether rows that have left the model but for its head have its logits, and what makes these is known to be the head:
        losses are computed in parts."""
        rows, last = (
            base_of(self._model.backbone, self._model.layers_path)(**self._inputs).last_hidden_state.flatten(0, 1).detach(),
            self._model.blocks[-1],
        )
        try:
            found = last.head(rows).view(self._expected.shape)
        except Exception as error:  # (a head that reads something beside, as several streams)
            raise self._refused(f"read out row by row, its head says {type(error).__name__}: {error}") from error
        with last.reading_out() as (_, known):
            for name, parameter, gradient in zip(self._names, self._watched, self._gradients(found.float().sum())):
                if gradient is not None and not any(parameter is each for each in known):
                    raise self._refused(f"its head reads {name}, which is no part of it")
        if (difference := _difference(found, self._expected)) > self._tolerance:
            raise self._refused(f"read out row by row, its logits differ by {difference:.2g} of the largest")

    @torch.no_grad()
    def check_order(self) -> None:
        """Whether tokens see those after them, by the logits of all others when the last is another."""
        tokens = self._inputs["input_ids"].clone()
        tokens[:, -1] = (tokens[:, -1] + 1) % self._expected.shape[-1]
        changed = self._model.backbone(**{**self._inputs, "input_ids": tokens}).logits
        # (Experts round by what others they get.)
        sees = _difference(changed[:, :-1], self._expected[:, :-1]) > self._tolerance
        if sees != self._model.sees_later_tokens:
            raise self._refused(
                f"its tokens {'see' if sees else 'do not see'} those after them, and must{' not' if sees else ''}",
                self._for_task,
            )

    def check_loss(self, labels: torch.Tensor) -> None:
        """Whether the stock model's loss is ours, of the token after each, and so are its gradients. (Some models, as BART,
        expect labels that are shifted before.)"""
        shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        ours, found = self._model.formulation.loss(self._inputs, labels), []
        for given in (labels, shifted):
            try:
                found.append(self._model.backbone(**self._inputs, labels=given).loss)
            except Exception as error:
                raise self._refused(f"its own loss says {error}", self._for_task) from error
            if _difference(ours, found[-1]) <= max(1e-3, _tolerance(ours.dtype)):
                return self._compare(self._gradients(found[-1]), self._gradients(ours))
        raise self._refused(f"its own loss of a text is {found[0]:.3f}, and that of each next token {ours:.3f}", self._for_task)

    @property
    def _for_task(self) -> str:
        return f"for task {self._model.task!r}"


def _tolerance(dtype: torch.dtype) -> float:
    return TOLERANCE.get(dtype, TOLERANCE_OF_HALF)


def _with_gradients(output: Any) -> list[torch.Tensor]:
    """What of it is passed back through."""
    return [each for each in tree_leaves(output) if isinstance(each, torch.Tensor) and each.requires_grad]


def _sum(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other


def _difference(found: torch.Tensor | None, expected: torch.Tensor | None, least: float = 1e-30) -> float:
    """Of the largest, or of `least`; infinite where one of them is no number."""
    if found is None or expected is None:
        there = found if expected is None else expected
        return float("inf") if there is not None and bool(there.any()) else 0.0
    found, expected = found.detach(), expected.detach()
    if not found.numel() or torch.allclose(found, expected, rtol=0, atol=0, equal_nan=True):
        return 0.0
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=least))
    return float("inf") if math.isnan(difference) else difference
