"""Objectives: what makes a loss of an estimate. Cross-entropy that is cheap with many rows, many classes, and classes that
z gives away."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import get_gradient_edge

IGNORED = -100  #: target of a row that has no loss, everywhere in Transformers

#: A chunk has at most this many bytes of float32 logits, and never more than a quarter of the rows. A CPU's stay in its
#: cache; an accelerator's are many enough that adding up gradients of a head after each, as large as the head, costs little.
CPU_CHUNK, ACCELERATOR_CHUNK = 2**25, 2**28
MIN_CHUNKS = 4
#: So few bytes of logits are read out at once: nothing is won by their parts.
WHOLE = 2**18

#: `(hidden [R, ...], *other rows) -> logits [R, V]`
ReadOut = Callable[..., torch.Tensor]
#: In gradients, no probability is below e^-60: what exp makes of less are denormal numbers, which CPUs multiply a hundred
#: times slower than others, and all the more slowly the better z is seen.
LEAST_LOG_PROBABILITY = -60.0


def num_counted(targets: torch.Tensor, num_items: torch.Tensor | int | None, training: bool) -> torch.Tensor | int:
    """What a summed loss is divided by: `num_items` of the step, or the targets that are not `IGNORED`. In training at least 1,
    so that nothing to learn is no loss; nothing to measure is no number, as in the plain model."""
    if num_items is None:
        num_items = (targets != IGNORED).sum()
    if not training:
        return num_items
    return num_items.clamp(min=1) if isinstance(num_items, torch.Tensor) else max(num_items, 1)


def _loss_and_gradient(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed cross-entropy, and its gradient `[R, V]`."""
    total, ignored = torch.logsumexp(logits, -1, keepdim=True), targets == IGNORED
    targets = targets.masked_fill(ignored, 0)
    nats = (total - logits.gather(-1, targets[:, None]))[:, 0].masked_fill(ignored, 0)
    gradient = (logits - total).clamp_(min=LEAST_LOG_PROBABILITY).exp_()
    gradient[torch.arange(len(targets), device=targets.device), targets] -= 1
    return (weights * nats).sum(), gradient.mul_(weights.masked_fill(ignored, 0)[:, None])


_read_out_as_on: ContextVar[str | None] = ContextVar("the kind of device as on which rows are read out", default=None)


@contextmanager
def reading_out_as_on(kind: str | None) -> Iterator[None]:
    """Read out as many rows at a time as a kind of device ("cpu", "cuda") would: `estimate_memory` follows it on the CPU. None:
    as on the device that they are on."""
    token = _read_out_as_on.set(kind)
    try:
        yield
    finally:
        _read_out_as_on.reset(token)


def _as_on_cpu(device: torch.device) -> bool:
    return (_read_out_as_on.get() or device.type) == "cpu"


def rows_with_loss(targets: torch.Tensor, at_most: int) -> torch.Tensor:
    """Numbers of the rows `[R]` whose target is not `IGNORED`, to read out no others.

    How many there are, a CPU counts. An accelerator would have to be waited for: there it is `at_most`, and rows without a
    loss fill that up.
    """
    ignored = targets == IGNORED
    if _as_on_cpu(targets.device):
        return (~ignored).nonzero()[:, 0]
    return ignored.byte().argsort(stable=True)[:at_most]


