"""The row of text classification in the table of tasks."""

from __future__ import annotations

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from ...tasks import LABEL_FREE_LOGITS, OF_TEXT, Task, a_step_a_block, gaussian_noise
from .model import DiffusionBlocksForSequenceClassification


CHARACTERS = 128  #: where a model has no vocabulary


def example(config: PreTrainedConfig, num_rows: int, sequence_length: int | None) -> dict[str, torch.Tensor]:
    """Random tokens `[N, S]`, of which the last ends a text where the model knows an end, and labels `[N]`."""
    text = config.get_text_config(decoder=True)
    tokens = torch.randint(getattr(text, "vocab_size", CHARACTERS) - 1, (num_rows, sequence_length))
    end = getattr(text, "eos_token_id", None)
    if isinstance(end, int):
        tokens += tokens >= end
        tokens[:, -1] = end
    return {"input_ids": tokens, "labels": torch.randint(config.num_labels, (num_rows,))}


def plain_loss(model: PreTrainedModel, **batch: torch.Tensor) -> torch.Tensor:
    """The plain model's own."""
    return model(**batch).loss


TEXT_CLASSIFICATION = Task(
    name=DiffusionBlocksForSequenceClassification.task,
    model_class=DiffusionBlocksForSequenceClassification,
    auto_class=AutoModelForSequenceClassification,
    stock_auto_classes=(AutoModelForSequenceClassification,),
    example=example,
    plain_loss=plain_loss,
    **OF_TEXT,
    usage='classify = pipeline("text-classification", model={name})\nclassify("A text whose class is asked for.")',
    formulations={"recommended": {"local_head_layers": 0}, "paper": gaussian_noise(overlap=0.05)},
    evaluation=LABEL_FREE_LOGITS,
    settle=a_step_a_block,
)
