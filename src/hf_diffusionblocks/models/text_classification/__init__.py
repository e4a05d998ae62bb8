"""Text classification."""

from .model import DiffusionBlocksForSequenceClassification

__all__ = ["DiffusionBlocksForSequenceClassification"]
