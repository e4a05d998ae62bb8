"""Several pictures in one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...extras import from_extra

with from_extra("pillow", "a grid of images", extra="diffusers"):
    from PIL import Image


def image_grid(pictures: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Pictures of one size, row by row; None is as many columns as rows, or one more."""
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    width, height = pictures[0].size
    grid = Image.new(pictures[0].mode, (columns * width, math.ceil(len(pictures) / columns) * height))
    for number, picture in enumerate(pictures):
        grid.paste(picture, (number % columns * width, number // columns * height))
    return grid
