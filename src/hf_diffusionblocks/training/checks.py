"""What a job that trains some of the blocks may do, and which parameters it leaves alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel, Trainer
from transformers.training_args import OptimizerNames

from ..models.base import DiffusionBlocksPreTrainedModel
from ..optimizers import check_counts
from ..saving.resident import checked_blocks
from .arguments import DiffusionBlocksTrainingArguments


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
    for kind, reason in (
        ("layerwise", "layer-wise: it has no learning-rate schedule by block"),
        ("lomo", "LOMO's: it moves parameters in the backward pass, which blocks share"),
        ("schedule_free", "schedule-free: it counts the turns of all blocks as steps of each"),
    ):
        if kind in optim:
            raise ValueError(f"optim={optim!r} must not be {reason}. 'adamw_torch' and the like can be taken")
    for name, reason in (
        ("compute_loss_func", "a block has a loss of its own"),
        ("model_init", "blocks are scheduled for the model that is given"),
    ):
        if given.get(name) is not None:
            raise ValueError(f"{name} must be None: {reason}")


def check_neftune(model: DiffusionBlocksPreTrainedModel, args: DiffusionBlocksTrainingArguments) -> None:
    """Raise ValueError if noise on embeddings is asked for, and blocks have embeddings that the Trainer does not know."""
    unknown = not isinstance(model.backbone, PreTrainedModel) or any(block.embeds_apart for block in model.blocks)
    if args.neftune_noise_alpha is not None and unknown:
        raise ValueError(
            f"neftune_noise_alpha={args.neftune_noise_alpha} must be None for {type(model).__name__} with "
            f"shared={model.config.shared!r}: it is for models of Transformers with one embedding, which all blocks start from"
        )


def blocks_to_train(model: DiffusionBlocksPreTrainedModel, args: DiffusionBlocksTrainingArguments) -> list[int]:
    """The blocks of this job, ascending.

    Raises:
        ValueError: a block is not loaded; an earlier block that it builds on is not; or parameters that all
            blocks share would be trained by this job and by others.
    """
    blocks, resident = _chosen_blocks(model, args), model.resident_blocks
    absent = sorted(set(blocks) - set(resident))
    if absent:
        raise ValueError(f"train_blocks={blocks} must be loaded, and {absent} are not: resident_blocks={resident}")
    earlier = sorted(set(model.blocks[max(blocks)].predecessors) - set(resident))
    if earlier:
        raise ValueError(
            f"train_blocks={blocks} of a model whose blocks build on one another needs the earlier blocks {earlier}, which run "
            f"forward: load them too, as they are at the end of their training (resident_blocks={resident})"
        )
    if args.train_shared and any(parameter.requires_grad for parameter in model.shared_parameters()):
        check_one_job(blocks, model.num_blocks)
    return blocks


def _chosen_blocks(model: DiffusionBlocksPreTrainedModel, args: DiffusionBlocksTrainingArguments) -> list[int]:
    if args.train_blocks is None:
        return model.resident_blocks
    return checked_blocks(args.train_blocks, model.num_blocks, "train_blocks")


def settle_schedule(model: DiffusionBlocksPreTrainedModel, args: DiffusionBlocksTrainingArguments) -> None:
    """Fill in the schedule where it is not given: all blocks together where a turn of one would run others again.

    Raises:
        ValueError: the model has no such blocks.
    """
    runs_again = len(_chosen_blocks(model, args)) > 1 and model.computes_plain_model
    if args.block_schedule is None:
        args.block_schedule = "together" if runs_again else "random"


@contextmanager
def trained_parameters(
    model: nn.Module, blocks: Sequence[int], train_shared: bool
) -> Iterator[dict[int | None, list[nn.Parameter]]]:
    """The parameters of what a run trains, by block; until it ends, those of other blocks ask for no gradients.

    What is frozen or thawed before the run, or by a callback in it, is left as it is. (A pass reaches no block but its own:
    nothing has to be frozen from turn to turn.)

    Args:
        blocks: that the run trains.
        train_shared: whether what belongs to no block (None) trains, too. If not, its batch norms run as they are in use:
            what they count of batches would differ from job to job.
    """
    norms = [] if train_shared else [
        norm for name, norm in batch_norms(model).items() if model.block_of_parameter(f"{name}.") is None
    ]  # fmt: skip
    hooks = [norm.register_forward_pre_hook(_as_in_use) for norm in norms]
    trained: dict[int | None, list[nn.Parameter]] = {None: [], **{block: [] for block in blocks}}
    set_aside = []
    for name, parameter in model.named_parameters():
        owner = model.block_of_parameter(name)
        if owner in blocks or owner is None and train_shared:
            trained[owner].append(parameter)
        elif parameter.requires_grad:
            set_aside.append(parameter.requires_grad_(False))
    try:
        yield trained
    finally:
        for hook, norm in zip(hooks, norms):
            hook.remove()
            norm.train(model.training)
        for parameter in set_aside:
            parameter.requires_grad_(True)


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """By name: what keeps statistics of batches."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def _as_in_use(module: nn.Module, args: tuple) -> None:
    module.eval()


