"""Mean average precision of found boxes, as COCO defines it: measured by `pycocotools`, the only door to it.

For each class, found boxes are taken by falling score; one counts as right that overlaps by at least a threshold with
a true box of the class which no box before it claimed. Average precision is the mean precision at 101 recalls, and
`map_50` the mean of it over the classes at a threshold of 0.5, `map_50_95` over ten thresholds from 0.5 to 0.95 as
well. At most 100 boxes of each class and image count. What is found in a crowd counts neither way.

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
        """Return `map_50` and `map_50_95`; raises `DataError` where no image has a box to find."""
        if all(box["iscrowd"] for box in self._true):
            raise DataError(f"the {self.num_images} held-out images have no box to find; hold out images with boxes")
        if not self._found:
            return {"map_50": 0.0, "map_50_95": 0.0}
        with contextlib.redirect_stdout(io.StringIO()):  # it reports every step
            evaluation = self._evaluate()
        precision_TRK = evaluation.eval["precision"][:, :, :, 0, -1]  # boxes of all sizes, up to 100 each
        precision_TRK = precision_TRK[:, :, (precision_TRK > -1).all(axis=(0, 1))]  # -1 where there is no true box
        return {"map_50": float(precision_TRK[0].mean()), "map_50_95": float(precision_TRK.mean())}

    def _evaluate(self) -> Any:
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


def require_pycocotools() -> None:
    """Raise `MissingExtraError` where the measurement could not be taken, before a run begins."""
    require("pycocotools.cocoeval", extra=_EXTRA)


def _as_bbox(boxes_N4: Tensor) -> list[list[float]]:
    """Return boxes as left, top, width, height."""
    corners = boxes_N4.double().tolist()
    return [[left, top, right - left, bottom - top] for left, top, right, bottom in corners]
