"""Train Hugging Face transformers that do not fit in memory, by streamed layers, or block by block (DiffusionBlocks, arXiv
2506.14202).

Importing this package registers its models with the Auto classes.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from transformers import AutoConfig

from ._version import __version__ as __version__
from . import families  # noqa: F401  registers architectures and tasks
from .configuration import DiffusionBlocksConfig
from .conversion import convert
from .diffusion.schedule import NoiseSchedule
from .evaluation.generated_text import generation_measures
from .evaluation.likelihood import LikelihoodBound, bits_per_byte, nll_bound
from .memory.estimate import MemoryEstimate, estimate_memory
from .memory.ledger import Ledger, StepMemory, measure_memory
from .models.base import DiffusionBlocksPreTrainedModel
from .models.causal_lm.model import DiffusionBlocksForCausalLM
from .models.image_classification.model import DiffusionBlocksForImageClassification
from .models.image_generation.model import DiffusionBlocksForImageGeneration
from .models.masked_lm.model import DiffusionBlocksForMaskedLM
from .models.text_classification.model import DiffusionBlocksForSequenceClassification
from .optimizers import OptimizerInBackward
from .saving.merging import merge_blocks
from .saving.shards import load_block_state_dict
from .streaming import LayerStream, stream_layers

if TYPE_CHECKING:
    from .training import DiffusionBlocksTrainer, DiffusionBlocksTrainingArguments

AutoConfig.register(DiffusionBlocksConfig.model_type, DiffusionBlocksConfig, exist_ok=True)


#: What is imported when it is asked for: what needs packages of an extra, and the Trainer, whose packages take a while.
_LATER = {
    "DiffusionBlocksImagePipeline": ".models.image_generation.pipeline",
    "DiffusionBlocksTrainer": ".training",
    "DiffusionBlocksTrainingArguments": ".training",
    "SampleImages": ".models.image_generation.samples",
}


def __getattr__(name: str):
    if name in _LATER:
        return getattr(import_module(_LATER[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "DiffusionBlocksConfig",
    "DiffusionBlocksForCausalLM",
    "DiffusionBlocksForImageClassification",
    "DiffusionBlocksForImageGeneration",
    "DiffusionBlocksForMaskedLM",
    "DiffusionBlocksForSequenceClassification",
    "DiffusionBlocksPreTrainedModel",
    "DiffusionBlocksTrainer",
    "DiffusionBlocksTrainingArguments",
    "LayerStream",
    "Ledger",
    "LikelihoodBound",
    "MemoryEstimate",
    "NoiseSchedule",
    "OptimizerInBackward",
    "StepMemory",
    "bits_per_byte",
    "convert",
    "estimate_memory",
    "generation_measures",
    "load_block_state_dict",
    "measure_memory",
    "merge_blocks",
    "nll_bound",
    "stream_layers",
]
