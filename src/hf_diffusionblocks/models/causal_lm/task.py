"""The row of autoregressive text in the table of tasks."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ...tasks import LABEL_FREE_LOGITS, OF_TEXT, Generation, Task, a_step_a_block, gaussian_noise
from ..plain_text import mean_cross_entropy
from .command import TextOptions, generate
from .model import DiffusionBlocksForCausalLM


def example(config: PreTrainedConfig, num_rows: int, sequence_length: int | None) -> dict[str, torch.Tensor]:
    """Random tokens `[N, S]`, which are their own labels."""
    tokens = torch.randint(config.get_text_config().vocab_size, (num_rows, sequence_length))
    return {"input_ids": tokens, "labels": tokens}


def plain_loss(model: PreTrainedModel, labels: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the token after each."""
    targets, task = labels[:, 1:].flatten(), DiffusionBlocksForCausalLM.task
    return mean_cross_entropy(model, task, targets, lambda hidden: hidden[:, :-1], **inputs, use_cache=False)


TEXT_GENERATION = Task(
    name=DiffusionBlocksForCausalLM.task,
    model_class=DiffusionBlocksForCausalLM,
    auto_class=AutoModelForCausalLM,
    stock_auto_classes=(AutoModelForCausalLM,),
    example=example,
    plain_loss=plain_loss,
    **OF_TEXT,
    usage='write = pipeline("text-generation", model={name})\n'
    'write("Once upon a time", max_new_tokens=50, do_sample=True, top_p=0.9)',
    formulations={"recommended": {"local_head_layers": 0}, "paper": gaussian_noise(overlap=0.1)},
    evaluation=LABEL_FREE_LOGITS,
    settle=a_step_a_block,
    generation=Generation(TextOptions, generate),
)
