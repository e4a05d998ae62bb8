"""All that is registered: the architectures that can be converted, and the tasks they are converted for."""

from transformers import AutoConfig, AutoModelForCausalLM

from .backbones.base import register_backbone
from .backbones.bert import BertBackbone
from .backbones.dit import DiTBackbone, DiTConfig
from .backbones.gpt2 import GPT2Backbone
from .backbones.llama import LlamaBackbone
from .backbones.modernbert import ModernBertBackbone
from .backbones.qwen3 import Qwen3Backbone
from .backbones.recurrent_depth_llama import RecurrentDepthLlamaBackbone
from .backbones.vit import ViTBackbone
from .configuration import DiffusionBlocksConfig
from .models.causal_lm.task import TEXT_GENERATION
from .models.image_classification.task import IMAGE_CLASSIFICATION
from .models.image_generation.task import IMAGE_GENERATION
from .models.masked_lm.task import FILL_MASK
from .recurrent_depth_llama import RecurrentDepthLlamaConfig, RecurrentDepthLlamaForCausalLM
from .tasks import register_task

AutoConfig.register(DiTConfig.model_type, DiTConfig, exist_ok=True)
AutoConfig.register(RecurrentDepthLlamaConfig.model_type, RecurrentDepthLlamaConfig, exist_ok=True)
AutoModelForCausalLM.register(RecurrentDepthLlamaConfig, RecurrentDepthLlamaForCausalLM, exist_ok=True)
for backbone in (
    GPT2Backbone(), LlamaBackbone(), Qwen3Backbone(), RecurrentDepthLlamaBackbone(), BertBackbone(), ModernBertBackbone(),
    ViTBackbone(), DiTBackbone(),
):  # fmt: skip
    register_backbone(backbone)
# (What an architecture serves first is its usual task.)
for task in (TEXT_GENERATION, FILL_MASK, IMAGE_CLASSIFICATION, IMAGE_GENERATION):
    register_task(task, DiffusionBlocksConfig)
