"""Optimizer steps on the device, a unit at a time: for hosts with few cores.

What a step needs of a unit, its weights, gradients and optimizer state, is copied to the device, stepped there, and copied
back. So it holds one unit's, and gives what the step on the host gives, to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from inspect import unwrap

import torch
from torch import nn, optim

#: Those that move each parameter by its own history: a step of some parameters is the same as a step of all.
BY_PARAMETER = (
    optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adamax, optim.Adagrad, optim.Adadelta, optim.RMSprop,
    optim.Rprop, optim.ASGD, optim.Adafactor,
)  # fmt: skip


class StepsOnDevice:
    """Takes the place of an optimizer's step for the parameters of units.

    Args:
        device: where steps are made.
        units: gives the parameters of each unit.
    """

    def __init__(self, device: torch.device, units):
        self._device, self._units = device, units
        self._gradients: list[tuple[nn.Parameter, torch.Tensor]] = []

    def before_step(self, optimizer: optim.Optimizer, args: tuple, kwargs: dict) -> None:
        """A hook before each step: what is left for the step itself is what no unit owns.

        Raises:
            ValueError: the optimizer does not move each parameter by itself, or is given a closure or a hook before steps.
        """
        ours = [parameters for parameters in self._owned(optimizer) if parameters]
        if not ours:
            return
        from transformers import Adafactor  # which brings all of PEFT along

        if unwrap(type(optimizer).step) not in map(unwrap, (each.step for each in (*BY_PARAMETER, Adafactor))):
            allowed = ", ".join(dict.fromkeys(each.__name__ for each in BY_PARAMETER))
            raise ValueError(
                f"optimizer_device='device' with {type(optimizer).__name__} must be one of {allowed}, which step "
                "a layer at a time"
            )
        if optimizer._optimizer_step_pre_hooks:
            raise ValueError('optimizer_device="device" takes no step_pre_hook: units have stepped before it is called')
        if any(each is not None for each in (*args[1:], *kwargs.values())):
            raise ValueError('optimizer_device="device" takes no closure: call step() without one')
        for parameters in ours:
            self._step(optimizer, parameters)
        for parameter in (each for parameters in ours for each in parameters):
            self._gradients.append((parameter, parameter.grad))
            parameter.grad = None

    def after_step(self) -> None:
        """A hook after each step: gradients are there for who looks at them."""
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self._gradients.clear()

    def _owned(self, optimizer: optim.Optimizer) -> Iterator[list[nn.Parameter]]:
        """Of each unit, those that the optimizer moves in this step; tied ones once."""
        left = {p: None for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        for parameters in self._units():
            yield [p for p in dict.fromkeys(parameters) if p in left and left.pop(p, True) is None]

    def _step(self, optimizer: optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
        there = {p: nn.Parameter(p.detach().to(self._device, copy=True)) for p in parameters}
        try:
            for host, copy in there.items():
                copy.grad = host.grad.to(self._device)
                state = optimizer.state.get(host, {})
                optimizer.state[copy] = {name: self._moved(optimizer, name, value) for name, value in state.items()}
            with _groups_of(optimizer, there):
                # Without hooks of steps, and not the instance's, which schedules count.
                type(optimizer).step.__wrapped__(optimizer)
            with torch.no_grad():
                for host, copy in there.items():
                    host.copy_(copy)
                    state = optimizer.state[copy].items()
                    optimizer.state[host] = {name: value.cpu() if torch.is_tensor(value) else value for name, value in state}
        finally:
            for copy in there.values():
                optimizer.state.pop(copy, None)

    def _moved(self, optimizer: optim.Optimizer, name: str, value):
        counts_too = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
        return value.to(self._device) if torch.is_tensor(value) and (name != "step" or counts_too) else value


@contextmanager
def _groups_of(optimizer: optim.Optimizer, there: dict[nn.Parameter, nn.Parameter]) -> Iterator[None]:
    """While this runs, an optimizer's groups hold these parameters alone, by their copies."""
    whole: Iterable[list[nn.Parameter]] = [group["params"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["params"] = [there[p] for p in group["params"] if p in there]
    try:
        yield
    finally:
        for group, parameters in zip(optimizer.param_groups, whole):
            group["params"] = parameters
