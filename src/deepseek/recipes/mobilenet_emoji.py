"""A small MobileNetV3 that says which group an emoji belongs to, from the pictures in an npm package.

Nothing is fetched here. `npm pack emoji-datasource-google` brings the package and `tar xf` unpacks its folder
`package`: `emoji.json` is the table, an object with `image` and `category` for each emoji, and the 64-pixel pictures
lie below `img`. Lies the folder elsewhere, `data.sources` and `data.image_folder` say where.
"""

from __future__ import annotations

import numpy as np

from deepseek.core.errors import DataError
from deepseek.core.extras import require
from deepseek.data.config import AugmentationConfig, ImagesConfig
from deepseek.data.labelled_images import ImageSource, open_images
from deepseek.optim.optimizers import OptimizerConfig
from deepseek.train.config import TrainConfig
from deepseek.train.scores import score_classes
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


def measure_baselines(config: TrainConfig, *, image_size: int = 16) -> dict[str, dict[str, float]]:
    """Return the scores on the held-out images of the largest class, and of a linear model on pixels.

    The linear model is scikit-learn's logistic regression, on images of `image_size` x `image_size` pixels. The images
    are those of `config`; raises `DataError` where it holds none out.
    """
    images = open_images(config.data_of(ImagesConfig).override({"image_size": image_size}))
    if images.heldout is None:
        raise DataError("no images are held out to measure with; raise data.heldout_fraction")
    (pixels, wanted), (heldout_pixels, heldout_wanted) = _read(images.train), _read(images.heldout)
    regression = require("sklearn.linear_model", extra="train").LogisticRegression(C=0.01, max_iter=2000)
    regression.fit(pixels, wanted)
    predicted = {
        "largest_class": np.full_like(heldout_wanted, np.bincount(wanted).argmax()),
        "pixels": regression.predict(heldout_pixels),
    }
    return {name: score_classes(classes, heldout_wanted) for name, classes in predicted.items()}


def _read(source: ImageSource) -> tuple[np.ndarray[tuple[int, int]], np.ndarray[tuple[int], np.dtype[np.int64]]]:
    samples = [source.load(number, None) for number in range(len(source))]
    return np.stack([sample.pixels_HWC.ravel() / 255 for sample in samples]), np.array(source.targets)
