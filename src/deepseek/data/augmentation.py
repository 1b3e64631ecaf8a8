"""From an image to the square of pixels that a classifier sees: a random part of it in training, its middle otherwise.

    augment(image, AugmentationConfig(), 224, random)      cut, scaled, mirrored, its colors changed
    center(image, 224, crop_share=0.875)                   its middle, scaled

The part is drawn as for GoogLeNet: an area and a ratio of the sides, both uniform (the ratio by its logarithm), tried
until it lies within the image. Colors change by factors around one, brightness first, then contrast, then saturation.
Everything is drawn from the generator that is handed in and computed by Pillow and NumPy on bytes, so that an image is
the same whoever loads it. An image of 500 x 375 takes 2 ms, most of it for reading the JPEG.

Source: Szegedy et al. 2014, "Going Deeper with Convolutions", section 6.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from deepseek.data.config import AugmentationConfig
from deepseek.data.images import Pixels, cut

_NUM_TRIES = 10
_RED, _GREEN, _BLUE = (np.float32(share) for share in (0.299, 0.587, 0.114))  # ITU-R 601, as Pillow has grey


def augment(image: Any, settings: AugmentationConfig, size: int, random: np.random.Generator) -> Pixels:
    """Return a random part of a Pillow image as bytes (size, size, 3), changed as `settings` say."""
    box = draw_box(image.width, image.height, settings, random)
    pixels_HWC = cut(image, box, (size, size))
    if random.random() < settings.flip:
        pixels_HWC = np.ascontiguousarray(pixels_HWC[:, ::-1])
    return change_colors(pixels_HWC, settings, random)


def center(image: Any, size: int, *, crop_share: float) -> Pixels:
    """Return the middle of a Pillow image, `crop_share` of its shorter side, as bytes (size, size, 3).

    The image is scaled first and cut then, as `deepseek predict` does with the model that comes out.
    """
    shorter = scaled_edge(size, crop_share)
    scale = shorter / min(image.width, image.height)
    width, height = max(shorter, int(image.width * scale)), max(shorter, int(image.height * scale))
    scaled = cut(image, (0, 0, image.width, image.height), (height, width))
    top, left = (height - size) // 2, (width - size) // 2
    return np.ascontiguousarray(scaled[top : top + size, left : left + size])


def scaled_edge(size: int, crop_share: float) -> int:
    """Return the length that the shorter side is scaled to, so that its middle of `size` pixels is `crop_share` of it.

    >>> scaled_edge(224, 0.875)
    256
    """
    return round(size / crop_share)


def draw_box(
    width: int, height: int, settings: AugmentationConfig, random: np.random.Generator
) -> tuple[float, float, float, float]:
    """Draw the part of an image that is seen, as (left, top, right, bottom) in pixels."""
    stretch = math.log(settings.max_stretch)
    for _ in range(_NUM_TRIES):
        area = width * height * (settings.min_area + (1 - settings.min_area) * random.random())
        ratio = math.exp(stretch * (2 * random.random() - 1))
        box_width, box_height = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if box_width <= width and box_height <= height:
            left, top = random.random() * (width - box_width), random.random() * (height - box_height)
            return left, top, left + box_width, top + box_height
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def change_colors(pixels_HWC: Pixels, settings: AugmentationConfig, random: np.random.Generator) -> Pixels:
    """Return the image with brightness, contrast and saturation changed by random factors."""
    changes = (settings.brightness, settings.contrast, settings.saturation)
    brightness, contrast, saturation = (np.float32(1 + change * (2 * random.random() - 1)) for change in changes)
    if not any(changes):
        return pixels_HWC
    values_HWC = np.minimum(pixels_HWC * brightness, np.float32(255))
    values_HWC = blend(values_HWC, to_grey(values_HWC).mean(), contrast)
    values_HWC = blend(values_HWC, to_grey(values_HWC), saturation)
    changed: Pixels = values_HWC.round().astype(np.uint8)
    return changed


def to_grey(values_HWC: Any) -> Any:
    """Return the brightness (H, W, 1) of each pixel; not a matmul, whose rounding depends on the number of threads."""
    return _RED * values_HWC[..., :1] + _GREEN * values_HWC[..., 1:2] + _BLUE * values_HWC[..., 2:]


def blend(values_HWC: Any, other: Any, share: np.float32) -> Any:
    """Return a share of `values_HWC` and the rest of `other`, within what bytes hold; a share above 1 goes beyond."""
    return np.clip(other + share * (values_HWC - other), np.float32(0), np.float32(255))
