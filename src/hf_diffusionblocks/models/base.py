"""What every DiffusionBlocks model shares: the stock model inside, cut into blocks that can be run one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as checkpoint_activations
from transformers import PreTrainedModel
from transformers import initialization as init

from ..backbones import Parts, backbone_for
from ..backbones.modulation import AdaLNModulation, Modulation, SigmaEmbedding
from ..configuration import DiffusionBlocksConfig
from ..diffusion.gaussian import precondition
from ..diffusion.randomness import Generators, draw
from ..diffusion.schedule import NoiseSchedule
from .offload import BlockResidence
from ..saving.pretrained import SavedByBlock
from .targets import FixedTargets, TargetEmbedding


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


class DiffusionBlocksPreTrainedModel(SavedByBlock):
    """Base of the task models. `backbone` is the stock HF model, with its own parameter names.

    Parameters belong either to one block (its layers, their modulations, its local head) or to all (embeddings,
    final norm, head, sigma embedding, target embeddings). With `shared="per_block"` every block has its own of the
    latter too: the backbone's embeddings are then block 0's and its final norm and head the last block's, so that
    these and the layers still make up the stock model. Where the plain model ties its head to its token embedding, so
    does each block that has both; no two blocks share a weight.
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
    default_bridge: ClassVar[str]  #: bridge where the config leaves it open

    #: While training offloads inactive blocks: what brings a block's parameters to the device
    residence: BlockResidence | None = None

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
        self._run_layer = self.architecture.run_layer
        self.backbone = self.architecture.plain_class(config.source_config)
        self._no_split_modules = self.backbone._no_split_modules

        width, blocks = config.hidden_size, config.num_blocks
        # What the forward pass asks at every layer: attributes of a config are slow.
        self.num_blocks, self.joint = blocks, config.denoiser == "joint"
        self.carried, self.per_block = config.context == "carried", config.shared == "per_block"
        self.resident_blocks = list(range(blocks))  #: blocks that are loaded: all, unless asked for some
        self._block_layers = [config.block_layers(block) for block in range(blocks)]
        if self.per_block:
            # Block 0 reads in by the backbone's own embeddings, and so do all blocks whose context is carried on.
            paths = self.architecture.embedding_paths
            if self.carried:
                paths = self.architecture.noisy_embedding_paths if self.joint else ()
            self.block_embeddings = nn.ModuleList(Parts(self.backbone, paths) for _ in range(blocks - 1))
            self.block_readouts = nn.ModuleList(
                Parts(self.backbone, self.architecture.readout_paths) for _ in range(blocks - 1)
            )
            self._tied_weights_keys = self.ties_within_blocks()
        if self.joint:
            self.sigma_embeddings = nn.ModuleList(SigmaEmbedding(width) for _ in range(blocks if self.per_block else 1))
            self.modulations = nn.ModuleList(AdaLNModulation(width) for _ in range(config.num_hidden_layers))
        if config.readout_layers:
            # The last block has none: it reads out as the stock model does.
            self.readout_heads = nn.ModuleList(
                nn.ModuleList(
                    self.architecture.make_layer(config.source_config) for _ in range(config.readout_layers)
                )
                for _ in range(blocks - 1)
            )
        self.noise_schedule: NoiseSchedule = config.noise_schedule(self.default_overlap)
        self.sigma_data = config.target_scale(width)
        self.bridge = config.bridge or self.default_bridge

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, AdaLNModulation):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, TargetEmbedding):
            init.normal_(module.weight, std=module.embedding_dim**-0.5)
        elif isinstance(module, FixedTargets):
            init.normal_(module.table, std=module.table.shape[-1] ** -0.5)
        else:
            self.backbone._init_weights(module)  # local heads and blocks' own parts start as the family's do

    @torch.no_grad()
    def copy_weights(self, plain: PreTrainedModel) -> None:
        """Take over the weights of a stock model: the backbone's, and those of every block's own parts. Local heads start as
        its last layers."""
        weights = plain.state_dict()
        self.backbone.load_state_dict({name: weights[name] for name in self.backbone.state_dict()})
        if self.per_block:
            for parts in (*self.block_embeddings, *self.block_readouts):
                for name, parameter in parts.named_parameters():
                    parameter.copy_(weights[name])
        if self.config.readout_layers:
            last_layers = plain.get_submodule(self.architecture.layers_path)[-self.config.readout_layers :]
            for head in self.readout_heads:
                if isinstance(head, nn.ModuleList):  # else its block is not loaded
                    head.load_state_dict(last_layers.state_dict())

    def ties_within_blocks(self) -> dict[str, str]:
        """`shared="per_block"`: the head of each loaded block that has a token embedding of its own, and that embedding,
        by name; Transformers ties them if `config.tie_word_embeddings`."""
        embedding_blocks = [block for block in self.resident_blocks if block == 0 or not self.carried]
        last, ties = self.num_blocks - 1, {}
        for head, embedding in (self.architecture.plain_class._tied_weights_keys or {}).items():
            for block in embedding_blocks:
                target = "backbone" if block == last else f"block_readouts.{block}"
                source = "backbone" if block == 0 else f"block_embeddings.{block - 1}"
                ties[f"{target}.{head}"] = f"{source}.{embedding}"
        return ties

    # ---- which parameter belongs to which block

    def block_layers(self, block_index: int) -> range:
        """Global indices of the layers of a block."""
        return self.config.block_layers(block_index)

    def block_of_parameter(self, name: str) -> int | None:
        """The block a parameter belongs to by its name in the state dict, or None if it is shared."""
        _, whole, adapter = name.partition(".modules_to_save.block_")  # what peft trains whole beside a block's adapter
        if whole:
            return int(adapter.split(".")[0])
        layers = f"backbone.{self.architecture.layers_path}."
        for prefix in (layers, "modulations."):
            if name.startswith(prefix):
                layer = int(name[len(prefix) :].split(".")[0])
                return next((k for k in range(self.num_blocks) if layer in self.block_layers(k)), None)
        if name.startswith("readout_heads."):
            return int(name.split(".")[1])
        return self._owner_of_shared_part(name) if self.per_block else None

    def _owner_of_shared_part(self, name: str) -> int | None:
        if name.startswith(tuple(f"backbone.{path}" for path in self.architecture.embedding_paths)):
            return 0
        if name.startswith(tuple(f"backbone.{path}" for path in self.architecture.readout_paths)):
            return self.num_blocks - 1
        part, _, rest = name.partition(".")
        first = {"block_embeddings": 1, "block_readouts": 0, "sigma_embeddings": 0, "noisy_labels": 0}.get(part)
        return None if first is None else first + int(rest.split(".")[0])

    @property
    def has_adapters(self) -> bool:
        """Whether blocks have LoRA adapters: see `lora.add_block_adapters`."""
        return bool(getattr(self, "peft_config", None))

    def block_parameters(self, block_index: int) -> list[nn.Parameter]:
        """All parameters of one block, and of no other."""
        self.block_layers(block_index)  # raises on a block that does not exist
        return [p for name, p in self.named_parameters() if self.block_of_parameter(name) == block_index]

    def shared_parameters(self) -> list[nn.Parameter]:
        """All parameters that belong to no single block."""
        return [p for name, p in self.named_parameters() if self.block_of_parameter(name) is None]

    # ---- running blocks

    @property
    def device(self) -> torch.device:
        return super().device if self.residence is None else self.residence.device

    def use_block(self, block_index: int) -> None:
        """To be called before a block's parameters are: they may be in host memory."""
        if self.residence is not None:
            self.residence.use(block_index)

    def embed(self, block_index: int, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The input, embedded as this block sees it: the hidden states that enter its first layer, or the model's."""
        return self.architecture.embed(self.embedding_parts(0 if self.carried else block_index), **inputs)

    def embedding_parts(self, block_index: int) -> nn.Module:
        """Where a block's own embeddings are."""
        self.use_block(block_index)
        return self.block_embeddings[block_index - 1] if self.per_block and block_index > 0 else self.backbone

    def run_block(
        self,
        block_index: int,
        hidden: torch.Tensor,
        modulations: list[Modulation | None],
        **attention,
    ) -> torch.Tensor:
        """`[N, S, D]` through the layers of one block; `attention` as in [`Backbone.run_layer`], here and below.

        Raises:
            ValueError: the block is not loaded.
        """
        if block_index not in self.resident_blocks:
            raise ValueError(f"block {block_index} is not loaded: resident_blocks={self.resident_blocks}")
        self.use_block(block_index)
        layers = self.backbone.get_submodule(self.architecture.layers_path)
        for index, modulation in zip(self._block_layers[block_index], modulations):
            hidden = self.run_layer(layers[index], hidden, modulation, **attention)
        return hidden

    def layer(self, index: int) -> nn.Module:
        """A layer of the stock model."""
        return self.backbone.get_submodule(self.architecture.layers_path)[index]

    def run_layer(
        self, layer: nn.Module, hidden: torch.Tensor, modulation: Modulation | None, **attention
    ) -> torch.Tensor:
        """One layer, checkpointed where gradient checkpointing is on."""
        # (By the model's mode: in training, layers that carry a gradient on are in evaluation mode, without dropout.)
        if not (layer.gradient_checkpointing and self.training and torch.is_grad_enabled()):
            return self._run_layer(layer, hidden, modulation, **attention)
        training = layer.training

        def run(hidden: torch.Tensor, modulation: Modulation | None) -> torch.Tensor:
            with nullcontext() if training else without_dropout(layer):  # also where the layer runs again
                return self._run_layer(layer, hidden, modulation, **attention)

        return layer._gradient_checkpointing_func(run, hidden, modulation)

    def compile_layers(self, **kwargs) -> None:
        """Have layers compiled as they first run: one graph for all layers of all blocks, since they are alike.

        Args:
            kwargs: of [`torch.compile`].
        """
        self._run_layer = torch.compile(self.architecture.run_layer, **kwargs)

    def modulations_at(self, block_index: int, sigma: torch.Tensor | None) -> list[Modulation | None]:
        """What sigma `[N]` (or `[1]`, for the whole batch) does to each layer of a block: nothing if factorized."""
        if not self.joint:
            return [None] * len(self._block_layers[block_index])
        self.use_block(block_index)
        embed_sigma = self.sigma_embeddings[block_index if self.per_block else 0]
        embedded = embed_sigma(precondition(sigma, self.sigma_data).noise)
        return [self.modulations[index](embedded) for index in self._block_layers[block_index]]

    def clean_modulations(self, block_index: int) -> list[Modulation | None]:
        """The clean stream is conditioned on sigma_min, whatever the noise level of the target."""
        sigma = torch.full((1,), self.config.sigma_min, device=self.device) if self.joint else None
        return self.modulations_at(block_index, sigma)

    def carry(self, block_index: int, hidden: torch.Tensor, **attention) -> torch.Tensor:
        """Clean hidden states through one block, as context for the next."""
        return self.run_block(block_index, hidden, self.clean_modulations(block_index), **attention)

    def loss_block_of(self, block_index: int, loss_block: int | None) -> int:
        """The block that is read out for the loss of another.

        Raises:
            ValueError: no blocks lie between, or hidden states are not carried on to it.
        """
        if loss_block is None or loss_block == block_index:
            return block_index
        if self.joint or not self.carried or not block_index <= loss_block < self.num_blocks:
            raise ValueError(
                f"loss_block={loss_block} with block_index={block_index} must be this or a later block of "
                f"{self.num_blocks}, and needs denoiser='factorized' and context='carried' (this model: "
                f"{self.config.denoiser!r}, {self.config.context!r})"
            )
        return loss_block

    def carry_on(self, hidden: torch.Tensor, block_index: int, loss_block: int, **attention) -> torch.Tensor:
        """Training: what left a block, through those after it up to `loss_block`, with gradient and without dropout.

        Each keeps what enters it alone, and runs again in the backward pass: the activations of one at a time are held.
        """

        def carry(later: int, hidden: torch.Tensor) -> torch.Tensor:
            with without_dropout(self.backbone):
                return self.carry(later, hidden, **attention)

        for later in range(block_index + 1, loss_block + 1):
            hidden = checkpoint_activations(carry, later, hidden, use_reentrant=False, preserve_rng_state=False)
        return hidden

    def block_input(self, block_index: int, inputs: Mapping[str, Any], **attention) -> torch.Tensor:
        """Training: the hidden states that enter a block. Carried ones come without gradient and dropout; or, as
        `inputs["block_input"]`, from a cache of them."""
        inputs = dict(inputs)
        cached = inputs.pop("block_input", None)
        if cached is not None:
            return cached.to(self.device, self.dtype)
        if not self.carried or block_index == 0:
            return self.embed(block_index, inputs)
        return self.carried_input(block_index, 0, None, inputs, **attention)

    @torch.no_grad()
    def carried_input(
        self, block_index: int, start: int, hidden: torch.Tensor | None, inputs: Mapping[str, Any], **attention
    ) -> torch.Tensor:
        """What enters a block, from what enters the earlier block `start` (None: from what embeds the input)."""
        with without_dropout(self.backbone):
            hidden = self.embed(0, inputs) if hidden is None else hidden
            for earlier in range(start, block_index):
                hidden = self.carry(earlier, hidden, **attention)
        return hidden

    def clean_inputs(self, batch: Mapping[str, torch.Tensor]) -> tuple[dict, dict]:
        """Of a batch: what embeds the clean input, and what the attention modules take to run it."""
        raise NotImplementedError

    def clean_outputs(self, inputs: Mapping[str, Any], **attention) -> list[torch.Tensor]:
        """Inference: what leaves each block when the clean input runs through all of them, first block first."""
        outputs: list[torch.Tensor] = []
        for block_index in range(self.num_blocks):
            carried = outputs and self.carried
            hidden = outputs[-1] if carried else self.embed(block_index, inputs)
            outputs.append(self.carry(block_index, hidden, **attention))
        return outputs

    def readout_parts(self, block_index: int) -> nn.Module:
        """Where a block's final norm and head are."""
        self.use_block(block_index)
        last = block_index == self.num_blocks - 1
        return self.block_readouts[block_index] if self.per_block and not last else self.backbone

    def run_local_head(self, block_index: int, hidden: torch.Tensor, **attention) -> torch.Tensor:
        """A block's output through the layers of its local head, if it has one."""
        if self.config.readout_layers and block_index < self.num_blocks - 1:
            self.use_block(block_index)
            for layer in self.readout_heads[block_index]:
                hidden = self.run_layer(layer, hidden, None, **attention)
        return hidden

    def read_out(self, block_index: int, hidden: torch.Tensor) -> torch.Tensor:
        """What has left a block and its local head, to logits: final norm and head."""
        return self.architecture.read_out(self.readout_parts(block_index), hidden)

    def draw_sigma(self, block_index: int, shape: tuple[int, ...], generator: Generators) -> torch.Tensor:
        """Training noise levels of a block, float32: its own, and sigma_max for `prior_fraction` of them."""
        sigma = self.noise_schedule.sample(block_index, shape, generator)
        if self.config.prior_fraction:
            chosen = draw(torch.rand, shape, generator) < self.config.prior_fraction
            sigma = torch.where(chosen, self.config.sigma_max, sigma)
        return sigma.to(self.device, torch.float32)
