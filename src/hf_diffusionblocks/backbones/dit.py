"""DiT, diffusers' transformer for class-conditional images. It is no model of Transformers: its config is wrapped in ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from os import PathLike
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers import initialization as init

from ..extras import from_extra
from .base import PiecewiseBackbone

#: Of label and noise level embeddings.
INITIALIZER_RANGE = 0.02


class DiTConfig(PreTrainedConfig):
    """Config of diffusers' `DiTTransformer2DModel`: its fields and defaults, and names of the classes.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """

    model_type = "dit-transformer-2d"

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = None
    num_layers: int = 28
    dropout: float = 0.0
    norm_num_groups: int = 32
    attention_bias: bool = True
    sample_size: int = 32
    patch_size: int = 2
    activation_fn: str = "gelu-approximate"
    num_embeds_ada_norm: int = 1000
    upcast_attention: bool = False
    norm_type: str = "ada_norm_zero"
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-5
    initializer_range: float = INITIALIZER_RANGE

    def __post_init__(self, **kwargs):
        if self.id2label is None:
            kwargs.setdefault("num_labels", self.num_embeds_ada_norm)
        super().__post_init__(**kwargs)
        if self.norm_type != "ada_norm_zero":
            raise ValueError(f"norm_type={self.norm_type!r} must be 'ada_norm_zero'")
        if self.sample_size % self.patch_size:
            raise ValueError(f"sample_size={self.sample_size} must be a multiple of patch_size={self.patch_size}")
        if self.num_labels != self.num_embeds_ada_norm:
            raise ValueError(
                f"id2label names {self.num_labels} classes, and must name num_embeds_ada_norm={self.num_embeds_ada_norm}"
            )

    def stock_fields(self) -> dict[str, Any]:
        """Arguments of the stock model."""
        return {name: getattr(self, name) for name in _STOCK_FIELDS}


_STOCK_FIELDS = [name for name in DiTConfig.__annotations__ if name not in ("initializer_range", "model_type")]


class DiTBackbone(PiecewiseBackbone):
    """A layer conditions itself: on the noise level and the class, by an embedding of its own.

    The final modulation takes its condition from the layers, too: from the first of those that run, so that no block
    depends on another's. (The stock model's are all layers, and it takes that of its first.)
    """

    plain_name: ClassVar[str] = "DiTTransformer2DModel"  #: of `plain_class`, which diffusers has

    def __init__(self):
        """diffusers is imported when a model is made."""

    @property
    def plain_class(self) -> type[nn.Module]:
        with from_extra("diffusers", f"a {self.plain_name}", extra="diffusers"):
            from diffusers import DiTTransformer2DModel
        return DiTTransformer2DModel

    # ---- the stock model as a whole

    def make_plain(self, config: DiTConfig) -> nn.Module:
        """In training, it drops no labels: each layer would on its own."""
        plain = self.plain_class(**config.stock_fields())
        for linear in (plain.proj_out_1, plain.proj_out_2):
            linear.initial_std = 0.0
        for layer in plain.transformer_blocks:
            layer.norm1.emb.class_embedder.dropout_prob = 0.0
            layer.norm1.linear.initial_std = 0.0
            for linear in (layer.norm1.emb.timestep_embedder.linear_1, layer.norm1.emb.timestep_embedder.linear_2):
                linear.initial_std = INITIALIZER_RANGE
        return plain

    def load_plain(self, plain_class: type[nn.Module], source: str | PathLike, config: DiTConfig, **loading) -> nn.Module:
        if "attn_implementation" in loading:
            raise ValueError(
                f"attn_implementation={loading['attn_implementation']!r} must not be given for a {self.plain_name}: "
                "diffusers chooses it"
            )
        dtype = loading.pop("dtype", None)
        return plain_class.from_pretrained(source, use_safetensors=True, torch_dtype=dtype, **loading)

    def config_from(self, fields: Mapping[str, Any]) -> DiTConfig:
        return DiTConfig(**{name: value for name, value in fields.items() if name in _STOCK_FIELDS})

    def config_of(self, plain: nn.Module) -> DiTConfig:
        return self.config_from(plain.config)

    def init_weights(self, plain: nn.Module, module: nn.Module) -> None:
        """As DiT's authors do (arXiv 2212.09748, section 3, adaLN-Zero): each layer starts as the identity, the output as 0."""
        from diffusers.models.embeddings import PatchEmbed

        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=INITIALIZER_RANGE)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            self._init_linear(module)
        elif isinstance(module, PatchEmbed):  # (a block's own, where the plain model's is not loaded)
            self._init_positions(module)

    def _init_linear(self, module: nn.Linear | nn.Conv2d) -> None:
        rows, columns = module.weight.flatten(1).shape  # of patches, as a linear layer: Xavier's
        init.normal_(module.weight, std=getattr(module, "initial_std", math.sqrt(2 / (rows + columns))))
        if module.bias is not None:
            init.zeros_(module.bias)

    def _init_positions(self, patch_embed: nn.Module) -> None:
        """Sines and cosines: a buffer that is not saved."""
        from diffusers.models.embeddings import get_2d_sincos_pos_embed

        _, patches, width = patch_embed.pos_embed.shape
        with torch.device("cpu"):
            table = get_2d_sincos_pos_embed(width, math.isqrt(patches), base_size=patch_embed.base_size, output_type="pt")
        init.copy_(patch_embed.pos_embed, table.float()[None])

    # ---- sizes

    def num_layers(self, config: DiTConfig) -> int:
        return config.num_layers

    def width(self, config: DiTConfig) -> int:
        return config.num_attention_heads * config.attention_head_dim

    # ---- its pieces

    def embed(self, plain: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
        """`[N, C, H, W]` -> `[N, S, D]`, a token a patch."""
        return plain.pos_embed(pixel_values.to(plain.pos_embed.proj.weight.dtype))

    def run_layer(
        self, layer: nn.Module, hidden: torch.Tensor, modulation: None, timestep: torch.Tensor, class_labels: torch.Tensor
    ) -> torch.Tensor:
        """The stock layer as a whole; `timestep` and `class_labels` are `[N]`."""
        return layer(hidden, timestep=timestep, class_labels=class_labels)

    def condition(self, layer: nn.Module, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        """`[N, D]`, what a layer makes of noise level and class, for the final modulation."""
        embedding = layer.norm1.emb
        return embedding(timestep, class_labels, hidden_dtype=embedding.class_embedder.embedding_table.weight.dtype)

    def read_out(self, plain: nn.Module, hidden: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """`[N, S, D]` -> `[N, S, patch_size**2 * out_channels]`: the final norm, modulated, and a linear layer."""
        shift, scale = plain.proj_out_1(F.silu(condition)).chunk(2, dim=1)
        return plain.proj_out_2(plain.norm_out(hidden) * (1 + scale[:, None]) + shift[:, None])

    def unpatchify(self, config: DiTConfig, patches: torch.Tensor) -> torch.Tensor:
        """What `read_out` gives -> `[N, out_channels, H, W]`."""
        side, size = config.sample_size // config.patch_size, config.patch_size
        grid = patches.reshape(len(patches), side, side, size, size, -1)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, config.sample_size, config.sample_size)
