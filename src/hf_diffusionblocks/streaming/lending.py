"""The doors by which a stock model runs on copies: its modules get classes of the same names, which know of the stream.

As FSDP2 does, a module's class becomes a subclass made for it; `leave` gives it back its own. Transformers' layers checkpoint
the `forward` of such a subclass, so what is lent for a call is lent again when it is repeated.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from .loss import causal_lm_loss
from .stream import Stream
from .units import Unit

_CLASSES: dict[tuple[type, type], type] = {}


def enter(module: nn.Module, mixin: type) -> None:
    """Give a module the class of its own name that is `mixin`, too."""
    stock = type(module)

    def new(cls: type, *args, **kwargs) -> nn.Module:
        """Whoever calls the class gets a stock one. (A copy is made without arguments.)"""
        return stock(*args, **kwargs) if args or kwargs else stock.__new__(cls)

    if (stock, mixin) not in _CLASSES:
        own = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
        own |= {"forward": mixin.around(stock.forward), "__new__": new}
        _CLASSES[stock, mixin] = type(stock)(stock.__name__, (mixin, stock), own)
    module.__class__ = _CLASSES[stock, mixin]


def leave(module: nn.Module, mixin: type) -> None:
    """Give a module its own class back."""
    module.__class__ = next(stock for (stock, of), own in _CLASSES.items() if own is type(module) and of is mixin)


class LentUnit:
    """A unit of a stream: `_unit` and `_stream` are in its `__dict__`."""

    _unit: Unit
    _stream: Stream

    @staticmethod
    def around(forward: Callable) -> Callable:
        @functools.wraps(forward)
        def lent(self, *args, **kwargs):
            if not isinstance(self, LentUnit):  # no longer: somebody has kept this, and set another over it
                return forward(self, *args, **kwargs)
            with self._stream.alone():
                return self._stream.run(self._unit, self, functools.partial(forward, self), args, kwargs)

        return lent

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        # While the model runs, others may read the weight of a head or an embedding; outside of it they want the parameter.
        if isinstance(value, nn.Parameter) and self._stream.computing:
            return self._stream.read(self._unit, self, name)
        return value

    def _apply(self, fn: Callable, recurse: bool = True):
        """Parameters and their gradients stay in host memory, whatever device is asked for."""
        ours = {id(each) for p in self.parameters() for each in (p, p.grad) if each is not None}

        def stays(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) in ours:
                asked = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
                if asked.device != tensor.device:
                    return tensor.to(asked.dtype)
            return fn(tensor)

        return super()._apply(stays, recurse)


def weights_on_device(*modules: nn.Module) -> AbstractContextManager:
    """For who calls parts of modules, or reads their weights, by himself: while this runs, those that are streamed are copies
    on the device."""
    with ExitStack() as lent:
        for module in modules:
            for unit in module.modules():
                if isinstance(unit, LentUnit):
                    lent.enter_context(unit._stream.alone())
                    lent.enter_context(unit._stream.lent(unit._unit, unit))
        return lent.pop_all()


def _deferring_head(model: nn.Module, given: dict[str, Any]) -> nn.Module | None:
    """The head of a model whose stock loss is to be computed."""
    if given.get("labels") is None or not (model.training and torch.is_grad_enabled()):
        return None
    if getattr(model, "loss_function", None) is not causal_lm_loss:
        return None
    head = model.get_output_embeddings()
    if not isinstance(head, LentUnit) or nn.Linear not in type(head).__bases__:
        return None
    return None if head._backward_hooks or head._backward_pre_hooks else head  # (these want the gradient of all logits)


class StreamedModel:
    """A model some of whose modules are units: `_stream` is in its `__dict__`. So is each model inside of it."""

    _stream: Stream

    @staticmethod
    def around(forward: Callable) -> Callable:
        @functools.wraps(forward)
        def running(self, *args, **kwargs):
            if not isinstance(self, StreamedModel):  # no longer: this was set on the instance
                return forward(self, *args, **kwargs)
            with self._stream.pass_of(self, kwargs), self._stream.deferring_logits(_deferring_head(self, kwargs)):
                return forward(self, *args, **kwargs)

        return running

    def __call__(self, *args, **kwargs):
        with self._stream.pass_of(self, kwargs):
            return super().__call__(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        # Another forward is set on the instance (Accelerate's autocast, TRL's fused head), which some call by itself.
        if name == "forward" and isinstance(value, types.MethodType) and value.__self__ is self:
            value = types.MethodType(StreamedModel.around(value.__func__), self)
        super().__setattr__(name, value)

    @property
    def loss_function(self) -> Callable:
        """The stock one; a causal model's takes deferred logits, too."""
        stock = super().loss_function
        return causal_lm_loss if stock is ForCausalLMLoss else stock

    @loss_function.setter
    def loss_function(self, value: Callable) -> None:
        super(StreamedModel, type(self)).loss_function.fset(self, value)

    @property
    def device(self) -> torch.device:
        """Where it computes, and wants its inputs."""
        return self._stream.device

    def _replicate_for_data_parallel(self):
        raise ValueError(
            "DataParallel cannot run a streamed model: start one process a device with `accelerate launch`, or choose one "
            "with CUDA_VISIBLE_DEVICES"
        )
