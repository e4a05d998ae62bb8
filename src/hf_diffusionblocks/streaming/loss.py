"""The cross-entropy of a causal model whose logits would be large: over parts of the vocabulary, never all at once.

A head that is asked for logits gives [`DeferredLogits`] instead. The stock loss of a causal model consumes them in parts;
whoever else touches them gets the logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

#: Bytes of float32 logits that are there at a time. Logits that are not more than twice as many are never deferred.
PART_BYTES = 128 * 2**20


class DeferredLogits:
    """Logits `[..., V]` that are computed when they are looked at.

    Args:
        hidden: `[..., D]`, what the head is given.
        head: gives all of the logits.
        loss: gives the summed cross-entropy of rows `[T, D]` and targets `[T]`, without all of the logits.
        num_logits: V.
        dtype: of the logits.
    """

    def __init__(self, hidden: torch.Tensor, head: Callable, loss: Callable, num_logits: int, dtype: torch.dtype):
        self.hidden, self.dtype = hidden, dtype
        self._head, self._loss, self._num_logits = head, loss, num_logits
        self._logits: torch.Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self._num_logits))

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def float(self) -> DeferredLogits:
        return DeferredLogits(self.hidden, self._head, self._loss, self._num_logits, torch.float32)

    def computed(self) -> torch.Tensor:
        """The logits."""
        if self._logits is None:
            self._logits = self._head(self.hidden).to(self.dtype)
        return self._logits

    def summed_loss(self, targets: torch.Tensor, ignore_index: int) -> torch.Tensor:
        """Cross-entropy in nats, summed over the rows whose target counts."""
        return self._loss(self.hidden.flatten(0, -2), targets, ignore_index)

    def __getattr__(self, name: str):
        return getattr(self.computed(), name)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        args, kwargs = _computed(args), _computed(kwargs or {})
        return function(*args, **kwargs)


def _computed(given):
    if isinstance(given, DeferredLogits):
        return given.computed()
    if isinstance(given, (list, tuple)):
        return type(given)(_computed(each) for each in given)
    return {name: _computed(each) for name, each in given.items()} if isinstance(given, dict) else given


def _by_operator(name: str):
    return lambda self, *others: getattr(self.computed(), name)(*_computed(others))


for _name in (
    "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "matmul", "neg", "pow", "getitem", "setitem", "len",
    "iter", "eq", "ne", "lt", "le", "gt", "ge",
):  # fmt: skip
    setattr(DeferredLogits, f"__{_name}__", _by_operator(f"__{_name}__"))
DeferredLogits.__hash__ = object.__hash__


def causal_lm_loss(
    logits, labels, vocab_size: int, num_items_in_batch=None, ignore_index: int = -100, shift_labels=None, **kwargs
) -> torch.Tensor:
    """Transformers' `ForCausalLMLoss`; of deferred logits, in parts."""
    if not isinstance(logits, DeferredLogits) or logits.shape[-1] != vocab_size:
        logits = _computed(logits)
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(logits.device)
    num_items = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    if torch.is_tensor(num_items):
        num_items = num_items.to(logits.device)
    return logits.summed_loss(targets, ignore_index) / num_items


def is_large(num_rows: int, num_logits: int) -> bool:
    return num_rows * num_logits * 4 > 2 * PART_BYTES


class CrossEntropyInParts(torch.autograd.Function):
    """Summed cross-entropy of `hidden @ weight.T + bias`: `[T, D]`, `[V, D]`, `[V]` or None, targets `[T]`.

    Logits are computed twice, for the loss and for gradients, in parts of the vocabulary, each for all rows: so the gradient
    of a row of the weight is one product over all of them, as without parts.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, ignore_index):
        counts = targets != ignore_index
        weight[:, 0].gather(0, targets.masked_fill(~counts, 0))  # a target that is in no part is an error, as without parts
        normalizer = torch.full(targets.shape, -torch.inf, device=hidden.device)
        of_target = torch.zeros(targets.shape, device=hidden.device)
        for start, logits in _parts(hidden, weight, bias):
            normalizer = torch.logaddexp(normalizer, logits.logsumexp(-1))
            column, is_here = _columns(targets, start, logits.shape[1])
            of_target += logits.gather(1, column[:, None])[:, 0] * is_here
        ctx.save_for_backward(hidden, weight, bias, targets, counts, normalizer)
        return ((normalizer - of_target) * counts).sum()

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("a loss in parts of the vocabulary has no second derivative: take one of outputs.logits")
        hidden, weight, bias, targets, counts, normalizer = ctx.saved_tensors
        of_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        of_bias = torch.empty_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        of_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        scale = torch.where(counts, upstream, 0)[:, None]  # (upstream is infinite where no target counts)
        with torch.autocast(hidden.device.type, enabled=False):  # (on a GPU's own thread it would be float16's)
            for start, logits in _parts(hidden, weight, bias):
                width = logits.shape[1]
                of_logits = logits.sub_(normalizer[:, None]).exp_().mul_(scale)
                column, is_here = _columns(targets, start, width)
                of_logits.scatter_add_(1, column[:, None], -scale * is_here[:, None])
                of_logits = of_logits.to(weight.dtype)
                of_hidden += of_logits @ weight[start : start + width]
                if of_weight is not None:
                    torch.mm(of_logits.T, hidden, out=of_weight[start : start + width])
                if of_bias is not None:
                    of_bias[start : start + width] = of_logits.sum(0)
        return of_hidden.to(hidden.dtype), of_weight, of_bias, None, None


def _parts(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None):
    """(Index of the first, logits `[T, n]` in float32) of parts of the vocabulary."""
    size = max(1, PART_BYTES // (4 * max(1, len(hidden))))
    for start in range(0, len(weight), size):
        own = None if bias is None else bias[start : start + size]
        yield start, nn.functional.linear(hidden, weight[start : start + size], own).float()


def _columns(targets: torch.Tensor, start: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where in a part each target is, and whether it is there."""
    column = targets - start
    return column.clamp(0, width - 1), (column >= 0) & (column < width)