def chunked_cross_entropy(
    read: ReadOut, rows: Sequence[torch.Tensor], targets: torch.Tensor, parameters: Sequence[nn.Parameter], num_logits: int,
    weights: torch.Tensor | None = None, at_most: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """`-ln softmax(logits)[target]`, summed over the rows that have a target, a chunk of rows at a time.

    With gradients enabled, each chunk's are taken at once, while its logits are there: nothing of a chunk is kept or
    computed again. Those of parameters are added up in float32 at least: in bfloat16 a sum of many chunks loses what is small
    beside it. (Second derivatives are not available. PyTorch's own `linear_cross_entropy` does the like for a bare head and
    no z: for 1024 rows of width 256, float32, on one CPU thread, in 0.94x of our time with 512 classes, in 3.1x with 32,768.)

    Args:
        read: makes logits of a chunk of each of `rows`.
        rows: tensors with the same first dimension R; gradients flow to the first.
        targets: `[R]`; `IGNORED` has no loss.
        parameters: all that `read` may train.
        num_logits: logits a row, V.
        weights: of the rows, `[R]` float32; None: all weigh 1.
        at_most: how many rows can have a target, where that is known to be fewer than all.
    """
    scored = rows_with_loss(targets, len(targets) if at_most is None else at_most)
    weights = torch.ones(len(scored), device=targets.device) if weights is None else weights[scored]
    rows, targets = [each[scored] for each in rows], targets[scored]
    size = rows_per_chunk(len(targets), num_logits, targets.device)
    if torch.is_grad_enabled():
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        return _ChunkedCrossEntropy.apply(read, targets, weights, size, len(rows), *rows, *trained)
    total = torch.zeros((), device=targets.device)
    for target, weight, *chunk in zip(*[each.split(size) for each in (targets, weights, *rows)]):
        total += (weight * F.cross_entropy(read(*chunk).float(), target, reduction="none")).sum()
    return total


def rows_per_chunk(num_rows: int, num_logits: int, device: torch.device) -> int:
    """How many rows are read out at a time on a device."""
    if 4 * num_rows * num_logits <= WHOLE:
        return max(1, num_rows)
    most = CPU_CHUNK if _as_on_cpu(device) else ACCELERATOR_CHUNK
    return max(1, min(most // (4 * num_logits), -(-num_rows // MIN_CHUNKS)))


def chunks(num_rows: int, num_logits: int, device: torch.device) -> list[slice]:
    """The rows, in parts of which each is read out at a time."""
    size = rows_per_chunk(num_rows, num_logits, device)
    return [slice(start, start + size) for start in range(0, num_rows, size)]


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, read: ReadOut, targets, weights, size: int, num_rows_given: int, *tensors: torch.Tensor):
        rows, parameters = tensors[:num_rows_given], tensors[num_rows_given:]
        total, of_hidden = torch.zeros((), device=targets.device), []
        of_parameters = [torch.zeros_like(each, dtype=torch.promote_types(each.dtype, torch.float32)) for each in parameters]
        used = [False] * len(parameters)
        for target, weight, hidden, *others in zip(*[each.split(size) for each in (targets, weights, *rows)]):
            hidden = hidden.detach().requires_grad_()
            if isinstance(hidden, FakeTensor) and len(of_hidden) > 1 and hidden.shape == of_hidden[-1].shape:
                of_hidden.append(torch.empty_like(hidden))  # `estimate_memory`: it holds what the chunk before held
                continue
            with torch.enable_grad():
                logits = read(hidden, *others).float()
            loss, upstream = _loss_and_gradient(logits, target, weight)
            end = get_gradient_edge(logits)
            del logits  # gone before gradients of parameters are made
            own, *gradients = torch.autograd.grad([end], [hidden, *parameters], [upstream], allow_unused=True)
            total += loss
            of_hidden.append(own)
            del end, upstream
            for number, accumulated in enumerate(of_parameters):
                if (gradient := gradients.pop(0)) is not None:
                    accumulated += gradient
                    used[number] = True
                del gradient  # a head's is as large as the head: gone before the next chunk's is made
        ctx.save_for_backward(torch.cat(of_hidden))
        # These become the parameters' gradients: no activations.
        ctx.of_parameters = [each if is_used else None for each, is_used in zip(of_parameters, used)]
        ctx.dtypes = [parameter.dtype for parameter in parameters]
        ctx.num_others = len(rows) - 1
        return total

    @staticmethod
    def backward(ctx, upstream: torch.Tensor):
        # Scaled in place and let go, to hold no second copy of a head's gradient: what nothing else refers to, autograd
        # takes as `.grad` itself. It refuses a second pass by its own.
        of_parameters, ctx.of_parameters = ctx.of_parameters, None
        (of_hidden,) = ctx.saved_tensors
        gradients = []
        for dtype in ctx.dtypes:
            own = of_parameters.pop(0)
            gradients.append(None if own is None else own.mul_(upstream).to(dtype))
            del own
        return *[None] * 5, of_hidden.mul_(upstream), *[None] * ctx.num_others, *gradients


class LikelihoodTerms(NamedTuple):
    """What a likelihood bound is summed up from, of a batch of N sequences; float64, on the CPU."""

    tokens: torch.Tensor  #: `[N]`, tokens scored
    prior: float  #: nats a token that no data change
    reconstruction: torch.Tensor  #: `[N]` nats of the last step
    diffusion: torch.Tensor  #: `[N]` nats of all others
