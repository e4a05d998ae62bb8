"""What steps of `recipes/finetune_image_model.py --stream` would hold: the figures of docs/finetuning_images.md.

    python benchmarks/estimates_images.py --output outputs/estimates                   # all; some minutes on an idle core
    python benchmarks/estimates_images.py --output outputs/estimates --models qwen-image  # of them alone

The recipe's own step (its loss, its adapters) is followed on tensors without memory: at 1024 x 1024, with the longest captions
that a pipeline takes by itself, weights in bfloat16, the optimizer AdamW. No weights are read, and any machine will do.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from estimates import numbers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import hf_diffusionblocks as db
from hf_diffusionblocks.memory.costs import Costs
from hf_diffusionblocks.memory.ledger import Ledger
from hf_diffusionblocks.memory.scenarios import Step, streamed_step
from hf_diffusionblocks.recipes.finetune_image_model import LossArguments, ModelArguments, add_adapters
from hf_diffusionblocks.recipes.image_pipelines import Habits
from hf_diffusionblocks.recipes.image_trainer import Denoiser, Objective

TOKENS, SIDE = 64 * 64, 128  #: of latents of 1024 x 1024 pixels: packed, and a side of what is not
TEXT = {"flux": 512, "qwen": 512, "sd3": 77 + 256}
SD3 = {
    "sample_size": SIDE, "in_channels": 16, "out_channels": 16, "attention_head_dim": 64, "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048, "qk_norm": "rms_norm",
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A transformer.

    Args:
        make: builds it.
        family: says what it is called with.
    """

    make: Callable[[], nn.Module]
    family: str

    def inputs(self, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, Any]]:
        """Latents and conditions of that many rows."""
        text = TEXT[self.family]
        packed = torch.zeros(rows, TOKENS, 64)
        if self.family == "sd3":
            return torch.zeros(rows, 16, SIDE, SIDE), {
                "encoder_hidden_states": torch.zeros(rows, text, 4096, dtype=dtype),
                "pooled_projections": torch.zeros(rows, 2048, dtype=dtype), "return_dict": False,
            }  # fmt: skip
        if self.family == "qwen":
            return packed, {
                "encoder_hidden_states": torch.zeros(rows, text, 3584, dtype=dtype),
                "encoder_hidden_states_mask": torch.ones(rows, text, dtype=torch.long), "img_shapes": [[(1, 64, 64)]] * rows,
                "return_dict": False,
            }  # fmt: skip
        return packed, {
            "encoder_hidden_states": torch.zeros(rows, text, 4096, dtype=dtype),
            "pooled_projections": torch.zeros(rows, 768, dtype=dtype), "guidance": torch.ones(rows),
            "img_ids": torch.zeros(TOKENS, 3, dtype=dtype), "txt_ids": torch.zeros(text, 3, dtype=dtype),
            "return_dict": False,
        }  # fmt: skip


MODELS = {
    "qwen-image": Model(diffusers.QwenImageTransformer2DModel, "qwen"),
    "flux-dev": Model(lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True), "flux"),
    "sd3.5-large": Model(
        lambda: diffusers.SD3Transformer2DModel(
            **SD3, num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192
        ),
        "sd3",
    ),
    "sd3.5-medium": Model(
        lambda: diffusers.SD3Transformer2DModel(
            **SD3, num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
        ),
        "sd3",
    ),
}  # fmt: skip


def followed(model: Model, rows: int, lora: bool) -> tuple[Ledger, Costs, int]:
    """Ledger and costs of a micro-batch once the order of units is known; and parameters of the transformer."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    dtype = torch.bfloat16
    with torch.device("meta"):
        transformer = model.make().to(dtype)
        size = sum(parameter.numel() for parameter in transformer.parameters())
        if lora:
            add_adapters(transformer, ModelArguments("-", lora=True))
    with fake:
        transformer.to_empty(device="cpu")
        for module in transformer.modules():  # (tensors that are no buffers stay where they were made)
            for name, value in vars(module).items():
                if isinstance(value, torch.Tensor) and value.is_meta:
                    setattr(module, name, torch.empty_like(value, device="cpu"))
        latents, conditions = model.inputs(rows, dtype)
    stream = db.stream_layers(transformer.train(), "cpu")
    habits = Habits(("hidden_states", "timestep"), False, 1e-3, 0.0, "as it is", ())
    objective = Objective({"_class_name": "FlowMatchEulerDiscreteScheduler"}, LossArguments())
    denoiser, generator = Denoiser(transformer), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in transformer.parameters() if p.requires_grad], fused=True)

    def loss() -> torch.Tensor:
        return objective(lambda noisy, times: habits.run(denoiser, noisy.to(dtype), times, conditions), latents, generator)

    return *streamed_step(Step(transformer, optimizer, loss, stream=stream), fake), size


def line(name: str, step: str, found: dict) -> str:
    """A row of the table."""
    costs = found["costs"]
    cells = (found["device"] / 2**30, found["host"] / 2**30, costs["to_device"] / 1e9, costs["to_host"] / 1e9)
    figures = " | ".join(f"{cell:.1f}" for cell in cells)
    what, rows = step.split(", ")
    return f"| {name}, {found['parameters'] / 1e9:.1f}B | {what} | {rows} | {figures} | {costs['operations'] / 1e12:.0f} |"


HEAD = ["| model | trained | images | device, GiB | host, GiB | copied, GB | back, GB | 10^12 operations |", "|---" * 8 + "|"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for tables and numbers; what is there stays")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 4], help="images of a micro-batch")
    options = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.models:
        file = options.output / f"{name}.json"
        found = json.loads(file.read_text()) if file.is_file() else {}
        for lora, rows in ((lora, rows) for lora in (True, False) for rows in options.rows):
            ledger, costs, size = followed(MODELS[name], rows, lora)
            step = f"{'LoRA' if lora else 'all'}, {rows}"
            found[step] = numbers(ledger, costs) | {"parameters": size}
            print(line(name, step, found[step]), flush=True)
            file.write_text(json.dumps(found) + "\n")
        lines = [line(name, *each) for each in found.items()]
        (options.output / f"{name}.md").write_text("\n".join([*HEAD, *lines]) + "\n")


if __name__ == "__main__":
    main()
