"""Fitting an image of any size into the square that a detector takes, and boxes back onto the image.

An image is scaled by one factor, so that nothing is distorted, and what is left of the square on two sides is grey.
The factor and the margins come back with it; `restore` undoes them. Called when samples with boxes are loaded, and
before and after a detector runs.

Shapes: C channels, H x W image; boxes (..., 4) are left, top, right, bottom in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.core.errors import ConfigError

GREY = 114 / 255


@dataclass(frozen=True)
class Letterbox:
    """How an image was fitted."""

    scale_x: float
    """Pixels of the fitted image for one of the original, across."""
    scale_y: float
    """The same, down; rounding to whole pixels makes the two differ by less than one pixel over the image."""
    left: int
    """Grey columns before the image."""
    top: int
    """Grey rows above the image."""
    height: int
    """Of the original, in pixels."""
    width: int
    """Of the original, in pixels."""


def letterbox(
    image_CHW: Tensor, size: tuple[int, int], *, grey: float = GREY, can_enlarge: bool = True
) -> tuple[Tensor, Letterbox]:
    """`image_CHW`, with values in [0, 1], in the middle of an image of `size` (height, width).

    Raises `ConfigError` for an image that is not (C, H, W) floats.

    >>> fitted, how = letterbox(torch.ones(3, 100, 200), (64, 64))
    >>> fitted.shape, how.top, fitted[0, :, 0].sum().item() < 64
    (torch.Size([3, 64, 64]), 16, True)
    """
    if image_CHW.dim() != 3 or not image_CHW.is_floating_point() or not image_CHW.numel() or min(size) < 1:
        raise ConfigError(
            f"an image {tuple(image_CHW.shape)} of {image_CHW.dtype} does not fit into {size}; expected "
            "(channels, height, width) of floats in [0, 1], divide bytes by 255"
        )
    height, width = image_CHW.shape[1:]
    scale = min(size[0] / height, size[1] / width)
    scale = scale if can_enlarge else min(scale, 1.0)
    inner = (max(1, round(height * scale)), max(1, round(width * scale)))
    scaled_CHW = image_CHW
    if inner != (height, width):
        scaled_CHW = F.interpolate(image_CHW[None], inner, mode="bilinear", antialias=scale < 1)[0]
    top, left = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    margins = [left, size[1] - inner[1] - left, top, size[0] - inner[0] - top]
    how = Letterbox(inner[1] / width, inner[0] / height, left, top, height, width)
    return F.pad(scaled_CHW, margins, value=grey), how


def restore(boxes_4: Tensor, how: Letterbox) -> Tensor:
    """Map boxes on a fitted image to boxes on the original, cut off at its edges.

    >>> _, how = letterbox(torch.ones(3, 100, 200), (64, 64))
    >>> restore(torch.tensor([0.0, 16.0, 32.0, 80.0]), how).tolist()
    [0.0, 0.0, 100.0, 100.0]
    """
    shift = boxes_4.new_tensor([how.left, how.top] * 2)
    scale = boxes_4.new_tensor([how.scale_x, how.scale_y] * 2)
    edge = boxes_4.new_tensor([how.width, how.height] * 2)
    return torch.minimum(((boxes_4 - shift) / scale).clamp(min=0), edge)
