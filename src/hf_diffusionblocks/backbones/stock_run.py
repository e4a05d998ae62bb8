"""A stock model run with some of its layers: its own forward does all the rest, so no architecture has to be known.

While a block runs, each layer's `forward` is an attribute of the instance, as Accelerate sets it, and is put back after.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from ..streaming import stream_of

#: Class of layers -> what its `forward` returns, with None for the tensors: hidden states alone, or first of several things.
_OUTPUTS: dict[type[nn.Module], Any] = {}
_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()


def one_thread(model: nn.Module) -> threading.RLock:
    """What is held while a model is altered: two threads would put back each other's. (Of a streamed one its passes hold it.)"""
    stream = stream_of(model)
    return _locks.setdefault(model, threading.RLock()) if stream is None else stream.one_thread


def alter(until: ExitStack, model: nn.Module, parts: Mapping[str, nn.Module], forwards: Mapping[nn.Module, Callable]) -> None:
    """Until a stack closes, a model has these modules, by path, and these forwards are what calls of modules run."""
    for path, part in parts.items():
        until.callback(model.set_submodule, path, model.get_submodule(path))
        model.set_submodule(path, part)
    for module, forward in forwards.items():
        before = vars(module).get("forward")
        module.forward = forward
        until.callback(*(delattr, module, "forward") if before is None else (setattr, module, "forward", before))


@contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode, then give every sub-module back the mode it had. (What some keep of their weights there,
    as LeViT does, they forget in training mode.)"""
    modes = [(child, child.training) for child in module.modules()]
    module.train().eval()
    try:
        yield
    finally:
        module.train()
        for child, training in modes:
            child.training = training


def layers_of(plain: nn.Module, lists: Sequence[str]) -> list[list[nn.Module]]:
    """The parts of each layer as they are called, of lists, by path, that it has an element, or a list, of."""
    layers = zip(*map(plain.get_submodule, lists))
    return [[part for each in parts for part in (each if isinstance(each, nn.ModuleList) else [each])] for parts in layers]


class StockRun:
    """A forward of a stock model in which one block alone trains, while this is entered.

    Layers after the block hand on what they are given. So do those before it, or they run as they are in use: without
    gradient, and nothing is dropped.

    Args:
        model: the stock model.
        layers: the parts of all of its layers, in order, as they are called: usually one each.
        block: which of them are the block's.
        parts: the block's own, which are in the stock model meanwhile, by path.
        runs_earlier: whether layers before the block run.
        entering: what the last layer before the block has returned, if it is there: those of one part do not run, then.
        local_head: layers that run after the block's, on what its last one is given beside hidden states.
    """

    leaving: Any = None  #: what the block's last layer has returned; None before
    _given: torch.Tensor  # what a layer is given

    def __init__(
        self, model: nn.Module, layers: Sequence[Sequence[nn.Module]], block: range, parts: Mapping[str, nn.Module],
        runs_earlier: bool, entering: Any, local_head: Sequence[nn.Module],
    ):  # fmt: skip
        self._model, self._layers, self._block, self._parts, self._local_head = model, layers, block, parts, local_head
        self._entering, self._runs_earlier = entering, runs_earlier
        self._until_block, self._until_end = ExitStack(), ExitStack()

    def __enter__(self) -> StockRun:
        with ExitStack() as until:
            until.enter_context(one_thread(self._model))
            self._first = [(type(part), part.forward) for part in self._layers[self._block.start]]
            if self._block.start > 0:
                until.callback(self._until_block.close)
                self._until_block.enter_context(without_dropout(self._model))
            parts = [(k, number, part) for k, layer in enumerate(self._layers) for number, part in enumerate(layer)]
            forwards = {part: partial(self._run, k, number, part.forward) for k, number, part in parts}
            alter(until, self._model, self._parts, forwards)
            self._until_end = until.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._until_end.close()

    def _run(self, index: int, number: int, forward: Callable, *args, **kwargs) -> Any:
        ends = number + 1 == len(self._layers[index])
        if number == 0:
            self._given = args[0] if args else next(iter(kwargs.values()))
        if index not in self._block:
            skips = ends and (number == 0 or index + 1 == self._block.start)  # (parts of layers are of several widths)
            if skips and index < self._block.start and self._entering is not None:  # (some write into it)
                return tree_map_only(torch.Tensor, torch.clone, self._entering)
            if index > self._block.start or not self._runs_earlier:
                return self._handed_on(number, args, kwargs)
            with torch.no_grad():
                return forward(*args, **kwargs)
        if index == self._block.start:
            self._until_block.close()
        output = forward(*args, **kwargs)
        _OUTPUTS.setdefault(self._first[number][0], _form(output))
        if ends and index == self._block[-1]:
            self.leaving = output
            for layer in self._local_head:
                args, kwargs = with_hidden(hidden_of(output), args, kwargs)
                output = layer(*args, **kwargs)
        return output

    def _handed_on(self, number: int, args: tuple, kwargs: dict) -> Any:
        """What a part of a layer returns that does nothing."""
        kind, first = self._first[number]
        if kind not in _OUTPUTS:  # before the block has run: nothing is dropped, and no cache is written to
            there = {id(each): each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)}
            with torch.no_grad():
                _OUTPUTS[kind] = _form(first(*copy.deepcopy(args, there), **copy.deepcopy(kwargs, there)))
        hidden, form = self._given, _OUTPUTS[kind]
        if isinstance(form, dict):
            return {name: value if number else hidden for number, (name, value) in enumerate(form.items())}
        return hidden if form is None else type(form)((hidden, *form[1:]))


def _form(output: Any) -> Any:
    if isinstance(output, dict):
        return dict.fromkeys(output)
    return type(output)([None] * len(output)) if isinstance(output, (tuple, list)) else None


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states that a layer, or a stage, returns: alone, or first of what may be first again."""
    if isinstance(output, dict):
        return hidden_of(next(iter(output.values())))
    return hidden_of(output[0]) if isinstance(output, (tuple, list)) else output


def with_hidden(hidden: torch.Tensor, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """What a layer is called with, on other hidden states: they come first, by position or by name."""
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, next(iter(kwargs)): hidden}


class _LastHidden(BaseModelOutputWithPastAndCrossAttentions):
    """What a stock model without its head returns, as far as a head reads it."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def base_of(model: nn.Module, layers_path: str) -> nn.Module:
    """A stock model without its head: what holds its layers. (`base_model` goes by a prefix, which may name nothing.)"""
    return model.get_submodule(layers_path.split(".")[0])


@contextmanager
def head_of(
    model: nn.Module, layers_path: str, parts: Mapping[str, nn.Module] | None = None
) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """While this runs, what it gives makes logits `[R, V]` of rows `[R, D]` that have left a stock model but for its head: by
    all that the model does then, soft caps and the like included.

    Args:
        parts: modules that are in the model meanwhile, by path.
    """
    rows: torch.Tensor | None = None

    def base(*args, **kwargs) -> _LastHidden:
        return _LastHidden(last_hidden_state=rows[None])

    def head(given: torch.Tensor) -> torch.Tensor:
        nonlocal rows
        rows = given
        return model(input_ids=torch.zeros((1, len(given)), dtype=torch.long, device=given.device)).logits[0]

    module, forwards = model, {}
    for name in layers_path.split(".")[:-1]:  # (some call what is in their base model, as its decoder)
        module = module.get_submodule(name)
        forwards[module] = base
    with one_thread(model), ExitStack() as until:
        alter(until, model, parts or {}, forwards)
        yield head
