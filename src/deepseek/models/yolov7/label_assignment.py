"""Which of a YOLOv7's many predictions answer for which object in training; `training_loss.py` compares these alone.

    1. Candidates: an object may be found by an anchor whose sides are at most `max_ratio` times longer or shorter, in
       the cell that its centre lies in and the two neighbours that the centre is nearest to, on every level.
    2. Matching, image by image: an object is answered for by as many candidates as its best overlaps add up to
       (1 to 10), those of the lowest cost: how wrong the class is, and how little the boxes overlap. A candidate that
       several objects want goes to the cheapest.

A prediction answers for one object at most. Nothing here has a gradient, and ties fall to the earlier candidate, so
that the same predictions always give the same assignment.

Shapes: B images, N objects of the batch, C candidates of the batch, G objects and M candidates of one image, A anchors
a level, H x W cells, O = 5 + K outputs.
Sources: Wang et al. 2022, "YOLOv7" (the lead head alone, with the three-cell candidates of YOLOv5); Ge et al. 2021,
"YOLOX", section on SimOTA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek.models.yolov7.model import NUM_BOX, STRIDES
from deepseek.models.yolov7.suppression import overlap

MAX_MATCHES = 10
IOU_WEIGHT = 3.0
_SMALLEST_IOU = 1e-8
_SMALLEST_SHARE = 1e-7  # of a probability from 0 and 1


@dataclass(frozen=True)
class ObjectTargets:
    """The objects in a batch of images."""

    boxes_N4: Tensor
    """Left, top, right, bottom in pixels."""
    labels_N: Tensor
    """Number of the class."""
    images_N: Tensor
    """Number of the image in the batch."""


@dataclass(frozen=True)
class Candidates:
    """Predictions that may answer for an object, level after level and image after image on each level."""

    levels_C: Tensor
    images_C: Tensor
    anchors_C: Tensor
    rows_C: Tensor
    columns_C: Tensor

    def on_level(self, level: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return image, anchor, row and column of the candidates of one level, which index its predictions."""
        chosen_C = self.levels_C == level
        parts = (self.images_C, self.anchors_C, self.rows_C, self.columns_C)
        images_C, anchors_C, rows_C, columns_C = (part[chosen_C] for part in parts)
        return images_C, anchors_C, rows_C, columns_C


def find_candidates(
    raw: Sequence[Tensor], objects: ObjectTargets, anchors_LA2: Tensor, *, max_ratio: float
) -> Candidates:
    """Find the candidates on all levels; `raw` is (B, A, H, W, O) each, and the anchors are in pixels."""
    levels = [
        _find_on_level(level, tuple(raw_BAHWO.shape[2:4]), objects, anchors_A2, max_ratio)
        for level, (raw_BAHWO, anchors_A2) in enumerate(zip(raw, anchors_LA2, strict=True))
    ]
    return Candidates(*(torch.cat(parts) for parts in zip(*levels, strict=True)))


def _find_on_level(
    level: int, size: tuple[int, ...], objects: ObjectTargets, anchors_A2: Tensor, max_ratio: float
) -> list[Tensor]:
    """Find the level, image, anchor, row and column of the candidates of a level, each once, sorted by image."""
    boxes_N4 = objects.boxes_N4
    limits_2 = boxes_N4.new_tensor([size[1], size[0]])
    centres_N2 = (boxes_N4[:, :2] + boxes_N4[:, 2:]) / 2 / STRIDES[level]
    ratios_AN2 = (boxes_N4[:, 2:] - boxes_N4[:, :2]) / anchors_A2[:, None]
    fits_AN = torch.maximum(ratios_AN2, 1 / ratios_AN2).amax(-1) < max_ratio
    share_N2 = centres_N2 % 1
    goes_before_N2 = (share_N2 < 0.5) & (centres_N2 > 1)
    goes_after_N2 = (share_N2 > 0.5) & (limits_2 - centres_N2 > 1)
    is_near_SN = torch.stack([torch.ones_like(fits_AN[0]), *goes_before_N2.T, *goes_after_N2.T])
    steps_S2 = centres_N2.new_tensor([[0, 0], [-1, 0], [0, -1], [1, 0], [0, 1]])
    cells_SN2 = torch.minimum((centres_N2.floor() + steps_S2[:, None]).clamp(min=0), limits_2 - 1).long()
    anchors_C, steps_C, objects_C = (fits_AN[:, None] & is_near_SN).nonzero().T
    columns_C, rows_C = cells_SN2[steps_C, objects_C].T
    found_C4 = torch.stack([objects.images_N[objects_C], anchors_C, rows_C, columns_C], dim=1).unique(dim=0)
    return [torch.full_like(found_C4[:, 0], level), *found_C4.T]


@torch.no_grad()
def match(
    candidates: Candidates, outputs_CO: Tensor, boxes_C4: Tensor, objects: ObjectTargets, num_images: int
) -> Tensor:
    """Return the number of the object that each candidate answers for, (C,); -1 where it answers for none.

    `outputs_CO` are the candidates' predictions before the sigmoid, `boxes_C4` their boxes by corners.
    """
    answers_C = torch.full_like(candidates.images_C, -1)
    for image in range(num_images):
        (mine_M,) = (candidates.images_C == image).nonzero(as_tuple=True)
        (present_G,) = (objects.images_N == image).nonzero(as_tuple=True)
        if len(mine_M):
            iou_GM = overlap(objects.boxes_N4[present_G], boxes_C4[mine_M])
            cost_GM = _cost_of_classes(outputs_CO[mine_M], objects.labels_N[present_G])
            cost_GM = cost_GM - IOU_WEIGHT * (iou_GM + _SMALLEST_IOU).log()
            chosen_M = choose(cost_GM, iou_GM)
            answers_C[mine_M] = torch.where(chosen_M < 0, -1, present_G[chosen_M.clamp(min=0)])
    return answers_C


def choose(cost_GM: Tensor, iou_GM: Tensor) -> Tensor:
    """Choose the object of each candidate, (M,); -1 for none.

    >>> iou = torch.tensor([[0.9, 0.8, 0.7, 0.0]])  # adds up to 2.4: two candidates
    >>> choose(1 - iou, iou).tolist()
    [0, 0, -1, -1]
    """
    num_best = min(MAX_MATCHES, iou_GM.shape[1])
    num_matches_G = iou_GM.topk(num_best, dim=1).values.sum(1).int().clamp(min=1)
    rank_GM = cost_GM.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    wants_GM = rank_GM < num_matches_G[:, None]
    num_wanting_M = wants_GM.sum(0)
    only_M, cheapest_M = wants_GM.int().argmax(0), cost_GM.argmin(0)
    return torch.where(num_wanting_M == 0, -1, torch.where(num_wanting_M == 1, only_M, cheapest_M))


def _cost_of_classes(outputs_MO: Tensor, labels_G: Tensor) -> Tensor:
    """Compute the binary cross-entropy of the classes, (G, M), summed over them; a probability is the geometric mean
    of that of the class and that of an object."""
    share_MO = outputs_MO.sigmoid()
    probability_MK = (share_MO[:, NUM_BOX:] * share_MO[:, NUM_BOX - 1 : NUM_BOX]).sqrt()
    probability_MK = probability_MK.clamp(_SMALLEST_SHARE, 1 - _SMALLEST_SHARE)
    absent_MK, present_MK = -torch.log1p(-probability_MK), -probability_MK.log()
    return absent_MK.sum(1) + (present_MK - absent_MK)[:, labels_G].T
