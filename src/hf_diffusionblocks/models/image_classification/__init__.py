"""Image classification."""

from .model import DiffusionBlocksForImageClassification, WalkClassifierOutput

__all__ = ["DiffusionBlocksForImageClassification", "WalkClassifierOutput"]
