"""Choose the class of an image: a ResNet, MobileNetV3 or vision transformer, from random weights or from given ones.

    folders or tables -> pixels and classes -> normalized (B, 3, H, W) -> logits (B, K) -> cross-entropy

Pixels are normalized here and not by who loads them: a batch is sent as bytes. The model lies in memory with its
channels last, as the images do. The names of the classes go into the model's config and the steps before it into
`preprocessor_config.json` beside it, so that `deepseek predict` sees images as an evaluation does.

The loss is in nats per image, in training against smoothed labels and blended images, where these are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.artifact.format import Manifest
from deepseek.core.errors import ConfigError
from deepseek.core.events import Event
from deepseek.data.augmentation import scaled_edge
from deepseek.data.config import ImagesConfig
from deepseek.data.digits import DIGITS, write_digits
from deepseek.data.labelled_images import ImageBatch, collate_images, open_images
from deepseek.data.samples import SampleLoader, choose_num_workers, evaluation_batches
from deepseek.models import zoo
from deepseek.models.starting_weights import HeadSpec
from deepseek.nn.small_convolutions import speed_up_convolutions_
from deepseek.train.scores import score_share
from deepseek.train.task import Measurements, Task, TaskData, UnitLosses
from deepseek.train.task_settings import ImageClassificationSettings

STEPS_FILE = "preprocessor_config.json"
NUM_TOP = 5
_EVALUATION_FACTOR = 2  # no gradient is kept, so that twice the images fit


class ImageClassification(Task):
    """A classifier of images."""

    unit: ClassVar[str] = "images"
    classes: tuple[str, ...] = ()
    """The names of the classes, once the data are open."""

    @property
    def settings(self) -> ImageClassificationSettings:
        """The settings of the task; its defaults where a task of one's own inherits from it."""
        settings = self.config.task
        return settings if isinstance(settings, ImageClassificationSettings) else ImageClassificationSettings()

    def prepare(self, folder: Path) -> Iterator[Event]:
        """Write the digits of scikit-learn, if they are asked for."""
        data = self.config.data_of(ImagesConfig)
        if DIGITS in (*data.sources, *data.heldout_sources):
            write_digits(folder / DIGITS)
        yield from ()

    def open_data(self, folder: Path) -> TaskData:
        """List the images and number their classes."""
        settings = self.config.data_of(ImagesConfig)
        places = {
            name: tuple(str(folder / DIGITS) if source == DIGITS else source for source in getattr(settings, name))
            for name in ("sources", "heldout_sources")
        }
        images = open_images(settings.model_copy(update=places))
        self.classes = images.classes
        images.train.mixup = self.settings.mixup
        collate = partial(collate_images, num_classes=len(self.classes))
        heldout, batch_size = images.heldout, _EVALUATION_FACTOR * settings.batch_size
        num_workers = choose_num_workers(settings.num_workers)
        return TaskData(
            loader=SampleLoader(
                images.train,
                batch_size=settings.batch_size,
                collate=partial(collate, label_smoothing=self.settings.label_smoothing),
                seed=settings.seed,
                num_workers=num_workers,
                max_broken=settings.max_broken,
            ),
            num_train_units=len(images.train),
            heldout=None
            if heldout is None
            else lambda: evaluation_batches(heldout, batch_size, collate, num_workers=num_workers),
        )

    def build_model(self, data: TaskData) -> nn.Module:
        """Open the model that `init` names, with as many outputs as there are classes."""
        size = self.config.data_of(ImagesConfig).image_size
        entry = zoo.MODELS.get(self.config.init or "")
        has_size = entry is not None and "image_size" in type(entry.config).model_fields
        head = HeadSpec(
            "image_classification", len(self.classes), self.classes, {"image_size": size} if has_size else {}
        )
        model = self.open_init(head)
        if getattr(getattr(model, "config", None), "in_channels", 3) != 3:
            raise ConfigError("images have 3 channels and the model of init takes another number; leave in_channels 3")
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # torch's stubs do not know it
        speed_up_convolutions_(model)
        return model

    def inputs(self, batch: ImageBatch) -> tuple[Tensor, ...]:
        """(B, 3, H, W) normalized images, to which the model answers with (B, K) logits."""
        settings = self.config.data_of(ImagesConfig)
        mean, deviation = (
            torch.tensor(values, device=batch.pixels_BCHW.device)[:, None, None]
            for values in (settings.mean, settings.std)
        )
        return (torch.addcmul(-mean / deviation, batch.pixels_BCHW.float(), 1 / (255 * deviation)),)

    def loss(self, outputs: Tensor, batch: ImageBatch) -> Tensor:
        """() sum of the cross-entropy over the images, in nats."""
        return F.cross_entropy(outputs.float(), batch.targets_BK, reduction="sum")

    def unit_losses(self, outputs: Tensor, batch: ImageBatch) -> UnitLosses:
        """Return the loss of each image."""
        return UnitLosses(F.cross_entropy(outputs.float(), batch.targets_BK, reduction="none"))

    def count_units(self, batch: ImageBatch) -> int:
        """Images."""
        return len(batch.pixels_BCHW)

    def class_logits(self, outputs: Tensor, batch: ImageBatch) -> Tensor:
        """(N, K) scores of the classes for each image, which a distillation compares."""
        return outputs

    def new_metrics(self) -> Measurements:
        """Return the shares of images whose class is the best answer and one of the five best, with intervals."""
        return Accuracy()

    def save(self, model: nn.Module, data: Any, folder: Path, **record: Any) -> Manifest:
        """Write the model with the steps that its images go through."""
        content = json.dumps(describe_steps(self.config.data_of(ImagesConfig)), indent=2).encode()
        return super().save(model, data, folder, files={STEPS_FILE: content}, **record)


class Accuracy:
    """Right answers of one evaluation."""

    def __init__(self) -> None:
        self.ranks: list[np.ndarray[Any, np.dtype[np.int64]]] = []
        self.num_classes = 0

    def update(self, outputs: Tensor, batch: ImageBatch) -> None:
        """Take in the place of the right class among the answers to each image; equal answers count before it."""
        right_B1 = batch.targets_BK.argmax(1, keepdim=True)
        rank_B = (outputs >= outputs.gather(1, right_B1)).sum(1) - 1
        self.ranks.append(rank_B.cpu().numpy())
        self.num_classes = outputs.shape[1]

    def compute(self) -> dict[str, float]:
        """Return the shares; that of the five best answers only where there are more classes."""
        ranks = np.concatenate(self.ranks)
        scores = score_share("accuracy", int((ranks < 1).sum()), len(ranks))
        if self.num_classes > NUM_TOP:
            scores |= score_share("top_5_accuracy", int((ranks < NUM_TOP).sum()), len(ranks))
        return scores


def describe_steps(settings: ImagesConfig) -> dict[str, Any]:
    """Describe what an image goes through in an evaluation, as `transformers` writes it beside a model."""
    size = settings.image_size
    return {
        "do_resize": True,
        "size": {"shortest_edge": scaled_edge(size, settings.crop_share)},
        "resample": 2,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(settings.mean),
        "image_std": list(settings.std),
    }
