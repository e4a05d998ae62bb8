"""What every DiffusionBlocks model shares: the stock model inside, cut into blocks that can be run one by one."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from functools import partial
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel
from transformers import initialization as init

from ..backbones.base import parts_around
from ..backbones.modulation import AdaLNModulation, Modulation, SigmaEmbedding
from ..backbones.stock_run import base_of, layers_of, without_dropout
from ..configuration import DiffusionBlocksConfig
from ..diffusion.randomness import Generators
from ..diffusion.schedule import NoiseSchedule
from ..saving.pretrained import SavedByBlock
from ..streaming import counting_once, weights_on_device
from .block import Block
from .sharing import Sharing
from .targets import FixedTargets


class Formulation:
    """What a block is shown, and how it is read out: `config.preset` of one task, as an object. Its subclasses have the methods
    that their task's model calls.

    Args:
        model: whose blocks.
    """

    modulated: ClassVar[bool] = False  #: whether sigma modulates the layers (AdaLN)
    passes_on: ClassVar[bool] = False  #: whether what leaves a block is what the next starts from
    runs_stock: ClassVar[bool] = False  #: whether the stock model's own forward runs a block; else it runs piece by piece

    def __init__(self, model: DiffusionBlocksPreTrainedModel):
        self.model = model


class DiffusionBlocksPreTrainedModel(SavedByBlock):
    """Base of the task models. `backbone` is the stock model, with its own parameter names; `blocks` are its blocks.

    Parameters belong either to one block (its layers, their modulations, its local head) or to all (embeddings,
    final norm, head, sigma embedding, target embeddings). With `shared="per_block"` every block has its own of the
    latter, too.

    A task model says what a block is shown: `FORMULATIONS` has a [`Formulation`] for each `config.preset`.
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
    FORMULATIONS: ClassVar[Mapping[str, type[Formulation]]]  #: by `config.preset`
    reads_rows: ClassVar[bool] = False  #: whether tokens are read out by themselves, in parts
    sees_later_tokens: ClassVar[bool | None] = None  #: whether a token sees those after it; None: as the stock model has it
    takes_stock_tensors: ClassVar[bool] = False  #: whether `forward` takes tensors by any name that the stock model has
    copied_modules: ClassVar[tuple[str, ...]] = ()  #: lists of modules with a copy a block if it has its own

    gradient_checkpointing = False  #: Transformers' switch, of all layers
    trained_block: int | None = None  #: that a Trainer's step trains just now
    _tied_across: Collection[str] = ()  # names of parameters that layers of several blocks have, so that they are no block's

    def __init__(self, config: DiffusionBlocksConfig):
        super().__init__(config)
        self._check_task(config)
        self.architecture = config.architecture
        # `from_pretrained(..., num_labels=...)` and the like reach the outer config only.
        plain = config.source_config
        plain.id2label, plain.label2id, plain.num_labels = config.id2label, config.label2id, config.num_labels
        self.backbone = self.architecture.make_plain(plain)
        #: of the stock model's `forward` (not all know of token types, positions or a cache)
        self.stock_arguments = frozenset(signature(self.backbone.forward).parameters)
        self.layers_path = self.architecture.layers_path(self.backbone, config.num_hidden_layers)
        self._no_split_modules = getattr(self.backbone, "_no_split_modules", None)

        formulation = self.FORMULATIONS[config.preset]
        self.num_blocks = config.num_blocks
        self.layer_lists = self.architecture.layer_lists(self.backbone, self.layers_path)
        around = parts_around(self.backbone, self.layers_path, self.layer_lists)
        base = f"{self.layers_path.split('.')[0]}."
        #: of the stock model, what reads a block out: what it has after its layers, or, where it runs itself, its head
        self.readout_paths = [path for path in around[1] if not (formulation.runs_stock and path.startswith(base))]
        self.sharing = Sharing(
            config.shared == "per_block", self.num_blocks, around, embeds_later=not formulation.passes_on,
            reads_earlier=self.architecture.layers_are_alike,
        )  # fmt: skip
        self.resident_blocks = list(range(self.num_blocks))  #: blocks that are loaded: all, unless asked for some
        self._make_parts(config, formulation.modulated)
        self.tie_within_blocks()
        self.blocks = [self._make_block(k, formulation) for k in range(self.num_blocks)]
        pairs = self.architecture.ties_of_layers(self.backbone, self.layers_path)
        owners = {name: self.block_of_parameter(f"backbone.{name}") for pair in pairs for name in pair}
        self._tied_across = {f"backbone.{name}" for one in pairs for name in one if owners[one[0]] != owners[one[1]]}
        #: levels of noise -> blocks; None where a formulation has no noise
        self.noise_schedule = self.schedule_for(config)
        self.formulation = formulation(self)
        if formulation.runs_stock:
            self.supports_gradient_checkpointing = self.backbone.supports_gradient_checkpointing
        else:
            self._run_layer = self.architecture.run_layer

    def _check_task(self, config: DiffusionBlocksConfig) -> None:
        if config.task != self.task:
            raise ValueError(f"this model is for task {config.task!r}, and {type(self).__name__} is for {self.task!r}")

    def _make_parts(self, config: DiffusionBlocksConfig, modulated: bool) -> None:
        """The modules that the stock model has not."""
        for name, module in self.sharing.modules(self.backbone).items():
            self.add_module(name, module)
        if modulated:
            width, layers = config.hidden_size, config.num_hidden_layers
            self.sigma_embeddings = nn.ModuleList(SigmaEmbedding(width) for _ in range(self.sharing.num_copies))
            self.modulations = nn.ModuleList(AdaLNModulation(width) for _ in range(layers))
        if config.local_head_layers:
            # The last block has none: it reads out as the stock model does.
            self.local_heads = nn.ModuleList(
                nn.ModuleList(self._make_layer() for _ in range(config.local_head_layers)) for _ in range(self.num_blocks - 1)
            )

    def _make_layer(self) -> nn.Module:
        """One more layer like the last, with no weights yet."""
        if len(self.layer_lists) > 1:
            raise ValueError(f"local_head_layers={self.config.local_head_layers} must be 0: no module of this model is a layer")
        layer = copy.deepcopy(self.layers[-1])
        for each in (*layer.modules(), *layer.parameters()):
            each._is_hf_initialized = False
        return layer

    def _make_block(self, k: int, formulation: type[Formulation]) -> Block:
        layers = self.config.block_layers(k)
        has_head = self.config.local_head_layers and k < self.num_blocks - 1
        prefixes = [f"backbone.{path}.{layer}." for path in self.layer_lists for layer in layers]
        prefixes += [f"modulations.{layer}." for layer in layers] + [f"local_heads.{k}."]
        prefixes += self.sharing.prefixes(k, ("sigma_embeddings", *self.copied_modules))
        return Block(
            self,
            index=k,
            layers=layers,
            predecessors=range(k if formulation.passes_on else 0),
            embeddings=self.sharing.embeddings(k),
            readout=self.sharing.readout(k),
            own_paths=self.sharing.own_paths(k),
            sigma_embedding=f"sigma_embeddings.{self.sharing.copy(k)}" if formulation.modulated else None,
            local_head=f"local_heads.{k}" if has_head else None,
            prefixes=prefixes,
        )

    @classmethod
    def schedule_for(cls, config: DiffusionBlocksConfig) -> NoiseSchedule | None:
        """Which noise levels there are, and which block owns which of them; None without noise."""
        return None if config.sigma_max is None else config.noise_schedule()

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: of others' code Transformers fills no buffer that a stock model sets in its layers, since all *its* weights were
        read."""
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, AdaLNModulation):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, FixedTargets):
            init.normal_(module.table, std=module.table.shape[-1] ** -0.5)
        else:
            self.architecture.init_weights(self.backbone, module)  # local heads and own parts start as the family's do

    @torch.no_grad()
    def copy_weights(self, plain: nn.Module) -> None:
        """Take over the weights of a stock model: the backbone's, and those of every block's own parts. Local heads start as
        its last layers."""
        weights, own = self.weights_of(plain), self.backbone.state_dict().keys()
        whole = len(self.resident_blocks) == self.num_blocks
        if odd := own ^ weights.keys() if whole else own - weights.keys():
            raise ValueError(f"source={type(plain).__name__} must have the weights that its class makes, and {min(odd)} is odd")
        self.backbone.load_state_dict({name: weights[name] for name in own})
        for name in self.sharing.own_modules:
            for parts in getattr(self, name):
                for path, parameter in parts.named_parameters():
                    parameter.copy_(weights[path])
        if self.config.local_head_layers:
            last_layers = plain.get_submodule(self.layers_path)[-self.config.local_head_layers :]
            for block in self.blocks[:-1]:
                if block.index in self.resident_blocks:
                    self.local_heads[block.index].load_state_dict(last_layers.state_dict())
        frozen = {name for name, parameter in plain.named_parameters() if not parameter.requires_grad}
        parts = [self.backbone, *(each for name in self.sharing.own_modules for each in getattr(self, name))]
        for name, parameter in ((name, parameter) for part in parts for name, parameter in part.named_parameters()):
            if name in frozen:
                parameter.requires_grad_(False)

    def weights_of(self, plain: nn.Module) -> Mapping[str, torch.Tensor]:
        """The weights of a stock model, by name, as the backbone takes them."""
        return plain.state_dict()

    def tie_within_blocks(self) -> None:
        """Say which weights are tied, of the blocks that are loaded; Transformers ties them if
        `config.tie_word_embeddings`."""
        if self.sharing.own_modules:  # (else the stock model says it itself)
            stock = getattr(self.backbone, "_tied_weights_keys", None) or {}
            self._tied_weights_keys = self.sharing.ties(self.resident_blocks, stock)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.backbone.get_output_embeddings() if isinstance(self.backbone, PreTrainedModel) else None

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.backbone.set_output_embeddings(new_embeddings)

    def _resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True) -> nn.Embedding:
        """What `resize_token_embeddings` does: also to the embeddings that blocks have of their own.

        Raises:
            ValueError: blocks are not loaded; jobs would each draw new tokens of their own.
        """
        if len(self.resident_blocks) < self.num_blocks:
            raise ValueError(
                f"resident_blocks={self.resident_blocks} must be all {self.num_blocks} to resize token embeddings: jobs "
                "would each draw new ones. Resize the whole model, save it, and load a part of that"
            )
        embeddings = self.backbone.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        path = next(name for name, module in self.backbone.named_modules() if module is embeddings)
        for parts in (block.embedding_parts for block in self.blocks if block.embeds_apart):
            self._get_resized_embeddings(parts.get_submodule(path), embeddings.num_embeddings, mean_resizing=mean_resizing)
        return embeddings

    @property
    def layers(self) -> nn.ModuleList:
        """The stock model's, first to last."""
        return self.backbone.get_submodule(self.layers_path)

    # ---- which parameter belongs to which block

    def block_layers(self, block_index: int) -> range:
        """Global indices of the layers of a block.

        Raises:
            ValueError: there is no such block.
        """
        if not 0 <= block_index < self.num_blocks:
            raise ValueError(f"block_index={block_index} must lie in 0..{self.num_blocks - 1}")
        return self.blocks[block_index].layer_indices

    def block_of_parameter(self, name: str) -> int | None:
        """The block a parameter belongs to by its name in the state dict, or None if it is shared."""
        owners = (block.index for block in self.blocks if name.startswith(block.prefixes))
        return None if name in self._tied_across else next(owners, None)

    @property
    def computes_plain_model(self) -> bool:
        """Whether the blocks compute together what the stock model does: each passes x on."""
        return self.formulation.passes_on

    def block_parameters(self, block_index: int) -> list[nn.Parameter]:
        """All parameters of one block, and of no other."""
        self.block_layers(block_index)  # raises on a block that does not exist
        return self.blocks[block_index].parameters()

    def shared_parameters(self) -> list[nn.Parameter]:
        """All parameters that belong to no single block."""
        return [parameter for name, parameter in self.named_parameters() if self.block_of_parameter(name) is None]

    # ---- running layers

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=None, every_n_layers: int = 1):
        given = getattr(gradient_checkpointing_func, "keywords", {})
        if given.get("use_reentrant"):
            raise ValueError(
                "use_reentrant=True must be False: what enters a block has no gradient, and so would its layers have none"
            )
        if every_n_layers != 1:
            raise ValueError(f"every_n_layers={every_n_layers} must be 1: layers are checkpointed all, or none")
        options: dict[str, Any] = {"use_reentrant": False}  # (PyTorch's is True, where others alone are given)
        if any(isinstance(module, _BatchNorm) for module in self.modules()):
            # A repeated forward would count its batch again, and the next block's steps run by what is counted.
            options = {"context_fn": partial(counting_once, self)} | given | options
        if enable:
            gradient_checkpointing_func = partial(gradient_checkpointing_func, **options)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, every_n_layers)
        for module in self.modules() if not self.formulation.runs_stock else ():  # layers would do it again, inside of ours
            if module is not self and hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False

    def run_layer(self, layer: nn.Module, hidden: torch.Tensor, modulation: Modulation | None, **attention) -> torch.Tensor:
        """One layer by itself, checkpointed where gradient checkpointing is on; as in [`PiecewiseBackbone.run_layer`]."""
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(partial(self._run_there, layer, **attention), hidden, modulation)
        return self._run_there(layer, hidden, modulation, **attention)

    def _run_there(self, layer: nn.Module, hidden: torch.Tensor, modulation: Modulation | None, **attention) -> torch.Tensor:
        with weights_on_device(layer):  # of which modulated ones are called part by part
            return self._run_layer(layer, hidden, modulation, **attention)

    def compile_layers(self, **kwargs) -> None:
        """Have layers compiled as they first run: one graph for all layers of all blocks, since they are alike.

        Args:
            kwargs: of [`torch.compile`].
        """
        if not self.formulation.runs_stock:
            self._run_layer = torch.compile(self.architecture.run_layer, **kwargs)
            return
        heads = self.local_heads if self.config.local_head_layers else ()
        layers = [part for layer in (*layers_of(self.backbone, self.layer_lists), *heads) for part in layer]
        compiled = {kind: torch.compile(kind.forward, **kwargs) for kind in {*map(type, layers)}}
        for layer in layers:
            layer.forward = partial(compiled[type(layer)], layer)

    def asked_of_stock_model(self, stock: Mapping[str, Any]) -> dict[str, Any]:
        """What evaluation asks of the stock model beside its inputs: what is given, or else the config's own settings."""
        settings = {name: True for name in ("output_hidden_states", "output_attentions") if getattr(self.config, name, False)}
        return settings | {name: value for name, value in stock.items() if value is not None}

    def refuse(self, stock: Mapping[str, Any], where: str) -> None:
        """Raise ValueError if something is asked of the stock model that only it can give."""
        for name, value in stock.items():
            if value is not None and value is not False:
                raise ValueError(f"{name} must not be given {where}")

    # ---- the clean input through blocks

    def check_block_given(self, block_index: int | None, target: torch.Tensor | None) -> None:
        """Raise ValueError unless `forward` is called for a block and its target, or for the whole model in evaluation."""
        if block_index is None and self.trained_block is not None:
            raise ValueError(
                f"block_index=None in a training step of block {self.trained_block}: the whole model would train, through all "
                "blocks. In an own compute_loss, call super().compute_loss(model, inputs, True, num_items_in_batch), and make "
                "your loss of what it returns"
            )
        if block_index is None and self.training and target is not None:
            raise ValueError(
                "block_index=None in training: pass the block to train (DiffusionBlocksTrainer does), or call model.eval() "
                "for the loss of the whole model"
            )
        if block_index is not None and target is None:
            raise ValueError(f"labels=None with block_index={block_index}: a block is trained on labels")
        if block_index is not None:
            self.block_layers(block_index)  # raises on a block that does not exist

    def draw_levels(
        self, block_index: int, shape: tuple[int, ...], sigma: torch.Tensor | None, generator: Generators
    ) -> torch.Tensor:
        """Noise levels to train a block at, float32 on the model's device: those given, or drawn for it.

        Raises:
            ValueError: given ones are of another shape, or outside of the config's range.
        """
        if sigma is None:
            return self.noise_schedule.sample(block_index, shape, generator, self.device).to(self.device, torch.float32)
        low, high = self.config.sigma_min, self.config.sigma_max
        slack = 1e-6  # of float32
        if sigma.shape != shape or not bool(((sigma >= low * (1 - slack)) & (sigma <= high * (1 + slack))).all()):
            raise ValueError(
                f"sigma of shape {tuple(sigma.shape)}, {sigma.min():g} to {sigma.max():g}, must be of shape {tuple(shape)}, "
                f"sigma_min={low:g} to sigma_max={high:g}"
            )
        return sigma.to(self.device, torch.float32)

    def evaluation_levels(self, block_index: int, num_rows: int) -> dict[str, torch.Tensor]:
        """What to give `forward` to evaluate one block while others are missing: levels where z says nothing of the target."""
        if self.noise_schedule is None:
            return {}
        return {"sigma": torch.full((num_rows,), self.config.sigma_max)}

    def stock_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What the stock model takes of a batch as `forward` takes it."""
        return {name: value for name, value in batch.items() if name != "labels"}

    def counted_labels(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Labels by which the Trainer counts what the loss of a step is divided by: those that are not -100."""
        return batch["labels"]

    @torch.no_grad()
    def passed_on(self, block: Block, batch: Mapping[str, Any], entering: Any = None) -> Any:
        """What leaves a block that does not train, `[N, S, D]`.

        Args:
            entering: what enters it; None: it embeds, or the blocks before it run.
        """
        # (Stages end where the block does, and some have no base.)
        base = base_of(self.backbone, self.layers_path) if self.architecture.layers_are_alike else self.backbone
        with without_dropout(self.backbone), block.alone(entering) as run:
            base(**self.stock_inputs(batch))
        return run.leaving