def check_one_job(blocks: Sequence[int], num_blocks: int) -> None:
    """Raises ValueError if a job moves what all blocks share, and trains some of them only."""
    if len(blocks) < num_blocks:
        raise ValueError(
            f"train_shared=True with train_blocks={blocks} of {num_blocks} blocks: separate jobs would each move what all "
            "blocks share. Set train_shared=False, or give each block its own with shared='per_block'"
        )


def columns_to_keep(model: DiffusionBlocksPreTrainedModel, accepted: Sequence[str]) -> list[str]:
    """Columns of the data that a batch is made of, of those with a name that `forward` has: not what `forward` has beside
    the stock model's, since a data set's `noise` or `sigma` is its own."""
    ours, stock = (signature(each.forward).parameters for each in (model, model.architecture.plain_class))
    of_data = {*stock, model.main_input_name}  # (which the stock model may call otherwise)
    labels = ["labels"] if WithClassLabels.is_for(model) else []
    accepted = dict.fromkeys((*accepted, *stock)) if model.takes_stock_tensors else accepted
    return [name for name in (*accepted, *labels) if name not in ours or name in of_data]


def check_processes(trainer: Trainer) -> None:
    """Refuse what would take a model apart that blocks are run of.

    Raises:
        ValueError: names it, and what serves instead.
    """
    for name, asked in (("DeepSpeed", trainer.is_deepspeed_enabled), ("FSDP", trainer.is_fsdp_enabled)):
        if asked:
            raise ValueError(
                f"{name} is not supported for blocks: each is trained alone. Where one does not fit, stream its layers "
                "(stream_layers(model), in one process)"
            )
    if trainer.args.mixed_precision == "fp16":  # whoever says so, the launcher or the arguments
        raise ValueError("fp16=True must be False: blocks would share one loss scale. bf16=True needs none")


def check_optimizer(optimizer: torch.optim.Optimizer | None, model: DiffusionBlocksPreTrainedModel) -> None:
    """Raise ValueError if an optimizer is given that moves nothing of the model: one made before `convert`, for example."""
    if optimizer is None:
        return
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(
            f"optimizers=({type(optimizer).__name__}, ...) holds no parameter of the model: convert() copies weights, so make "
            "it of the converted model"
        )
    check_counts(optimizer)


class WithClassLabels:
    """A collator for a model that is told classes: what data sets call `labels`, it calls `class_labels`."""

    def __init__(self, collator: Callable[[list[dict]], dict]):
        self.collator = collator

    @staticmethod
    def is_for(model: DiffusionBlocksPreTrainedModel) -> bool:
        taken = signature(model.forward).parameters
        return "class_labels" in taken and "labels" not in taken

    def __call__(self, rows: list[dict]) -> dict:
        batch = dict(self.collator(rows))
        labels = batch.pop("labels", None)
        return batch if labels is None else {"class_labels": labels, **batch}


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
