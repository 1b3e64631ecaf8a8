"""A small MobileNetV3 that says which group an emoji belongs to, from the pictures in an npm package.

Nothing is fetched here. `npm pack emoji-datasource-google` brings the package and `tar xf` unpacks its folder
`package`: `emoji.json` is the table, an object with `image` and `category` for each emoji, and the 64-pixel pictures
lie below `img`. Lies the folder elsewhere, `data.sources` and `data.image_folder` say where.
"""

from __future__ import annotations

from deepseek.data.config import AugmentationConfig, ImagesConfig
from deepseek.optim.optimizers import OptimizerConfig
from deepseek.train.config import TrainConfig
from deepseek.train.task_settings import ImageClassificationSettings


def mobilenet_emoji() -> TrainConfig:
    """Return the config of a MobileNetV3-small for the 10 groups of 1,900 emoji, a tenth of which is held out."""
    return TrainConfig(
        folder="runs/mobilenet_emoji",
        task=ImageClassificationSettings(label_smoothing=0.1),
        init="mobilenet_v3_small",
        init_settings={"norm_momentum": 0.1},
        data=ImagesConfig(
            sources=("package/emoji.json",),
            image_folder="package/img/google/64",
            label_column="category",
            image_size=64,
            crop_share=1.0,
            batch_size=64,
            augmentation=AugmentationConfig(min_area=0.5, brightness=0.2, contrast=0.2, saturation=0.2),
        ),
        optimizer=OptimizerConfig(
            name="adamw",
            base_learning_rate=8e-3,
            weight_decay=0.05,
            schedule="cosine",
            warmup_steps=50,
        ),
        num_steps=500,
        evaluate_every=250,
        log_every=20,
    )
