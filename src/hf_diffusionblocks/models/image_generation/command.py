"""What `diffusionblocks generate` does with a model of images: a grid of them in a PNG file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from ...configuration import option
from ...diffusion.randomness import keyed_generators
from .model import DiffusionBlocksForImageGeneration


@dataclass
class ImageOptions:
    class_labels: list[str] | None = option(None, "Images: classes, by number or name. Not given: images of no class.")
    num_images: int | None = option(None, "Images: how many of each class. Not given: 1.")
    output: str | None = option(None, "Images: the PNG file for all of them, in a grid.")
    num_inference_steps: int | None = option(None, "Images: steps of sampling. Not given: the model's own, else 50.")
    guidance_scale: float | None = option(None, "Images: of classifier-free guidance; up to 1 is none. Not given: 1.")
    sampler: str | None = option(None, "Images: 'euler' or 'heun'. Not given: 'euler'.")
    grid: str | None = option(None, "Images: noise levels, 'equal' for all blocks or 'karras'. Not given: 'equal'.")


def generate(
    source: str, options: ImageOptions, seed: int | None, load: Callable[[], DiffusionBlocksForImageGeneration]
) -> None:
    """Write the grid: a row a class if there are several images of each, else about square.

    Args:
        source: saved model, or folder of a saved pipeline, which brings its VAE.
        seed: of the noise, which an image has by its number; None is the model's own.
    """
    from .pictures import image_grid  # which needs pillow
    from .pipeline import DiffusionBlocksImagePipeline  # imports diffusers

    given = {name: value for name, value in asdict(options).items() if value is not None}
    output = given.pop("output", None)
    if output is None or not output.endswith(".png"):
        raise ValueError(f"--output {output or ''} must name a .png file")
    if Path(source, DiffusionBlocksImagePipeline.config_name).is_file():
        pipe = DiffusionBlocksImagePipeline.from_pretrained(source, transformer=load())
    else:
        pipe = DiffusionBlocksImagePipeline(load())
    each = given.get("num_images", 1)
    labels = [int(label) if str(label).isdigit() else label for label in given.pop("class_labels", ())]
    generator = None if seed is None else keyed_generators([seed], range(each * max(1, len(labels))))
    images = pipe(labels or None, generator=generator, **given).images
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    image_grid(images, each if each > 1 and labels else None).save(output)
    print(f"{output}: {len(images)} images")
