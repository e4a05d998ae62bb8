"""DiffusionBlocksConfig: the plain model's own config, and how it is cut into blocks and trained."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import field, fields
from typing import Any, ClassVar

from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .backbones.base import Backbone
from .diffusion.schedule import NoiseSchedule
from .presets import PRESETS
from .tasks import Task, backbone_for, task_of
from .whole_numbers import check_whole, is_whole

#: Of saved models; to be raised when their config, names or files change their meaning.
FORMAT_VERSION = 3

#: Field -> the values it may take.
CHOICES: dict[str, tuple] = {"preset": PRESETS, "shared": ("common", "per_block")}


#: What a plain model's config says of its own files and layers.
NOT_OF_SOURCE = {"quantization_config", "auto_map", "rope_parameters", "rope_theta", "rope_scaling"}
#: What it says of generation, which the model's generation config has: a stock config that says it is not saved.
NOT_OF_SOURCE |= vars(GenerationConfig()).keys() - {"bos_token_id", "eos_token_id", "pad_token_id", "use_cache"}


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field of a dataclass, with what `--help` says of it."""
    return field(default=default, metadata={"help": help, **metadata})


class DiffusionBlocksConfig(PreTrainedConfig):
    """Configuration of a DiffusionBlocks model: which formulation, how the layers are cut, and the formulation's own numbers.

    What each field means is said beside it, and by `--help` of every command that takes it. A number that the formulation of
    the task has not is None, and is refused where it is given; the others' defaults are the task's (`tasks.py`).

    Raises:
        ValueError: names the field, its value and what is allowed.
    """

    model_type = "diffusionblocks"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values", "cache", "block_losses"]
    sub_configs_defaults: ClassVar = {"source_config": SubConfigSpec(config_class=AutoConfig, model_type="vit")}

    # Set by `convert` and the Trainer
    source_config: dict | PreTrainedConfig | None = option(None, "Config of the plain model that is converted.")
    base_model: str | None = option(None, "Hub id or folder of the pretrained source, for the model card.")
    training_report: dict[str, Any] | None = option(
        None, "What the Trainer measured (data, steps, results, memory), for the model card."
    )
    format_version: int = option(FORMAT_VERSION, "Of the files of a saved model.")
    tie_word_embeddings: bool | None = option(
        None, "shared='per_block': whether a block's own head is its own token embedding, as in the plain model."
    )

    task: str | None = option(None, "What the model is for, as in pipeline(task); None is the architecture's usual task.")

    # The formulation
    preset: str | None = option(
        None,
        "Which formulation: 'recommended' (what measured best for the task; next tokens and classes: blocks on losses of their "
        "own, no noise), or 'paper' (arXiv 2506.14202). None is what is recommended.",
    )

    # The cut
    num_blocks: int | None = option(
        None, "B, how many blocks the layers are cut into. None: as layers_per_block has it, or else 4, or a layer each."
    )
    layers_per_block: list[int] | None = option(
        None, "Layers of each block, first block first; None cuts as evenly as possible."
    )
    shared: str = option(
        "common",
        "'common': all blocks read and train the same embeddings, final norm and head. 'per_block': each has its own, "
        "so that blocks can be trained apart.",
    )

    # Next tokens and classes, recommended
    local_head_layers: int | None = option(
        None,
        "Next tokens and classes, recommended: layers of each block's local head, which later blocks do not see. The last "
        "block has none: it is read out as the plain model is.",
    )

    # Gaussian noise: images by diffusion, and the paper's next tokens and classes
    sigma_min: float | None = option(None, "Gaussian noise: the lowest level.")
    sigma_max: float | None = option(None, "Gaussian noise: the highest level.")
    p_mean: float | None = option(None, "Gaussian noise: mean of ln sigma, before truncation to the range.")
    p_std: float | None = option(None, "Gaussian noise: standard deviation of ln sigma, before truncation to the range.")
    sigma_data: float | None = option(None, "Gaussian noise: EDM's scale of the target, its standard deviation.")

    # Any noise
    overlap: float | None = option(
        None,
        "gamma: a block's training interval is widened by this share of its width (of its log-width, of Gaussian noise) on "
        "both sides.",
    )
    num_inference_steps: int | None = option(
        None, "Denoiser evaluations to an answer. None: images 50, masked text one a token, next tokens and classes num_blocks."
    )
    inference_seed: int | None = option(None, "Key of the noise, or masks, that evaluation and prediction use.")

    # Of one task
    label_dropout: float | None = option(
        None, "Image generation: share of training images whose class is hidden, for classifier-free guidance."
    )
    mask_token_id: int | None = option(
        None,
        "Masked text: the token that stands for a masked one. None is that of the tokenizer saved with the plain model, or "
        "of its config; where neither has one, a new token after the last.",
    )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As in Transformers: of what a saved `config.json` holds, which has to say its version."""
        if (model_type := config_dict.get("model_type", cls.model_type)) != cls.model_type:
            raise ValueError(f"model_type={model_type!r} must be {cls.model_type!r}: this is a plain model, convert() cuts it")
        return super().from_dict({"format_version": None, **config_dict}, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """As in Transformers, without the fields that the formulation has not."""
        return {
            name: value for name, value in super().to_diff_dict().items() if value is not None or name not in OF_FORMULATIONS
        }

    def __post_init__(self, **kwargs):
        self._check_before_reading()
        labels_given = self.id2label is not None or "num_labels" in kwargs
        # Setting up a composite config sets fields of its sub-configs: never those of a config the user still holds.
        self.source_config = copy.deepcopy(self.source_config)
        super().__post_init__(**kwargs)
        if not labels_given:
            self.id2label, self.label2id = self.source_config.id2label, self.source_config.label2id
            self.num_labels = self.source_config.num_labels  # (which some say by itself)
        task = task_of(self.source_config, self.task)
        self.task = task.name
        architecture = self.architecture
        if self.preset is None:
            self.preset = architecture.fixed_fields.get("preset", "recommended")
        if self.num_blocks is None:
            given, most = self.layers_per_block, architecture.fixed_fields.get("num_blocks", 4)
            self.num_blocks = len(given) if isinstance(given, (list, tuple)) else min(most, self.num_hidden_layers)
        self._check_choices()
        for name, allowed in architecture.fixed_fields.items():
            if (value := getattr(self, name)) != allowed:
                raise ValueError(
                    f"{name}={value!r} must be {allowed!r} for model_type={self.source_config.model_type!r}: "
                    f"{architecture.fixed_because}"
                )
        if self.preset not in task.formulations:
            raise ValueError(f"preset={self.preset!r} must be {', '.join(map(repr, task.formulations))} for task {self.task!r}")
        if task.model_class.FORMULATIONS[self.preset].modulated:
            architecture.check_modulation(self.source_config)
        self._fill_in(task)
        task.settle(self)
        self.problem_type = self.problem_type or self.source_config.problem_type
        if self.shared == "per_block":
            # The backbone's embedding is the first block's and its head the last's: each is tied within its own block.
            if self.tie_word_embeddings is None:
                self.tie_word_embeddings = getattr(self.source_config, "tie_word_embeddings", False)
            self.source_config.tie_word_embeddings = False
        self._check_fields()
        self._check_cut()
        if self.sigma_max is not None:
            self.noise_schedule()  # complains of blocks without probability

    def _fill_in(self, task: Task) -> None:
        """The formulation's numbers where they are not given; those that it has not are refused."""
        numbers = task.formulations[self.preset]
        for name in OF_FORMULATIONS:
            if name in numbers:
                setattr(self, name, numbers[name] if getattr(self, name) is None else getattr(self, name))
            elif (value := getattr(self, name)) is not None:
                raise ValueError(
                    f"{name}={value!r} must be None with preset={self.preset!r} for task {self.task!r}, whose formulation "
                    f"has {', '.join(numbers)} alone{_where_it_is(name, task)}"
                )

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

    def _check_choices(self) -> None:
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}")

    def _check_fields(self) -> None:
        check_whole("num_blocks", self.num_blocks, 1)
        self._check_number("sigma_min", " above 0", lambda v: v > 0)
        self._check_number("sigma_max", f" above sigma_min={self.sigma_min}", lambda v: v > self.sigma_min)
        self._check_number("p_mean", "", lambda v: True)
        self._check_number("p_std", " above 0", lambda v: v > 0)
        self._check_number("sigma_data", " above 0", lambda v: v > 0)
        self._check_number("overlap", " from 0", lambda v: v >= 0)
        self._check_number("label_dropout", " from 0 to 1", lambda v: 0 <= v <= 1)
        for name, least in (("local_head_layers", 0), ("num_inference_steps", 1), ("inference_seed", 0)):
            if (value := getattr(self, name)) is not None:
                check_whole(name, value, least)

    def _check_number(self, name: str, allowed: str, in_range: Callable[[float], bool]) -> None:
        value = getattr(self, name)
        if value is None:  # not of this formulation
            return
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not in_range(value):
            raise ValueError(f"{name}={value!r} must be a finite number{allowed}")

    def _check_cut(self) -> None:
        layers = self.num_hidden_layers
        if (self.local_head_layers or 0) > layers:
            raise ValueError(f"local_head_layers={self.local_head_layers} must be at most the model's {layers} layers")
        if self.local_head_layers and not self.architecture.layers_are_alike:
            raise ValueError(
                f"local_head_layers={self.local_head_layers} must be 0 for model_type={self.source_config.model_type!r}: its "
                "stages are of several widths, and each block has a head of its own"
            )
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

    @property
    def architecture(self) -> Backbone:
        """How the plain model is cut into blocks."""
        return backbone_for(self.source_config, self.task)

    @property
    def num_hidden_layers(self) -> int:
        return self.architecture.num_layers(self.source_config)

    @property
    def hidden_size(self) -> int:
        try:
            return self.architecture.width(self.source_config)
        except ValueError as error:  # stages are of several widths: others ask by `hasattr` whether there is one
            raise AttributeError(str(error)) from None

    def __getattr__(self, name: str) -> Any:
        # What a caller may ask of a stock config (positions, token ids, ...), ours answers by the plain model's.
        source = self.__dict__.get("source_config")
        if name.startswith("_") or name in NOT_OF_SOURCE or not isinstance(source, PreTrainedConfig):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(source if hasattr(source, name) else source.get_text_config(), name)  # (of a composite, its text's)

    def __setattr__(self, name: str, value: Any) -> None:
        # And what is set of a stock config's is set of the plain model's: `to_plain()` has it, then.
        source = self.__dict__.get("source_config")
        ours = name.startswith("_") or name in self.__dict__ or hasattr(type(self), name)
        ours = ours or name in type(self).__dataclass_fields__
        if not ours and isinstance(source, PreTrainedConfig) and hasattr(source, name):
            setattr(source, name, value)
        else:
            super().__setattr__(name, value)

    def validate(self) -> None:
        """Nothing: stock rules are for stock fields, which the plain model's config answers for, and keeps by itself."""

    def get_text_config(self, *args, **kwargs) -> PreTrainedConfig:
        """The plain model's config: what HF's cache and generation code should read."""
        return self.source_config.get_text_config(*args, **kwargs)

    def block_layers(self, block_index: int) -> range:
        """Global indices of the layers of one of the blocks; the first ones get the extra layers of an uneven cut."""
        counts = self.layers_per_block
        if counts is None:
            even, extra = divmod(self.num_hidden_layers, self.num_blocks)
            counts = [even + (k < extra) for k in range(self.num_blocks)]
        start = sum(counts[:block_index])
        return range(start, start + counts[block_index])

    def noise_schedule(self) -> NoiseSchedule:
        """The schedule that the fields of Gaussian noise describe."""
        names = ("num_blocks", "sigma_min", "sigma_max", "p_mean", "p_std", "overlap")
        return NoiseSchedule(**{name: getattr(self, name) for name in names})


#: The fields that some formulations have, and others have not.
OF_FORMULATIONS = (
    "local_head_layers", "sigma_min", "sigma_max", "p_mean", "p_std", "sigma_data", "overlap", "num_inference_steps",
    "inference_seed", "label_dropout", "mask_token_id",
)  # fmt: skip
#: The fields a user sets: every field of its own that `convert` and the Trainer do not fill in.
USER_FIELDS = {
    f.name: f
    for f in fields(DiffusionBlocksConfig)
    if f.name in DiffusionBlocksConfig.__annotations__
    and f.name not in ("source_config", "base_model", "training_report", "tie_word_embeddings", "task", "format_version")
}


def _where_it_is(name: str, task: Task) -> str:
    """Which other formulation of the task has a field, as the end of a message."""
    others = [preset for preset, numbers in task.formulations.items() if name in numbers]
    return f"; preset={others[0]!r} has it" if others else ""


def check_known(names: Iterable[str]) -> None:
    """Raise ValueError if one of these is not a field that a user sets."""
    unknown = sorted(set(names) - USER_FIELDS.keys())
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: not a field of DiffusionBlocksConfig; fields are {', '.join(USER_FIELDS)}")
