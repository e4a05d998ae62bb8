"""Steps of the ways to train, each ready to be taken.

`benchmarks/memory.py` takes these steps, `estimate_memory` follows them without memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..backbones.base import backbone_for, backbone_of
from ..configuration import DiffusionBlocksConfig
from ..conversion import convert
from ..diffusion.objectives import reading_out_as_on
from ..models.active import TrainedParameters
from ..models.base import DiffusionBlocksPreTrainedModel
from ..models.offload import OffloadedBlocks
from .ledger import Ledger, measure_memory
from .traffic import Traffic, traffic
from .ways import LORA_RANK, Way, Workload


class Step(NamedTuple):
    """A step of training, or a block's part in it, up to its loss."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[], torch.Tensor]
    kept: Collection[torch.Tensor] = ()  #: hidden states that another pass has left


def ledger_of(way: Way, workload: Workload, fake_mode: FakeTensorMode | None = None) -> Ledger:
    """The ledger of a way's largest step. With a fake mode, tensors have sizes and no memory."""
    ledgers = []
    for step in steps(way, workload, fake_mode):
        with nullcontext() if fake_mode is None else WithoutMemory(fake_mode):
            averages = _averages(step) if workload.ema and not way.offload else ()
            with reading_out_as_on(workload.device):
                ledgers.append(measure_memory(*step[:3], averages, step.kept))
    return max(ledgers, key=lambda ledger: ledger.total)


def steps(way: Way, workload: Workload, fake_mode: FakeTensorMode | None = None) -> Iterator[Step]:
    """A step of each block that can hold most (of a plain model, its step), one model in memory at a time.

    Raises:
        ValueError: the config cannot be cut so.
    """
    if way.fields is None:
        yield _plain_step(way, workload, fake_mode)
        return
    config = DiffusionBlocksConfig(
        source_config=workload.config, task=workload.task.name, num_blocks=workload.num_blocks, **way.fields
    )
    blocks = _blocks_that_differ(config)
    if way.job:
        for block in blocks:
            yield from _job_step(way, workload, block, fake_mode)
    elif way.together:
        yield from _steps_together(way, workload, blocks, fake_mode)
    else:
        yield from _steps_in_turn(way, workload, blocks, fake_mode)


def traffic_of(way: Way, workload: Workload) -> Traffic | None:
    """What a way copies while every block moves once; None where blocks stay on the device."""
    if not way.offload:
        return None
    with torch.device("meta"):
        model = _converted(way, workload)().to(workload.dtype)
    sizes = [sum(parameter.nbytes for parameter in model.block_parameters(k)) for k in range(workload.num_blocks)]
    return traffic(sizes, [2 * size for size in sizes], way.objective, way.together, way.carried, way.job)


def _blocks_that_differ(config: DiffusionBlocksConfig) -> list[int]:
    """The first, the last, and the second where it has more layers: any other holds no more than one of these."""
    last = config.num_blocks - 1
    sizes = [len(config.block_layers(block)) for block in range(config.num_blocks)]
    largest = max(range(config.num_blocks), key=lambda block: (sizes[block], block))
    return sorted({0, last, largest} | ({last - 1} if config.readout_layers and last else set()))


def _plain_step(way: Way, workload: Workload, fake_mode) -> Step:
    architecture = backbone_for(workload.config)

    def make() -> PreTrainedModel:
        model = architecture.make_plain(workload.config)
        if way.lora:
            _add_adapters(model)
        return model

    model = _built(make, workload.dtype, fake_mode)
    if way.checkpointing:
        architecture.checkpoint_layers(model)
    batch = workload.batch() | architecture.largest_step(workload.config)
    return Step(model, _optimizer(model), lambda: workload.task.plain_loss(model, **batch))


def _trained_before(way: Way, workload: Workload, fake_mode) -> tuple[DiffusionBlocksPreTrainedModel, torch.optim.Optimizer]:
    """A model, and an optimizer with the state of all its blocks."""
    model = _built(_converted(way, workload), workload.dtype, fake_mode)
    optimizer = _optimizer(model)
    if way.checkpointing:
        model.activation_checkpointing_enable()
    if way.offload:
        _offload(model, optimizer)
    for block in range(workload.num_blocks):
        if way.offload:
            model.offload.activate(block)
        shared = model.shared_parameters() if way.train_shared else ()
        _make_state(optimizer, (*model.block_parameters(block), *shared))
    return model, optimizer


def _steps_together(way: Way, workload: Workload, blocks: list[int], fake_mode) -> Iterator[Step]:
    """A block's part in a step of all: `_own_part` first block to last, or `_exact_part` last block to first."""
    model, optimizer = _trained_before(way, workload, fake_mode)
    exact, last = way.objective == "exact", workload.num_blocks - 1
    for block in blocks:
        following = block - 1 if exact else (block + 1) % workload.num_blocks
        if way.offload:
            model.offload.activate(block, following if following not in (-1, block) else None)
        loss, kept = (_exact_part if exact else _own_part)(model, workload, block, fake_mode)
        with fake_mode or nullcontext():  # what all blocks share has a gradient from the first of them that trains
            for parameter in model.shared_parameters() if way.train_shared and block != (last if exact else 0) else ():
                parameter.grad = torch.zeros_like(parameter)
        with TrainedParameters(model, [block], way.train_shared):
            yield Step(model, optimizer, loss, kept)
        optimizer.zero_grad()


def _own_part(model: DiffusionBlocksPreTrainedModel, workload: Workload, block: int, fake_mode):
    """A block's own loss, and what is kept meanwhile: what the one before it has put out."""
    given = _entering(workload, fake_mode) if block else {}
    arguments = {**workload.batch(), **given, "block_index": block}
    return lambda: model(**arguments).loss, list(given.values())


