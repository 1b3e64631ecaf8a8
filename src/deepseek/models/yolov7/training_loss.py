"""The training loss of YOLOv7, in the form without an auxiliary head, as a sum over images.

    raw predictions, objects -> assignment -> matched predictions -> box loss     1 - CIoU
                                                                     class loss   binary cross-entropy over the classes
                                           -> all predictions     -> objectness   binary cross-entropy with the CIoU

The published loss averages the box and class terms over the matches of a whole batch, level by level, so that the
weight of an image depends on those that it was drawn with. Here they are averaged over the matches of each image, level
by level, and the levels of an image that have matches are averaged with the weight of all levels. Losses of images then
add up: N small batches give the gradient of the big one. On a batch of one image with matches on every level the two
are the same.

Shapes: as in `label_assignment.py`; M matches of the batch.
Sources: Wang et al. 2022, "YOLOv7"; Zheng et al. 2020, "Distance-IoU Loss" and "Enhancing Geometric Factors" (CIoU);
the gains are those of the authors' repository (data/hyp.scratch.tiny.yaml), scaled as its train.py does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from deepseek.core.config import Config
from deepseek.models.yolov7.label_assignment import Candidates, ObjectTargets, find_candidates, match
from deepseek.models.yolov7.model import NUM_BOX, STRIDES
from deepseek.models.yolov7.suppression import to_corners

LEVEL_BALANCE = (4.0, 1.0, 0.4)
"""Weight of each level's objectness: the fine levels have many cells and few objects."""
REFERENCE_LEVELS, REFERENCE_CLASSES, REFERENCE_SIZE = 3, 80, 640
"""Levels, classes and height and width of images that the gains are meant for."""
_EPS = 1e-7


class DetectionLossConfig(Config):
    """Gains of the terms of a detector's loss."""

    box_gain: float = Field(default=0.05, ge=0)
    """Weight of the box loss."""
    objectness_gain: float = Field(default=1.0, ge=0)
    """Weight of the objectness loss at 640 x 640 pixels; it is scaled with the area of an image."""
    class_gain: float = Field(default=0.5, ge=0)
    """Weight of the class loss at 80 classes; it is scaled with their number."""
    max_anchor_ratio: float = Field(default=4.0, gt=1)
    """Factor between the sides of an object and of an anchor from which on the anchor is none of its candidates."""


def training_loss(
    raw: Sequence[Tensor], objects: ObjectTargets, anchors_LA2: Tensor, config: DetectionLossConfig
) -> Tensor:
    """Compute the () sum over the images of a batch of what `YOLOv7.predict_raw` returned, in float32 or better.

    `anchors_LA2` are those of the model, in pixels.
    """
    raw = [level.to(torch.promote_types(level.dtype, torch.float32)) for level in raw]
    candidates = find_candidates(raw, objects, anchors_LA2, max_ratio=config.max_anchor_ratio)
    outputs_CO, boxes_C4 = read_candidates(raw, candidates, anchors_LA2)
    answers_C = match(candidates, outputs_CO, boxes_C4, objects, len(raw[0]))
    is_match_C = answers_C >= 0
    answers_M = answers_C[is_match_C]
    ciou_M = complete_iou(boxes_C4[is_match_C], objects.boxes_N4[answers_M])
    shares_M = _count_shares(candidates.images_C[is_match_C], candidates.levels_C[is_match_C], len(raw[0]))
    weights_M = len(raw) / shares_M.to(ciou_M.dtype)
    box = (weights_M * (1 - ciou_M)).sum()
    classes = (weights_M * _class_loss(outputs_CO[is_match_C, NUM_BOX:], objects.labels_N[answers_M])).sum()
    overlap_C = ciou_M.new_zeros(len(answers_C)).masked_scatter(is_match_C, ciou_M.detach().clamp(min=0))
    objectness = torch.stack(
        [
            balance * _objectness_loss(level, candidates.on_level(number), overlap_C[candidates.levels_C == number])
            for number, (level, balance) in enumerate(zip(raw, LEVEL_BALANCE, strict=True))
        ]
    ).sum()
    height, width = raw[0].shape[2] * STRIDES[0], raw[0].shape[3] * STRIDES[0]
    num_classes = raw[0].shape[-1] - NUM_BOX
    total = (
        config.box_gain * box
        + config.objectness_gain * (height * width / REFERENCE_SIZE**2) * objectness
        + config.class_gain * (num_classes / REFERENCE_CLASSES) * classes
    )
    return total * (REFERENCE_LEVELS / len(raw))


