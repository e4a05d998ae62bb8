"""The ledger of a training step: what its bytes are, part by part, and how many there are when there are most."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..streaming import stream_of
from .stock import layer_paths, num_logits

#: What the bytes of a training step are, in the order in which tables list them.
PARTS = ("shared", "blocks", "adaln", "gradients", "optimizer", "averages", "activations", "logits", "rest")
HOST = "host"  #: of a streamed model, what is in host memory


@dataclass(frozen=True)
class Parts:
    """Bytes by what they are.

    Args:
        shared: embeddings, final norm, head, fixed targets and all else that is no layer's: what blocks share, or what
            each has of its own with `shared="per_block"`. Parameters and buffers.
        blocks: layers and local heads; adapters inside them.
        adaln: modulations and sigma embeddings.
        gradients: of parameters.
        optimizer: its state.
        averages: of weights (`ema_decay`).
        activations: what autograd keeps for the backward pass.
        logits: tensors over the vocabulary (or labels), and their gradients.
        rest: temporary tensors, inputs.
    """

    shared: int = 0
    blocks: int = 0
    adaln: int = 0
    gradients: int = 0
    optimizer: int = 0
    averages: int = 0
    activations: int = 0
    logits: int = 0
    rest: int = 0

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Ledger:
    """What a training step holds; printed, a table in MiB.

    Args:
        parts: each part at its largest in the step; without `rest`. Their sum is what would be held if all were there
            together, as they are where gradients of several micro-batches are summed.
        peak: what is there when most is: gradients come as activations go.
        host: what is in host memory, of a streamed model: parameters, gradients, optimizer state, and what is on its way.
        allocated: `torch.cuda.max_memory_allocated` of the same step, on CUDA.
    """

    parts: Parts
    peak: Parts
    host: int = 0
    allocated: int | None = None

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.peak.total

    def __str__(self) -> str:
        columns = [("", *PARTS, "total")]
        for title, parts in (("at its largest", self.parts), ("at the peak", self.peak)):
            columns.append((title, *(f"{size / 2**20:,.1f}" for size in (*asdict(parts).values(), parts.total))))
        widths = [max(map(len, column)) for column in columns]
        lines = [f"{row[0]:{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}" for row in zip(*columns)]
        if self.host:
            lines.append(f"in host memory  {self.host / 2**20:,.1f}")
        if self.allocated is not None:
            lines.append(f"torch.cuda.max_memory_allocated  {self.allocated / 2**20:,.1f}")
        return "\n".join(["MiB" + lines[0][3:], *lines[1:]])


class StepMemory(TorchDispatchMode):
    """Follow every tensor storage that a forward and a backward pass make, from its birth to its death.

        with StepMemory(model, optimizer) as memory:
            model(**inputs).loss.backward()
        optimizer.step()
        ledger = memory.ledger()

    Storages are counted once, by the bytes that were asked for, on whatever device: fake tensors have bytes, too. The
    optimizer's step is taken to hold no more than parameters, gradients and state, which is so for fused ones.
    Of a streamed model, what is in host memory is counted apart, on a CPU too: weights of units, what is computed from what is
    there alone, and gradients that have come home.

    Args:
        model: a DiffusionBlocks model, or a stock one.
        optimizer: its state may still be empty: the ledger takes it as it is then.
        averages: of weights, which are there all the time.
        kept: hidden states that another pass has left: activations.
    """

    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, averages: Collection[torch.Tensor] = (),
        kept: Collection[torch.Tensor] = (),
    ):  # fmt: skip
        super().__init__()
        self.model, self.optimizer, self.averages, self.kept = model, optimizer, averages, kept
        self._layers, self._num_logits = layer_paths(model), num_logits(model)
        self._known: dict[int, tuple[int, weakref.ref]] = {}  # address of a living storage -> its number
        self._sizes: list[int] = []
        self._kinds: list[str] = []
        self._events: list[int] = []  # n: storage n is born; ~n: it dies
        self._stream = stream_of(model)
        self._device = next(model.parameters()).device if self._stream is None else self._stream.device
        self._on_host = set() if self._stream is None else set(self._stream.host_parameters)
        self._parts_on_host: dict[int, str] = {}  # number of a parameter's storage in host memory -> what its copy is part of
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._saved, lambda tensor: tensor)
        self.allocated: int | None = None

    def __enter__(self) -> StepMemory:
        self._label()
        self._state_before = self._state_bytes()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        if self._stream is not None:
            for parameter, copy in self._stream.copies_there:
                self._copied(parameter, copy, in_host_memory=False)
            self._stream.watch_copies(self._copied)
        self._hooks.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._hooks.__exit__(*error)
        if self._stream is not None:
            self._stream.watch_copies(None)
        if self._device.type == "cuda":
            self.allocated = torch.cuda.max_memory_allocated(self._device)
        self._label()
        self._counted = self._replay()
        self._known.clear()  # what dies from now on is no concern of this step

    def ledger(self) -> Ledger:
        """The ledger, with the optimizer's state as it is now."""
        at_peak, largest, at_end = (dict(each) for each in self._counted)
        state = self._state_bytes()
        host = largest.pop(HOST) + sum(t.nbytes for t in state_tensors(self.optimizer)) - state
        del at_peak[HOST], at_end[HOST]
        parts = Parts(**largest | {"optimizer": state, "rest": 0})
        peak = Parts(**at_peak | {"optimizer": state})
        # The optimizer's step comes when activations are gone and all gradients are there.
        stepping = Parts(**at_end | {"optimizer": state, "activations": 0, "logits": 0, "rest": 0})
        allocated = None if self.allocated is None else self.allocated + state - self._state_before
        return Ledger(parts, max(peak, stepping, key=lambda parts: parts.total), host, allocated)

    def _replay(self) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
        """Bytes of each part when there are most, each at its largest, and each at the end."""
        live, largest, at_peak = (dict.fromkeys((*PARTS, HOST), 0) for _ in range(3))
        total = most = 0
        for event in self._events:
            number = event if event >= 0 else ~event
            kind, size = self._kinds[number], self._sizes[number]
            if kind == "optimizer":  # its state is counted at the end, in full
                continue
            change = size if event >= 0 else -size
            live[kind] += change
            total += change if kind != HOST else 0
            largest[kind] = max(largest[kind], live[kind])
            if total > most:
                most, at_peak = total, dict(live)
        return at_peak, largest, live

    def _label(self) -> None:
        """Note what the storages of the model and the optimizer are, now."""
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            part, away = part_of_parameter(name, self._layers), tensor in self._on_host
            number = self._note(tensor, HOST if away else part)
            if away:
                self._parts_on_host[number] = part
            if tensor.grad is not None:
                self._note(tensor.grad, HOST if away else "gradients")
        for kind, tensors in (
            ("optimizer", state_tensors(self.optimizer)), ("averages", self.averages), ("activations", self.kept)
        ):  # fmt: skip
            for tensor in tensors:
                self._note(tensor, kind)

    def _state_bytes(self) -> int:
        """Of the optimizer's state on the device."""
        return sum(tensor.nbytes for tensor in state_tensors(self.optimizer, self._on_host))

    def _copied(self, source: torch.Tensor, copy: torch.Tensor, in_host_memory: bool) -> None:
        """The stream has copied a weight to the device, or a gradient to host memory."""
        if in_host_memory:
            self._note(source, "gradients")
            self._note(copy, HOST)
        else:
            self._note(copy, self._parts_on_host[self._note(source)])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.device):  # (fake tensors are asked for it more often than for anything else)
            return result
        if func is torch.ops.aten.detach.default and torch._C._current_graph_task_id() >= 0 and args[0].requires_grad:
            self._saved(result)  # as activation checkpointing keeps what it computes again
        of_host = bool(self._on_host) and self._all_on_host(args)
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                is_new = tensor.untyped_storage()._cdata not in self._known
                number = self._note(tensor)
                if of_host and is_new:
                    self._kinds[number] = HOST
        return result

    def _all_on_host(self, args: tuple) -> bool:
        """Whether all tensors that are given are in host memory, and what they make is, too."""
        tensors = [each for arg in args for each in (arg if isinstance(arg, (tuple, list)) else (arg,))]
        kinds = [self._kinds[self._note(tensor)] for tensor in tensors if isinstance(tensor, torch.Tensor)]
        return bool(kinds) and all(kind == HOST for kind in kinds)

    def _saved(self, tensor: torch.Tensor) -> torch.Tensor:
        number = self._note(tensor)
        if self._kinds[number] == "rest":
            self._kinds[number] = "activations"
        return tensor.detach()  # (what a node has put out would hold the node)

    def _note(self, tensor: torch.Tensor, kind: str | None = None) -> int:
        """The number of a tensor's storage, which is born now if it was not known; `kind` is what it is known to be."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._known:
            number = self._known[address][0]
        else:
            number = len(self._sizes)
            self._known[address] = (number, weakref.ref(storage, lambda _: self._died(address)))
            self._sizes.append(storage.nbytes())
            is_logits = tensor.dim() > 1 and tensor.shape[-1] == self._num_logits
            elsewhere = tensor.device.type == "cpu" != self._device.type
            self._kinds.append(HOST if elsewhere else "logits" if is_logits else "rest")
            self._events.append(number)
        if kind is not None:
            self._kinds[number] = kind
        return number

    def _died(self, address: int) -> None:
        self._events.append(~self._known.pop(address)[0])


def state_tensors(optimizer: torch.optim.Optimizer, without: Collection[torch.nn.Parameter] = ()) -> Iterator[torch.Tensor]:
    """The tensors of an optimizer's state, but for some parameters'."""
    for parameter, state in optimizer.state.items():
        if parameter not in without:
            yield from (value for value in state.values() if torch.is_tensor(value))


def part_of_parameter(name: str, layers: Collection[str]) -> str:
    """The part of [`Parts`] that a parameter or buffer belongs to.

    Args:
        name: in the state dict, of a DiffusionBlocks model or of the plain one, with or without adapters.
        layers: paths of the plain model's layers, each with a dot at its end.
    """
    if name.startswith(("modulations.", "sigma_embeddings.")):
        return "adaln"
    return "blocks" if any(path in name for path in layers) or name.startswith("local_heads.") else "shared"


def measure_memory(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss_of_step: Callable[[], torch.Tensor],
    averages: Collection[torch.Tensor] = (), kept: Collection[torch.Tensor] = (),
) -> Ledger:  # fmt: skip
    """The ledger of one training step, which is taken.

    Args:
        model: a DiffusionBlocks model, or a stock one.
        optimizer: of its trained parameters.
        loss_of_step: runs the forward pass.
        averages: of weights, on the device.
        kept: hidden states that another pass has left.
    """
    with StepMemory(model, optimizer, averages, kept) as memory:
        loss_of_step().backward()
    optimizer.step()
    ledger = memory.ledger()
    optimizer.zero_grad()
    return ledger
