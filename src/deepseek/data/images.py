"""Images from files, and onto files with boxes drawn: the only door to Pillow.

    image_CHW = read_image("street.jpg")                       floats in [0, 1], red, green, blue
    image = read_rgb("street.jpg")                             the same as Pillow has it, a byte for each color
    pixels_HWC = cut(image, (left, top, right, bottom), 224)   a part of it, scaled to a square
    save_with_boxes(image_CHW, boxes, ["dog 0.93"], "out.png")

An image is turned the way its camera says, and one with transparency is put on white. Files are read up to
`MAX_PIXELS`: a small file can claim to be an image of many gigabytes.

Shapes: C channels, H x W image; boxes are left, top, right, bottom in pixels.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepseek.core.errors import DataError
from deepseek.core.extras import require
from deepseek.core.storage import explained_storage

T = TypeVar("T")
Pixels = NDArray[np.uint8]
"""Bytes (H, W, 3) of red, green and blue, unless said otherwise."""
MAX_PIXELS = 2**28
"""A file that holds more is refused: 3 GB as floats."""
_WHITE_16 = 65535  # of 16 bits
_LINE_SHARE = 400  # of the shorter side: the thickness of a box's line
_COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")


def read_image(path: str | Path) -> Tensor:
    """Read the image in the file `path` as floats (3, H, W) in [0, 1].

    Raises `DataError` for a file that is no image, a damaged one, and one of more than `MAX_PIXELS`.
    """
    return torch.from_numpy(_decode(path, str(path), _as_floats)).permute(2, 0, 1).contiguous()


def read_rgb(source: str | Path | bytes, name: str | None = None) -> Any:
    """Read a file, or its bytes, as a Pillow image in RGB; `name` is what errors call it. Raises as `read_image`."""
    return _decode(source, name or str(source), _as_rgb)


def cut(image: Any, box: tuple[float, float, float, float], size: tuple[int, int]) -> Pixels:
    """Cut the box (left, top, right, bottom) out of a Pillow image and scale it to height and width `size`.

    The pixels are bytes (H, W, 3), each the mean of what it covers, by a filter that grows with the scale and also sees
    what lies right beside the box.
    """
    bilinear = require("PIL.Image", extra="models").Resampling.BILINEAR
    # The array is copied, since Pillow lends memory that torch may not write to.
    return np.array(image.resize((size[1], size[0]), bilinear, box=box))


def write_pixels(pixels: Pixels, path: Path) -> None:
    """Write bytes (H, W) of grey or (H, W, 3) of red, green and blue to the image file `path`."""
    with explained_storage(path):
        require("PIL.Image", extra="models").fromarray(pixels).save(path)


def read_picture(path: str | Path) -> Tensor:
    """Read the image in the file `path` as floats (4, H, W) in [0, 1], the last of them its opacity.

    Raises `DataError` as `read_image` does.
    """
    pixels = _decode(path, str(path), lambda library, image: np.asarray(image.convert("RGBA"), dtype=np.float32) / 255)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def save_image(image_CHW: Tensor, path: str | Path) -> None:
    """Write an image (3, H, W) with values in [0, 1] to `path`, in the format of its suffix."""
    write_pixels(as_pixels(image_CHW), Path(path))


def as_pixels(image_CHW: Tensor) -> Pixels:
    """Return an image (3, H, W) with values in [0, 1] as bytes (H, W, 3)."""
    return (image_CHW.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def _decode(source: str | Path | bytes, name: str, convert: Callable[[Any, Any], T]) -> T:
    """Open an image, turn it the way its camera says, and return what `convert` makes of it."""
    library = require("PIL.Image", extra="models")
    ops = require("PIL.ImageOps", extra="models")
    if not isinstance(source, bytes) and not Path(source).exists():
        raise DataError(f"{name} does not exist; give the path of an image")
    if not isinstance(source, bytes) and not Path(source).is_file():  # to open a pipe would wait forever
        raise DataError(f"{name} is no regular file; give the path of an image")
    with ExitStack() as stack:
        if isinstance(source, bytes):
            file: IO[bytes] = io.BytesIO(source)
        else:
            stack.enter_context(explained_storage(Path(source)))
            file = stack.enter_context(Path(source).open("rb"))
        try:
            image = library.open(file)
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"{name} is {image.width} x {image.height} and {MAX_PIXELS} pixels are the limit; make it smaller"
                )
            _check_values(image, name)
            return convert(library, ops.exif_transpose(image))
        except DataError:
            raise
        except library.DecompressionBombError as error:  # Pillow's own limit, which is below ours for some formats
            raise DataError(f"{name} has too many pixels ({error}); make it smaller") from error
        except Exception as error:  # Pillow's readers raise whatever their format's code runs into
            raise DataError(f"{name} cannot be read as an image ({error}); give a PNG, JPEG or WebP file") from error


def _check_values(image: Any, name: str) -> None:
    """Raise `DataError` for pixels that are floats or integers beyond 16 bits: nobody says which of them is white."""
    if image.mode == "F":
        raise DataError(f"{name} has floats for pixels, whose range is not known; save it with 8 or 16 bits")
    if image.mode == "I":
        least, most = image.getextrema()
        if least < 0 or most > _WHITE_16:
            raise DataError(
                f"{name} has pixels from {least} to {most}, and 0 to {_WHITE_16} are read; save it with 8 or 16 bits"
            )


def save_with_boxes(
    image_CHW: Tensor, boxes_N4: Tensor, captions: Sequence[str], path: str | Path, *, kinds: Sequence[int] = ()
) -> None:
    """Write the image with a box and a caption for each object to `path`; objects of one of `kinds` share a color."""
    library = require("PIL.Image", extra="models")
    image = library.fromarray(as_pixels(image_CHW))
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


def change_colors(image_CHW: Tensor, *, hue: float, saturation: float, value: float) -> Tensor:
    """Turn the hue by `hue` rounds of the color circle, and multiply saturation and value, in steps of 1/255."""
    library = require("PIL.Image", extra="models")
    levels = np.arange(256)
    turned = (levels + round(hue * 256)) % 256
    stretched = [np.clip(levels * factor, 0, 255).round() for factor in (saturation, value)]
    table = np.concatenate([turned, *stretched]).astype(np.uint8).tolist()
    changed = library.fromarray(as_pixels(image_CHW)).convert("HSV").point(table).convert("RGB")
    return torch.from_numpy(np.asarray(changed, dtype=np.float32) / 255).permute(2, 0, 1).contiguous()


def _as_floats(library: Any, image: Any) -> NDArray[np.float32]:
    """RGB floats (H, W, 3) of any mode, 16-bit ones scaled by their own range."""
    if image.mode.startswith("I"):
        grey = np.asarray(image, dtype=np.float32) / np.float32(_WHITE_16)
        return np.repeat(grey[..., None], 3, axis=2)
    return np.asarray(_as_rgb(library, image), dtype=np.float32) / np.float32(255)


def _as_rgb(library: Any, image: Any) -> Any:
    """A Pillow image in RGB of any mode, transparent ones on white."""
    if image.mode.startswith("I"):
        return library.fromarray((_as_floats(library, image) * 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        colored = image.convert("RGBA")
        image = library.alpha_composite(library.new("RGBA", colored.size, "white"), colored)
    return image.convert("RGB")
