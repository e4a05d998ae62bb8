"""What a saved model says of the run that trained it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..saving import cards
from ..saving.shards import Provenance
from .checkpoints import AtomicCheckpoints


class RunReports(AtomicCheckpoints):
    """The part of the Trainer that notes in config and model card what it has done."""

    def train(self, *args, **kwargs):
        result = super().train(*args, **kwargs)
        self.model.provenance = Provenance(self._updates())  # for whoever saves the model itself
        return result

    def save_model(self, *args, **kwargs) -> None:
        if self.state.global_step:
            self.model.provenance = Provenance(self._updates())
            self.model.config.training_report = self._training_report()
        super().save_model(*args, **kwargs)

    def _updates(self) -> list[int]:
        """Of each block, in this run."""
        step = self.state.global_step
        return [self.block_schedule.updates_before(step, k) for k in range(self.num_blocks)]

    def _training_report(self) -> dict:
        """What the model card says of this run; JSON-able."""
        evaluations = [entry for entry in self.state.log_history if any(key.startswith("eval_") for key in entry)]
        results = evaluations[-1] if evaluations else {}
        return {
            **(self.model.config.training_report or {}),
            "train_examples": len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None,
            "steps": self.state.global_step,
            "updates_per_block": self._updates(),
            "block_schedule": self.args.block_schedule,
            "batch_size": self.get_total_train_batch_size(self.args),
            "learning_rate": self.args.learning_rate,
            "ema_decay": None if self.writes_checkpoint else self.args.ema_decay,
            "seed": self.args.seed,
            "results": {
                key: value
                for key, value in results.items()
                if key.startswith("eval_") and not key.endswith(("_runtime", "_per_second")) and np.isscalar(value)
            },
            "memory": self._ledgers.report() if self._ledgers else {},
        }

    def create_model_card(self, *args, **kwargs) -> None:
        """Write the DiffusionBlocks card to the output folder, where the Trainer would write its own."""
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            cards.write(self.model, folder, keep_from=folder)
