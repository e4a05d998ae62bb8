"""One tiny model, streamed and not: gradients, outputs in evaluation, units there at once, what runs on the host's weights."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from tiny_batches import loss_of, tensors_of, tiny_batch
from tiny_diffusers import diffusers_batch, diffusers_model
from tiny_models import CannotBuild, seed, tiny_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import hf_diffusionblocks as db

#: Relative differences up to this are reported apart, as rounding.
ROUNDING = 1e-6
#: Of a tiny model, this share of the parameters' bytes has to move; small parts of it weigh more than in a real one.
LEAST_MOVED = 0.8
#: Operations that make a copy of a weight, as fetching it does.
COPIES = {"aten::_to_copy", "aten::clone", "aten::copy_"}

#: Architectures that are run once more with the dropout that their configs have by default, and as which task.
WITH_DROPOUT = {
    "gpt2": "causal-lm", "openai-gpt": "causal-lm", "opt": "causal-lm", "xlnet": "sequence-classification",
    "deberta-v2": "token-classification", "bert": "masked-lm", "longformer": "masked-lm", "swin": "image-classification",
    "bart": "seq2seq", "t5": "seq2seq",
}  # fmt: skip


@dataclass
class Result:
    """What was found of one model.

    Args:
        mapping, name: which it was.
        error: why it could not be built, or what it raised; empty if it ran.
        built: whether there was a stock model that ran.
        repeats: whether the stock model's gradients are the same twice.
        difference: largest relative difference of a gradient, or of an output in evaluation, from the stock model's, over all
            steps.
        peak_units: most units whose weights were there at once.
        on_host: what ran on weights of units in host memory, as "unit: operation".
        moved: share of the parameters' bytes that units hold.
        units: how many there are.
        seconds: all of this.
    """

    mapping: str
    name: str
    error: str = ""
    built: bool = False
    repeats: bool = True
    difference: float | None = None
    differs: str = ""
    peak_units: int | None = None
    on_host: list[str] = field(default_factory=list)
    moved: float | None = None
    units: int | None = None
    seconds: float = 0.0

    @property
    def exact(self) -> bool:
        return self.difference == 0.0

    @property
    def rounded(self) -> bool:
        return self.difference is not None and 0.0 < self.difference <= ROUNDING

    @property
    def two_units(self) -> bool:
        return self.peak_units is not None and self.peak_units <= 2

    @property
    def host_unused(self) -> bool:
        return self.difference is not None and not self.on_host

    @property
    def enough_moved(self) -> bool:
        return self.moved is not None and self.moved >= LEAST_MOVED

    @property
    def holds(self) -> bool:
        return (self.exact or self.rounded) and self.two_units and self.host_unused and self.enough_moved


def check(mapping: str, name: str, steps: int = 2) -> Result:
    """Build the model, and compare.

    Args:
        mapping: of `tiny_models.MAPPINGS`, "diffusers", or "own-dropout".
        name: a model type, or a class of diffusers.
        steps: forward and backward passes; in the first the stream learns the order, in those after it fetches ahead by it.
    """
    start, result = time.perf_counter(), Result(mapping, name)
    try:
        model, batch = _build(mapping, name)
        stock = copy.deepcopy(model)
        expected = [gradients(stock, batch, step) for step in range(steps)]
        result.repeats = not _difference(gradients(stock, batch, 0), expected[0])[0]
        result.built = True
        _streamed(result, model, batch, expected)
    except CannotBuild as error:
        result.error = str(error)
    except Exception as error:  # (one model does not end the run)
        lines = str(error).strip().splitlines() or [""]
        result.error = f"{type(error).__name__}: {lines[0][:300]}"
    result.seconds = round(time.perf_counter() - start, 2)
    return result


def _build(mapping: str, name: str) -> tuple[nn.Module, dict]:
    if mapping == "diffusers":
        return diffusers_model(name), diffusers_batch(name)
    dropout, mapping = mapping == "own-dropout", WITH_DROPOUT[name] if mapping == "own-dropout" else mapping
    model = tiny_model(mapping, name, dropout)
    return model, tiny_batch(mapping, name, model)


def gradients(model: nn.Module, batch: dict, step: int) -> dict[str, Tensor | None]:
    """Of all parameters, from one forward and backward, None where there is none; with the loss, and what evaluation gives."""
    model.zero_grad(set_to_none=True)
    seed(5 + step)
    loss = loss_of(model, copy.deepcopy(batch))
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": loss.detach(), **found, **evaluated(model, batch)}


@torch.no_grad()
def evaluated(model: nn.Module, batch: dict) -> dict[str, Tensor]:
    """What the model gives in evaluation."""
    training = model.training
    seed(4)
    outputs = tensors_of(model.eval()(**copy.deepcopy(batch)))
    model.train(training)
    return {f"output {number}": each for number, each in enumerate(outputs) if each.is_floating_point()}


def _streamed(result: Result, model: nn.Module, batch: dict, expected: list[dict[str, Tensor | None]]) -> None:
    """Fills in what streaming the model shows."""
    sizes = {id(parameter): parameter.nbytes for parameter in model.parameters()}
    with db.stream_layers(model, device="cpu") as stream:
        units = {name: model.get_submodule(name) for name in stream.units}
        result.units = len(units)
        moving = {id(parameter) for unit in units.values() for parameter in unit.parameters()}
        result.moved = sum(sizes.get(each, 0) for each in moving) / sum(sizes.values())
        watch = HostWatch(units)
        for step, wanted in enumerate(expected):
            with watch:
                found = gradients(model, batch, step)
            difference, where = _difference(found, wanted)
            if result.difference is None or difference > result.difference:
                result.difference, result.differs = difference, where
        result.peak_units, result.on_host = stream.peak_units, sorted(watch.found)


def _difference(found: dict[str, Tensor | None], wanted: dict[str, Tensor | None]) -> tuple[float, str]:
    """The largest relative difference of a gradient (infinite: one is there, and the other is not), and whose it is."""
    worst, where = 0.0, ""
    for name, expected in wanted.items():
        here = found[name]
        if expected is None or here is None:
            difference = 0.0 if expected is here else float("inf")
        elif torch.equal(here, expected) or (here.isnan() == expected.isnan()).all() and expected.isnan().all():
            difference = 0.0
        else:
            scale = expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
            difference = float((here - expected).abs().max() / scale)
            difference = float("inf") if difference != difference else max(difference, torch.finfo(torch.float32).tiny)
        if difference > worst:
            worst, where = difference, name
    return worst, where


class HostWatch(TorchDispatchMode):
    """Notes each operation on a unit's own weights in host memory, but those that copy them, those that make views, and those
    that change them (RWKV does, as it goes to evaluation).

    It knows a weight by the memory it is in, so a view of it is seen as well.
    """

    def __init__(self, units: dict[str, nn.Module]):
        super().__init__()
        self.found: set[str] = set()
        self._units = {
            parameter.untyped_storage()._cdata: f"{unit}.{name}"
            for unit, module in units.items() for name, parameter in module.named_parameters()
        }  # fmt: skip

    def __torch_dispatch__(self, func: Callable, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _computes(func):
            for tensor in _tensors_of((*args, *kwargs.values())):
                weight = self._units.get(tensor.untyped_storage()._cdata)
                if weight is not None and not (func._schema.is_mutable and tensor is args[0]):
                    self.found.add(f"{weight}: {func._schema.name}")
        return func(*args, **kwargs)


def _tensors_of(values: Iterable) -> Iterator[Tensor]:
    """Operations take tensors, and lists of them."""
    for value in values:
        if isinstance(value, Tensor) and value.layout == torch.strided:
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors_of(value)


@functools.cache
def _computes(func: Callable) -> bool:
    """Neither a copy nor a view."""
    returns = func._schema.returns
    is_view = bool(returns) and all(each.alias_info is not None and not each.alias_info.is_write for each in returns)
    return not is_view and func._schema.name not in COPIES
