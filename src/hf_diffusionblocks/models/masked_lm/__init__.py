"""Masked diffusion language models."""

from .model import DiffusionBlocksForMaskedLM

__all__ = ["DiffusionBlocksForMaskedLM"]
