"""The row of autoregressive text in the table of tasks."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ...backbones.stock_run import head_of
from ...diffusion.objectives import chunked_sum, cross_entropy
from ...tasks import LABEL_FREE_LOGITS, OF_TEXT, Generation, Task, a_step_a_block, backbone_for, gaussian_noise
from .command import TextOptions, generate
from .model import DiffusionBlocksForCausalLM


def example(config: PreTrainedConfig, num_rows: int, sequence_length: int | None) -> dict[str, torch.Tensor]:
    """Random tokens `[N, S]`, which are their own labels."""
    tokens = torch.randint(config.get_text_config().vocab_size, (num_rows, sequence_length))
    return {"input_ids": tokens, "labels": tokens}


def plain_loss(model: PreTrainedModel, labels: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of a plain model, read out in chunks as ours is: memory and time compare fairly."""
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    backbone = backbone_for(model.config, DiffusionBlocksForCausalLM.task)
    layers_path = backbone.layers_path(model, backbone.num_layers(model.config))

    def loss_of_rows(hidden, targets):
        return cross_entropy(head_of(model, layers_path, hidden).float(), targets).sum()

    rows, head = [hidden, labels[:, 1:].flatten()], list(model.get_output_embeddings().parameters())
    return chunked_sum(loss_of_rows, rows, head, model.config.get_text_config().vocab_size) / len(hidden)


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
