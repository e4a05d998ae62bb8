"""What a value is written down as, and how two records are compared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch


def digest(tensor: torch.Tensor) -> str:
    """Of dtype, shape and bytes: 16 of sha256's 64 digits keep a record small."""
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def written(value):
    """A value as JSON: tensors by digest, floats by `repr` (exact), names as they are."""
    if isinstance(value, torch.Tensor):
        return digest(value)
    if isinstance(value, float):
        return repr(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, dict):
        return {str(key): written(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [written(each) for each in value]
    raise TypeError(f"{type(value).__name__} cannot be pinned")


class Pins(dict):
    """name -> what is written down of a value; a name is used once."""

    def __setitem__(self, name: str, value) -> None:
        if name in self:
            raise KeyError(f"{name} is pinned already")
        super().__setitem__(name, written(value))


def named_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Each parameter once; a tied one by the first of its names, so that the order of modules does not matter."""
    found = {}
    for name, parameter in sorted(model.named_parameters(remove_duplicate=False)):
        found.setdefault(id(parameter), (name, parameter))
    return dict(found.values())


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    """Of every parameter; None is another thing than zero: weight decay does not touch it."""
    return {name: parameter.grad for name, parameter in named_parameters(model).items()}


def differences(one: dict, other: dict) -> Iterator[str]:
    """A line for each pin, or part of one, that is not the same in both."""
    first, second = _flat(one), _flat(other)
    for name in sorted(first.keys() | second.keys()):
        if name not in second:
            yield f"missing  {name}"
        elif name not in first:
            yield f"extra    {name}"
        elif first[name] != second[name]:
            yield f"differs  {name}: {_short(first[name])} -> {_short(second[name])}"


def _flat(record: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in record.items():
        if isinstance(value, dict):
            # An empty one is a value, too.
            flat |= _flat(value, f"{prefix}{key} :: ") or {f"{prefix}{key}": {}}
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
