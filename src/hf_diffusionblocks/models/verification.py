"""What was cut, against the stock model, on one small batch: before a converted model is handed out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.utils import logging

from ..backbones.stock_run import without_dropout
from .base import DiffusionBlocksPreTrainedModel

logger = logging.get_logger(__name__)

#: Elements of the largest parameters whose gradients are compared: of a large model norms and biases, so that none is held.
LARGEST = 2**16
#: How far apart gradients may be, of the largest: blocks add up in another order what several of them use.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
TOLERANCE_OF_HALF = 3e-2


def check_cut(model: DiffusionBlocksPreTrainedModel, batch: Mapping[str, torch.Tensor]) -> bool:
    """Run a stock model, and its blocks one after the other, each on what the one before it has put out.

    Args:
        model: whose blocks the stock model's own forward runs.
        batch: as `forward` takes it.

    Returns:
        Whether they could be compared: the stock model may not run such a batch, or not where it is now.

    Raises:
        ValueError: their logits differ, or gradients; or a block reads another's own parameters; or tokens see later ones, and
            must not, or the reverse. Says by how much, and what is known of why.
    """
    inputs = model.stock_inputs({name: value.to(model.device) for name, value in batch.items()})
    with without_dropout(model.backbone), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        try:
            expected = model.backbone(**inputs).logits
        except Exception as error:  # (as flash attention before the model is on its device)
            logger.warning(f"what was cut could not be compared with {_name(model)}, which says: {error}")
            return False
        weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0)).to(expected)
        names, watched = _watched(model)
        of_stock = torch.autograd.grad((expected * weights).float().sum(), watched, allow_unused=True) if watched else ()
        try:
            found, of_blocks = _block_by_block(model, inputs, weights, names, watched)
        except Exception as error:
            said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise ValueError(f"{_name(model)} cannot be cut into blocks: {said}") from error
        _compare(model, expected, found, names, of_stock, of_blocks)
        if model.reads_rows:
            _check_head(model, inputs, expected)
        if model.sees_later_tokens is not None:
            _check_order(model, inputs, expected)
        if model.sees_later_tokens is False:
            _check_loss(model, inputs, batch["labels"].to(model.device))
    return True


def _name(model: DiffusionBlocksPreTrainedModel) -> str:
    return type(model.backbone).__name__


def _watched(model: DiffusionBlocksPreTrainedModel) -> tuple[list[str], list[torch.Tensor]]:
    named = [(f"backbone.{name}", each) for name, each in model.backbone.named_parameters()]
    chosen = [(name, each) for name, each in named if each.requires_grad and each.numel() <= LARGEST]
    return [name for name, _ in chosen], [each for _, each in chosen]


def _block_by_block(
    model: DiffusionBlocksPreTrainedModel, inputs: dict, weights: torch.Tensor, names: Sequence[str], watched: Sequence
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """The last block's logits, and gradients, passed back from block to block."""
    entering, leaving, hidden = [], [], None
    for block in model.blocks:
        with block.alone(hidden) as run:
            logits = model.backbone(**inputs).logits
        if run.leaving is None:
            raise ValueError(f"its forward does not call the layers of {model.layers_path}")
        entering.append(hidden)
        leaving.append(run.leaving)
        hidden = run.leaving.detach().requires_grad_()
    total: list[torch.Tensor | None] = [None] * len(watched)
    above = None
    for block, before, after in zip(model.blocks[::-1], entering[::-1], leaving[::-1]):
        end, upstream = ((logits * weights).float().sum(), None) if above is None else (after, above)
        asked = [*watched] if before is None else [*watched, before]
        if not end.requires_grad or not asked:
            return logits, total
        gradients = torch.autograd.grad(end, asked, upstream, allow_unused=True)
        _check_owners(model, block.index, names, gradients)
        total = [_sum(one, other) for one, other in zip(total, gradients)]
        above = gradients[-1]
    return logits, total


def _check_owners(model: DiffusionBlocksPreTrainedModel, block_index: int, names: Sequence[str], gradients: Sequence) -> None:
    for name, gradient in zip(names, gradients):
        owner = model.block_of_parameter(name)
        if gradient is not None and owner not in (None, block_index) and bool(gradient.any()):
            raise ValueError(f"block {block_index} reads {name}, which shared={model.config.shared!r} makes block {owner}'s")


