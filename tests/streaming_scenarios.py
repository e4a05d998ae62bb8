"""What test_streaming_processes.py launches in two processes: stock and streamed training.

python streaming_scenarios.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from streaming_models import weights
from test_streaming_training import adapted, trained

from hf_diffusionblocks.training.process_group import leave_at_exit

SCENARIOS = {"plain": {}, "bf16": {"bf16": True}, "lora": {"model": adapted}}


def main() -> None:
    leave_at_exit()
    folder = Path(sys.argv[1])
    for name, how in SCENARIOS.items():
        for streamed in (False, True):
            given = {key: value() if key == "model" else value for key, value in how.items()}
            trainer = trained(folder / "run", streamed, max_steps=3, **given)
            kept = weights(trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False))
            torch.save(kept, folder / f"{name}-{streamed}-{trainer.args.process_index}.pt")


if __name__ == "__main__":
    main()
