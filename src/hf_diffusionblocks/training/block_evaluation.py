"""Evaluation by the Trainer: of all blocks, with the loss of each; or of those that a job has."""

from __future__ import annotations

import torch
from accelerate.utils import find_batch_size
from transformers import Trainer


class BlockEvaluation(Trainer):
    """The part of the Trainer that evaluates."""

    train_blocks: list[int]
    num_blocks: int

    def __init__(self, *args, **kwargs):
        self._evaluated: list[torch.Tensor] = []  # `[rows, B]` losses of the evaluation that runs
        super().__init__(*args, **kwargs)

    def evaluation_loss(self, model, inputs, *args, **kwargs):
        """What `compute_loss` does in evaluation."""
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if isinstance(result, tuple) and (losses := result[1].get("block_losses")) is not None:
            # As the Trainer does with the loss, so that it is their mean: a batch counts by its rows.
            self._evaluated.append(self.gather_function(losses.repeat(self.args.eval_batch_size, 1)))
        return result

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """As the Trainer's, with the loss of each block, where the model gives it: `eval_loss_block_0`, ..."""
        self._evaluated = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._evaluated:
            means = torch.cat(self._evaluated).mean(0).tolist()
            output.metrics.update({f"{metric_key_prefix}_loss_block_{k}": loss for k, loss in enumerate(means)})
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, *args, **kwargs):
        if len(self.model.resident_blocks) < self.num_blocks:
            return self._block_prediction_step(inputs)
        if prediction_loss_only:
            inputs = {**inputs, "return_logits": False}
        return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)

    @torch.no_grad()
    def _block_prediction_step(self, inputs: dict) -> tuple[torch.Tensor, None, None]:
        """Where blocks are missing there are no label-free logits of the model: the mean of what the trained blocks are
        trained on, where z says nothing of the target."""
        inputs = self._prepare_inputs(inputs)
        num_items = self._get_num_items_in_batch([inputs], self.args.device)
        num_rows, losses = find_batch_size(inputs), []
        for block in self.train_blocks:
            generator = torch.Generator().manual_seed(self.model.config.inference_seed or 0)
            inputs |= {"generator": generator, "block_index": block, **self.model.evaluation_levels(block, num_rows)}
            with self.compute_loss_context_manager():
                losses.append(self.compute_loss(self.model, dict(inputs), num_items_in_batch=num_items))
        return torch.stack(losses).mean().detach(), None, None
