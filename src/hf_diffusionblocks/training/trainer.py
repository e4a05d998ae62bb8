"""The Hugging Face Trainer, training blocks one by one: in turns, or one after another in each step."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from inspect import signature
from pathlib import Path

import torch
from accelerate.utils import TorchDynamoPlugin, find_batch_size
from transformers.utils import logging

from ..diffusion.randomness import keyed_generators
from ..memory.ledger import Ledger
from ..models.base import DiffusionBlocksPreTrainedModel
from ..optimizers import OptimizerInBackward, check_counts
from ..saving import shards
from ..saving.checks import has_adapters
from .arguments import DiffusionBlocksTrainingArguments
from .averages import AveragingTrainer
from .block_evaluation import BlockEvaluation
from .block_schedule import BlockSchedule, learning_rate_curve, scheduler_by_block, split_by_block
from .checks import (
    WithClassLabels, WithoutFullMask, batch_norms, blocks_to_train, check_given_to_trainer, check_neftune,
    check_optimizer, check_processes, columns_to_keep, settle_schedule, trained_parameters,
)  # fmt: skip
from .parallel import average_gradients, broadcast
from .process_group import leave_at_exit
from .resumed_runs import StepsOfRun
from .step_ledgers import StepLedgers
from .together import TogetherSteps

logger = logging.get_logger(__name__)


class DiffusionBlocksTrainer(BlockEvaluation, AveragingTrainer):
    """Trains a DiffusionBlocks model; used as [`~transformers.Trainer`] is.

    Each optimizer step trains one block, the same for all its micro-batches and on all ranks; or
    (`block_schedule="together"`) all blocks, one after another. Only the gradients of one block are there at a time, and
    those of what blocks share. Noise is keyed by seed, step and the row's number in the step's batch: a resumed run repeats
    the uninterrupted one, and neither several processes nor gradient accumulation change what a row meets. (Of masked text,
    how many tokens are masked is spread over a micro-batch.)

    Args:
        model: from [`convert`] or `from_pretrained`.
        args: [`DiffusionBlocksTrainingArguments`].
        the rest: as [`~transformers.Trainer`].

    Raises:
        TypeError: model or args are of another class.
        ValueError: the model has adapters, one process sees several devices, `lr_scheduler_type` is not a
            function of the step, the loss is asked to be another, `train_blocks` asks for what one job cannot do alone,
            or processes and formulation do not go together.
    """

    args: DiffusionBlocksTrainingArguments

    def __init__(
        self,
        model: DiffusionBlocksPreTrainedModel | None = None,
        args: DiffusionBlocksTrainingArguments | None = None,
        **kwargs,
    ):
        if not isinstance(args, DiffusionBlocksTrainingArguments):
            raise TypeError(f"args={type(args).__name__} must be DiffusionBlocksTrainingArguments")
        check_given_to_trainer(args, kwargs)
        if isinstance(model, torch.nn.Module) and has_adapters(model):
            raise ValueError(
                f"model={type(model).__name__} has adapters (PEFT), and blocks are trained whole: merge_and_unload() them first. "
                "To train adapters, stream_layers() the plain model, under any other trainer"
            )
        if not isinstance(model, DiffusionBlocksPreTrainedModel):
            raise TypeError(f"model={type(model).__name__} must be a DiffusionBlocks model: convert() makes one")
        if args.n_gpu > 1:  # the Trainer would wrap the model in DataParallel, whose threads would share one generator
            raise ValueError(
                f"{args.n_gpu} devices in one process cannot be trained on: start one process each with `accelerate "
                "launch`, or choose one with CUDA_VISIBLE_DEVICES"
            )
        check_neftune(model, args)
        args = copy.copy(args)  # the caller's stay as they are, for another model
        settle_schedule(model, args)
        together = args.block_schedule == "together"
        self.num_blocks = model.config.num_blocks
        self.train_blocks = blocks_to_train(model, args)
        if args.updates_per_block is not None:
            args.max_steps = args.updates_per_block * (1 if together else len(self.train_blocks))
        super().__init__(model=model, args=args, **kwargs)
        if args.label_names is None and "labels" not in signature(model.forward).parameters:
            self.label_names = []  # what it is trained on is the input itself (`class_labels` are a condition)
        leave_at_exit()
        check_processes(self)
        check_optimizer(self.optimizer, model)
        if args.torch_compile:
            model.compile_layers(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        if WithClassLabels.is_for(model):
            self.data_collator = WithClassLabels(self.data_collator)
        if args.include_num_input_tokens_seen != "non_padding":  # which counts by masks
            self.data_collator = WithoutFullMask(self.data_collator)
        learning_rate_curve(args, num_updates=1)  # complain before training
        self.block_schedule: BlockSchedule | None = None  # known once training knows its number of steps
        self.active_block = self.train_blocks[0]  #: the block that trains now
        self._steps_of_run = StepsOfRun.of(args, self.train_blocks)
        self.add_callback(self._steps_of_run)
        self._together = TogetherSteps(self) if together else None
        #: of each block that trains, and of none (those that are frozen just now, too); known once training begins
        self._parameters: dict[int | None, list[torch.nn.Parameter]] = {}
        self._statistics: list[torch.Tensor] = []  # of batch norms
        self._micro_batch = 0
        self._block_losses = torch.zeros(self.num_blocks, 2, device=args.device)  # sum and count since the last log
        self._ledgers = StepLedgers(self) if args.measure_memory else None
        if self._ledgers:
            self.add_callback(self._ledgers)

    def _build_accelerator_args(self, **kwargs) -> dict:
        # Compiled as a whole, the model would be a graph for each block, broken at every draw.
        return super()._build_accelerator_args(**kwargs) | {"dynamo_plugin": TorchDynamoPlugin(backend="NO")}

    # ---- which block

    def get_batch_samples(self, *args, **kwargs):
        # The Trainer calls this once for each optimizer step, before its micro-batches.
        if self._together is None:
            self.begin_block(self.block_schedule.block_at(self.state.global_step))
        return super().get_batch_samples(*args, **kwargs)

    def begin_block(self, block: int) -> None:
        """Have the passes that come train a block."""
        self.active_block = block
        self._micro_batch = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return self.evaluation_loss(model, inputs, return_outputs, num_items_in_batch)
        m, self._micro_batch = self._micro_batch, self._micro_batch + 1
        given = {"block_index": self.active_block}
        given |= self._together.entering(m) if self._together is not None else {}
        if self.model.noise_schedule is not None:
            given["generator"] = self.noise_generators(m, find_batch_size(inputs))
        loss, outputs = super().compute_loss(model, {**inputs, **given}, True, num_items_in_batch)
        for value in outputs.values():  # of a block that is frozen, whose step moves nothing
            if torch.is_tensor(value):
                value.requires_grad_()
        if self._together is not None:
            self._together.note(m, outputs)
        return (loss, outputs) if return_outputs else loss

    def _set_signature_columns_if_needed(self) -> None:
        # The only word that the Trainer takes on which columns to keep: it has no argument for them.
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns = columns_to_keep(self.model, self._signature_columns)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device):
        # The Trainer counts the labels of its batches; a model knows which of them have a loss.
        counted = [
            {**batch, "labels": self.model.counted_labels(batch)} if "labels" in batch else batch for batch in batch_samples
        ]
        return super()._get_num_items_in_batch(counted, device)

    def noise_generators(self, micro_batch: int, num_rows: int) -> list[torch.Generator]:
        """Of each row of a micro-batch of the step."""
        processes = self.args.world_size
        batch_size = self.args.train_batch_size // (processes if self.accelerator.split_batches else 1)
        first = (micro_batch * processes + self.args.process_index) * batch_size
        return keyed_generators([self.args.seed, self.state.global_step], range(first, first + num_rows), self.args.device)

    def training_step(self, model, inputs, num_items_in_batch=None):
        is_last = self.accelerator.sync_gradients
        if self._together is not None:
            loss = self._together.training_step(inputs, num_items_in_batch)
        else:
            loss = self.block_pass(model, inputs, num_items_in_batch, is_last)
        if is_last and self.args.world_size > 1:
            if self._together is None:
                average_gradients([*self._parameters[self.active_block], *self._parameters[None]])
            # Batch norms, which each process counts for itself: by rank 0's, which are saved, the next blocks' steps run.
            broadcast(self._statistics, source=0)
        return loss

    def block_pass(self, model, inputs, num_items_in_batch, is_last: bool) -> torch.Tensor:
        """Forward and backward pass of the active block, over a micro-batch; its loss."""
        self.model.trained_block = self.active_block
        try:
            with self._ledgers.following() if self._ledgers and is_last else nullcontext():
                loss = super().training_step(model, inputs, num_items_in_batch)
        finally:
            self.model.trained_block = None
        for block, parameters in self._parameters.items():  # (an own loss may have a penalty on all parameters)
            if block not in (None, self.active_block):
                for parameter in parameters:
                    parameter.grad = None
        # `loss` is already divided by the number of micro-batches.
        self._block_losses[self.active_block, 0] += loss
        self._block_losses[self.active_block, 1] += 1 / self.current_gradient_accumulation_steps
        return loss

    # ---- several processes

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        # A model that "owns placement and gradient reduction" is not wrapped in DDP, nor moved to the device.
        self._move_model_to_device(self.model, self.args.device)
        self._schedule_blocks(max_steps)
        self.is_distributed_loading_by_transformers = True
        try:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        finally:
            self.is_distributed_loading_by_transformers = False
        check_counts(self.optimizer)  # whoever has made it
        return prepared

    def _sync_replicated_trainable_parameters(self, model) -> None:
        if self.args.world_size > 1:  # as DDP does: all start from rank 0's weights, frozen ones and buffers, too
            broadcast((*self.model.parameters(), *self.model.buffers()), source=0)
            self._statistics = [buffer for norm in batch_norms(self.model).values() for buffer in norm.buffers()]

    # ---- optimizer and schedule

    def create_optimizer(self, model=None):
        """The Trainer's optimizer, with each of its groups split by block and tagged with it (None: shared)."""
        made_here = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if made_here:
            split_by_block(optimizer, self.model)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """`lr_scheduler_type` over the updates of one block; each group advances with the updates of its block."""
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = scheduler_by_block(self.args, optimizer, self._schedule_blocks(num_training_steps))
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _schedule_blocks(self, num_steps: int) -> BlockSchedule:
        self.block_schedule = BlockSchedule(self.args.block_schedule, self.train_blocks, num_steps, self.args.seed)
        return self.block_schedule

    def _get_learning_rate(self) -> float:
        # Of the active block, before the step that is logged; `log` comes after it. The Trainer's is the first group's.
        groups, rates = self.optimizer.param_groups, self.lr_scheduler.get_last_lr()
        for group, rate in zip(groups, rates):
            if group.get("block") == self.active_block:
                return float(rate)
        return float(rates[0])

    # ---- reports

    @property
    def ledgers(self) -> dict[int, Ledger]:
        """What a step of each block that this process has trained holds in memory; print one for a table."""
        return dict(self._ledgers.of_block) if self._ledgers else {}

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            totals = self.accelerator.reduce(self._block_losses, "sum").tolist()
            logs |= {f"loss_block_{k}": total / count for k, (total, count) in enumerate(totals) if count}
            self._block_losses.zero_()
        if self._together is not None and "grad_norm" in logs:
            logs["grad_norm"] = self._together.norm(logs["grad_norm"])
        super().log(logs, *args, **kwargs)

    def train(self, *args, **kwargs):
        if any(isinstance(each, OptimizerInBackward) for each in self.callback_handler.callbacks):
            raise ValueError("callbacks must hold no OptimizerInBackward: gradients of one block are there at a time as it is")
        for k in self.train_blocks:
            block, schedule, levels = self.model.blocks[k], self.model.noise_schedule, ""
            if schedule is not None:
                low, high = schedule.interval(k, schedule.overlap)
                levels = f" trains at {schedule.level_name} ({low:.4g}, {high:.4g}],"
            logger.info(
                f"block {k}: layers {block.layer_indices[0]}-{block.layer_indices[-1]},{levels} "
                f"{sum(p.numel() for p in block.parameters()):,} parameters"
            )
        if self._together is not None:
            self._together.forget()
        with trained_parameters(self.model, self.train_blocks, self.args.train_shared) as self._parameters:
            if not any(parameter.requires_grad for parameter in sum(self._parameters.values(), [])):
                raise ValueError(f"no parameter of train_blocks={self.train_blocks} asks for gradients: all are frozen")
            result = super().train(*args, **kwargs)
        if self._ledgers:
            self._ledgers.log()
        return result

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.averages:
            self.averages.load(self.state.best_model_checkpoint)

    # ---- checkpoints

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.averages and checkpoint is not None:
            self.averages.load(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        # The Trainer's reads what is there: a save that is not finished, shards that are not whole.
        folder = Path(resume_from_checkpoint)
        shards.finish_interrupted_save(folder)
        self._steps_of_run.check(folder)
        shards.check_shards(folder)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result) -> None:
        # The Trainer goes on with weights that it has not loaded. (Tied ones are saved once.)
        lacks = sorted(set(load_result.missing_keys) - set(self.model.all_tied_weights_keys))
        if lacks or load_result.unexpected_keys:
            says, name = ("lacks", lacks[0]) if lacks else ("has", min(load_result.unexpected_keys))
            raise ValueError(
                f"the checkpoint is of another model: it {says} {name}. Resume with the model that has written it, or start anew "
                "from what from_pretrained() or convert() makes of its folder"
            )
