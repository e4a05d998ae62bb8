"""Pictures of what benchmarks/quality_generation.py trained, for docs/image_generation.md.

    python benchmarks/generation_pictures.py --results outputs/quality_generation --output docs

Samples of several rows from the same noise, the way of one image through the blocks, and cost and quality as B grows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
import torch
from cached_runs import file_of
from quality_generation import ROWS, STEPS

import hf_diffusionblocks as db

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

BY_BLOCKS = {1: "end to end, 6 layers", 2: "B=2 of 3 layers", 3: "B=3 of 2 layers", 6: "B=6 of 1 layer"}
SAMPLED = ["end to end, 6 layers", "end to end, 2 layers", "B=3 of 2 layers, own ends", "B=3 of 6 layers"]
WALKED = "B=3 of 2 layers, own ends"
NAMES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


def model_of(results: Path, row: str, updates: int):
    return db.DiffusionBlocksForImageGeneration.from_pretrained(file_of(results, ROWS, row, updates).with_suffix(""))


def draw_samples(results: Path, updates: int, file: Path) -> None:
    """Two images a class from each row's model, all from the same noise."""
    classes = [k // 2 for k in range(20)]
    figure, axes = plt.subplots(len(SAMPLED), 20, figsize=(20, 1.25 * len(SAMPLED)))
    for row, line in zip(SAMPLED, axes):
        images = model_of(results, row, updates).predict(classes, num_inference_steps=STEPS, grid="karras").images
        for image, axis in zip(images, line):
            axis.imshow(image[0].clamp(-1, 1), cmap="gray", vmin=-1, vmax=1)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(row.replace(", ", ",\n").replace(" of ", "\nof "), rotation=0, ha="right", va="center")
    for axis, k in zip(axes[0][::2], range(10)):
        axis.set_title(NAMES[k], loc="left", fontsize=10)
    figure.subplots_adjust(wspace=0.03, hspace=0.05, left=0.07, right=0.995, top=0.92, bottom=0.01)
    figure.savefig(file, dpi=80)
    plt.close(figure)


def draw_walk(results: Path, updates: int, file: Path, steps: int = 12) -> None:
    """z, scaled to the images' size, and what the block of each step takes the image for."""
    model, seen = model_of(results, WALKED, updates), []
    sigmas = model.inference_sigmas(steps)
    noise = torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(4))
    model.predict([1], num_inference_steps=steps, noise=noise, on_step=lambda step, z: seen.append(z))
    z = sigmas[0] * noise.double()
    figure, axes = plt.subplots(2, steps, figsize=(1.3 * steps, 3.3))
    colours = plt.get_cmap("tab10")
    for step, (z_next, sigma, sigma_next) in enumerate(zip(seen, sigmas, sigmas[1:])):
        ratio = sigma_next / sigma
        estimate, block = (z_next - ratio * z) / (1 - ratio), int(model.noise_schedule.block_of(sigma))
        scaled = z / (1 + sigma**2 / model.config.sigma_data**2) ** 0.5
        for axis, image in zip(axes[:, step], (scaled, estimate)):
            axis.imshow(image[0, 0].clamp(-1, 1), cmap="gray", vmin=-1, vmax=1)
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set(color=colours(block), linewidth=4)
        axes[0, step].set_title(f"block {block}\nσ = {sigma:.2g}", fontsize=9, color=colours(block))
        z = z_next
    axes[0, 0].set_ylabel("z")
    axes[1, 0].set_ylabel("estimate")
    figure.tight_layout(pad=0.4)
    figure.savefig(file, dpi=90)
    plt.close(figure)


def draw_blocks(results: Path, updates: int, file: Path) -> None:
    """Six layers in B blocks: quality, and what a step of sampling and of training costs."""
    found = {b: json.loads(file_of(results, ROWS, row, updates).read_text()) for b, row in BY_BLOCKS.items()}
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2))
    panels = (
        ("held-out denoising loss", lambda b, run: run["loss"]),
        ("Frechet distance, Karras grid", lambda b, run: run["frechet karras"]),
        ("share of end to end", None),
    )
    for axis, (title, value) in zip(axes, panels):
        if value is not None:
            axis.plot(list(found), [value(b, run) for b, run in found.items()], "o-")
        else:
            axis.plot(list(found), [1 / b for b in found], "o-", label="layers a sampling step")
            memory = [run["step bytes"] / found[1]["step bytes"] for run in found.values()]
            axis.plot(list(found), memory, "s--", label="memory of a training step")
            axis.legend(frameon=False)
            axis.set_ylim(0, 1.05)
        axis.set(title=title, xlabel="B, blocks that 6 layers are cut into", xticks=list(found))
    figure.tight_layout()
    figure.savefig(file, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="folder of benchmarks/quality_generation.py")
    parser.add_argument("--output", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--updates", type=int, default=1500)
    options = parser.parse_args()
    draw_samples(options.results, options.updates, options.output / "image_samples.png")
    draw_walk(options.results, options.updates, options.output / "image_walk.png")
    draw_blocks(options.results, options.updates, options.output / "image_blocks.png")


if __name__ == "__main__":
    main()
