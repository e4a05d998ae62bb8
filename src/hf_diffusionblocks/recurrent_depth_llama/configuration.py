"""Config of a Llama of recurrent depth."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from ..whole_numbers import check_whole


@strict
class RecurrentDepthLlamaConfig(LlamaConfig):
    """Config of a prelude, a core that runs several times over, and a coda, all of Llama layers.

    Args:
        num_prelude_layers, num_core_layers, num_coda_layers: how many layers each has.
        mean_recurrence: about how often the core runs in training (the mean is one more), and, unless `num_steps` says
            otherwise, how often in evaluation.
        backprop_depth: gradients run through the last so many of these runs; None is a quarter of `mean_recurrence`.
        initial_state_std: of the noise that the state starts from.
        inference_seed: key of that noise in evaluation.
        num_hidden_layers: the sum of the three, whatever it is set to later; None says so.

    The other fields are Llama's.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """

    model_type = "recurrent_depth_llama"
    base_model_pp_plan = None

    num_hidden_layers: int | None = None
    num_prelude_layers: int = 2
    num_core_layers: int = 4
    num_coda_layers: int = 2
    mean_recurrence: int = 32
    backprop_depth: int | None = None
    initial_state_std: int | float = 0.4**0.5
    inference_seed: int = 0

    def __post_init__(self, **kwargs):
        parts = ("num_prelude_layers", "num_core_layers", "num_coda_layers")
        for name in (*parts, "mean_recurrence"):
            check_whole(name, getattr(self, name), 1)
        if self.backprop_depth is not None:
            check_whole("backprop_depth", self.backprop_depth, 1, ", or None")
        check_whole("inference_seed", self.inference_seed, 0)
        if self.initial_state_std < 0:
            raise ValueError(f"initial_state_std={self.initial_state_std!r} must be at least 0")
        if self.num_hidden_layers not in (None, self.num_layers):
            raise ValueError(
                f"num_hidden_layers={self.num_hidden_layers!r} must be {self.num_layers}, the sum of {', '.join(parts)}, or None"
            )
        self.num_hidden_layers = self.num_layers
        super().__post_init__(**kwargs)

    @property
    def num_layers(self) -> int:
        """Of the three parts together."""
        return self.num_prelude_layers + self.num_core_layers + self.num_coda_layers

    @property
    def num_backprop_steps(self) -> int:
        """The last runs of the core, at most, that gradients run through."""
        return max(1, self.mean_recurrence // 4) if self.backprop_depth is None else self.backprop_depth

    def to_dict(self) -> dict[str, Any]:
        # `from_pretrained(..., num_core_layers=3)` sets fields one by one, after all were checked together.
        return super().to_dict() | {"num_hidden_layers": self.num_layers}
