"""Steps of models whose tensors have sizes and no memory."""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException, DynamicOutputShapeException, FakeTensor, FakeTensorMode, in_kernel_invocation_manager,
)  # fmt: skip
from torch.utils._python_dispatch import TorchDispatchMode

#: What a function was called with -> shape, strides, dtype and device of what it gave.
_OUTLINES: dict[Hashable, tuple] = {}
_BY_INDEX = {torch.ops.aten.index, torch.ops.aten.index_put_, torch.ops.aten.index_put, torch.ops.aten._index_put_impl_}


class WithoutMemory(TorchDispatchMode):
    """Runs a step on fake parameters, and real tokens and masks: what depends on values is decided by real ones.

    A fake mode alone would not do: masks select rows by value, and Transformers makes other masks for fake tokens. It would also
    take three times as long: it looks at all that a tensor may be, at each of its calls.
    """

    def __init__(self, fake_mode: FakeTensorMode):
        super().__init__()
        self.fake_mode = fake_mode

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:  # the most frequent call of all
            return args[0].fake_device
        try:
            return self._followed(func, args, kwargs or {})
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ValueError(
                f"the model cannot be estimated: its step depends on values ({error}). Measure one, with `StepMemory`"
            ) from error

    def _followed(self, func: OpOverload, args: tuple, kwargs: dict[str, Any]) -> Any:
        if func._overloadpacket in (torch.ops.aten.randn, torch.ops.aten.randn_like):
            with self.fake_mode:  # the noise of all targets: large, and never looked at
                return func(*args, **kwargs)
        if func._overloadpacket is torch.ops.aten._grouped_mm and args[0].dtype != torch.bfloat16:
            first, second, *rest = args  # (of experts; what knows its shape knows bfloat16 alone)
            return func(first.bfloat16(), second.bfloat16(), *rest, **kwargs).to(first.dtype)
        if func._overloadpacket in _BY_INDEX:
            tensor, indices, *rest = args
            numbers = [each for index in indices for each in _as_numbers(index)]
            return func(tensor, numbers, *rest, **kwargs)
        if not _gives_one_tensor(func):
            return func(*args, **kwargs)
        if (func.is_view or func is torch.ops.aten._unsafe_view.default) and _is_plain(args[0]):
            with in_kernel_invocation_manager(self.fake_mode):  # (as a tensor of the meta device)
                view = func(*args, **kwargs)
            return self._fake(view, args[0].fake_device)
        key = _call(func, args, kwargs)
        if key is None:
            return func(*args, **kwargs)
        if key in _OUTLINES:
            shape, strides, dtype, device = _OUTLINES[key]
            return self._fake(torch.empty_strided(shape, strides, dtype=dtype, device="meta"), device)
        found = func(*args, **kwargs)
        if _is_plain(found) and not found.storage_offset():
            _OUTLINES[key] = found.shape, found.stride(), found.dtype, found.fake_device
        return found

    def _fake(self, tensor: torch.Tensor, device: torch.device) -> FakeTensor:
        return FakeTensor(self.fake_mode, tensor, device)


def _as_numbers(index: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """What a mask selects, as index tensors: fake tensors cannot be selected by a mask."""
    return (index,) if index is None or index.dtype != torch.bool else index.nonzero().unbind(1)


def _call(func: OpOverload, args: tuple, kwargs: dict[str, Any]) -> Hashable:
    """All that the outline of a function's output depends on; None: that is more than this knows."""
    key = [func, torch.get_default_dtype()]
    for arg in args:
        if _is_plain(arg):
            key.append((arg.shape, arg.stride(), arg.dtype, arg.fake_device))
        elif isinstance(arg, (list, tuple)) and all(isinstance(each, int) for each in arg):
            key.append(tuple(arg))
        elif arg is None or isinstance(arg, (bool, int, float, str, torch.dtype, torch.memory_format)):
            key.append((type(arg), arg))  # (1, 1.0 and True are equal)
        else:
            return None
    for name, value in kwargs.items():
        if isinstance(value, (torch.Tensor, list)):
            return None
        key.append((name, type(value), value))
    return tuple(key)


def _is_plain(tensor: Any) -> bool:
    return type(tensor) is FakeTensor and tensor.layout == torch.strided


@lru_cache
def _gives_one_tensor(func: OpOverload) -> bool:
    """New, or a view of its first argument; by no values, and of PyTorch itself (others' may share memory, and not say so)."""
    schema, by_value = func._schema, {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    changes = schema.is_mutable or torch.Tag.inplace_view in func.tags
    one = len(schema.returns) == 1 and str(schema.returns[0].type) == "Tensor"
    return one and not changes and not by_value & {*func.tags} and func.namespace == "aten"