def _sum(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other


def _compare(model, expected, found, names, of_stock, of_blocks) -> None:
    difference = _difference(found, expected)
    if difference > 0:
        raise ValueError(
            f"{_name(model)} cannot be cut into blocks: their logits differ from the model's by {difference:.2g} of the largest. "
            "Layers that run twice, or hand on more than hidden states, cannot be told apart so"
        )
    _compare_gradients(model, names, of_stock, of_blocks)


def _compare_gradients(model, names, of_stock, of_blocks) -> None:
    sizes = [float(each.abs().max()) for each in of_stock if each is not None and each.numel()]
    least = 1e-4 * max(sizes, default=0.0)  # below, rounding
    differences = [_difference(mine, stock, least) for mine, stock in zip(of_blocks, of_stock)]
    worst = max(zip(differences, names), default=(0.0, ""))
    if worst[0] > TOLERANCE.get(model.dtype, TOLERANCE_OF_HALF):
        raise ValueError(
            f"{_name(model)} cannot be cut into blocks: their gradient of {worst[1]} differs from the model's by {worst[0]:.2g} "
            "of the largest. Layers that share parameters, or hand on more than hidden states, cannot train apart"
        )


def _tolerance(logits: torch.Tensor) -> float:
    return TOLERANCE.get(logits.dtype, TOLERANCE_OF_HALF)


def _difference(found: torch.Tensor | None, expected: torch.Tensor | None, least: float = 1e-30) -> float:
    """Of the largest, or of `least`."""
    if found is None or expected is None:
        there = found if expected is None else expected
        return float("inf") if there is not None and bool(there.any()) else 0.0
    if torch.equal(found, expected) or not found.numel():
        return 0.0
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=least))


def _check_head(model: DiffusionBlocksPreTrainedModel, inputs: dict[str, Any], expected: torch.Tensor) -> None:
    """Whether rows that have left the model but for its head have its logits, and what makes these is known to be the head:
    losses are computed in parts."""
    rows = model.base(**inputs).last_hidden_state.flatten(0, 1).detach()
    try:
        found = model.blocks[-1].head(rows).view(expected.shape)
    except Exception as error:  # (a head that reads something beside, as several streams)
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"{_name(model)} cannot be cut into blocks: read out row by row, its head says {said}") from error
    names, watched = _watched(model)
    with model.blocks[-1].readout_on_device() as known:
        used = torch.autograd.grad(found.float().sum(), watched, allow_unused=True) if watched and found.requires_grad else ()
        for name, parameter, gradient in zip(names, watched, used):
            if gradient is not None and not any(parameter is each for each in known):
                raise ValueError(f"{_name(model)} cannot be cut into blocks: its head reads {name}, which is no part of it")
    if (difference := _difference(found, expected)) > _tolerance(expected):
        raise ValueError(
            f"{_name(model)} cannot be cut into blocks: read out row by row, its logits differ by {difference:.2g} of the largest"
        )


def _check_loss(model: DiffusionBlocksPreTrainedModel, inputs: dict[str, Any], labels: torch.Tensor) -> None:
    """Whether the stock model's loss is ours, of the token after each, and so are its gradients."""
    try:
        stock = model.backbone(**inputs, labels=labels).loss
    except Exception as error:
        raise ValueError(f"{_name(model)} cannot be cut for task {model.task!r}: its own loss says {error}") from error
    ours = model.formulation.loss(inputs, labels)
    if _difference(ours, stock) > max(1e-3, _tolerance(stock)):
        raise ValueError(
            f"{_name(model)} cannot be cut for task {model.task!r}: its own loss of a text is {stock:.3f}, and that of each next "
            f"token {ours:.3f}. Labels that are shifted before are for other models"
        )
    names, watched = _watched(model)
    if watched:
        _compare_gradients(model, names, *(torch.autograd.grad(loss, watched, allow_unused=True) for loss in (stock, ours)))


@torch.no_grad()
def _check_order(model: DiffusionBlocksPreTrainedModel, inputs: dict[str, Any], expected: torch.Tensor) -> None:
    """Whether tokens see those after them, by the logits of all others when the last is another."""
    tokens = inputs["input_ids"].clone()
    tokens[:, -1] = (tokens[:, -1] + 1) % expected.shape[-1]
    changed = model.backbone(**{**inputs, "input_ids": tokens}).logits
    sees = _difference(changed[:, :-1], expected[:, :-1]) > _tolerance(expected)  # (experts round by what others they get)
    if sees != model.sees_later_tokens:
        raise ValueError(
            f"{_name(model)} cannot be cut for task {model.task!r}: its tokens {'see' if sees else 'do not see'} those after "
            f"them, and must{' not' if sees else ''}"
        )
