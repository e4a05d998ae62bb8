"""Steps of the ways to train, each ready to be taken.

`benchmarks/memory.py` takes these steps, `estimate_memory` follows them without memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..configuration import DiffusionBlocksConfig
from ..conversion import convert
from ..diffusion.objectives import reading_out_as_on
from ..models.base import DiffusionBlocksPreTrainedModel
from ..optimizers import OptimizerInBackward
from ..streaming import LayerStream, stream_layers
from ..streaming.layers import switch_checkpointing
from .costs import Costs, Operations
from .ledger import Ledger, measure_memory
from .stock import matrices_of_layers
from .ways import LORA_RANK, Way, Workload
from .without_memory import WithoutMemory


class Step(NamedTuple):
    """A step of training, or a block's part in it, up to its loss."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[], torch.Tensor]
    kept: Collection[torch.Tensor] = ()  #: hidden states that another pass has left
    stream: LayerStream | None = None  #: of a streamed model


def ledgers_of(
    way: Way, workload: Workload, fake_mode: FakeTensorMode | None = None, operations: Operations | None = None
) -> Iterator[Ledger]:
    """The ledgers of a way's steps, one that can be the largest after the other. With a fake mode, tensors have no memory.

    Args:
        operations: counts those of the steps.
    """
    for step in steps(way, workload, fake_mode):
        with nullcontext() if fake_mode is None else WithoutMemory(fake_mode), operations or nullcontext():
            averages = _averages(step) if workload.ema else ()
            with reading_out_as_on(workload.device):
                ledger = measure_memory(*step[:3], averages, step.kept)
        yield ledger


def ledger_of(
    way: Way, workload: Workload, fake_mode: FakeTensorMode | None = None, operations: Operations | None = None
) -> Ledger:
    """The ledger of a way's largest step."""
    return max(ledgers_of(way, workload, fake_mode, operations), key=lambda ledger: ledger.total)


def followed_stream(way: Way, workload: Workload, fake_mode: FakeTensorMode | None = None) -> tuple[Ledger, Costs]:
    """Of a streamed model: the ledger of a micro-batch once the order of its units is known, and what it costs."""
    (step,) = steps(way, workload, fake_mode)
    return streamed_step(step, fake_mode)


def streamed_step(step: Step, fake_mode: FakeTensorMode | None = None) -> tuple[Ledger, Costs]:
    """The same of a step of a streamed model. With a fake mode, its tensors have sizes and no memory."""
    with nullcontext() if fake_mode is None else WithoutMemory(fake_mode):
        step.loss().backward()
        step.optimizer.zero_grad()
        before = step.stream.copied
        with Operations() as operations:
            ledger = measure_memory(step.model, step.optimizer, step.loss)
    copied = {direction: size - before[direction] for direction, size in step.stream.copied.items()}
    trained = sum(p.numel() for p in step.optimizer.param_groups[0]["params"])
    return ledger, Costs(**copied, trained=trained, operations=operations.total)


def steps(way: Way, workload: Workload, fake_mode: FakeTensorMode | None = None) -> Iterator[Step]:
    """A step of each block that can hold most (of a stock model, its step), one model in memory at a time.

    Raises:
        ValueError: the config cannot be cut so.
    """
    found = _stock_step(way, workload, fake_mode) if way.fields is None else _steps_of_blocks(way, workload, fake_mode)
    for step in found:
        if workload.bf16:
            device = step.stream.device if step.stream else next(step.model.parameters()).device
            step = step._replace(loss=_autocast(step.loss, device.type))
        yield step


def _autocast(loss: Callable[[], torch.Tensor], device: str) -> Callable[[], torch.Tensor]:
    def computed() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16):  # left before the backward pass, as in the Trainer
            return loss()

    return computed


# ---- stock models


def _stock_step(way: Way, workload: Workload, fake_mode) -> Iterator[Step]:
    stock = workload.stock

    def make() -> nn.Module:
        model = stock.make()
        if way.lora:
            _add_adapters(model)
        return model

    model = _built(make, workload.dtype, fake_mode)
    if way.checkpointing:
        switch_checkpointing(model, on=True)
    optimizer, batch = _optimizer(model), workload.batch()
    if way.in_backward:
        _make_state(optimizer, optimizer.param_groups[0]["params"])
        OptimizerInBackward.attach(optimizer)
    # (Without memory, the CPU's tensors are as good as a device's.)
    stream = stream_layers(model, None if fake_mode is None else "cpu", keep=workload.keep) if way.streamed else None
    yield Step(model, optimizer, lambda: stock.loss(model, batch), stream=stream)


def _add_adapters(model: PreTrainedModel) -> None:
    """LoRA on the matrices of every attention module."""
    from peft import LoraConfig, inject_adapter_in_model

    matrices = matrices_of_layers(model)
    attention = {name: matrix for name, matrix in matrices.items() if "attn" in name or "attention" in name}
    matrices = attention or matrices
    transposed = any(isinstance(module, Conv1D) for module in matrices.values())
    config = LoraConfig(r=LORA_RANK, target_modules=[f"model.{name}" for name in matrices], fan_in_fan_out=transposed)
    # (Of a model that has a config, PEFT takes some names for those of experts.)
    inject_adapter_in_model(config, nn.ModuleDict({"model": model}))