def read_candidates(raw: Sequence[Tensor], candidates: Candidates, anchors_LA2: Tensor) -> tuple[Tensor, Tensor]:
    """Read the outputs (C, O) of the candidates, before the sigmoid, and their boxes (C, 4) by corners in pixels."""
    outputs_CO = torch.cat([level[candidates.on_level(number)] for number, level in enumerate(raw)])
    cells_C2 = torch.stack([candidates.columns_C, candidates.rows_C], dim=1)
    strides_C1 = cells_C2.new_tensor(STRIDES)[candidates.levels_C, None]
    share_C4 = outputs_CO[:, :4].sigmoid()
    centres_C2 = (share_C4[:, :2] * 2 - 0.5 + cells_C2) * strides_C1
    sizes_C2 = (share_C4[:, 2:] * 2).square() * anchors_LA2[candidates.levels_C, candidates.anchors_C]
    return outputs_CO, to_corners(torch.cat([centres_C2, sizes_C2], dim=1))


def complete_iou(boxes_M4: Tensor, others_M4: Tensor) -> Tensor:
    """Compute the complete IoU of each pair of boxes by corners, (M,): at most 1, and negative for boxes far apart.

    It is the intersection over union, less the distance of the centres as a share of the diagonal around both, less
    the difference in aspect; how much the aspect counts is taken as a constant by the gradient, as published.

    >>> complete_iou(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[0.0, 0, 2, 2]])).tolist()
    [1.0]
    """
    sizes_M2, other_sizes_M2 = boxes_M4[:, 2:] - boxes_M4[:, :2], others_M4[:, 2:] - others_M4[:, :2]
    inner_M2 = torch.minimum(boxes_M4[:, 2:], others_M4[:, 2:]) - torch.maximum(boxes_M4[:, :2], others_M4[:, :2])
    outer_M2 = torch.maximum(boxes_M4[:, 2:], others_M4[:, 2:]) - torch.minimum(boxes_M4[:, :2], others_M4[:, :2])
    common_M = inner_M2.clamp(min=0).prod(1)
    iou_M = common_M / (sizes_M2.prod(1) + other_sizes_M2.prod(1) - common_M).clamp(min=_EPS)
    apart_M2 = (boxes_M4[:, :2] + boxes_M4[:, 2:] - others_M4[:, :2] - others_M4[:, 2:]) / 2
    distance_M = apart_M2.square().sum(1) / outer_M2.square().sum(1).clamp(min=_EPS)
    angles_M, other_angles_M = (
        torch.atan2(sizes[:, 0], sizes[:, 1].clamp(min=_EPS)) for sizes in (sizes_M2, other_sizes_M2)
    )
    aspect_M = (4 / math.pi**2) * (angles_M - other_angles_M).square()
    with torch.no_grad():
        weight_M = aspect_M / (1 - iou_M + aspect_M).clamp(min=_EPS)
    return iou_M - distance_M - weight_M * aspect_M


def _count_shares(images_M: Tensor, levels_M: Tensor, num_images: int) -> Tensor:
    """Count the equal shares of its image that each match is one of: levels with matches, times matches of its own."""
    num_levels = len(STRIDES)
    counts_BL = torch.bincount(images_M * num_levels + levels_M, minlength=num_images * num_levels)
    counts_BL = counts_BL.view(num_images, num_levels)
    return (counts_BL > 0).sum(1)[images_M] * counts_BL[images_M, levels_M]


def _class_loss(outputs_MK: Tensor, labels_M: Tensor) -> Tensor:
    """Compute the cross-entropy of each match, (M,), as the mean over the classes; 0 where there is one class only."""
    num_classes = outputs_MK.shape[1]
    if num_classes == 1:
        return outputs_MK.new_zeros(len(outputs_MK))
    targets_MK = F.one_hot(labels_M, num_classes).to(outputs_MK.dtype)
    return F.binary_cross_entropy_with_logits(outputs_MK, targets_MK, reduction="none").mean(1)


def _objectness_loss(level_BAHWO: Tensor, places: tuple[Tensor, Tensor, Tensor, Tensor], overlap_C: Tensor) -> Tensor:
    """Compute the () sum over the images of the mean over the cells of a level."""
    output_BAHW = level_BAHWO[..., NUM_BOX - 1]
    target_BAHW = torch.zeros_like(output_BAHW)
    target_BAHW[places] = overlap_C
    loss_BAHW = F.binary_cross_entropy_with_logits(output_BAHW, target_BAHW, reduction="none")
    return loss_BAHW.sum() / output_BAHW[0].numel()