def _exact_part(model: DiffusionBlocksPreTrainedModel, workload: Workload, block: int, fake_mode):
    """The loss through the last block, or what sends a gradient back through another; what enters it and the blocks before
    is kept, and the gradient of what left it."""
    last, batch = workload.num_blocks - 1, workload.batch()
    with fake_mode or nullcontext():
        kept = [workload.hidden() for _ in range(block + (block < last))]  # the last of them: a gradient
    entering = kept[block - 1].requires_grad_() if block else None

    def loss() -> torch.Tensor:
        if block == last:
            given = {} if entering is None else {"block_input": entering}
            return model(**batch, **given, block_index=block).loss
        x, own = model.clean_input(batch), model.blocks[block]
        hidden = own.run_clean(own.embed(x.inputs) if entering is None else entering, **x.attention)
        return (hidden * kept[-1]).sum()

    return loss, kept


def _steps_in_turn(way: Way, workload: Workload, blocks: list[int], fake_mode) -> Iterator[Step]:
    model, optimizer = _trained_before(way, workload, fake_mode)
    batch = workload.batch()
    for block in blocks:
        if way.offload:
            following = (block + 1) % workload.num_blocks
            model.offload.activate(block, following if following != block else None)
        entering = {}
        if fake_mode is not None and way.carried and block:
            entering = _entering(workload, fake_mode)
            model.blocks[block - 1].fetch()
        arguments = {**batch, **entering, "block_index": block, "loss_block": way.loss_block(workload)}
        with TrainedParameters(model, [block] if way.objective == "final" else range(workload.num_blocks), train_shared=True):
            yield Step(model, optimizer, lambda: model(**arguments).loss)


def _job_step(way: Way, workload: Workload, block: int, fake_mode) -> Iterator[Step]:
    loss_block = way.loss_block(workload)
    run = range((block if loss_block is None else loss_block) + 1) if way.carried and not way.cached else [block]
    model = _built(_converted(way, workload, run), workload.dtype, fake_mode)
    batch = workload.batch()
    if way.carried and block and (way.cached or fake_mode is not None):
        batch |= _entering(workload, fake_mode)
    if way.checkpointing:
        model.activation_checkpointing_enable()
    with TrainedParameters(model, [block], way.train_shared):
        optimizer = _optimizer(model)
        if way.offload:
            _offload(model, optimizer)
            model.offload.activate(block)
        yield Step(model, optimizer, lambda: model(**batch, block_index=block, loss_block=loss_block).loss)


def _converted(
    way: Way, workload: Workload, resident_blocks: Iterable[int] | None = None
) -> Callable[[], DiffusionBlocksPreTrainedModel]:
    """What makes the model of a way; what its fields do not say is the paper's."""
    return lambda: convert(
        workload.config, workload.num_blocks, workload.task.name, resident_blocks, preset="paper", **way.fields
    )


def _offload(model: DiffusionBlocksPreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    model.offload = OffloadedBlocks(model, model.device)
    model.offload.optimizer = optimizer


def _entering(workload: Workload, fake_mode: FakeTensorMode | None) -> dict[str, torch.Tensor]:
    """What enters a block, from a cache. Also where earlier blocks would run, if nothing is to be computed: forward and
    without gradient, they hold less than what follows."""
    with fake_mode or nullcontext():
        return {"block_input": workload.hidden()}


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


def _add_adapters(model: PreTrainedModel) -> None:
    """LoRA on the matrices of every attention module."""
    from peft import LoraConfig, inject_adapter_in_model

    layers = f"{backbone_of(model).layers_path}."
    matrices = {
        name: module
        for name, module in model.named_modules()
        if name.startswith(layers) and isinstance(module, (nn.Linear, Conv1D))
    }
    attention = {name: matrix for name, matrix in matrices.items() if "attn" in name or "attention" in name}
    matrices = attention or matrices  # (a layer may have none)
    transposed = any(isinstance(module, Conv1D) for module in matrices.values())
    config = LoraConfig(r=LORA_RANK, target_modules=list(matrices), fan_in_fan_out=transposed)
    inject_adapter_in_model(config, model)


# ---- without memory


def _built(
    make: Callable[[], PreTrainedModel], dtype: torch.dtype, fake_mode: FakeTensorMode | None
) -> PreTrainedModel:
    if fake_mode is None:
        return make().to(dtype).train()
    with torch.device("meta"):
        model = make().to(dtype)
    with fake_mode:
        model.to_empty(device="cpu")
    if isinstance(model, PreTrainedModel):  # not of another library
        model.tie_weights()
    return model.train()


class WithoutMemory(TorchDispatchMode):
    """Runs a step on fake parameters, and real tokens and masks: what depends on values is decided by real ones.

    A fake mode alone would not do: masks select rows by value, and Transformers makes other masks for fake tokens.
    """

    def __init__(self, fake_mode: FakeTensorMode):
        super().__init__()
        self.fake_mode = fake_mode

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._overloadpacket in (torch.ops.aten.randn, torch.ops.aten.randn_like):
            with self.fake_mode:  # the noise of all targets: large, and never looked at
                return func(*args, **kwargs)
        if func._overloadpacket in _BY_INDEX:
            tensor, indices, *rest = args
            numbers = [each for index in indices for each in _as_numbers(index)]
            return func(tensor, numbers, *rest, **kwargs)
        return func(*args, **kwargs)


_BY_INDEX = {torch.ops.aten.index, torch.ops.aten.index_put_, torch.ops.aten.index_put, torch.ops.aten._index_put_impl_}


def _as_numbers(index: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """What a mask selects, as index tensors: fake tensors cannot be selected by a mask."""
    return (index,) if index is None or index.dtype != torch.bool else index.nonzero().unbind(1)
