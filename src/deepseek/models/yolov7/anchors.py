"""Anchors that fit the boxes of a data set: k-means of their widths and heights, on a logarithmic scale.

Equal ratios are equal distances there, and a ratio is what decides whether an anchor may find a box
(`label_assignment.py`). Of `NUM_STARTS` starts, drawn by a seed, the one whose anchors end up nearest to the boxes
counts, so that the same boxes give the same anchors.

Sources: Redmon and Farhadi 2017, "YOLO9000", section on dimension clusters, with ratios in place of overlaps; Arthur
and Vassilvitskii 2007, "k-means++" (the starts).
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek.core.errors import ConfigError
from deepseek.models.yolov7.model import STRIDES, Anchors

MAX_ROUNDS = 300
NUM_STARTS = 10
_DECIMALS = 1  # of a pixel


def fit_anchors(sizes_N2: Tensor, num_anchors: int = 3) -> Anchors:
    """Fit `num_anchors` anchors for each level to widths and heights in pixels, the smallest on the finest level.

    >>> fit_anchors(torch.tensor([[8.0, 8.0], [16.0, 16.0], [64.0, 32.0]]), num_anchors=1)
    (((8.0, 8.0),), ((16.0, 16.0),), ((64.0, 32.0),))
    """
    if not len(sizes_N2):
        raise ConfigError("there are no boxes to fit anchors to; give data with boxes, or set task.anchors=model")
    points_N2 = sizes_N2.double().log()
    generator = torch.Generator().manual_seed(0)
    starts = [_choose_start(points_N2, len(STRIDES) * num_anchors, generator) for _ in range(NUM_STARTS)]
    found = [_move_to_means(points_N2, start_K2) for start_K2 in starts]
    centres_K2 = min(found, key=lambda centres_K2: float(_measure(points_N2, centres_K2).amin(1).sum()))
    rounded = [(round(width, _DECIMALS), round(height, _DECIMALS)) for width, height in centres_K2.exp().tolist()]
    anchors = sorted(rounded, key=lambda size: size[0] * size[1])
    return tuple(tuple(anchors[level * num_anchors : (level + 1) * num_anchors]) for level in range(len(STRIDES)))


def _choose_start(points_N2: Tensor, num_centres: int, generator: torch.Generator) -> Tensor:
    """Choose points one after the other, each by its squared distance to the nearest one so far."""
    centres_K2 = points_N2[torch.randint(len(points_N2), (1,), generator=generator)]
    while len(centres_K2) < num_centres:
        distance_N = _measure(points_N2, centres_K2).amin(1)
        distance_N = distance_N if distance_N.any() else torch.ones_like(distance_N)
        centres_K2 = torch.cat([centres_K2, points_N2[torch.multinomial(distance_N, 1, generator=generator)]])
    return centres_K2


def _move_to_means(points_N2: Tensor, centres_K2: Tensor) -> Tensor:
    """Move each centre to the mean of the points that are nearest to it, until none moves."""
    for _ in range(MAX_ROUNDS):
        nearest_N = _measure(points_N2, centres_K2).argmin(1)
        members_KN = nearest_N == torch.arange(len(centres_K2))[:, None]
        means_K2 = members_KN.double() @ points_N2 / members_KN.sum(1, keepdim=True).clamp(min=1)
        moved_K2 = torch.where(members_KN.any(1, keepdim=True), means_K2, centres_K2)
        if torch.equal(moved_K2, centres_K2):
            break
        centres_K2 = moved_K2
    return centres_K2


def _measure(points_N2: Tensor, centres_K2: Tensor) -> Tensor:
    """Measure the squared distance of each point from each centre, (N, K)."""
    return (points_N2[:, None] - centres_K2).square().sum(-1)
