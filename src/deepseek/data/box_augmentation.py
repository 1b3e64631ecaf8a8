"""Random changes of images with boxes, all of them drawn from one generator: the sample's own.

    pictures, 1 or 4 of them (a mosaic) -> scaled and shifted onto a grey square -> mirrored -> hue, saturation, value

A mosaic puts four pictures around a random point, which is what the published recipe does on a square twice as large
before it scales, shifts and crops it; here every picture is resized once, straight to where it ends up. Boxes are cut
off at the edges of the square. A box of which little is left is dropped: it shows too little of its object.

Shapes: C channels, H x W image, N boxes; boxes are left, top, right, bottom in pixels.
Source: Bochkovskiy et al. 2020, "YOLOv4" (mosaic); ranges and limits are those of YOLOv7's published settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.data.config import BoxAugmentationConfig
from deepseek.data.images import change_colors
from deepseek.data.letterbox import GREY

MIN_SIDE = 2.0
"""Pixels that each side of a box keeps at least."""
MIN_SHARE = 0.1
"""Share of its area that a box keeps at least."""


@dataclass(frozen=True)
class Picture:
    """An image with the boxes and classes of its objects."""

    image_CHW: Tensor
    """Red, green, blue from 0 to 1."""
    boxes_N4: Tensor
    labels_N: Tensor


def augment(
    pictures: Sequence[Picture], size: int, settings: BoxAugmentationConfig, random: np.random.Generator
) -> Picture:
    """Put one picture, or a mosaic of four, onto a square of `size` pixels, and change it by `random`."""
    composed = compose(pictures, size, settings, random)
    if random.random() < settings.flip:
        composed = mirror(composed)
    hue, saturation, value = random.uniform(-1, 1, size=3) * (settings.hue, settings.saturation, settings.brightness)
    colored_CHW = change_colors(composed.image_CHW, hue=hue, saturation=1 + saturation, value=1 + value)
    return Picture(colored_CHW, composed.boxes_N4, composed.labels_N)


def compose(
    pictures: Sequence[Picture], size: int, settings: BoxAugmentationConfig, random: np.random.Generator
) -> Picture:
    """Scale and shift one picture on a grey square, or four around a point of it, and drop boxes that are cut away."""
    zoom = random.uniform(1 - settings.scale, 1 + settings.scale)
    shift_2 = random.uniform(-settings.translate, settings.translate, size=2) * size
    is_mosaic = len(pictures) > 1
    joint_2 = random.uniform(-size / 2, size / 2, size=2) if is_mosaic else np.zeros(2)
    x, y = (size / 2 + zoom * joint_2 + shift_2).round().astype(int).tolist()
    canvas_CHW = torch.full((3, size, size), GREY)
    boxes, labels = [], []
    for number, picture in enumerate(pictures):
        height, width = picture.image_CHW.shape[1:]
        factor = zoom * size / max(height, width)
        inner_height, inner_width = max(1, round(height * factor)), max(1, round(width * factor))
        left, top = x - inner_width // 2, y - inner_height // 2
        if is_mosaic:  # upper left, upper right, lower left, lower right of the point
            left, top = (x if number % 2 else x - inner_width), (y if number >= 2 else y - inner_height)
        _draw(canvas_CHW, picture.image_CHW, (left, top, inner_width, inner_height))
        scale_4 = torch.tensor([inner_width / width, inner_height / height] * 2)
        boxes.append(picture.boxes_N4 * scale_4 + torch.tensor([left, top] * 2))
        labels.append(picture.labels_N)
    return crop(Picture(canvas_CHW, torch.cat(boxes), torch.cat(labels)))


def crop(picture: Picture) -> Picture:
    """Cut boxes off at the edges of the image, and drop those of which too little is left."""
    height, width = picture.image_CHW.shape[1:]
    whole_N4 = picture.boxes_N4
    cut_N4 = torch.minimum(whole_N4.clamp(min=0), torch.tensor([width, height] * 2))
    sides_N2 = cut_N4[:, 2:] - cut_N4[:, :2]
    share_N = sides_N2.clamp(min=0).prod(1) / (whole_N4[:, 2:] - whole_N4[:, :2]).prod(1)
    stays_N = (sides_N2.amin(1) >= MIN_SIDE) & (share_N >= MIN_SHARE)
    return Picture(picture.image_CHW, cut_N4[stays_N], picture.labels_N[stays_N])


def mirror(picture: Picture) -> Picture:
    """Mirror left to right.

    >>> image = torch.zeros(3, 4, 10)
    >>> mirror(Picture(image, torch.tensor([[1.0, 0.0, 3.0, 4.0]]), torch.tensor([0]))).boxes_N4.tolist()
    [[7.0, 0.0, 9.0, 4.0]]
    """
    left_N, top_N, right_N, bottom_N = picture.boxes_N4.unbind(1)
    width = picture.image_CHW.shape[2]
    boxes_N4 = torch.stack([width - right_N, top_N, width - left_N, bottom_N], dim=1)
    return Picture(picture.image_CHW.flip(2), boxes_N4, picture.labels_N)


def _draw(canvas_CHW: Tensor, image_CHW: Tensor, place: tuple[int, int, int, int]) -> None:
    """Draw an image onto `canvas_CHW`, in place, resized to (left, top, width, height); what lies beside it is lost."""
    left, top, width, height = place
    seen_left, seen_top = max(left, 0), max(top, 0)
    seen_right, seen_bottom = min(left + width, canvas_CHW.shape[2]), min(top + height, canvas_CHW.shape[1])
    if seen_left >= seen_right or seen_top >= seen_bottom:
        return
    is_smaller = width < image_CHW.shape[2] or height < image_CHW.shape[1]
    scaled_CHW = F.interpolate(image_CHW[None], (height, width), mode="bilinear", antialias=is_smaller)[0]
    seen_CHW = scaled_CHW[:, seen_top - top : seen_bottom - top, seen_left - left : seen_right - left]
    canvas_CHW[:, seen_top:seen_bottom, seen_left:seen_right] = seen_CHW
