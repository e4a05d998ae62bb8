"""A small family that is not in the library: a denoiser of images whose estimate is a point and whose stock model is no
`PreTrainedModel`, as diffusers' are not."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageToImage, PreTrainedConfig
from transformers.utils import ModelOutput

from hf_diffusionblocks.backbones.base import PiecewiseBackbone
from hf_diffusionblocks.configuration import DiffusionBlocksConfig
from hf_diffusionblocks.diffusion.gaussian import corrupt, edm_loss_weight, precondition
from hf_diffusionblocks.diffusion.randomness import keyed_generators
from hf_diffusionblocks.models.base import DiffusionBlocksPreTrainedModel, Formulation
from hf_diffusionblocks.presets import PRESETS
from hf_diffusionblocks.tasks import Task, gaussian_noise, register_backbone, register_task


class TinyConfig(PreTrainedConfig):
    model_type = "tiny-denoiser"
    width: int = 16
    depth: int = 4
    size: int = 6
    initializer_range: float = 0.02


class TinyLayer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.condition = nn.Linear(1, width)
        self.mix = nn.Linear(width, width)

    def forward(self, hidden: torch.Tensor, c_noise: torch.Tensor) -> torch.Tensor:
        return hidden + self.mix(F.silu(self.norm(hidden) + self.condition(c_noise[:, None, None])))


class TinyDenoiser(nn.Module):
    """Rows of pixels are tokens."""

    def __init__(self, config: TinyConfig):
        super().__init__()
        self.config = config
        self.proj_in = nn.Linear(config.size, config.width)
        self.layers = nn.ModuleList(TinyLayer(config.width) for _ in range(config.depth))
        self.proj_out = nn.Linear(config.width, config.size)

    def forward(self, pixel_values: torch.Tensor, c_noise: torch.Tensor) -> torch.Tensor:
        hidden = self.proj_in(pixel_values)
        for layer in self.layers:
            hidden = layer(hidden, c_noise)
        return self.proj_out(hidden)


class TinyBackbone(PiecewiseBackbone):
    def init_weights(self, plain: TinyDenoiser, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=plain.config.initializer_range)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def checkpoint_layers(self, plain: TinyDenoiser) -> None:
        """It cannot."""

    def num_layers(self, config: TinyConfig) -> int:
        return config.depth

    def width(self, config: TinyConfig) -> int:
        return config.width

    def embed(self, plain: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
        return plain.proj_in(pixel_values)

    def run_layer(self, layer: TinyLayer, hidden: torch.Tensor, modulation: None, c_noise) -> torch.Tensor:
        return layer(hidden, c_noise)

    def read_out(self, plain: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return plain.proj_out(hidden)


class WholeInput(Formulation):
    """z is what the network reads."""

    def estimate(self, block, z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """EDM's `D = c_skip z + c_out F(c_in z)`, `[N, H, W]`."""
        c = precondition(sigma[:, None, None], self.model.config.sigma_data)
        hidden = block.run(block.embed({"pixel_values": c.input * z}), c_noise=c.noise[:, 0, 0])
        return c.skip * z + c.out * block.read_out(hidden)


class ImageDenoiser(DiffusionBlocksPreTrainedModel):
    main_input_name = "pixel_values"
    task = "image-denoising"
    FORMULATIONS = dict.fromkeys(PRESETS, WholeInput)

    def __init__(self, config: DiffusionBlocksConfig):
        super().__init__(config)
        self.post_init()

    def forward(
        self, pixel_values, block_index=None, sigma=None, noise=None, generator=None, return_logits=None, return_loss=True
    ) -> ModelOutput:
        self.check_block_given(block_index, pixel_values)
        if block_index is None:  # the loss on held-out images, of all blocks, at levels and with noise that repeat
            rows = [keyed_generators([self.config.inference_seed], range(len(pixel_values))) for _ in self.blocks]
            return ModelOutput(loss=torch.stack([self(pixel_values, k, generator=g).loss for k, g in enumerate(rows)]).mean())
        block = self.blocks[block_index]
        sigma = self.draw_levels(block_index, (len(pixel_values),), sigma, generator)
        z = corrupt(pixel_values.flatten(1), sigma, noise, generator).unflatten(1, pixel_values.shape[1:])
        estimate = self.formulation.estimate(block, z, sigma)
        loss = edm_loss_weight(sigma, self.config.sigma_data) * (estimate - pixel_values).square().mean((1, 2))
        return ModelOutput(loss=loss.mean(), estimate=estimate)


def register() -> None:
    AutoConfig.register(TinyConfig.model_type, TinyConfig, exist_ok=True)
    register_backbone(TinyConfig.model_type, ImageDenoiser.task, TinyBackbone(TinyDenoiser))
    register_task(
        Task(
            name=ImageDenoiser.task, model_class=ImageDenoiser, auto_class=AutoModelForImageToImage,
            example=lambda config, num_rows, length: {"pixel_values": torch.randn(num_rows, config.size, config.size)},
            takes_sequence_length=False,
            plain_loss=lambda model, pixel_values: model(pixel_values, torch.zeros(len(pixel_values))).square().mean(),
            processor="image processor", load_processor=str, usage="model(pixel_values).loss",
            formulations=dict.fromkeys(PRESETS, gaussian_noise(0.05)), evaluation=dict.fromkeys(PRESETS, "A loss."),
        ),
        DiffusionBlocksConfig,
    )  # fmt: skip
