"""YOLOv7-tiny on composed scenes: a detector that learns in minutes, from pictures and photographs of your own."""

from __future__ import annotations

from pathlib import Path

from deepseek.data.config import BoxAugmentationConfig, BoxesConfig
from deepseek.data.scenes import compose_scenes
from deepseek.models.yolov7.training_loss import DetectionLossConfig
from deepseek.optim.optimizers import OptimizerConfig
from deepseek.train.config import TrainConfig
from deepseek.train.task_settings import DetectionSettings

SIZE = 160
NUM_TRAIN, NUM_HELDOUT = 1000, 200


def yolov7_tiny_scenes() -> TrainConfig:
    """Return the config of a YOLOv7-tiny of a quarter of the published width on the scenes of `compose_data`."""
    return TrainConfig(
        folder="runs/yolov7_tiny_scenes",
        # On small images with few objects the published gain leaves objectness a tenth of the box loss.
        task=DetectionSettings(anchors="data", loss=DetectionLossConfig(objectness_gain=5.0)),
        init="yolov7-tiny",
        init_settings={"width_multiple": 0.25},
        data=BoxesConfig(
            annotations="scenes/train/annotations.json",
            images="scenes/train/images",
            heldout_annotations="scenes/heldout/annotations.json",
            heldout_images="scenes/heldout/images",
            image_size=SIZE,
            batch_size=16,
            augmentation=BoxAugmentationConfig(mosaic=0.5),
        ),
        optimizer=OptimizerConfig(
            base_learning_rate=6e-3,
            reference_batch_size=16,
            weight_decay=0.05,
            betas=(0.9, 0.99),
            grad_clip=10.0,
            warmup_steps=50,
        ),
        num_steps=400,
        ema_decay=0.98,
        evaluate_every=200,
    )


def compose_data(pictures: Path, photographs: Path, folder: Path = Path("scenes")) -> None:
    """Compose the scenes that the recipe learns from, `folder/train`, and those it is measured on, `folder/heldout`.

    `pictures` holds a folder of PNG files for each class, `photographs` what they are put on.
    """
    for seed, (part, num_images) in enumerate((("train", NUM_TRAIN), ("heldout", NUM_HELDOUT))):
        compose_scenes(pictures, photographs, folder / part, num_images=num_images, size=SIZE, seed=seed)
