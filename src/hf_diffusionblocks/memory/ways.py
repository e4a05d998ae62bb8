"""The ways to train a model whose memory is compared: end to end, with its layers streamed, and block by block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedConfig
from transformers.utils import is_peft_available

from ..tasks import Task
from .stock import Stock, stock_of

LORA_RANK = 16
LORA = f"LoRA (r={LORA_RANK}, attention)"
END_TO_END = "end to end"
CHECKPOINTING = f"{END_TO_END}, checkpointing"


@dataclass(frozen=True)
class Workload:
    """What is trained on what.

    Args:
        config: of the plain model.
        num_blocks: B.
        batch_size: sequences or images of a step.
        sequence_length: tokens a sequence; None for images.
        dtype: of parameters, hence of gradients, optimizer state and activations.
        task_name: as in `pipeline(task)`; None is the architecture's usual one.
        ema: whether there are averages of the trained weights (`ema_decay`), in float32.
        device: the kind, as on which blocks read out rows where steps are only followed; None: as where they are.
        bf16: whether it computes in bfloat16 by autocast, as with the Trainer's `bf16=True`.
        keep: of streamed layers, those that stay on the device, as `stream_layers` takes it.
    """

    config: PreTrainedConfig
    num_blocks: int | None
    batch_size: int
    sequence_length: int | None
    dtype: torch.dtype = torch.float32
    task_name: str | None = None
    ema: bool = False
    device: str | None = None
    bf16: bool = False
    keep: int | str = 0

    @cached_property
    def stock(self) -> Stock:
        """The model as it is where nothing is cut."""
        return stock_of(self.config, self.task_name)

    @property
    def task(self) -> Task | None:
        """The row of what it is trained for, where it can be cut into blocks."""
        return self.stock.task

    def batch(self) -> dict[str, torch.Tensor]:
        """Random inputs and labels."""
        batch = self.stock.batch(self.batch_size, self.sequence_length)
        return {name: t.to(self.dtype) if t.is_floating_point() else t for name, t in batch.items()}


@dataclass(frozen=True)
class Way:
    """A way to train: the stock model (`fields` is None), or what `convert` makes of it by `fields`.

    Args:
        checkpointing: of the stock model's layers.
        lora: adapters alone train.
        in_backward: each gradient is used by the optimizer, and let go, as it is made.
        streamed: layers come to the device when they run (`stream_layers`).
        together: all blocks in one step (`block_schedule="together"`).
        job: one block; with neither, all blocks in turn.
        train_shared: False leaves what blocks share as it is.
        carried: a block starts from what the blocks before it made of the input.
    """

    name: str
    fields: Mapping | None = None
    checkpointing: bool = False
    lora: bool = False
    in_backward: bool = False
    streamed: bool = False
    together: bool = False
    job: bool = False
    train_shared: bool = True
    carried: bool = False


def formulations_for(task: Task, config: PreTrainedConfig) -> dict[str, dict]:
    """Formulation -> what `convert` is given for it: what is recommended for a pretrained model, and the paper's."""
    presets = task.presets_for(config)
    if len({id(task.formulations[preset]) for preset in presets}) == 1:
        presets = presets[-1:]  # (masked text and images: one by two names)
    without_heads = {"local_head_layers": 0}  # as of pretrained weights
    heads = {preset: without_heads if "local_head_layers" in task.formulations[preset] else {} for preset in presets}
    return {preset: {"preset": preset, **heads[preset]} for preset in presets}


def ways_of_stock_models() -> list[Way]:
    """End to end: everything, and adapters alone."""
    ways = [
        Way(END_TO_END),
        Way(CHECKPOINTING, checkpointing=True),
        Way(f"{CHECKPOINTING}, optimizer in the backward pass", checkpointing=True, in_backward=True),
    ]
    if is_peft_available():
        ways += [Way(LORA, lora=True), Way(f"{LORA}, checkpointing", lora=True, checkpointing=True)]
    return ways


def ways_of_streams() -> list[Way]:
    """Layers that come and go."""
    ways = [Way("streamed, everything trained", streamed=True)]
    ways += [Way("streamed, optimizer in the backward pass", streamed=True, in_backward=True)]
    return ways + ([Way(f"streamed, {LORA}", streamed=True, lora=True)] if is_peft_available() else [])


def ways_of_blocks(task: Task, formulations: Mapping[str, Mapping]) -> list[Way]:
    """Each formulation in each mode, on losses of the blocks' own."""
    ways = []
    for name, fields in formulations.items():
        carried = task.model_class.FORMULATIONS[fields["preset"]].passes_on
        common, own = {**fields, "shared": "common"}, {**fields, "shared": "per_block"}
        around = ", around the earlier blocks" if carried else ""
        if carried:  # (others hold together what they hold in turn)
            ways.append(Way(f"{name}: all blocks together", common, together=True, carried=True))
        ways += [
            Way(f"{name}: all blocks in turn", common, carried=carried),
            Way(f"{name}: job, own embeddings and head{around}", own, job=True, carried=carried),
            Way(f"{name}: job, shared part frozen{around}", common, job=True, train_shared=False, carried=carried),
        ]
    return ways
