"""Checkpoints of the Trainer that are whole or not there, whenever the process is killed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

#: Where a checkpoint is written before it has its name, below the output folder. (Pushes to the Hub leave out "_*".)
ASIDE = "_saving"


class AtomicCheckpoints(Trainer):
    """A Trainer that writes each checkpoint aside, and renames it."""

    _aside: Path | None = None  #: where the Trainer is to write, while it writes a checkpoint

    @property
    def writes_checkpoint(self) -> bool:
        """Whether a checkpoint is written just now."""
        return self._aside is not None

    def _get_output_dir(self, trial) -> str:
        # Where the Trainer asks for the folder that it makes checkpoints in.
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def _save_checkpoint(self, model, trial) -> None:
        """As the Trainer's, but written aside and renamed: a checkpoint's folder is whole, or not there."""
        run_dir = Path(self._get_output_dir(trial))
        staged = run_dir / ASIDE
        final = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(staged, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._aside = staged
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._aside = None
        self.accelerator.wait_for_everyone()
        is_best = self.state.best_model_checkpoint == str(staged / final.name)
        if is_best:
            self.state.best_model_checkpoint = str(final)
        if self.args.should_save:
            if is_best:
                self.state.save_to_json(str(staged / final.name / TRAINER_STATE_NAME))
            if final.exists():  # of an earlier run
                os.rename(final, staged / "replaced")
            os.rename(staged / final.name, final)
            for surplus in self._surplus_checkpoints(run_dir):
                os.rename(surplus, staged / surplus.name)
            shutil.rmtree(staged)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(final))

    def _surplus_checkpoints(self, run_dir: Path) -> list[Path]:
        """The oldest beyond `save_total_limit`; never the newest or the best."""
        limit = self.args.save_total_limit
        if limit is None or limit <= 0:
            return []
        found = sort_checkpoints(str(run_dir), use_mtime=True)
        spare = [path for path in found[:-1] if path != self.state.best_model_checkpoint]
        return [Path(path) for path in spare[: max(len(found) - limit, 0)]]

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Later: once the folder has its name."""
