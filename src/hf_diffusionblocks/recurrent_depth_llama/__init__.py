"""A language model of recurrent depth, of stock Llama layers: a plain model of ours, since Transformers has none.

Source: Geiping et al. 2025 (arXiv 2502.05171, "Huginn").
"""

from .configuration import RecurrentDepthLlamaConfig
from .modeling import RecurrentDepthLlamaForCausalLM, RecurrentDepthLlamaModel

__all__ = ["RecurrentDepthLlamaConfig", "RecurrentDepthLlamaForCausalLM", "RecurrentDepthLlamaModel"]
