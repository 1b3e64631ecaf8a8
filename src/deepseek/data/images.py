"""Images from files, and onto files with boxes drawn: the only door to Pillow.

    image_CHW = read_image("street.jpg")                       floats in [0, 1], red, green, blue
    save_with_boxes(image_CHW, boxes, ["dog 0.93"], "out.png")

An image is turned the way its camera says, and one with transparency is put on white. Files are read up to
`MAX_PIXELS`: a small file can claim to be an image of many gigabytes.

Shapes: C channels, H x W image; boxes are left, top, right, bottom in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepseek.core.errors import DataError
from deepseek.core.extras import require
from deepseek.core.storage import explained_storage

MAX_PIXELS = 2**28
"""A file that holds more is refused: 3 GB as floats."""
_LINE_SHARE = 400  # of the shorter side: the thickness of a box's line
_COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")


def read_image(path: str | Path) -> Tensor:
    """Read the image in the file `path` as floats (3, H, W) in [0, 1].

    Raises `DataError` for a file that is no image, a damaged one, and one of more than `MAX_PIXELS`.
    """
    library = require("PIL.Image", extra="models")
    ops = require("PIL.ImageOps", extra="models")
    if not Path(path).exists():
        raise DataError(f"{path} does not exist; give the path of an image")
    with explained_storage(Path(path)), Path(path).open("rb") as file:
        try:
            image = library.open(file)
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"{path} is {image.width} x {image.height} and {MAX_PIXELS} pixels are the limit; make it smaller"
                )
            upright = ops.exif_transpose(image)
            return torch.from_numpy(_as_array(library, upright)).permute(2, 0, 1).contiguous()
        except DataError:
            raise
        except Exception as error:  # Pillow's readers raise whatever their format's code runs into
            raise DataError(f"{path} cannot be read as an image ({error}); give a PNG, JPEG or WebP file") from error


def save_with_boxes(
    image_CHW: Tensor, boxes_N4: Tensor, captions: Sequence[str], path: str | Path, *, kinds: Sequence[int] = ()
) -> None:
    """Write the image with a box and a caption for each object to `path`; objects of one of `kinds` share a color."""
    library = require("PIL.Image", extra="models")
    pixels = (image_CHW.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    image = library.fromarray(pixels)
    draw = require("PIL.ImageDraw", extra="models").Draw(image)
    width = max(1, min(image.size) // _LINE_SHARE + 1)
    numbers = kinds or range(len(captions))
    for box, caption, number in zip(boxes_N4.tolist(), captions, numbers, strict=True):
        color = _COLORS[number % len(_COLORS)]
        draw.rectangle(box, outline=color, width=width)
        left, top, right, bottom = draw.textbbox((box[0] + width, box[1] + width), caption)
        draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), fill=color)
        draw.text((box[0] + width, box[1] + width), caption, fill="white")
    with explained_storage(Path(path)):
        image.save(path)


def _as_array(library: Any, image: Any) -> Any:
    """RGB floats (H, W, 3) of any mode, 16-bit ones scaled by their own range and transparent ones on white."""
    if image.mode.startswith("I"):
        grey = np.asarray(image, dtype=np.float32) / 65535
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        colored = image.convert("RGBA")
        image = library.alpha_composite(library.new("RGBA", colored.size, "white"), colored)
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255
