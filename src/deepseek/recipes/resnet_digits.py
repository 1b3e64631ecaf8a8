"""A small ResNet that reads handwritten digits: the shortest way from images to an artifact, a minute on two cores.

The 1,797 digits of 8 x 8 pixels come with scikit-learn and are written as PNG files into the run's folder. They are
neither mirrored nor cut by much, since sides and edges mean something in a digit.
"""

from __future__ import annotations

from deepseek.data.config import AugmentationConfig, ImagesConfig
from deepseek.data.digits import DIGITS
from deepseek.optim.optimizers import OptimizerConfig
from deepseek.train.config import TrainConfig
from deepseek.train.task_settings import ImageClassificationSettings


def resnet_digits() -> TrainConfig:
    """Return the config of a ResNet with 0.7 M parameters for 8 x 8 digits, a fifth of which is held out."""
    return TrainConfig(
        folder="runs/resnet_digits",
        task=ImageClassificationSettings(label_smoothing=0.1),
        init="resnet18",
        init_settings={"depths": [2, 2, 2], "width": 32, "stem": "cifar"},
        data=ImagesConfig(
            sources=(DIGITS,),
            heldout_fraction=0.2,
            image_size=8,
            crop_share=1.0,
            batch_size=64,
            num_workers=0,
            augmentation=AugmentationConfig(min_area=0.7, max_stretch=1.2, flip=0.0),
        ),
        optimizer=OptimizerConfig(
            name="sgd",
            base_learning_rate=0.4,
            weight_decay=5e-4,
            schedule="cosine",
            warmup_steps=20,
        ),
        num_steps=300,
        evaluate_every=100,
        log_every=10,
    )
