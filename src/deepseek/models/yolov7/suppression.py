"""From the many boxes of a YOLOv7 to the few that count: confidence, then non-maximum suppression per class.

Of boxes of one class that overlap by more than a threshold, the most confident stays and the others go, where a box
that went removes nobody. Defined one after the other, it is computed for all at once: start with everyone staying, and
let "a box stays if nobody that stays removes it" correct itself until nothing changes. After round i the verdicts of
the first i boxes, by confidence, are final, so it ends with the sequential answer; images need a handful of rounds.

The images of a batch go together, as many as `MAX_PAIRS` allows: with M candidates in the busiest image, a round
costs B * M * M comparisons. Boxes are compared in float32 or better, since an area overflows float16.

Shapes: B images, N boxes, M candidates or detections an image, K classes.
Source of the rounds: Zheng et al. 2020, "Enhancing Geometric Factors in Model Learning and Inference for Object
Detection and Instance Segmentation" (Cluster-NMS).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek.core.errors import ConfigError
from deepseek.models.yolov7.model import NUM_BOX

MAX_CANDIDATES = 3000
MAX_DETECTIONS = 300
MAX_PAIRS = 2**24  # of boxes compared at a time, about 0.4 GB of intermediates in float32


@dataclass(frozen=True)
class Detections:
    """Objects in a batch of images, the most confident first; rows past an image's count are zeros."""

    boxes_BM4: Tensor
    """Left, top, right, bottom in pixels."""
    scores_BM: Tensor
    """Objectness times class probability."""
    labels_BM: Tensor
    """Number of the class."""
    counts_B: Tensor
    """Objects of each image."""

    def of(self, image: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the boxes, scores and labels of one image, without padding."""
        count = int(self.counts_B[image])
        return self.boxes_BM4[image, :count], self.scores_BM[image, :count], self.labels_BM[image, :count]


def select(
    predictions_BNO: Tensor,
    *,
    min_score: float = 0.25,
    max_overlap: float = 0.45,
    is_multi_label: bool = False,
    max_candidates: int = MAX_CANDIDATES,
    max_detections: int = MAX_DETECTIONS,
) -> Detections:
    """Select the objects in what `YOLOv7` answers, (B, N, 5 + K).

    A box counts with a score above `min_score`; its score is its best class's, or with `is_multi_label` it counts once
    for each class. Of overlapping boxes (intersection over union above `max_overlap`) of a class the best is kept.
    At most `max_candidates` an image are compared and `max_detections` returned, the best ones. Equal scores keep the
    order of the boxes. Scores that are not numbers never count. Raises `ConfigError` for thresholds outside [0, 1].

    >>> boxes = torch.tensor([[[5.0, 5, 4, 4, 0.9, 1.0], [5.0, 5, 4, 5, 0.8, 1.0], [9.0, 9, 2, 2, 0.7, 1.0]]])
    >>> select(boxes).of(0)[0].tolist()
    [[3.0, 3.0, 7.0, 7.0], [8.0, 8.0, 10.0, 10.0]]
    """
    _check(predictions_BNO, min_score, max_overlap, max_candidates, max_detections)
    scores_BM, boxes_BM, labels_BM = find_candidates(predictions_BNO, min_score, is_multi_label, max_candidates)
    boxes_BM4 = to_corners(_widen(predictions_BNO[..., :4]).gather(1, boxes_BM[..., None].expand(-1, -1, 4)))
    num_together = max(1, MAX_PAIRS // max(1, boxes_BM.shape[1]) ** 2)
    parts = [rows.split(num_together) for rows in (boxes_BM4, labels_BM, scores_BM > min_score)]
    stays_BM = torch.cat([suppress(*part, max_overlap=max_overlap) for part in zip(*parts, strict=True)])
    order_BM = stays_BM.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :max_detections]
    counts_B = stays_BM.sum(1).clamp(max=max_detections)
    order_BM = order_BM[:, : int(counts_B.max()) if len(counts_B) else 0]
    is_object_BM = torch.arange(order_BM.shape[1], device=order_BM.device) < counts_B[:, None]
    return Detections(
        boxes_BM4.gather(1, order_BM[..., None].expand(-1, -1, 4)) * is_object_BM[..., None],
        scores_BM.gather(1, order_BM) * is_object_BM,
        labels_BM.gather(1, order_BM) * is_object_BM,
        counts_B,
    )


def find_candidates(
    predictions_BNO: Tensor, min_score: float, is_multi_label: bool, max_candidates: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores, numbers of boxes and labels, each (B, M), by falling score; what does not count has score -1."""
    scores_BNK = predictions_BNO[..., NUM_BOX:] * predictions_BNO[..., NUM_BOX - 1 : NUM_BOX]
    scores_BNK = torch.where(scores_BNK > min_score, scores_BNK, -1.0)
    num_classes = scores_BNK.shape[-1]
    if is_multi_label:
        scores_BC, labels_BC = scores_BNK.flatten(1), None
    else:
        scores_BC, labels_BC = scores_BNK.max(dim=-1)
    most = int((scores_BC > min_score).sum(1).max()) if scores_BC.numel() else 0
    scores_BM, chosen_BM = scores_BC.sort(dim=1, descending=True, stable=True)
    scores_BM, chosen_BM = scores_BM[:, : min(most, max_candidates)], chosen_BM[:, : min(most, max_candidates)]
    if labels_BC is None:
        return scores_BM, chosen_BM // num_classes, chosen_BM % num_classes
    return scores_BM, chosen_BM, labels_BC.gather(1, chosen_BM)


def suppress(boxes_BM4: Tensor, labels_BM: Tensor, is_candidate_BM: Tensor, *, max_overlap: float) -> Tensor:
    """Select the candidates that stay; boxes are given by corners and by falling score."""
    num_boxes = boxes_BM4.shape[1]
    is_before_MM = torch.ones(num_boxes, num_boxes, dtype=torch.bool, device=boxes_BM4.device).triu(1)
    is_rival_BMM = (labels_BM[:, :, None] == labels_BM[:, None, :]) & is_before_MM
    removes_BMM = is_rival_BMM & (overlap(boxes_BM4, boxes_BM4) > max_overlap)
    stays_BM = is_candidate_BM
    while True:
        corrected_BM = is_candidate_BM & ~(removes_BMM & stays_BM[:, :, None]).any(dim=1)
        if torch.equal(corrected_BM, stays_BM):
            return stays_BM
        stays_BM = corrected_BM


def overlap(boxes_BM4: Tensor, others_BN4: Tensor) -> Tensor:
    """Compute intersection over union of each box with each other, by corners, (B, M, N); 0 where both have no area."""
    boxes_BM14, others_B1N4 = boxes_BM4[..., :, None, :], others_BN4[..., None, :, :]
    width_BMN, height_BMN = (_find_common(boxes_BM14, others_B1N4, axis) for axis in (0, 1))
    common_BMN = width_BMN * height_BMN
    areas_BM1, areas_B1N = ((corners[..., 2:] - corners[..., :2]).prod(-1) for corners in (boxes_BM14, others_B1N4))
    union_BMN = areas_BM1 + areas_B1N - common_BMN
    return torch.where(union_BMN > 0, common_BMN / union_BMN, 0.0)


def _find_common(boxes_BM14: Tensor, others_B1N4: Tensor, axis: int) -> Tensor:
    """Return the length that each box has in common with each other, across (`axis` 0) or down (1)."""
    ends_BMN = torch.minimum(boxes_BM14[..., axis + 2], others_B1N4[..., axis + 2])
    return (ends_BMN - torch.maximum(boxes_BM14[..., axis], others_B1N4[..., axis])).clamp(min=0)


def _widen(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def to_corners(boxes_4: Tensor) -> Tensor:
    """(..., centre x, centre y, width, height) as (..., left, top, right, bottom).

    >>> to_corners(torch.tensor([5.0, 4.0, 2.0, 6.0])).tolist()
    [4.0, 1.0, 6.0, 7.0]
    """
    centre, half = boxes_4[..., :2], boxes_4[..., 2:4] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def _check(
    predictions_BNO: Tensor, min_score: float, max_overlap: float, max_candidates: int, max_detections: int
) -> None:
    if predictions_BNO.dim() != 3 or predictions_BNO.shape[-1] <= NUM_BOX:
        raise ConfigError(
            f"the predictions are {tuple(predictions_BNO.shape)}; expected (images, boxes, {NUM_BOX} + classes), "
            "which is what the model returns"
        )
    for name, value in (("min_score", min_score), ("max_overlap", max_overlap)):
        if not 0 <= value <= 1:
            raise ConfigError(f"{name}={value} is not a share; choose a number between 0 and 1")
    for name, value in (("max_candidates", max_candidates), ("max_detections", max_detections)):
        if value < 1:
            raise ConfigError(f"{name}={value} leaves nothing; choose 1 or more")
