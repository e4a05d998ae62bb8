"""What test_streaming_copies.py runs, in a process of its own, since a made-up kind of device stays: streamed training on a
device whose streams work when somebody waits for them, or as soon as waits permit.

    python late_streams.py FILE

Tensors there have no memory; each storage stands for real memory, which is written over when the storage is let go, in the
order of the stream that it was made for: so does an allocator that gives it to somebody else. Backward passes run on that
device's own thread. Writes, as JSON, how far gradients are off the stock model's: with all waits, and where some are left out.
"""

from __future__ import annotations

import copy
import json
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from no_waits import DEVICE, FAKE
from streaming_models import MODELS, gradients, llama, pair, tokens, weights
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

import hf_diffusionblocks as db
from hf_diffusionblocks.streaming import copies, layer_streaming
from hf_diffusionblocks.streaming.copies import Copies
from hf_diffusionblocks.streaming.gradients import _Trip
from hf_diffusionblocks.streaming.lending import LentUnit

LOCK = threading.RLock()  # of the streams' work
MEMORY: dict[int, tuple[torch.Tensor, weakref.ref]] = {}  # storage -> its bytes


class Event:
    done = False

    def __init__(self, stream: Stream):
        self._stream = stream

    def synchronize(self) -> None:
        with LOCK:
            while not self.done:
                waits_for = self._stream.work[0] if isinstance(self._stream.work[0], Event) else self
                if waits_for is not self and not waits_for.done:
                    waits_for.synchronize()
                self._stream.go_on()


class Stream:
    every: list[Stream] = []
    eager: frozenset[str] = frozenset()  #: names of those that work as soon as they may
    of_thread = threading.local()

    def __init__(self, device: torch.device | None = None):
        self.name = ("compute", "inward", "outward")[len(self.every)]
        self.every.append(self)
        self.work: deque[Event | Callable[[], object]] = deque()  # (an event that is not done is waited for)

    def go_on(self) -> bool:
        """Do what is next, unless it has to wait."""
        with _disable_current_modes(), torch.no_grad():
            done = self.work[0].done if isinstance(self.work[0], Event) else self.work[0]() is not Event
        if done:
            self.work.popleft()
        return done

    def ask(self, work: Event | Callable[[], object]) -> None:
        with LOCK:
            self.work.append(work)
            while any(each.name in self.eager and each.work and each.go_on() for each in self.every):
                pass

    def record_event(self) -> Event:
        event = Event(self)
        self.ask(lambda: setattr(event, "done", True))
        return event

    def wait_event(self, event: Event) -> None:
        self.ask(event)

    def wait_stream(self, other: Stream) -> None:
        self.ask(other.record_event())

    def __enter__(self) -> None:
        self.of_thread.current = self  # (here nobody enters one in another)

    def __exit__(self, *error) -> None:
        self.of_thread.current = None


def current_stream(device: torch.device | None = None) -> Stream:
    return getattr(Stream.of_thread, "current", None) or Stream.every[0]


def memory(tensor):
    """What a tensor of the device stands for; anything else as it is."""
    if not isinstance(tensor, torch.Tensor) or tensor.device.type != DEVICE.type:
        return tensor
    storage = tensor.untyped_storage()
    with LOCK:
        if storage._cdata not in MEMORY:
            made, stream, key = torch.full((storage.nbytes() or 1,), 255, dtype=torch.uint8), current_stream(), storage._cdata

            def let_go(_) -> None:  # (255 in all bytes is no number)
                del MEMORY[key]
                stream.work.append(lambda: made.fill_(255))

            MEMORY[key] = made, weakref.ref(storage, let_go)
        whole = MEMORY[storage._cdata][0]
    whole = whole[: len(whole) // tensor.itemsize * tensor.itemsize].view(tensor.dtype)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def there(tensor: torch.Tensor) -> torch.Tensor:
    with FAKE:
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)
    memory(made).copy_(tensor.detach())
    return made


