"""The picture of docs/finetuning_images.md: a tiny Flux, built here, that `recipes/finetune_image_model.py` teaches words.

    python benchmarks/pictures_finetuning_images.py --data train.parquet --output outputs/words

Fashion-MNIST, with the name of the class as caption. The transformer and the text encoders have random weights; the VAE is
trained here first. A quarter of an hour on a busy core. A column is a caption; rows are the recipe's own grids as training goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import diffusers
import torch
from datasets import load_dataset
from diffusers.utils import make_image_grid
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from tiny_pipelines import clip, t5, tokenizer  # noqa: E402

from hf_diffusionblocks.recipes import finetune_image_model  # noqa: E402

WORDS = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
SIDE, SHOWN = 32, ["trouser", "dress", "sneaker", "bag", "ankle boot", "pullover"]


def save_images(file: str, folder: Path, number: int) -> torch.Tensor:
    """Images with their captions, as the recipe reads them; and their pixels, `[N, 3, 32, 32]` in [-1, 1]."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, pixels = [], []
    data = load_dataset("parquet", data_files=file, split="train").shuffle(seed=0).select(range(number))
    for index, row in enumerate(data):
        image = row["image"].convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        image.save(folder / f"{index}.png")
        rows.append({"file_name": f"{index}.png", "text": WORDS[row["label"]]})
        pixels.append(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(SIDE, SIDE, 3))
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return torch.stack(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def trained_vae(pixels: torch.Tensor, steps: int) -> diffusers.AutoencoderKL:
    """Latents of `[4, 8, 8]` with a mean square of one."""
    channels = (16, 32, 32)
    vae = diffusers.AutoencoderKL(
        block_out_channels=channels, down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1, norm_num_groups=8, latent_channels=4, sample_size=SIDE, shift_factor=0.0, scaling_factor=1.0,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for step in range(steps):
        batch = pixels[torch.randint(len(pixels), (32,))]
        code = vae.encode(batch).latent_dist
        loss = (vae.decode(code.sample()).sample - batch).abs().mean() + 1e-4 * code.kl().mean() / 256
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"VAE, step {step + 1}: {loss.item():.3f}", flush=True)
    with torch.no_grad():
        latents = vae.encode(pixels[:256]).latent_dist.mode()
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    return vae


def untrained_flux(vae: diffusers.AutoencoderKL) -> diffusers.FluxPipeline:
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=clip(), tokenizer=tokenizer(77),
        text_encoder_2=t5(), tokenizer_2=tokenizer(512),
        transformer=diffusers.FluxTransformer2DModel(
            num_attention_heads=4, attention_head_dim=32, in_channels=16, num_layers=2, num_single_layers=2,
            joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(8, 12, 12),
        ),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="parquet file of Fashion-MNIST")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--vae_steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=900)
    options = parser.parse_args()
    torch.manual_seed(0)
    pixels = save_images(options.data, options.output / "images", options.images)
    untrained_flux(trained_vae(pixels, options.vae_steps)).save_pretrained(options.output / "flux")
    finetune_image_model.main([
        "--model", str(options.output / "flux"), "--data", str(options.output / "images"), "--stream", "--dtype", "float32",
        "--resolution", str(SIDE), "--bucket_step", str(SIDE), "--max_sequence_length", "16",
        "--max_steps", str(options.steps), "--per_device_train_batch_size", "32", "--learning_rate", "2e-3",
        "--lr_scheduler_type", "cosine", "--ema_decay", "0.99", "--warmup_steps", "50",
        "--sample_prompts", *SHOWN, "--sample_every_n_steps", str(options.steps // 3),
        "--sample_steps", "12", "--cache_batch_size", "64", "--save_strategy", "no", "--logging_steps", "50", "--use_cpu",
        "--disable_tqdm", "true", "--output_dir", str(options.output / "tuned"),
    ])  # fmt: skip
    grids = [Image.open(file) for file in sorted((options.output / "tuned" / "samples").iterdir(), key=order)]
    rows = [tile for grid in grids for tile in tiles(grid)]
    picture = make_image_grid(rows, len(grids), len(SHOWN)).resize((len(SHOWN) * 96, len(grids) * 96)).convert("L")
    picture.save(options.output / "words.png", optimize=True)


def order(file: Path) -> tuple[bool, str]:
    return file.name == "final.png", file.name


def tiles(grid: Image.Image) -> list[Image.Image]:
    """A grid's images, row by row."""
    across, down = grid.width // SIDE, grid.height // SIDE
    boxes = [(x * SIDE, y * SIDE, (x + 1) * SIDE, (y + 1) * SIDE) for y in range(down) for x in range(across)]
    return [grid.crop(box) for box in boxes]


if __name__ == "__main__":
    main()
