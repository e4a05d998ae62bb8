"""`stream_layers`: a stock model whose layers come to the device when they are used."""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers.utils import logging

from .checks import check_cache, check_device, check_model, check_parameter, check_processes
from .device_steps import StepsOnDevice
from .layers import find_layers, find_rest, named_layers, switch_checkpointing
from .lending import LentUnit, StreamedModel, enter, leave
from .stream import Stream, without_checkpointing
from .units import Unit

logger = logging.get_logger(__name__)


def stream_layers(
    model: nn.Module,
    device: torch.device | str | int | None = None,
    *,
    layers: Sequence[nn.Module | str] | None = None,
    keep: int | str = 0,
    optimizer_device: str = "host",
) -> LayerStream:
    """Keep a model's weights in host memory, and have a layer or two at a time on the device.

    The model stays what it is: the same class, parameters, names and outputs, and exact gradients, under any trainer. Its
    layers come to the device for the length of their forward, and again in the backward pass; gradients are sent to host
    memory as they are made, where the caller's optimizer steps. Activation checkpointing is switched on, where a model has it.

    Args:
        model: a PreTrainedModel, a diffusers transformer, either with PEFT adapters, or a DiffusionBlocks model.
        device: where layers run. None is the accelerator; "cpu" makes real copies, which is for tests.
        layers: what comes and goes, as modules or their paths. None finds them: what the model checkpoints itself, else the
            elements of its lists of modules. Embedding, head and other large parts come and go beside.
        keep: layers that stay on the device, as a number of them, or as memory that they may take ("20GiB"). Their gradients,
            and what the optimizer has of them, are in host memory all the same.
        optimizer_device: where optimizers step, "host" or "device": a layer at a time there, with its optimizer state copied
            beside, for hosts with few cores. It takes optimizers of PyTorch that move each parameter by itself, and Transformers'
            Adafactor.

    Raises:
        TypeError: model is no module.
        ValueError: it cannot be streamed, or an argument is out of range; names it.
    """
    check_model(model)
    if optimizer_device not in ("host", "device"):
        raise ValueError(f'optimizer_device={optimizer_device!r} must be "host" or "device"')
    there = check_device(device)
    if device is None and there.type == "cpu":
        logger.warning(
            'no accelerator is there: layers are copied within host memory, which saves none of it (device="cpu" is for tests)'
        )
    return LayerStream(model, there, layers, keep, optimizer_device)


