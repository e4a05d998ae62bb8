"""The ways to train a model whose memory is compared: end to end, and block by block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedConfig
from transformers.utils import is_peft_available

from ..backbones.base import Backbone, backbone_for
from ..presets import recommended
from ..tasks import Task, task_of

#: What `convert` is given for the paper's formulation.
PAPER = {"denoiser": "joint", "context": "independent"}
LORA_RANK = 16


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
        ema: whether there are averages of the trained weights (`ema_decay`): in float32, and where other blocks are in host
            memory, there.
        device: the kind, as on which rows are read out where steps are only followed; None: as where they are.
    """

    config: PreTrainedConfig
    num_blocks: int
    batch_size: int
    sequence_length: int | None
    dtype: torch.dtype = torch.float32
    task_name: str | None = None
    ema: bool = False
    device: str | None = None

    @property
    def task(self) -> Task:
        """The row of what it is trained for."""
        return task_of(self.config, self.task_name)

    def batch(self) -> dict[str, torch.Tensor]:
        """Random inputs and labels."""
        batch = self.task.example(self.config, self.batch_size, self.sequence_length)
        return {name: t.to(self.dtype) if t.is_floating_point() else t for name, t in batch.items()}

    def hidden(self) -> torch.Tensor:
        """What enters a block, as a cache would hold it."""
        positions = self.task.num_positions(self.config, self.sequence_length)
        return torch.randn(self.batch_size, positions, backbone_for(self.config).width(self.config)).to(self.dtype)


@dataclass(frozen=True)
class Way:
    """A way to train: the plain model (`fields` is None), or what `convert` makes of it by `fields`.

    Args:
        together: all blocks in one step (`block_schedule="together"`).
        objective: as the Trainer's.
        job: one block; with neither, all blocks in turn.
        train_shared: False leaves what blocks share as it is.
        cached: carried context comes from a cache, and no earlier block is loaded.
        offload: other blocks than the active (and, if there are several to train, the next one) are in host memory.
    """

    name: str
    fields: Mapping | None = None
    checkpointing: bool = False
    lora: bool = False
    together: bool = False
    objective: str = "local"
    job: bool = False
    train_shared: bool = True
    cached: bool = False
    offload: bool = False

    @property
    def carried(self) -> bool:
        return self.fields is not None and self.fields.get("context") == "carried"

    def loss_block(self, workload: Workload) -> int | None:
        """The block that is read out for the loss of another; None: each reads out itself."""
        return workload.num_blocks - 1 if self.objective == "final" else None


def formulations_for(task: Task, architecture: Backbone) -> dict[str, dict]:
    """Formulation -> what `convert` is given for it: what is recommended for a pretrained model, and the paper's."""
    found = recommended(task.name, "pretrained", architecture)
    fields = {name: found[name] for name in found if name not in ("objective", "num_blocks")}  # the ways', the workload's
    return ({"recommended": fields} if fields and fields != PAPER else {}) | {"joint (paper)": PAPER}


def ways_to_train(formulations: Mapping[str, Mapping]) -> list[Way]:
    """End to end, and each formulation in each mode."""
    ways = [Way("end to end"), Way("end to end, checkpointing", checkpointing=True)]
    if is_peft_available():
        name = f"LoRA (r={LORA_RANK}, attention)"
        ways += [Way(name, lora=True), Way(f"{name}, checkpointing", lora=True, checkpointing=True)]
    for name, fields in formulations.items():
        carried = fields.get("context") == "carried"
        cached = ", cached inputs" if carried else ""
        common, own = {**fields, "shared": "common"}, {**fields, "shared": "per_block"}
        runs_plain = carried and fields.get("denoiser") == "factorized"  # and so trains together by default
        ways += _together(name, common) if runs_plain else []
        ways += [
            Way(f"{name}: all blocks in turn", common),
            Way(f"{name}: all blocks, inactive ones in host memory", common, offload=True),
            Way(f"{name}: job, own embeddings and head{cached}", own, job=True, cached=carried),
            Way(f"{name}: job, shared part frozen{cached}", common, job=True, train_shared=False, cached=carried),
        ]
        if carried:
            around = f"{name}: job, shared part frozen, around the earlier blocks"
            ways.append(Way(around, common, job=True, train_shared=False))
        ways += _final(name, common) if runs_plain else []
    return ways


def _final(name: str, common: Mapping) -> list[Way]:
    """Blocks on the final loss: in turn, and in what holds least."""
    least = f"{name}: job, shared part frozen, final loss, checkpointing, other blocks in host memory"
    return [
        Way(f"{name}: all blocks in turn, final loss", common, objective="final"),
        Way(least, common, checkpointing=True, job=True, train_shared=False, offload=True, objective="final"),
    ]


def _together(name: str, common: Mapping) -> list[Way]:
    """All blocks in one step: on their own losses, and by the exact gradient. (Blocks that start from nothing of one another
    hold together what they hold in turn.)"""
    own = Way(f"{name}: all blocks together, own losses", common, together=True)
    exact = Way(f"{name}: all blocks together, exact gradient", common, together=True, objective="exact")
    elsewhere = "inactive ones in host memory"
    least = replace(exact, name=f"{exact.name}, checkpointing, {elsewhere}", checkpointing=True, offload=True)
    return [
        exact,
        least,
        replace(least, name=f"{least.name}, shared part frozen", train_shared=False),
        own,
        replace(own, name=f"{own.name}, {elsewhere}", offload=True),
    ]