# ---- blocks


def _steps_of_blocks(way: Way, workload: Workload, fake_mode) -> Iterator[Step]:
    config = DiffusionBlocksConfig(
        source_config=workload.config, task=workload.task.name, num_blocks=workload.num_blocks, **way.fields
    )
    blocks = _blocks_that_differ(config)
    if way.job:
        for block in blocks:
            yield from _job_step(way, workload, block, fake_mode)
    else:
        yield from _steps_of_all(way, workload, blocks, fake_mode)


def _blocks_that_differ(config: DiffusionBlocksConfig) -> list[int]:
    """The first, the last, and the second where it has more layers: any other holds no more than one of these. Stages all
    differ."""
    if not config.architecture.layers_are_alike:
        return [*range(config.num_blocks)]
    last = config.num_blocks - 1
    sizes = [len(config.block_layers(block)) for block in range(config.num_blocks)]
    largest = max(range(config.num_blocks), key=lambda block: (sizes[block], block))
    return sorted({0, last, largest} | ({last - 1} if config.local_head_layers and last else set()))


def _steps_of_all(way: Way, workload: Workload, blocks: list[int], fake_mode) -> Iterator[Step]:
    """A block's step, or its part in a step of all, where every block has optimizer state."""
    model = _built(_converted(way, workload), workload.dtype, fake_mode)
    optimizer = _optimizer(model)
    _make_state(optimizer, optimizer.param_groups[0]["params"])
    for block in blocks:
        # (In turn, earlier blocks run, unless nothing is to be computed: forward and without gradient they hold less.)
        entering = _entering(model, block, workload, fake_mode) if block and way.carried and (way.together or fake_mode) else {}
        arguments = {**workload.batch(), **entering, "block_index": block}
        if way.together and block:  # what all blocks share has a gradient from the first
            with fake_mode or nullcontext():
                for parameter in model.shared_parameters():
                    parameter.grad = torch.zeros_like(parameter)
        kept = [each for each in tree_leaves(entering) if isinstance(each, torch.Tensor)] if way.together else []
        trained = (*model.block_parameters(block), *model.shared_parameters()) if way.together else model.parameters()
        with _training(model, trained):
            yield Step(model, optimizer, lambda: model(**arguments).loss, kept)
        optimizer.zero_grad()


def _job_step(way: Way, workload: Workload, block: int, fake_mode) -> Iterator[Step]:
    run = range(block + 1) if way.carried else [block]
    model = _built(_converted(way, workload, run), workload.dtype, fake_mode)
    batch = workload.batch()
    if way.carried and block and fake_mode is not None:
        batch |= _entering(model, block, workload, fake_mode)
    with _training(model, (*model.block_parameters(block), *(model.shared_parameters() if way.train_shared else ()))):
        yield Step(model, _optimizer(model), lambda: model(**batch, block_index=block).loss)


@contextmanager
def _training(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """These parameters ask for gradients, and no others."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trained = set(parameters)
    for parameter in asked:
        parameter.requires_grad_(parameter in trained)
    yield
    for parameter in asked:
        parameter.requires_grad_(True)


def _converted(
    way: Way, workload: Workload, resident_blocks: Iterable[int] | None = None
) -> Callable[[], DiffusionBlocksPreTrainedModel]:
    """What makes the model of a way."""
    return lambda: convert(workload.config, workload.num_blocks, workload.task.name, resident_blocks, **way.fields)


def _entering(
    model: DiffusionBlocksPreTrainedModel, block: int, workload: Workload, fake_mode: FakeTensorMode | None
) -> dict[str, Any]:
    """What enters a block, where earlier blocks have run, or would run: forward and without gradient, they hold less than what
    follows."""
    with nullcontext() if fake_mode is None else WithoutMemory(fake_mode):
        return {"block_input": model.passed_on(model.blocks[block - 1], workload.batch())}


def _optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)


def _averages(step: Step) -> list[torch.Tensor]:
    """Averages of what the run trains: all that the optimizer has, whichever block's turn it is."""
    trained = (parameter for group in step.optimizer.param_groups for parameter in group["params"])
    return [torch.empty_like(parameter, dtype=torch.float32, requires_grad=False) for parameter in trained]


def _make_state(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


# ---- without memory


def _built(make: Callable[[], PreTrainedModel], dtype: torch.dtype, fake_mode: FakeTensorMode | None) -> PreTrainedModel:
    if fake_mode is None:
        return make().to(dtype).train()
    with torch.device("meta"):
        model = make().to(dtype)
    with fake_mode:
        model.to_empty(device="cpu")
    if isinstance(model, PreTrainedModel):  # not of another library
        model.tie_weights()
    return model.train()
