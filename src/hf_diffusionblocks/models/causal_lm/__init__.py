"""Autoregressive text."""

from .model import DiffusionBlocksForCausalLM

__all__ = ["DiffusionBlocksForCausalLM"]
