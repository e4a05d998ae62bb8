"""One model class a task."""

from .base import DiffusionBlocksPreTrainedModel
from .causal_lm.model import DiffusionBlocksForCausalLM
from .image_classification.model import DiffusionBlocksForImageClassification, WalkClassifierOutput

#: Task, as in `pipeline(task)` -> its class.
MODELS: dict[str, type[DiffusionBlocksPreTrainedModel]] = {
    model_class.task: model_class for model_class in (DiffusionBlocksForCausalLM, DiffusionBlocksForImageClassification)
}

__all__ = [
    "MODELS",
    "DiffusionBlocksForCausalLM",
    "DiffusionBlocksForImageClassification",
    "DiffusionBlocksPreTrainedModel",
    "WalkClassifierOutput",
]
