"""DiffusionBlocksConfig: the plain model's own config, and how it is cut into blocks and trained."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field, fields
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .backbones.base import backbone_for
from .diffusion.schedule import NoiseSchedule
from .tasks import task_of
from .whole_numbers import check_whole, is_whole

#: Of saved models; to be raised when their config, names or files change their meaning.
FORMAT_VERSION = 2

#: Field -> the values it may take.
CHOICES: dict[str, tuple] = {
    "denoiser": ("joint", "factorized"),
    "context": ("independent", "carried"),
    "readout": (None, "edm", "posterior"),
    "bridge": (None, "soft", "hard"),
    "noise_distribution": ("lognormal", "information"),
    "shared": ("common", "per_block"),
    "sampler": ("euler", "ancestral"),
    "loss_weighting": (None, "edm"),
}


def _field(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


class DiffusionBlocksConfig(PreTrainedConfig):
    """Configuration of a DiffusionBlocks model. Defaults are the paper's (arXiv 2506.14202).

    What each field means is said beside it, and by `--help` of every command that takes it.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """

    model_type = "diffusionblocks"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values", "block_losses"]
    sub_configs_defaults: ClassVar = {"source_config": SubConfigSpec(config_class=AutoConfig, model_type="vit")}

    # Set by `convert` and the Trainer
    source_config: dict | PreTrainedConfig | None = _field(None, "Config of the plain model that is converted.")
    base_model: str | None = _field(None, "Hub id or folder of the pretrained source, for the model card.")
    training_report: dict[str, Any] | None = _field(
        None, "What the Trainer measured (data, steps, results, memory), for the model card."
    )
    noise_table: list[list[float]] | None = _field(
        None, "What fit_noise_schedule found: [sigma, share of the draws below it], from sigma_min to sigma_max."
    )
    format_version: int = _field(FORMAT_VERSION, "Of the files of a saved model.")
    tie_word_embeddings: bool | None = _field(
        None, "shared='per_block': whether a block's own head is its own token embedding, as in the plain model."
    )

    task: str | None = _field(None, "What the model is for, as in pipeline(task); None is the architecture's usual task.")

    # The cut
    num_blocks: int = _field(4, "B, how many blocks the layers are cut into.")
    layers_per_block: list[int] | None = _field(
        None, "Layers of each block, first block first; None cuts as evenly as possible."
    )

    # The noise
    sigma_min: float = _field(0.002, "Lowest noise level.")
    sigma_max: float = _field(80.0, "Highest noise level.")
    p_mean: float = _field(-1.2, "Mean of ln sigma, before truncation to the range.")
    p_std: float = _field(1.2, "Standard deviation of ln sigma, before truncation to the range.")
    sigma_data: float | str = _field(0.5, "EDM's scale of the target; 'auto' is the target's norm over sqrt(width).")
    overlap: float | None = _field(
        None,
        "gamma: a block's training interval is widened by this share of its log-width (masked text: its width) on both "
        "sides; None is the task's default (images 0.05, text 0.1).",
    )
    noise_distribution: str = _field(
        "lognormal",
        "'lognormal' (p_mean, p_std), or 'information': equal mass where the cross-entropy falls equally, as "
        "fit_noise_schedule finds it; log-normal until then.",
    )
    prior_fraction: float = _field(
        0.0, "Share of training draws made at sigma_max whatever the block: there the target is invisible."
    )

    # The formulation
    denoiser: str = _field(
        "joint",
        "'joint': layers see the noisy target. 'factorized': layers see the context only, and the posterior readout "
        "accounts for the noise.",
    )
    context: str = _field(
        "independent",
        "'independent': a block starts from the embedded input. 'carried': from the clean hidden states of the "
        "earlier blocks, which run without gradient.",
    )
    readout: str | None = _field(
        None,
        "'edm' (the paper's) or 'posterior' (Bayes' rule on the network's prior); None is 'edm' for joint and "
        "'posterior' for factorized.",
    )
    readout_layers: int = _field(
        0,
        "Layers of each block's local head, which later blocks do not see (carried context only). The last block "
        "has none: it reads out as the plain model does.",
    )
    shared: str = _field(
        "common",
        "'common': all blocks read and train the same embeddings, final norm and head. 'per_block': each has its own, "
        "around one fixed table of targets, so that blocks can be trained apart.",
    )
    loss_weighting: str | None = _field(
        None, "None (right for cross-entropy), or 'edm': the paper's w(sigma), meant for L2 targets."
    )

    label_dropout: float = _field(
        0.1, "Image generation: share of training images whose class is hidden, for classifier-free guidance."
    )

    mask_token_id: int | None = _field(
        None,
        "Masked text: the token that stands for a masked one. None is that of the tokenizer saved with the plain model, or "
        "of its config; where neither has one, a new token after the last.",
    )

    # The walk
    sampler: str = _field("euler", "'euler' (the paper's) or 'ancestral'.")
    bridge: str | None = _field(
        None,
        "How logits become a point of the target space in the Euler walk: 'soft' mean or 'hard' argmax; None is the "
        "task's default (images soft, text hard).",
    )
    num_inference_steps: int | None = _field(
        None,
        "Denoiser evaluations of a walk; None is the task's default (image generation 50, masked text one a token, labels "
        "and next tokens num_blocks). Factorized next tokens have no walk.",
    )
    inference_seed: int = _field(0, "Key of the noise that evaluation and prediction use.")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As in Transformers: of what a saved `config.json` holds, which has to say its version."""
        return super().from_dict({"format_version": None, **config_dict}, **kwargs)

    def __post_init__(self, **kwargs):
        self._check_before_reading()
        labels_given = self.id2label is not None or "num_labels" in kwargs
        # Setting up a composite config sets fields of its sub-configs: never those of a config the user still holds.
        self.source_config = copy.deepcopy(self.source_config)
        super().__post_init__(**kwargs)
        if not labels_given:
            self.id2label, self.label2id = self.source_config.id2label, self.source_config.label2id
        task = task_of(self.source_config, self.task)
        self.task = task.name
        architecture = backbone_for(self.source_config)
        self.check_fixed_fields(
            architecture.fixed_fields, f"model_type={architecture.model_type!r}: {architecture.fixed_because}"
        )
        task.settle(self)
        self.problem_type = self.problem_type or self.source_config.problem_type
        if self.readout is None:
            self.readout = "edm" if self.denoiser == "joint" else "posterior"
        if self.shared == "per_block":
            # The backbone's embedding is the first block's and its head the last's: each is tied within its own block.
            if self.tie_word_embeddings is None:
                self.tie_word_embeddings = getattr(self.source_config, "tie_word_embeddings", False)
            self.source_config.tie_word_embeddings = False
        self._check_fields()
        self._check_combinations()

    def _check_before_reading(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"format_version={self.format_version!r} must be {FORMAT_VERSION}: the model was saved by an earlier version "
                "of hf-diffusionblocks, or a later one, whose files may mean something else: convert again"
            )
        for name, kinds, allowed in (
            ("source_config", (dict, PreTrainedConfig), "a config, a dictionary of its fields, or None"),
            ("id2label", dict, "a dictionary of class numbers and their names, or None"),
            ("training_report", dict, "a dictionary, or None"),
        ):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kinds):
                raise ValueError(f"{name}={value!r} must be {allowed}")

    def check_fixed_fields(self, fixed: Mapping[str, Any], whom: str) -> None:
        """Raise ValueError if a field without a choice is not what it has to be; `whom` says for whom, and why."""
        for name, allowed in fixed.items():
            if (value := getattr(self, name)) != allowed:
                raise ValueError(f"{name}={value!r} must be {allowed!r} for {whom}")

    def _check_fields(self) -> None:
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}")
        check_whole("num_blocks", self.num_blocks, 1)
        self._check_number("sigma_min", " above 0", lambda v: v > 0)
        self._check_number("sigma_max", f" above sigma_min={self.sigma_min}", lambda v: v > self.sigma_min)
        self._check_number("p_mean", "", lambda v: True)
        self._check_number("p_std", " above 0", lambda v: v > 0)
        if self.sigma_data != "auto":
            self._check_number("sigma_data", " above 0, or 'auto'", lambda v: v > 0)
        if self.overlap is not None:
            self._check_number("overlap", " from 0, or None", lambda v: v >= 0)
        check_whole("readout_layers", self.readout_layers, 0)
        self._check_number("prior_fraction", " from 0 to 1", lambda v: 0 <= v <= 1)
        self._check_number("label_dropout", " from 0 to 1", lambda v: 0 <= v <= 1)
        if self.num_inference_steps is not None:
            check_whole("num_inference_steps", self.num_inference_steps, 1, ", or None")
        check_whole("inference_seed", self.inference_seed, 0)

    def _check_number(self, name: str, allowed: str, in_range: Callable[[float], bool]) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not in_range(value):
            raise ValueError(f"{name}={value!r} must be a finite number{allowed}")

    def _check_combinations(self) -> None:
        layers = self.num_hidden_layers
        if self.layers_per_block is None:
            if self.num_blocks > layers:
                raise ValueError(f"num_blocks={self.num_blocks} must be at most the model's {layers} layers")
        else:
            counts = self.layers_per_block
            whole = isinstance(counts, (list, tuple)) and all(is_whole(count, 1) for count in counts)
            if not whole or len(counts) != self.num_blocks or sum(counts) != layers:
                raise ValueError(
                    f"layers_per_block={counts!r} must be a list of {self.num_blocks} (num_blocks) whole numbers from 1 that "
                    f"sum to the model's {layers} layers"
                )
        if self.denoiser == "factorized" and self.readout != "posterior":
            raise ValueError(
                f"readout={self.readout!r} must be 'posterior' with denoiser='factorized': its layers never see the "
                "noisy target, so the readout has to"
            )
        if self.readout_layers and self.context != "carried":
            raise ValueError(
                f"readout_layers={self.readout_layers} must be 0 with context='independent': nothing is passed on "
                "past a local head there, so its layers would only be more layers of the block"
            )
        self._check_noise_table()
        self.noise_schedule(overlap=0.0)

    def _check_noise_table(self) -> None:
        table = self.noise_table
        if table is None:
            return
        if self.noise_distribution != "information":
            raise ValueError(
                f"noise_distribution={self.noise_distribution!r} must be 'information' with a noise_table"
            )
        ends = table[0] == [self.sigma_min, 0.0] and table[-1] == [self.sigma_max, 1.0]
        rising = all(low[0] < high[0] and low[1] < high[1] for low, high in zip(table, table[1:]))
        if not ends or not rising:
            raise ValueError(
                f"noise_table={table} must rise in both columns from [sigma_min={self.sigma_min}, 0.0] to "
                f"[sigma_max={self.sigma_max}, 1.0]"
            )

    @property
    def num_hidden_layers(self) -> int:
        return backbone_for(self.source_config).num_layers(self.source_config)

    @property
    def hidden_size(self) -> int:
        return backbone_for(self.source_config).width(self.source_config)

    @property
    def formulation(self) -> str:
        """What decides what a block sees, in words."""
        return f"{self.denoiser}, {self.context}"

    @property
    def initializer_range(self) -> float:
        return self.source_config.initializer_range

    @property
    def image_size(self):
        return self.source_config.image_size

    @property
    def vocab_size(self) -> int:
        return self.source_config.vocab_size

    def get_text_config(self, *args, **kwargs) -> PreTrainedConfig:
        """The plain model's config: what HF's cache and generation code should read."""
        return self.source_config.get_text_config(*args, **kwargs)

    def block_layers(self, block_index: int) -> range:
        """Global indices of a block's layers; the first blocks get the extra layers of an uneven cut."""
        if not 0 <= block_index < self.num_blocks:
            raise ValueError(f"block_index={block_index} must lie in 0..{self.num_blocks - 1}")
        counts = self.layers_per_block
        if counts is None:
            even, extra = divmod(self.num_hidden_layers, self.num_blocks)
            counts = [even + (k < extra) for k in range(self.num_blocks)]
        start = sum(counts[:block_index])
        return range(start, start + counts[block_index])

    def noise_schedule(self, overlap: float) -> NoiseSchedule:
        """The schedule these fields describe; `overlap` is the task's default where the field is None."""
        return NoiseSchedule(
            num_blocks=self.num_blocks,
            sigma_min=self.sigma_min,
            sigma_max=self.sigma_max,
            p_mean=self.p_mean,
            p_std=self.p_std,
            overlap=overlap if self.overlap is None else self.overlap,
            prior_fraction=self.prior_fraction,
            table=self.noise_table,
        )

    def target_scale(self, width: int) -> float:
        """sigma_data: the field, or for "auto" the per-coordinate scale of a unit-norm target of this width."""
        return width**-0.5 if self.sigma_data == "auto" else self.sigma_data


#: The fields a user sets: every field of its own that `convert` and the Trainer do not fill in.
USER_FIELDS = {
    f.name: f
    for f in fields(DiffusionBlocksConfig)
    if f.name in DiffusionBlocksConfig.__annotations__
    and f.name
    not in ("source_config", "base_model", "training_report", "noise_table", "tie_word_embeddings", "task", "format_version")
}


def check_known(names: Iterable[str]) -> None:
    """Raise ValueError if one of these is not a field that a user sets."""
    unknown = sorted(set(names) - USER_FIELDS.keys())
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)}: not a field of DiffusionBlocksConfig; fields are {', '.join(USER_FIELDS)}"
        )
