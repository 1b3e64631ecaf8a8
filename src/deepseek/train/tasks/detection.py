"""Find the objects of an image: YOLOv7 on images with boxes, without an auxiliary head.

    annotated images -> augmented squares -> raw boxes of three levels -> box, objectness and class loss
                                          -> the best boxes at evaluations -> mAP@0.5 and mAP@0.5:0.95

The loss is that of `models/yolov7/training_loss.py` per image. Evaluations keep boxes as the published ones do: scores
from 0.001 on, one for each class of a box, overlaps up to 0.65. They are compared on the fitted square, where overlaps
are what they are on the original.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from deepseek.core.errors import ConfigError
from deepseek.data.boxes import BoxBatch, BoxData, BoxSample, BoxSource, collate, open_boxes
from deepseek.data.config import BoxesConfig
from deepseek.data.samples import SampleLoader, choose_num_workers, evaluation_batches
from deepseek.models.starting_weights import HeadSpec
from deepseek.models.yolov7.anchors import fit_anchors
from deepseek.models.yolov7.label_assignment import ObjectTargets
from deepseek.models.yolov7.model import YOLOv7, decode_levels
from deepseek.models.yolov7.suppression import select
from deepseek.models.yolov7.training_loss import training_loss
from deepseek.train.average_precision import AveragePrecision, require_pycocotools
from deepseek.train.task import Measurements, Task, TaskData
from deepseek.train.task_settings import DetectionSettings

MIN_SCORE, MAX_OVERLAP = 0.001, 0.65
MAX_CANDIDATES = 1000
"""Boxes of an image that are compared: an untrained model gives all of them a chance, and time grows by the square."""


@dataclass(frozen=True)
class RawBoxes:
    """What a detector answers in training."""

    levels: tuple[Tensor, ...]
    """(B, A, H, W, 5 + K) of each level, before the sigmoid."""
    anchor_grid_L1A112: Tensor
    """The anchors that they are relative to, in pixels."""


@dataclass(frozen=True, eq=False, kw_only=True)
class DetectionData(TaskData):
    """The data of one run, with what the model is built from."""

    boxes: BoxData


class Detection(Task):
    """A YOLOv7 on images with boxes."""

    unit: ClassVar[str] = "images"

    @property
    def settings(self) -> DetectionSettings:
        """The settings of this task."""
        settings = self.config.task
        assert isinstance(settings, DetectionSettings)
        return settings

    def open_data(self, folder: Path) -> DetectionData:
        """Open the annotated images."""
        settings = self.config.data_of(BoxesConfig)
        if settings.has_heldout:
            require_pycocotools()
        boxes = open_boxes(settings)
        heldout, num_workers = boxes.heldout, choose_num_workers(settings.num_workers)
        return DetectionData(
            loader=SampleLoader[BoxSample, BoxBatch](
                boxes.train,
                batch_size=settings.batch_size,
                collate=collate,
                seed=settings.seed,
                num_workers=num_workers,
                max_broken=settings.max_broken,
            ),
            num_train_units=len(boxes.train),
            heldout=None
            if heldout is None
            else lambda: evaluation_batches(heldout, settings.batch_size, collate, num_workers=num_workers),
            boxes=boxes,
        )

    def build_model(self, data: DetectionData) -> nn.Module:
        """Open the detector that `init` names, with the classes, the image size and, if asked for, anchors of the data.

        Raises `ConfigError` for a model that is no YOLOv7, or takes images of another number of channels.
        """
        image_size = self.config.data_of(BoxesConfig).image_size
        labels = data.boxes.labels
        model = self.open_init(HeadSpec("detection", len(labels), labels, settings={"image_size": image_size}))
        if not isinstance(model, YOLOv7):
            raise ConfigError(
                f"init={self.config.init} is a {type(model).__name__} and the task detection trains detectors; "
                "give yolov7-tiny, yolov7, or the folder of one"
            )
        if model.config.in_channels != 3:
            raise ConfigError(
                f"images have 3 channels and init={self.config.init} takes {model.config.in_channels}; leave it at 3"
            )
        config = model.config.override({"image_size": image_size})
        if self.settings.anchors == "data":
            sizes_N2 = measure_sizes(data.boxes.train, image_size)
            config = config.override({"anchors": fit_anchors(sizes_N2, config.num_anchors)})
            model.head.set_anchors_(config.anchors)
        model.config = config
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # torch's stubs do not know it
        return model

    def inputs(self, batch: BoxBatch) -> tuple[Tensor, ...]:
        """(B, 3, H, W) images, to which the model answers with boxes."""
        return (batch.images_BCHW,)

    def forward(self, model: nn.Module, batch: BoxBatch) -> RawBoxes:
        """Predict the raw boxes of all levels."""
        detector = cast("YOLOv7", model)
        return RawBoxes(detector.predict_raw(*self.inputs(batch)), detector.head.anchor_grid)

    def loss(self, outputs: RawBoxes, batch: BoxBatch) -> Tensor:
        """() sum of the loss over the images."""
        counts_N = ~batch.is_crowd_N
        objects = ObjectTargets(batch.boxes_N4[counts_N], batch.labels_N[counts_N], batch.images_N[counts_N])
        anchors_LA2 = outputs.anchor_grid_L1A112[:, 0, :, 0, 0]
        return training_loss(outputs.levels, objects, anchors_LA2, self.settings.loss)

    def count_units(self, batch: BoxBatch) -> int:
        """Images."""
        return len(batch.images_BCHW)

    def new_metrics(self) -> Measurements:
        """Mean average precision of the boxes."""
        return _BoxMeasurements()


class _BoxMeasurements:
    """Average precision of the boxes that are selected from the raw ones."""

    def __init__(self) -> None:
        self._precision = AveragePrecision()

    def update(self, outputs: RawBoxes, batch: BoxBatch) -> None:
        """Select the boxes of a batch, and take them in beside the true ones."""
        predictions_BNO = decode_levels(outputs.levels, outputs.anchor_grid_L1A112)
        found = select(
            predictions_BNO,
            min_score=MIN_SCORE,
            max_overlap=MAX_OVERLAP,
            is_multi_label=True,
            max_candidates=MAX_CANDIDATES,
        )
        for image, frame_4 in enumerate(batch.frames_B4):
            boxes_M4, scores_M, labels_M = found.of(image)
            low_4, high_4 = frame_4[:2].repeat(2), frame_4[2:].repeat(2)
            seen_M4 = torch.minimum(torch.maximum(boxes_M4, low_4), high_4)
            mine_N = batch.images_N == image
            true = batch.boxes_N4[mine_N], batch.labels_N[mine_N], batch.is_crowd_N[mine_N]
            self._precision.add_image(seen_M4, scores_M, labels_M, *true)

    def compute(self) -> dict[str, Any]:
        """Return `map_50` and `map_50_95`."""
        return self._precision.compute()


def measure_sizes(source: BoxSource, image_size: int) -> Tensor:
    """Measure widths and heights (N, 2) of all boxes, crowds aside, on images fitted into a square of `image_size`."""
    sizes = [
        (scale * (right - left), scale * (bottom - top))
        for image in source.images
        for scale in (image_size / max(image.width, image.height),)
        for (left, top, right, bottom), is_crowd in zip(image.boxes, image.is_crowd, strict=True)
        if not is_crowd
    ]
    return torch.tensor(sizes).view(-1, 2)