class LayerStream(Stream):
    """What [`stream_layers`] has made of a model; also a context manager, which ends with [`LayerStream.stop`].

    Args:
        as [`stream_layers`].
    """

    def __init__(self, model: nn.Module, device: torch.device, layers, keep: int | str, optimizer_device: str):
        super().__init__(device)
        self._model = weakref.ref(model)
        self._entered: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # (a model may outlive its wrapper, as peft's)
        found = find_layers(model) if layers is None else named_layers(model, layers)
        if not found:
            raise ValueError(f"model={type(model).__name__} has no layers that can be found: name them by layers=")
        self._named = None if layers is None else list(found.values())
        staying = _staying(found, keep)
        self._checkpointed_before = _set_checkpointing(model, True)
        here = not _is_checkpointed(model)
        for path, layer in found.items():
            self._add(path, layer, checkpointed_here=here, stays=path in staying)
        self._watched: set[tuple] = set()
        self._look(model)
        self._steps = StepsOnDevice(device, self._parameters_of_units) if optimizer_device == "device" else None
        self._hooks = [
            register_optimizer_step_pre_hook(_while_alive(self._before_step)),
            register_optimizer_step_post_hook(_while_alive(self._after_step)),
        ]
        for hook in self._hooks:  # all optimizers call them: not longer than there is a stream
            weakref.finalize(self, hook.remove)

    @property
    def units(self) -> list[str]:
        """Names of what comes and goes: layers first, then what is around them."""
        return [unit.name for unit in self._units.values()]

    @property
    def _units(self) -> dict[nn.Module, Unit]:
        model = self._model()
        modules = () if model is None else model.modules()
        return {module: module._unit for module in modules if isinstance(module, LentUnit)}

    @property
    def host_parameters(self) -> list[nn.Parameter]:
        """What lives in host memory: all parameters of units."""
        return list(dict.fromkeys(parameter for module in self._units for parameter in module.parameters()))

    def stop(self) -> None:
        """Give the stock model back, all of it in host memory."""
        self.let_go()
        for hook in self._hooks:
            hook.remove()
        models = []
        for module in {part for each in self._entered for part in each.modules()}:
            if isinstance(module, LentUnit):
                leave(module, LentUnit)
                del module._unit, module._stream
            elif isinstance(module, StreamedModel):
                leave(module, StreamedModel)
                del module._stream
                module.__dict__.pop("_seen", None)
                models.append(module)
        for model in models:
            model.to("cpu")
            if not self._checkpointed_before:
                _set_checkpointing(model, False)

    def __enter__(self) -> LayerStream:
        return self

    def __exit__(self, *error) -> None:
        self.stop()

    # ---- optimizers

    def _parameters_of_units(self) -> Iterator[list[nn.Parameter]]:
        for module in self._units:
            yield list(module.parameters())

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if self._steps is not None:
            self._steps.before_step(optimizer, args, kwargs)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_) -> None:
        self._updates.update(id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad)
        if self._steps is not None:
            self._steps.after_step()

    # ---- what a model's pass begins with

    @contextmanager
    def pass_of(self, model: nn.Module, given: dict[str, Any]) -> Iterator[None]:
        """While a forward pass of a model, or of one inside of it, runs with what it is given."""
        with self.running() as is_outermost:
            if model.training and torch.is_grad_enabled() and _is_checkpointed(model):
                check_cache(model, given)
            if not is_outermost:
                yield
                return
            if model.training and torch.is_grad_enabled():
                check_processes(self.device)
            if _seen(model) != model.__dict__.get("_seen"):
                self._look(model)
            self._place(model)
            # Where no gradient is asked for nothing runs again, and Transformers' checkpointing would drop caches in training mode.
            with self._watching(model), without_checkpointing(() if torch.is_grad_enabled() else model.modules()):
                yield

    def _look(self, model: nn.Module) -> None:
        """Find what comes and goes beside layers, and the models inside; again where modules were replaced or added (another
        vocabulary, adapters)."""
        found = find_layers(model) if self._named is None else {}
        for path, layer in found.items():
            self._add(path, layer)
        layers = [module for module in model.modules() if isinstance(module, LentUnit)]
        for path, module in find_rest(model, layers).items():
            self._add(path, module)
        for module in model.modules():
            is_model = module is model or isinstance(inspect.getattr_static(type(module), "device", None), property)
            if is_model and not isinstance(module, (StreamedModel, LentUnit)):
                enter(module, StreamedModel)
                self._entered.add(module)
                module.__dict__["_stream"] = self
                if "forward" in module.__dict__:
                    module.forward = module.__dict__["forward"]  # (set before: from now on as ours, too)
        self._watched.clear()
        model.__dict__["_seen"] = _seen(model)
        self._place(model)

    def _add(self, path: str, module: nn.Module, **how: bool) -> None:
        if isinstance(module, LentUnit):  # it is one already, or is found by another path, too
            return
        enter(module, LentUnit)
        self._entered.add(module)
        module.__dict__["_unit"], module.__dict__["_stream"] = Unit(path, module, **how), self
        for name, parameter in module.named_parameters():
            check_parameter(f"{path}.{name}", parameter)
            parameter.data = _in_host_memory(parameter.data, self.device)
            if parameter.grad is not None:
                parameter.grad = parameter.grad.cpu()

    def _place(self, model: nn.Module) -> None:
        """What does not come and go is on the device; buffers are, too."""
        streamed = {id(p) for module in model.modules() if isinstance(module, LentUnit) for p in module.parameters()}
        for module in model.modules():
            for parameter in module._parameters.values():
                if parameter is not None and id(parameter) not in streamed and parameter.device != self.device:
                    parameter.data = parameter.data.to(self.device)
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device != self.device:
                    module._buffers[name] = buffer.to(self.device)

    @contextmanager
    def _watching(self, model: nn.Module) -> Iterator[None]:
        """At the first pass of a kind: a part of a unit that is called by itself, not by the unit, becomes a unit, too."""
        kind = id(model), model.training, torch.is_grad_enabled()
        if kind in self._watched:
            yield
            return
        units = [module for module in model.modules() if isinstance(module, LentUnit)]
        owners = {part: (unit, path) for unit in units for path, part in unit.named_modules() if path}

        def watch(module: nn.Module, args) -> None:
            owner, path = owners.get(module, (None, ""))
            if owner is None or owner._unit.depth or isinstance(module, LentUnit):
                return
            if not any(isinstance(p, nn.Parameter) for p in module.parameters()):
                return
            self._add(f"{owner._unit.name}.{path}", module)
            lent = self.lent(module._unit, module)  # (this call has looked up its forward already)
            lent.__enter__()

            def give_back(module, args, output) -> None:
                handle.remove()
                lent.__exit__(None, None, None)

            handle = module.register_forward_hook(give_back, always_call=True)

        handle = register_module_forward_pre_hook(watch)
        try:
            yield
        finally:
            handle.remove()
        self._watched.add(kind)


def stream_of(model: nn.Module) -> LayerStream | None:
    """The stream of a model, or of one inside of it; None: it has none."""
    return next((module._stream for module in model.modules() if isinstance(module, StreamedModel)), None)


def _while_alive(method):
    """A hook that calls a method, and does not keep its object."""
    ref = weakref.WeakMethod(method)

    def hook(*given) -> None:
        if (alive := ref()) is not None:
            alive(*given)

    return hook


def _seen(model: nn.Module) -> int:
    """Changes where modules outside of units do."""

    def walk(module: nn.Module) -> Iterator[int]:
        yield id(module)
        if not isinstance(module, LentUnit):
            for child in module._modules.values():
                if child is not None:
                    yield from walk(child)

    return hash(tuple(walk(model)))


def _in_host_memory(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    host = tensor.cpu()
    return host.pin_memory() if device.type == "cuda" and not host.is_pinned() else host


def _set_checkpointing(model: nn.Module, on: bool) -> bool:
    """Switch a model's own activation checkpointing, if it has any; gives whether it was on before."""
    before = _is_checkpointed(model)
    if on != before:
        switch_checkpointing(model, on)
    return before


def _is_checkpointed(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(GiB|GB|MiB|MB)")
_UNITS = {"GiB": 2**30, "GB": 10**9, "MiB": 2**20, "MB": 10**6}


def _staying(layers: dict[str, nn.Module], keep: int | str) -> set[str]:
    """Paths of the layers that `keep` names: the first ones.

    Raises:
        ValueError: it is neither a number of layers nor a size.
    """
    if isinstance(keep, int) and not isinstance(keep, bool) and 0 <= keep <= len(layers):
        return set(list(layers)[:keep])
    size = _SIZE.fullmatch(keep.strip()) if isinstance(keep, str) else None
    if size is None:
        raise ValueError(f'keep={keep!r} must be a number of layers from 0 to {len(layers)}, or a size, such as "20GiB"')
    left, staying = float(size[1]) * _UNITS[size[2]], set()
    for path, layer in layers.items():
        left -= sum(p.nbytes for p in layer.parameters())
        if left < 0:
            break
        staying.add(path)
    return staying