class Device(TorchDispatchMode):
    """Operations are asked of the current stream."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        kinds = {each.device.type for each in given}
        to = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        if DEVICE.type not in kinds | {to}:
            return func(*args, **kwargs)
        stream, own = current_stream(), [memory(each) for each in args] if args and kinds else []
        if func is torch.ops.aten._local_scalar_dense.default or (func is torch.ops.aten._to_copy.default and to == "cpu"):
            stream.record_event().synchronize()
            return func(*own, **kwargs)
        if to == "cpu":  # host memory for what comes home
            return torch.full(args[0].shape, torch.nan, dtype=args[0].dtype)
        if func is torch.ops.aten.copy_.default and len(kinds) > 1:
            stream.ask(lambda: own[0].copy_(own[1]))
            return args[0]
        if func is torch.ops.aten._to_copy.default and kinds == {"cpu"}:
            with FAKE:
                made = torch.empty_like(args[0], device=DEVICE, dtype=kwargs.get("dtype"))
            into = memory(made)
            stream.ask(lambda: into.copy_(own[0]))
            return made
        before = {each.untyped_storage()._cdata for each in given}
        own, how = tree_map(memory, args), tree_map(memory, kwargs)
        if to:
            how["device"] = torch.device("cpu")
        with FAKE:
            found = func(*args, **kwargs)
        made = [each for each in tree_leaves(found) if isinstance(each, torch.Tensor)]
        into = [None if each.untyped_storage()._cdata in before else memory(each) for each in made]

        def compute() -> None:
            results = [each for each in tree_leaves(func(*own, **how)) if isinstance(each, torch.Tensor)]
            for result, place in zip(results, into):
                if place is not None:
                    place.copy_(result)

        if func._schema.is_mutable or any(place is not None for place in into):
            stream.ask(compute)
        return found


def placed(layers: layer_streaming.LayerStream, model: nn.Module) -> None:
    """What does not come and go is on the device. (A parameter's `data` cannot become a tensor without memory.)"""
    streamed = {id(p) for module in model.modules() if isinstance(module, LentUnit) for p in module.parameters()}
    for module in model.modules():
        for name, each in module._parameters.items():
            if each is not None and id(each) not in streamed and each.device != DEVICE:
                module._parameters[name] = nn.Parameter(there(each))
        for name, each in module._buffers.items():
            if each is not None and each.device != DEVICE:
                module._buffers[name] = there(each)


def streamed(model: nn.Module, eager: str) -> None:
    Stream.every, Stream.eager = [], frozenset(eager.split())
    Stream()
    db.stream_layers(model, DEVICE)


def off(kind: str, eager: str, in_backward: bool = False) -> float:
    """In two steps, the largest error of a gradient, over its size; infinite where it is no number. Of
    weights in host memory that an optimizer moves in the backward pass, theirs."""
    stock, model = pair(kind)
    for module in (*stock.modules(), *model.modules()):  # (what is done late draws late)
        for name in ("p", "dropout", "dropout_rate", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    streamed(model, eager)
    worst = 0.0
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.device != DEVICE], lr=0.1)
    if in_backward:
        db.OptimizerInBackward.attach(optimizer)
    for _ in range(2):  # the second fetches ahead
        before = weights(stock)
        stock.zero_grad(), model.zero_grad()
        stock(**MODELS[kind].batch()).loss.backward()
        given = {key: there(value) for key, value in MODELS[kind].batch().items()}
        with Device():
            model(**given, use_cache=False).loss.backward()
        Stream.every[0].record_event().synchronize()
        expected, found = gradients(stock), gradients(model)
        for key, moved in model.named_parameters():
            if found[key] is None:
                expected[key], found[key] = before[key] - 0.1 * expected[key], moved.detach().clone()
            else:
                found[key] = memory(found[key])
        for key, each in expected.items():
            error = ((found[key] - each).norm() / each.norm()).item()
            worst = max(worst, error if error == error else float("inf"))
        with torch.no_grad():
            for mine, its in zip(model.parameters(), stock.parameters()):
                its -= 0.1 * its.grad
                memory(mine).copy_(its) if mine.device == DEVICE else mine.copy_(its)
    return worst


def off_where_weights_are_written_after() -> float:
    """A pass without gradients, whose caller writes into weights at once."""
    ids, model = tokens()["input_ids"], llama().eval()
    expected, given = model(input_ids=ids).logits.detach(), there(ids)
    streamed(model, "")
    with Device(), torch.no_grad():
        found = model(input_ids=given, use_cache=False).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_() if parameter.device != DEVICE else None
    Stream.every[0].record_event().synchronize()
    return (memory(found) - expected).abs().max().item()


def off_where_weights_are_written_after_backward_passes() -> float:
    """These have no gradients of weights, which somebody would wait for; each is followed by a write into weights."""
    model = llama().eval().requires_grad_(False)
    stock, expected, found = copy.deepcopy(model), [], []
    streamed(model, "")
    for _ in range(3):  # the last ones fetch ahead
        hidden = torch.randn(2, 5, 32)
        expected.append(hidden.requires_grad_()), found.append(there(hidden).requires_grad_())
        stock(inputs_embeds=hidden).logits.square().sum().backward()
        with Device():
            model(inputs_embeds=found[-1], use_cache=False).logits.square().sum().backward()
        for each in (stock, model):
            for parameter in each.model.layers.parameters():
                parameter.mul_(1.1)
    Stream.every[0].record_event().synchronize()
    errors = [(memory(one.grad) - other.grad).norm() / other.grad.norm() for one, other in zip(found, expected)]
    return torch.stack(errors).max().item()


#: Kind, and which streams are eager.
CASES = [("llama, tied", ""), ("llama, tied", "compute"), ("llama, tied", "inward outward"), ("t5", "compute")]
#: What is left out, and has to be found.
CONTROLS = {
    "fetches do not wait for room": lambda: mock.patch.object(Copies, "let_go", lambda self: None),
    "nothing waits for a fetch": lambda: mock.patch.object(Copies, "wait_for", lambda self, event: None),
    "nobody waits for gradients": lambda: mock.patch.object(_Trip, "wait", lambda self: None),
}


def main() -> None:
    torch.accelerator.current_stream, copies.torch.Stream = current_stream, Stream
    layer_streaming.check_device, layer_streaming.LayerStream._place = lambda device: device, placed
    found = {f"{name}: {eager}": off(name, eager) for name, eager in CASES}
    found["optimizer in the backward pass"] = off("llama, tied", "", in_backward=True)
    found["written after"] = off_where_weights_are_written_after()
    found["written after backward passes"] = off_where_weights_are_written_after_backward_passes()
    for name, without in CONTROLS.items():
        with without():
            found[name] = off("llama, tied", "")
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
