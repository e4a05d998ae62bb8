"""What every DiffusionBlocks model shares: the stock model inside, cut into blocks that can be run one by one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .. import cards, checkpoint
from ..backbones import backbone_for
from ..conditioning import AdaLNModulation, Modulation, SigmaEmbedding
from ..configuration import DiffusionBlocksConfig
from ..denoising import precondition
from ..noise import NoiseSchedule
from .targets import TargetEmbedding


@contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode, then give every sub-module back the mode it had."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, training in modes:
            child.training = training


class DiffusionBlocksPreTrainedModel(PreTrainedModel):
    """Base of the task models. `backbone` is the stock HF model, with its own parameter names.

    Parameters belong either to one block (its layers, their modulations, its local head) or to all (embeddings,
    final norm, head, sigma embedding, target embeddings).
    """

    config_class = DiffusionBlocksConfig
    config: DiffusionBlocksConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # a loss is the mean over its own batch: the Trainer divides by accumulation steps
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    task: ClassVar[str]  #: as in `pipeline(task)`
    default_overlap: ClassVar[float]  #: gamma where the config leaves it open

    def __init__(self, config: DiffusionBlocksConfig):
        super().__init__(config)
        self.architecture = backbone_for(config.source_config)
        if self.architecture.task != self.task:
            raise ValueError(
                f"model_type={config.source_config.model_type!r} is converted for {self.architecture.task!r}, "
                f"not for {self.task!r}"
            )
        # `from_pretrained(..., num_labels=...)` and the like reach the outer config only.
        config.source_config.id2label, config.source_config.label2id = config.id2label, config.label2id
        self.backbone = self.architecture.plain_class(config.source_config)
        self._no_split_modules = self.backbone._no_split_modules

        width = config.hidden_size
        if config.denoiser == "joint":
            self.sigma_embedding = SigmaEmbedding(width)
            self.modulations = nn.ModuleList(AdaLNModulation(width) for _ in range(config.num_hidden_layers))
        if config.readout_layers:
            # The last block has none: it reads out as the stock model does.
            self.readout_heads = nn.ModuleList(
                nn.ModuleList(
                    self.architecture.make_layer(config.source_config) for _ in range(config.readout_layers)
                )
                for _ in range(config.num_blocks - 1)
            )
        self.noise_schedule: NoiseSchedule = config.noise_schedule(self.default_overlap)
        self.sigma_data = config.target_scale(width)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, AdaLNModulation):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, TargetEmbedding):
            init.normal_(module.weight, std=module.embedding_dim**-0.5)
        else:
            super()._init_weights(module)

    # ---- which parameter belongs to which block

    def block_layers(self, block_index: int) -> range:
        """Global indices of the layers of a block."""
        return self.config.block_layers(block_index)

    def block_of_parameter(self, name: str) -> int | None:
        """The block a parameter belongs to by its name in the state dict, or None if it is shared."""
        layers = f"backbone.{self.architecture.layers_path}."
        for prefix in (layers, "modulations."):
            if name.startswith(prefix):
                layer = int(name[len(prefix) :].split(".")[0])
                return next(k for k in range(self.config.num_blocks) if layer in self.block_layers(k))
        if name.startswith("readout_heads."):
            return int(name.split(".")[1])
        return None

    def block_parameters(self, block_index: int) -> list[nn.Parameter]:
        """All parameters of one block, and of no other."""
        self.block_layers(block_index)  # raises on a block that does not exist
        return [p for name, p in self.named_parameters() if self.block_of_parameter(name) == block_index]

    def shared_parameters(self) -> list[nn.Parameter]:
        """All parameters that belong to no single block."""
        return [p for name, p in self.named_parameters() if self.block_of_parameter(name) is None]

    # ---- running blocks

    def run_block(
        self, block_index: int, hidden: torch.Tensor, modulations: list[Modulation | None]
    ) -> torch.Tensor:
        """`[N, S, D]` through the layers of one block."""
        layers = self.backbone.get_submodule(self.architecture.layers_path)
        for index, modulation in zip(self.block_layers(block_index), modulations):
            hidden = self._run_layer(layers[index], hidden, modulation)
        return hidden

    def _run_layer(self, layer: nn.Module, hidden: torch.Tensor, modulation: Modulation | None) -> torch.Tensor:
        if layer.gradient_checkpointing and layer.training and torch.is_grad_enabled():
            return layer._gradient_checkpointing_func(self.architecture.run_layer, layer, hidden, modulation)
        return self.architecture.run_layer(layer, hidden, modulation)

    def modulations_at(self, block_index: int, sigma: torch.Tensor) -> list[Modulation | None]:
        """What sigma `[N]` (or `[1]`, for the whole batch) does to each layer of a block: nothing if factorized."""
        if self.config.denoiser == "factorized":
            return [None] * len(self.block_layers(block_index))
        embedded = self.sigma_embedding(precondition(sigma, self.sigma_data).noise)
        return [self.modulations[index](embedded) for index in self.block_layers(block_index)]

    def carry(self, block_index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Clean hidden states through one block, as context for the next. The clean stream is conditioned on
        sigma_min, whatever the noise level of the target."""
        sigma_min = torch.full((1,), self.config.sigma_min, device=hidden.device)
        return self.run_block(block_index, hidden, self.modulations_at(block_index, sigma_min))

    def block_input(self, block_index: int, **inputs) -> torch.Tensor:
        """Training: the hidden states that enter a block. Carried ones come without gradient and dropout."""
        if self.config.context == "independent" or block_index == 0:
            return self.architecture.embed(self.backbone, **inputs)
        with torch.no_grad(), without_dropout(self.backbone):
            hidden = self.architecture.embed(self.backbone, **inputs)
            for earlier in range(block_index):
                hidden = self.carry(earlier, hidden)
        return hidden

    def block_inputs(self, **inputs) -> list[torch.Tensor]:
        """Inference: the hidden states that enter each block, first block first."""
        hidden = self.architecture.embed(self.backbone, **inputs)
        entering = [hidden]
        for block_index in range(self.config.num_blocks - 1):
            if self.config.context == "carried":
                hidden = self.carry(block_index, hidden)
            entering.append(hidden)
        return entering

    def read_out(self, block_index: int, hidden: torch.Tensor) -> torch.Tensor:
        """A block's output `[N, S, D]` to logits, through its local head if it has one."""
        if self.config.readout_layers and block_index < self.config.num_blocks - 1:
            for layer in self.readout_heads[block_index]:
                hidden = self._run_layer(layer, hidden, None)
        return self.architecture.read_out(self.backbone, hidden)

    def draw_sigma(self, block_index: int, num_rows: int, generator: torch.Generator | None) -> torch.Tensor:
        """Training noise levels `[N]` of a block, float32: its own, and sigma_max for `prior_fraction` of them."""
        sigma = self.noise_schedule.sample(block_index, (num_rows,), generator)
        if self.config.prior_fraction:
            chosen = torch.rand((num_rows,), generator=generator, device=sigma.device) < self.config.prior_fraction
            sigma = torch.where(chosen, self.config.sigma_max, sigma)
        return sigma.to(self.device, torch.float32)

    # ---- to and from disk

    def to_plain(self) -> PreTrainedModel:
        """A copy of the stock HF model inside, with the trained weights: it gives the same logits.

        Raises:
            ValueError: the formulation is not the stock model's function (anything but factorized and carried).
        """
        formulation = (self.config.denoiser, self.config.context)
        if formulation != ("factorized", "carried"):
            raise ValueError(
                f"to_plain() needs denoiser='factorized' and context='carried', this model has "
                f"denoiser={formulation[0]!r} and context={formulation[1]!r}: no stock model computes its logits"
            )
        plain = self.architecture.plain_class._from_config(self.config.source_config, dtype=self.dtype)
        plain.load_state_dict(self.backbone.state_dict())
        return plain.to(self.device).train(self.training)

    def save_pretrained(
        self,
        save_directory: str | PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """As in Transformers, with one safetensors file for the shared parameters and one a block, and a model card.

        All files are written aside first: an interrupted save leaves what was there before. `max_shard_size` has
        no effect, since a block is a file; `variant` is refused.
        """
        if kwargs.get("variant") is not None:
            raise ValueError(f"variant={kwargs['variant']!r} is not supported: shards are named by block")
        hub_kwargs = {key: kwargs.pop(key) for key in checkpoint.HUB_KWARGS if key in kwargs}
        if is_main_process:
            with checkpoint.atomic_save(Path(save_directory)) as staging:
                # Current parameter names, not HF's older ones: block files and Trainer resume go by them.
                kwargs |= {"max_shard_size": "1000TB", "save_original_format": False}
                super().save_pretrained(staging, state_dict=state_dict, **kwargs)
                checkpoint.split_by_block(staging, self.block_of_parameter, self.config.num_blocks)
                cards.write(self, staging, keep_from=Path(save_directory))
        if push_to_hub:
            self.push_to_hub(hub_kwargs.pop("repo_id", Path(save_directory).name), **hub_kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in Transformers; a local folder is checked first, so that a damaged shard is named.

        Raises:
            OSError: a shard is missing or truncated; names it.
        """
        if pretrained_model_name_or_path is not None and Path(pretrained_model_name_or_path).is_dir():
            if checkpoint.finish_interrupted_save(Path(pretrained_model_name_or_path)):
                kwargs.pop("config", None)  # was read before the save was finished
            checkpoint.check_shards(Path(pretrained_model_name_or_path))
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        checkpoint.align(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        # push_to_hub has just put the hub's card, or a generic one, over ours.
        cards.write(self, Path(working_dir), keep_from=Path(working_dir))
        return super()._upload_modified_files(working_dir, *args, **kwargs)
