"""The way of a gradient from a copy on the device to the parameter in host memory.

A copy is tied to its parameter by two nodes of the graph: one on the device's side, which starts to copy the gradient home,
and one on the host's, which waits until it has come. PyTorch runs the second on the thread that called `backward()`, so the
device's thread never waits. Then `AccumulateGrad` sums in host memory, as it does for any parameter.
"""

from __future__ import annotations

import torch
from torch import nn

from .copies import Arrival, Copies


def tied(parameter: nn.Parameter, copy: torch.Tensor, copies: Copies) -> torch.Tensor:
    """The copy, whose gradient goes to the parameter, if one is asked for."""
    if not parameter.requires_grad:
        return copy
    if not torch.is_grad_enabled():  # PyTorch multiplies in another way by what asks for gradients, also where none are made
        return copy.detach().requires_grad_()
    trip = _Trip(copies)
    return _Leave.apply(_Arrive.apply(parameter, copy.dtype, trip), copy, trip)


class _Trip:
    """One gradient, under way."""

    def __init__(self, copies: Copies):
        self._copies = copies
        self._arrival: Arrival | None = None

    def leave(self, gradient: torch.Tensor) -> torch.Tensor:
        if gradient.layout != torch.strided:
            return gradient.to("cpu")  # (of an embedding with sparse gradients)
        host, self._arrival = self._copies.send_home(gradient)
        if torch.is_anomaly_enabled() and torch.is_anomaly_check_nan_enabled():  # (autograd looks at it at once)
            self.wait()
        return host

    def wait(self) -> None:
        if self._arrival is not None:
            self._arrival.synchronize()


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, placeholder: torch.Tensor, copy: torch.Tensor, trip: _Trip) -> torch.Tensor:
        ctx.trip = trip
        return copy.detach()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return ctx.trip.leave(gradient), None, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parameter: nn.Parameter, dtype: torch.dtype, trip: _Trip) -> torch.Tensor:
        ctx.trip, ctx.dtype = trip, parameter.dtype
        # Shape and dtype of the gradient that is to come, or PyTorch would cast it before it is there; of no size itself.
        return torch.empty((), dtype=dtype, device=parameter.device).expand(parameter.shape)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        ctx.trip.wait()
        return gradient.to(ctx.dtype), None, None
