"""Training block by block with the Hugging Face Trainer."""

from .arguments import DiffusionBlocksTrainingArguments
from .block_schedule import BlockSchedule
from .trainer import DiffusionBlocksTrainer

__all__ = ["BlockSchedule", "DiffusionBlocksTrainer", "DiffusionBlocksTrainingArguments"]
