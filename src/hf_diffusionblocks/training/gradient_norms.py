"""The norm that exact steps clip by: of all gradients, which are never there together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from .parallel import gradients_of


class GradientNorms(TrainerCallback, ExportableState):
    """Norms of the parts of a gradient that is made part by part: of those yet to come in a step, the last step's is taken.

    Kept in a checkpoint's `trainer_state.json`, so that a resumed run clips as the uninterrupted one.
    """

    def __init__(self):
        self.of_part: dict[str, torch.Tensor] = {}

    def clip(self, part: str, parameters: Sequence[nn.Parameter], max_norm: float) -> torch.Tensor:
        """Clip a part by the norm of all, as far as it is known; its own norm before.

        Args:
            max_norm: 0 clips nothing.
        """
        gradients = gradients_of(parameters)
        norm = nn.utils.get_total_norm(gradients)
        if not gradients:  # the norm of nothing is on the CPU
            return norm
        self.of_part[part] = norm
        if max_norm:
            total = torch.stack([norm for _, norm in sorted(self.of_part.items())]).norm()  # (a checkpoint sorts)
            nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
        return norm

    def state(self) -> dict:
        return {"args": {}, "attributes": {"of_part": {part: norm.item() for part, norm in self.of_part.items()}}}

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.get(type(self).__name__)  # none in a checkpoint of another way to train
        norms = saved["attributes"]["of_part"] if saved and state.global_step else {}
        self.of_part = {part: torch.tensor(norm, device=args.device) for part, norm in norms.items()}
