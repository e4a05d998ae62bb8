"""Optimizers that move some parameters now and others later: whether one can, and one that does so in the backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary
from transformers import TrainerCallback, TrainingArguments

#: Parameters that move in backward passes, and their hooks.
_hooks: WeakIdKeyDictionary = WeakIdKeyDictionary()


class OptimizerInBackward(TrainerCallback):
    """Has an optimizer move each parameter as soon as its gradient is there, and lets the gradient go: there are never all
    gradients, and steps go on beside the rest of the backward pass. Weights end as they would without, bit by bit.

    A callback of any stock [`~transformers.Trainer`], with `max_grad_norm=0` and one micro-batch a step. In a loop of one's
    own, `OptimizerInBackward.attach(optimizer)`; its `step()` then finds nothing to do. Who looks at gradients after the
    backward pass finds none.
    """

    @staticmethod
    def check(args: TrainingArguments) -> None:
        """Raise ValueError if a run needs all gradients at once; names the argument."""
        for name, needed in (("max_grad_norm", 0), ("gradient_accumulation_steps", 1), ("fp16", False), ("world_size", 1)):
            if (value := getattr(args, name)) not in (needed, None):
                raise ValueError(f"{name}={value!r} must be {needed!r} with an optimizer in the backward pass")

    @staticmethod
    def attach(optimizer: Optimizer) -> None:
        """From now on, each backward pass is a step of the optimizer, and of no other that was attached before.

        Raises:
            ValueError: it does not move each parameter by itself, or gradients are averaged over processes.
        """
        optimizer = getattr(optimizer, "optimizer", optimizer)  # (of Accelerate's)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ValueError("an optimizer in the backward pass needs one process: several average gradients first")
        check_counts(optimizer)
        for index, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                detach(parameter)
                if parameter.requires_grad:
                    hook = partial(_step, weakref.ref(optimizer), index)
                    _hooks[parameter] = parameter.register_post_accumulate_grad_hook(hook)

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        self.check(args)
        self.attach(optimizer)

    def on_train_end(self, args, state, control, optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                detach(parameter)


def detach(parameter: nn.Parameter) -> None:
    """Its gradients stay again, if they did not."""
    hook: RemovableHandle | None = _hooks.pop(parameter, None)
    if hook is not None:
        hook.remove()


def _step(ref: weakref.ref[Optimizer], group_index: int, parameter: nn.Parameter) -> None:
    """Of one parameter, as its group says now. (Not through the optimizer's own groups: hooks run in several threads.)"""
    optimizer = ref()
    if optimizer is None:  # of a run that was given up
        return
    alone = object.__new__(type(optimizer))
    alone.__dict__.update(vars(optimizer), param_groups=[{**optimizer.param_groups[group_index], "params": [parameter]}])
    alone.__dict__.pop("step", None)  # a scheduler's, which counts
    alone.step()
    parameter.grad = None


def check_counts(optimizer: Optimizer) -> None:
    """Raise ValueError if an optimizer counts its steps for all parameters alike, so that a step of some is one of the others.
    A step without gradients tells, which leaves alone what counts by parameter. (Those that wait for a gradient go by name.)"""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # (of Accelerate's)
    counted = {"k", "d", "train_mode", "lr_max"} & set().union(*(group.keys() for group in optimizer.param_groups))
    if not counted:
        before = _numbers_of(optimizer)
        with without_gradients([parameter for group in optimizer.param_groups for parameter in group["params"]]):
            optimizer.step()
        counted = {name for _, name, _ in _numbers_of(optimizer) - before}
    if counted:
        raise ValueError(
            f"optimizer={type(optimizer).__name__} must count steps by parameter, as AdamW does, and keeps {min(counted)!r} for "
            "all of a group, of which some move in another step than others"
        )


def _numbers_of(optimizer: Optimizer) -> set[tuple[int, str, float]]:
    """What an optimizer keeps beside the state of parameters: group (the last is itself), name, value."""
    return {
        (index, name, float(value))
        for index, entries in enumerate([*optimizer.param_groups, vars(optimizer)])
        for name, value in entries.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) or torch.is_tensor(value) and value.numel() == 1
    }


@contextmanager
def without_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Set their gradients aside: an optimizer leaves them as they are, then."""
    aside = [(parameter, parameter.grad) for parameter in parameters]
    for parameter, _ in aside:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in aside:
            parameter.grad = gradient
