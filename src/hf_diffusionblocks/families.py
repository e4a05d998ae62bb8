"""All that is registered: the architectures that can be converted, and the tasks they are converted for."""

from transformers import AutoConfig

from .backbones.base import register_backbone
from .backbones.dit import DiTBackbone, DiTConfig
from .backbones.gpt2 import GPT2Backbone
from .backbones.llama import LlamaBackbone
from .backbones.qwen3 import Qwen3Backbone
from .backbones.vit import ViTBackbone
from .configuration import DiffusionBlocksConfig
from .models.causal_lm.task import TEXT_GENERATION
from .models.image_classification.task import IMAGE_CLASSIFICATION
from .models.image_generation.task import IMAGE_GENERATION
from .tasks import register_task

AutoConfig.register(DiTConfig.model_type, DiTConfig, exist_ok=True)
for backbone in (GPT2Backbone(), LlamaBackbone(), Qwen3Backbone(), ViTBackbone(), DiTBackbone()):
    register_backbone(backbone)
for task in (TEXT_GENERATION, IMAGE_CLASSIFICATION, IMAGE_GENERATION):
    register_task(task, DiffusionBlocksConfig)
