"""What a job that trains some of the blocks may do, and which parameters it leaves alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset
from transformers import Trainer
from transformers.training_args import OptimizerNames

from ..models.base import DiffusionBlocksPreTrainedModel
from ..saving.resident import checked_blocks
from ..streaming import stream_of
from .arguments import DiffusionBlocksTrainingArguments
from .cached_inputs import column_of, predecessors_column_of
from .parallel import Layout


def check_given_to_trainer(args: DiffusionBlocksTrainingArguments, given: Mapping[str, Any]) -> None:
    """Refuse what the stock Trainer would do with all of a model at once.

    Args:
        given: to the Trainer, beside model and arguments.

    Raises:
        ValueError: names the field.
    """
    if args.label_smoothing_factor:
        raise ValueError(f"label_smoothing_factor={args.label_smoothing_factor} must be 0: a block has a loss of its own")
    optim = OptimizerNames(args.optim).value
    if "layerwise" in optim:
        raise ValueError(f"optim={optim!r} must not be layer-wise: it has no learning-rate schedule by block")
    for name, reason in (
        ("compute_loss_func", "a block has a loss of its own"),
        ("model_init", "blocks are scheduled for the model that is given"),
    ):
        if given.get(name) is not None:
            raise ValueError(f"{name} must be None: {reason}")


def blocks_to_train(
    model: DiffusionBlocksPreTrainedModel, args: DiffusionBlocksTrainingArguments, columns: Sequence[str]
) -> list[int]:
    """The blocks of this job, ascending.

    Args:
        columns: of the training data, which may hold what enters a block.

    Raises:
        ValueError: a block is not loaded; carried context needs an earlier block that is not; or parameters that all
            blocks share would be trained by this job and by others.
    """
    blocks, resident = _chosen_blocks(model, args), model.resident_blocks
    absent = sorted(set(blocks) - set(resident))
    if absent:
        raise ValueError(f"train_blocks={blocks} must be loaded, and {absent} are not: resident_blocks={resident}")
    earlier = sorted(set(model.blocks[max(blocks)].predecessors) - set(resident))
    if earlier and cached_column(blocks, columns) is None:
        raise ValueError(
            f"train_blocks={blocks} of a model whose blocks build on one another needs the earlier blocks {earlier}, which run forward: "
            f"load them too, as they are at the end of their training (resident_blocks={resident}), or train one block "
            "on what cache_block_inputs made"
        )
    if args.train_shared and any(parameter.requires_grad for parameter in model.shared_parameters()):
        check_one_job(blocks, model.num_blocks)
    return blocks


def _chosen_blocks(model: DiffusionBlocksPreTrainedModel, args: DiffusionBlocksTrainingArguments) -> list[int]:
    if args.train_blocks is None:
        return model.resident_blocks
    return checked_blocks(args.train_blocks, model.num_blocks, "train_blocks")


def settle_schedule(model: DiffusionBlocksPreTrainedModel, args: DiffusionBlocksTrainingArguments) -> None:
    """Fill in the schedule where it is not given: all blocks together where a turn of one would run others again, and
    nothing asks for turns.

    Raises:
        ValueError: the model has no such blocks.
    """
    runs_again = len(_chosen_blocks(model, args)) > 1 and model.computes_plain_model
    in_turn = args.block_parallel or args.scales_loss
    if args.block_schedule is None:
        args.block_schedule = "together" if runs_again and not in_turn else "random"


def check_schedule(
    model: DiffusionBlocksPreTrainedModel, args: DiffusionBlocksTrainingArguments, cached: str | None
) -> None:
    """Refuse what blocks cannot be trained on together.

    Args:
        cached: the column of the data that holds what enters the block, if there is one.

    Raises:
        ValueError: names what cannot be combined, and why.
    """
    schedule = f"block_schedule={args.block_schedule!r}"
    if args.block_schedule != "together":
        return
    if args.block_parallel:
        raise ValueError(f"{schedule} with block_parallel=True: each process trains blocks of its own, and none has all")
    if args.scales_loss:
        raise ValueError(
            f"{schedule} with fp16=True: blocks would share one loss scale. bf16=True needs none; or set "
            "block_schedule='random'"
        )
    if cached is not None:
        raise ValueError(f"{schedule} with the column {cached!r}: a job on cached inputs trains one block, and runs no other")


def check_one_job(blocks: Sequence[int], num_blocks: int) -> None:
    """Raises ValueError if a job moves what all blocks share, and trains some of them only."""
    if len(blocks) < num_blocks:
        raise ValueError(
            f"train_shared=True with train_blocks={blocks} of {num_blocks} blocks: separate jobs would each move what all "
            "blocks share. Set train_shared=False, or give each block its own with shared='per_block'"
        )


def cached_column(blocks: Sequence[int], columns: Sequence[str]) -> str | None:
    """The column of the data that holds what enters the block of a one-block job, if there is one."""
    column = column_of(blocks[0])
    return column if len(blocks) == 1 and column in columns else None


def columns_to_keep(model: DiffusionBlocksPreTrainedModel, accepted: Sequence[str], cached: str | None) -> list[str]:
    """Columns of the data that a batch is made of, of those with a name that `forward` has: not what `forward` has beside
    the stock model's, since a data set's `noise` or `sigma` is its own. And what enters the block, if it is cached."""
    ours, stock = (signature(each.forward).parameters for each in (model, model.architecture.plain_class))
    of_data = {*stock, model.main_input_name}  # (which the stock model may call otherwise)
    return [name for name in accepted if name not in ours or name in of_data] + ([cached] if cached else [])


def check_processes(trainer: Trainer, layout: Layout) -> None:
    """Refuse what cannot work in several processes.

    Raises:
        ValueError: names what cannot be combined, and why.
    """
    args, model = trainer.args, trainer.model
    if trainer.is_deepspeed_enabled:
        raise ValueError("DeepSpeed is not supported: use FSDP2, for a job that trains one block")
    if trainer.is_fsdp_enabled:
        _check_sharding(trainer)
    if layout.num_lanes > 1 and args.ema_decay is not None:
        raise ValueError(
            f"ema_decay={args.ema_decay} cannot be combined with block_parallel=True: each process would have the averages "
            "of its own blocks alone. Train blocks in turn, or one block a job"
        )
    if layout.num_lanes > 1 and args.scales_loss and args.train_shared and model.shared_parameters():
        raise ValueError(
            "fp16=True cannot be combined with block_parallel=True and common trained parameters: each block would scale "
            "its loss, and their gradients with it, by itself. bf16=True needs no scale"
        )
    if layout.num_lanes > 1 and isinstance(trainer.train_dataset, IterableDataset):
        raise ValueError(
            f"train_dataset={type(trainer.train_dataset).__name__} must have a length with block_parallel=True: "
            "Accelerate would deal its rows out to all processes, not to those of one block"
        )
    if layout.num_lanes > 1 and trainer.accelerator.dispatch_batches:
        raise ValueError(
            "dispatch_batches=True must be False or None with block_parallel=True: Accelerate would deal rows out to all "
            "processes, not to those of one block"
        )


def _check_sharding(trainer: Trainer) -> None:
    args, model, plugin = trainer.args, trainer.model, trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(f"fsdp_version={plugin.fsdp_version} must be 2")
    if plugin.cpu_ram_efficient_loading:
        raise ValueError("fsdp_cpu_ram_efficient_loading=True must be False: it cannot load saved buffers (fixed targets)")
    if len(trainer.train_blocks) > 1 or args.block_parallel:
        raise ValueError(
            f"FSDP with train_blocks={trainer.train_blocks} and block_parallel={args.block_parallel}: it shards a job that "
            "trains one block, too large for one device. Load and train one block: resident_blocks=[k]"
        )
    if not model.can_generate():
        raise ValueError(f"FSDP with model_type={model.config.source_config.model_type!r}: Accelerate shards text models only")
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    names = [name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is embedding]
    if len(names) > 1:
        raise ValueError(f"FSDP with embeddings tied to the head ({', '.join(names)}): Accelerate shards them apart")
    if model.formulation.modulated:
        raise ValueError(
            "FSDP with preset='paper': its streams call parts of the attention module, which FSDP gathers as a whole"
        )
    if stream_of(model) is not None:
        raise ValueError("FSDP with a streamed model: sharded parameters stay where they are. Call stop() of its stream before")
    if args.block_schedule == "together":
        raise ValueError("FSDP with block_schedule='together': it shards a job that trains one block. Set 'random'")
    if args.ema_decay is not None:
        raise ValueError(f"FSDP with ema_decay={args.ema_decay}: averages of sharded parameters are not implemented")
    # A layer is run through its parts, so these are what FSDP gathers as they are called.
    layer = model.blocks[trainer.train_blocks[0]].layers[0]
    plugin.transformer_cls_names_to_wrap = [type(part).__name__ for part in layer.children() if any(part.children())]


def check_evaluation_data(trainer: Trainer, cached: str | None) -> None:
    """Raise ValueError if a job on cached inputs, which has no earlier blocks, would evaluate on data that no cache was made of."""
    if cached is None or len(trainer.model.resident_blocks) == trainer.model.num_blocks:
        return
    given = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
    for name, data in given.items():
        if cached not in (getattr(data, "column_names", None) or [cached]):
            raise ValueError(
                f"eval_dataset{name and f'[{name!r}]'} must have the column {cached!r}, as train_dataset has, since earlier blocks "
                "are not loaded: cache_block_inputs makes it"
            )


class WithBlockInput:
    """A collator that also stacks what enters the block, where the rows have it."""

    def __init__(self, collator: Callable[[list[dict]], dict], block_index: int):
        self.collator, self.column = collator, column_of(block_index)
        self.dropped = {self.column, predecessors_column_of(block_index)}

    def __call__(self, rows: list[dict]) -> dict:
        if self.column not in rows[0]:  # of a set to evaluate the whole model on
            return self.collator(rows)
        hidden = torch.stack([torch.as_tensor(np.asarray(row[self.column], np.float32)) for row in rows])
        others = [{name: value for name, value in row.items() if name not in self.dropped} for row in rows]
        return {**self.collator(others), "block_input": hidden}


class WithoutFullMask:
    """A collator that leaves out an attention mask that hides nothing: here, in host memory, that is seen for nothing, and
    attention without a mask has faster kernels. (Not beside `position_ids`: texts packed in a row are told apart by these
    where there is no mask.)"""

    def __init__(self, collator: Callable[[list[dict]], dict]):
        self.collator = collator
        self.tokenizer = getattr(collator, "tokenizer", None)  # which the Trainer saves

    def __call__(self, rows: list[dict]) -> dict:
        batch = self.collator(rows)
        mask = batch.get("attention_mask")
        if mask is None or "position_ids" in batch or mask.dim() != 2 or not bool((mask == 1).all()):
            return batch  # (one of four dimensions says who sees whom)
        return {name: value for name, value in batch.items() if name != "attention_mask"}
