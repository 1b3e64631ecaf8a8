"""Mean average precision of found boxes, as COCO defines it: measured by `pycocotools`, the only door to it.

For each class, found boxes are taken by falling score; one counts as right that overlaps by at least a threshold with
a true box of the class which no box before it claimed. Average precision is the mean precision at 101 recalls, and
`map_50` the mean of it over the classes at a threshold of 0.5, `map_50_95` over ten thresholds from 0.5 to 0.95 as
well. At most 100 boxes of each class and image count. What is found in a crowd counts neither way.

The interval of both comes from resampling images. What was found in an image matches its true boxes whichever other
images there are, so that `pycocotools` matches once, and a resample only weighs images: precision at each right box is
a ratio of two weighted counts. 400 resamples of 100 images with 10,000 found boxes take 0.3 s.

Shapes: R resamples, N images, F found boxes of a class by falling score, P of them that are right.

Source: Lin et al. 2014, "Microsoft COCO", and its evaluation code.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from deepseek.core.errors import DataError
from deepseek.core.extras import require
from deepseek.train.scores import ENDS, LEAST_RESAMPLED, FloatArray, IntArray, draw_weights, with_interval

_EXTRA = "train"


@dataclass(eq=False)
class AveragePrecision:
    """Found and true boxes of many images; boxes are left, top, right, bottom."""

    num_images: int = 0
    _true: list[dict[str, Any]] = field(default_factory=list)
    _found: list[list[float]] = field(default_factory=list)

    def add_image(
        self,
        found_boxes_M4: Tensor,
        scores_M: Tensor,
        found_labels_M: Tensor,
        true_boxes_N4: Tensor,
        true_labels_N: Tensor,
        is_crowd_N: Tensor,
    ) -> None:
        """Add what was found and what is there in one image."""
        self.num_images += 1
        found = zip(_as_bbox(found_boxes_M4), scores_M.tolist(), found_labels_M.tolist(), strict=True)
        self._found += [[self.num_images, *bbox, score, label] for bbox, score, label in found]
        for bbox, label, is_crowd in zip(
            _as_bbox(true_boxes_N4), true_labels_N.tolist(), is_crowd_N.tolist(), strict=True
        ):
            self._true.append(
                {
                    "id": len(self._true) + 1,  # 0 means no match to pycocotools
                    "image_id": self.num_images,
                    "category_id": label,
                    "bbox": bbox,
                    "area": bbox[2] * bbox[3],
                    "iscrowd": int(is_crowd),
                }
            )

    def compute(self) -> dict[str, float]:
        """Return `map_50` and `map_50_95`, of enough images with intervals.

        Raises `DataError` where no image has a box to find.
        """
        if all(box["iscrowd"] for box in self._true):
            raise DataError(f"the {self.num_images} held-out images have no box to find; hold out images with boxes")
        if not self._found:
            return {"map_50": 0.0, "map_50_95": 0.0}
        with contextlib.redirect_stdout(io.StringIO()):  # it reports every step
            evaluation = self.evaluate()
        precision_TRK = evaluation.eval["precision"][:, :, :, 0, -1]  # boxes of all sizes, up to 100 each
        precision_TRK = precision_TRK[:, :, (precision_TRK > -1).all(axis=(0, 1))]  # -1 where there is no true box
        found = {"map_50": float(precision_TRK[0].mean()), "map_50_95": float(precision_TRK.mean())}
        if self.num_images < LEAST_RESAMPLED:
            return found
        ends_2M = np.nanpercentile(resample(evaluation, draw_weights(self.num_images)), ENDS, axis=0)
        return {
            key: value
            for (name, mean), (low, high) in zip(found.items(), ends_2M.T, strict=True)
            for key, value in with_interval(name, mean, float(low), float(high)).items()
        }

    def evaluate(self) -> Any:
        """Return the `COCOeval` of all images, with their boxes matched."""
        coco, cocoeval = require("pycocotools.coco", extra=_EXTRA), require("pycocotools.cocoeval", extra=_EXTRA)
        labels = sorted({box["category_id"] for box in self._true} | {int(box[-1]) for box in self._found})
        true = coco.COCO()
        true.dataset = {
            "images": [{"id": number + 1} for number in range(self.num_images)],
            "categories": [{"id": label} for label in labels],
            "annotations": self._true,
        }
        true.createIndex()
        evaluation = cocoeval.COCOeval(true, true.loadRes(np.array(self._found)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        return evaluation


def resample(evaluation: Any, weights_RN: IntArray) -> FloatArray:
    """Return `map_50` and `map_50_95`, (R, 2), of the images of a `COCOeval`, each as often as the weights say.

    A mean is over the classes that a resample has true boxes of; NaN where it has none at all.
    """
    settings = evaluation.params
    num_images, num_areas = len(settings.imgIds), len(settings.areaRng)
    sums_R2, num_classes_R = np.zeros((len(weights_RN), 2)), np.zeros(len(weights_RN))
    for number in range(len(settings.catIds)):
        begin = number * num_areas * num_images  # boxes of all sizes come first
        images = evaluation.evalImgs[begin : begin + num_images]
        matches = [(image, match) for image, match in enumerate(images) if match is not None]
        num_true = [int((np.asarray(match["gtIgnore"]) == 0).sum()) for _, match in matches]
        num_true_R = weights_RN[:, [image for image, _ in matches]] @ np.array(num_true, dtype=np.int64)
        precision_RT = _average_precisions(matches, weights_RN, num_true_R, settings.recThrs, len(settings.iouThrs))
        sums_R2 += np.stack([precision_RT[:, 0], precision_RT.mean(axis=1)], axis=1)
        num_classes_R += num_true_R > 0
    return np.where(num_classes_R[:, None] > 0, sums_R2 / np.maximum(num_classes_R, 1)[:, None], np.nan)


def _average_precisions(
    matches: list[tuple[int, Any]],
    weights_RN: IntArray,
    num_true_R: IntArray,
    recalls: FloatArray,
    num_thresholds: int,
) -> FloatArray:
    """Return (R, T) average precisions of one class, 0 in resamples without a true box of it.

    `matches` are the images with boxes of it, by their number, and what pycocotools found in them.
    """
    precisions_RT = np.zeros((len(weights_RN), num_thresholds))
    if not num_true_R.any():
        return precisions_RT
    order_F = np.argsort(-np.concatenate([match["dtScores"] for _, match in matches]), kind="stable")
    images_F = np.repeat([image for image, _ in matches], [len(match["dtScores"]) for _, match in matches])[order_F]
    matched_TF = np.concatenate([match["dtMatches"] for _, match in matches], axis=1)[:, order_F] > 0
    counts_TF = ~np.concatenate([match["dtIgnore"] for _, match in matches], axis=1)[:, order_F].astype(bool)
    drawn_RF = weights_RN.astype(np.int32)[:, images_F]
    for threshold in range(num_thresholds):
        right_P = np.flatnonzero(matched_TF[threshold] & counts_TF[threshold])
        if not len(right_P):
            continue
        found_RF = drawn_RF[:, : right_P[-1] + 1]
        num_right_RP = np.cumsum(found_RF[:, right_P], axis=1)
        if not counts_TF[threshold].all():
            found_RF = found_RF * counts_TF[threshold, : right_P[-1] + 1]
        # The weights between two right boxes, the second one included, added up.
        begins_P = np.concatenate([[0], right_P[:-1] + 1])
        num_found_RP = np.cumsum(np.add.reduceat(found_RF, begins_P, axis=1), axis=1)
        precision_RP = num_right_RP / np.maximum(num_found_RP, 1)
        best_RP = np.maximum.accumulate(precision_RP[:, ::-1], axis=1)[:, ::-1]
        recall_RP = num_right_RP / np.maximum(num_true_R, 1)[:, None]
        reached_RP = np.searchsorted(recalls, recall_RP, side="right")
        precisions_RT[:, threshold] = (np.diff(reached_RP, axis=1, prepend=0) * best_RP).sum(axis=1) / len(recalls)
    return precisions_RT


def require_pycocotools() -> None:
    """Raise `MissingExtraError` where the measurement could not be taken, before a run begins."""
    require("pycocotools.cocoeval", extra=_EXTRA)


def _as_bbox(boxes_N4: Tensor) -> list[list[float]]:
    """Return boxes as left, top, width, height."""
    corners = boxes_N4.double().tolist()
    return [[left, top, right - left, bottom - top] for left, top, right, bottom in corners]
