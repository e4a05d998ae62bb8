"""All that is registered: the tasks, and the architectures of which more is known than their stock class."""

from transformers import (
    AutoConfig, AutoModelForCausalLM, GPT2ForSequenceClassification, GPT2LMHeadModel, LlamaForCausalLM,
    LlamaForSequenceClassification, Qwen3ForCausalLM, Qwen3ForSequenceClassification, ViTForImageClassification,
)  # fmt: skip

from .backbones.dit import DiTBackbone, DiTConfig
from .backbones.gpt2 import GPT2Backbone
from .backbones.llama import LlamaBackbone
from .backbones.qwen3 import Qwen3Backbone
from .backbones.recurrent_depth_llama import RecurrentDepthLlamaBackbone
from .backbones.vit import ViTBackbone
from .configuration import DiffusionBlocksConfig
from .models.causal_lm.task import TEXT_GENERATION
from .models.image_classification.task import IMAGE_CLASSIFICATION
from .models.image_generation.task import IMAGE_GENERATION
from .models.masked_lm.task import FILL_MASK
from .models.text_classification.task import TEXT_CLASSIFICATION
from .recurrent_depth_llama import RecurrentDepthLlamaConfig, RecurrentDepthLlamaForCausalLM
from .tasks import register_backbone, register_task

AutoConfig.register(DiTConfig.model_type, DiTConfig, exist_ok=True)
AutoConfig.register(RecurrentDepthLlamaConfig.model_type, RecurrentDepthLlamaConfig, exist_ok=True)
AutoModelForCausalLM.register(RecurrentDepthLlamaConfig, RecurrentDepthLlamaForCausalLM, exist_ok=True)
# (The first task whose Auto class has an architecture is its usual one.)
for task in (FILL_MASK, TEXT_GENERATION, IMAGE_CLASSIFICATION, IMAGE_GENERATION, TEXT_CLASSIFICATION):
    register_task(task, DiffusionBlocksConfig)
for model_type, task_name, backbone in (
    ("gpt2", "text-generation", GPT2Backbone(GPT2LMHeadModel)),
    ("llama", "text-generation", LlamaBackbone(LlamaForCausalLM)),
    ("qwen3", "text-generation", Qwen3Backbone(Qwen3ForCausalLM)),
    (RecurrentDepthLlamaConfig.model_type, "text-generation", RecurrentDepthLlamaBackbone(RecurrentDepthLlamaForCausalLM)),
    ("gpt2", "text-classification", GPT2Backbone(GPT2ForSequenceClassification, "score")),
    ("llama", "text-classification", LlamaBackbone(LlamaForSequenceClassification, "score")),
    ("qwen3", "text-classification", Qwen3Backbone(Qwen3ForSequenceClassification, "score")),
    ("vit", "image-classification", ViTBackbone(ViTForImageClassification)),
    (DiTConfig.model_type, "image-generation", DiTBackbone()),
):
    register_backbone(model_type, task_name, backbone)
