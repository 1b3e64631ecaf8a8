"""Images with a class each: from folders or tables to samples and batches.

    birds/train/wren/1.jpg                   a folder for each class, below `train` and `val`,
    birds/wren/1.jpg                         or right below the source, of which a share is held out
    labels.csv                               a table with a column of paths and one of labels;
                                             in a Parquet table, the column may hold the files' bytes

    images = open_images(ImagesConfig(sources=("birds",)))
    images.classes                           ("robin", "wren"): folders and labels that occur, sorted
    collate_images([images.train.load(0, random), ...], num_classes=2)
                                             ImageBatch: pixels_BCHW, targets_BK

All images are listed when the data are opened, and read when they are needed. Pixels stay bytes until they reach the
model: a batch that a worker sends is a quarter of what it would be as floats. In memory a batch lies as the images do,
channels last, which is also how convolutions on CPUs like it best.

Whether an image is for training or held out follows from a hash of its name alone, below its source or in its table;
that of an image whose bytes are in a table is their hash. An image that cannot be read is a broken sample
(`samples.py`); a label that is none of the classes, and a class without images, are refused before anything begins.

Shapes: B images, C channels, H x W image, K classes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deepseek.core.caller_warnings import warn_caller
from deepseek.core.errors import DataError
from deepseek.data.augmentation import augment, center
from deepseek.data.config import ImagesConfig
from deepseek.data.images import Pixels, read_rgb
from deepseek.data.samples import BrokenSampleError
from deepseek.data.sources import is_heldout, name_some, walk_files
from deepseek.data.table_rows import TableColumns, read_rows

TRAIN_FOLDER, HELDOUT_FOLDER = "train", "val"
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})
"""Ends of the names of images."""
_NUM_NAMED = 5  # classes in an error


@dataclass(frozen=True)
class LabelledImage:
    """One image that was found."""

    name: str
    """Its path below the source, or as the table has it; that of an image whose bytes are in a table is their hash."""
    content: Path | bytes
    """Where its file is, or the bytes of it."""
    label: str | int
    """Its class, as folder or table have it."""


@dataclass(frozen=True)
class FoundImages:
    """The images of some sources."""

    train: tuple[LabelledImage, ...]
    heldout: tuple[LabelledImage, ...] = ()
    """Those that the sources themselves hold out."""
    folders: frozenset[str] = frozenset()
    """Classes that have a folder, maybe without an image."""


# ---- samples and batches


@dataclass(frozen=True, eq=False)
class ImageSample:
    """One image as the model sees it, and its class."""

    pixels_HWC: Pixels
    target: int
    share: float = 1.0
    """Share of this image when it is blended with another one."""


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """Images and what is to be said about them."""

    pixels_BCHW: Tensor
    """uint8 red, green and blue, channels last in memory."""
    targets_BK: Tensor
    """float32 probability of each class."""


class ImageSource:
    """Images that are loaded one by one, augmented where a random generator is given."""

    def __init__(self, images: Sequence[LabelledImage], targets: Sequence[int], config: ImagesConfig) -> None:
        self.images, self.targets, self.config = images, targets, config
        self.mixup = 0.0
        """Parameter of the beta distribution that shares of blended images come from; 0 blends none."""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def digest(self) -> str:
        """SHA-256 over the names, sizes and classes of the images, in their order."""
        digest = hashlib.sha256()
        for image, target in zip(self.images, self.targets, strict=True):
            digest.update(json.dumps([image.name, _count_bytes(image.content), target]).encode())
        return digest.hexdigest()

    def load(self, index: int, random: np.random.Generator | None) -> ImageSample:
        """Load one image; raises `BrokenSampleError` where it cannot be read."""
        image, target, config = self.images[index], self.targets[index], self.config
        try:
            opened = read_rgb(image.content, image.name if isinstance(image.content, bytes) else None)
        except DataError as error:
            raise BrokenSampleError(str(error)) from error
        if random is None:
            return ImageSample(center(opened, config.image_size, crop_share=config.crop_share), target)
        pixels_HWC = augment(opened, config.augmentation, config.image_size, random)
        return ImageSample(pixels_HWC, target, float(random.beta(self.mixup, self.mixup)) if self.mixup else 1.0)


def collate_images(samples: Sequence[ImageSample], *, num_classes: int, label_smoothing: float = 0.0) -> ImageBatch:
    """Put samples into a batch; those with a share below 1 are blended with the sample after them, the last with the
    first.

    >>> samples = [ImageSample(np.zeros((4, 4, 3), dtype=np.uint8), 0), ImageSample(np.ones((4, 4, 3), np.uint8), 2)]
    >>> collate_images(samples, num_classes=3).targets_BK.tolist()
    [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    """
    pixels_BHWC = torch.from_numpy(np.stack([sample.pixels_HWC for sample in samples]))
    targets_BK = torch.full((len(samples), num_classes), label_smoothing / num_classes)
    rows_B = torch.arange(len(samples))
    targets_BK[rows_B, torch.tensor([sample.target for sample in samples])] += 1 - label_smoothing
    shares_B = torch.tensor([sample.share for sample in samples])
    if (shares_B < 1).any():
        targets_BK = torch.lerp(targets_BK.roll(-1, 0), targets_BK, shares_B[:, None])
        wide_BHWC = pixels_BHWC.float()
        pixels_BHWC = torch.lerp(wide_BHWC.roll(-1, 0), wide_BHWC, shares_B[:, None, None, None]).round().byte()
    return ImageBatch(pixels_BHWC.permute(0, 3, 1, 2), targets_BK)


@dataclass(frozen=True, eq=False)
class OpenImages:
    """The images of a run."""

    train: ImageSource
    heldout: ImageSource | None
    classes: tuple[str, ...]
    """Names of the classes, in the order of their numbers."""


def open_images(config: ImagesConfig) -> OpenImages:
    """List the images of `config` and number their classes.

    Raises `DataError` where there are none, a class has none, or a label is none of the classes.
    """
    found = list_images(config.sources, config)
    train, heldout = found.train, found.heldout
    if config.heldout_sources:
        others = list_images(config.heldout_sources, config)
        train, heldout = (*train, *heldout), (*others.train, *others.heldout)
    elif not heldout and config.heldout_fraction:
        heldout = tuple(image for image in train if is_heldout(image.name, config.heldout_fraction))
        train = tuple(image for image in train if not is_heldout(image.name, config.heldout_fraction))
        if train and not heldout:
            raise DataError(
                f"none of the {len(train)} images falls into the held-out part at data.heldout_fraction="
                f"{config.heldout_fraction}; raise it, set it to 0, or name data.heldout_sources"
            )
    classes = config.classes or _sort_classes([*found.folders, *(image.label for image in (*train, *heldout))])
    _check_classes(classes, train, config.sources)
    sources = [ImageSource(images, _number(images, classes), config) for images in (train, heldout)]
    return OpenImages(sources[0], sources[1] if heldout else None, classes)


# ---- finding them


def list_images(sources: Iterable[str], config: ImagesConfig) -> FoundImages:
    """List the images of some sources, sorted by name; raises `DataError` for a source without any."""
    parts = [_list_source(source, config) for source in sources]
    return FoundImages(
        train=tuple(image for part in parts for image in part.train),
        heldout=tuple(image for part in parts for image in part.heldout),
        folders=frozenset().union(*(part.folders for part in parts)),
    )


def _list_source(source: str, config: ImagesConfig) -> FoundImages:
    path = Path(source)
    if not path.exists():
        raise DataError(
            f"source {source!r} does not exist; give a folder with a folder for each class, or a table of images"
        )
    if not path.is_dir():
        return FoundImages(tuple(_read_table(path, config)))
    if not (path / TRAIN_FOLDER).is_dir():
        return _list_folder(path, path)
    train = _list_folder(path / TRAIN_FOLDER, path)
    if not (path / HELDOUT_FOLDER).is_dir():
        return train
    heldout = _list_folder(path / HELDOUT_FOLDER, path)
    return FoundImages(train.train, heldout.train, train.folders)


def _list_folder(folder: Path, source: Path) -> FoundImages:
    """List the images in the folders of `folder`, each of which is a class."""
    images: list[LabelledImage] = []
    left_out: list[str] = []
    above = frozenset({os.path.realpath(source), os.path.realpath(folder)})
    classes: list[str] = []
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        if path.is_dir() and os.path.realpath(path) not in above:
            classes.append(path.name)
        else:
            left_out.append(str(path))
    for label in classes:
        for found, is_file in walk_files(str(folder / label), above=above):
            if is_file and Path(found).suffix.lower() in SUFFIXES:
                images.append(LabelledImage(Path(found).relative_to(source).as_posix(), Path(found), label))
            else:
                left_out.append(found)
    if not images:
        raise DataError(
            f"{folder} holds no image in a folder; expected a folder for each class, as in {folder}/wren/1.jpg, or "
            "give a table of images"
        )
    if left_out:
        warn_caller(f"left out, since they are no image files in the folder of a class: {name_some(left_out)}")
    return FoundImages(tuple(images), folders=frozenset(classes))


def _read_table(path: Path, config: ImagesConfig) -> Iterator[LabelledImage]:
    folder = path.parent if config.image_folder is None else Path(config.image_folder)
    for row in read_rows((str(path),), TableColumns((config.image_column, config.label_column))):
        label = row.values[config.label_column]
        if not isinstance(label, str | int) or label == "":
            raise DataError(
                f"{row.name} has {label!r} in {config.label_column!r}; expected the class of the image as a text or an "
                "integer"
            )
        image = row.values[config.image_column]
        if isinstance(image, Mapping):  # as Hugging Face's datasets store an image
            image = image.get("bytes") or image.get("path")
        if isinstance(image, bytes) and image:
            yield LabelledImage(hashlib.sha256(image).hexdigest(), image, label)
        elif isinstance(image, str) and image:
            yield LabelledImage(image, folder / image, label)
        else:
            raise DataError(
                f"{row.name} has {type(image).__name__} in {config.image_column!r}; expected the path of an image, or "
                "the bytes of one"
            )


def _count_bytes(content: Path | bytes) -> int:
    """Size of an image's file; -1 where there is none, of which loading it will tell."""
    if isinstance(content, bytes):
        return len(content)
    try:
        return content.stat().st_size
    except OSError:
        return -1


# ---- their classes


def _sort_classes(labels: Iterable[str | int]) -> tuple[str, ...]:
    """Sort the classes that occur: as numbers where all are numbers, else as texts.

    >>> _sort_classes(["10", "9", "10"]), _sort_classes(["b", "10", "9"])
    (('9', '10'), ('10', '9', 'b'))
    """
    found = {str(label) for label in labels}
    return tuple(sorted(found, key=int) if all(label.isdecimal() for label in found) else sorted(found))


def _check_classes(classes: Sequence[str], train: Sequence[LabelledImage], sources: Sequence[str]) -> None:
    if len(classes) < 2:
        raise DataError(f"{', '.join(sources)} has the one class {classes[0]!r} alone; expected two or more")
    targets = set(_number(train, classes))
    empty = [name for number, name in enumerate(classes) if number not in targets]
    if empty:
        raise DataError(
            f"no image to train on has the class {_name_classes(empty)}; add some, take the class away, or lower "
            "data.heldout_fraction"
        )


def _number(images: Iterable[LabelledImage], classes: Sequence[str]) -> list[int]:
    """The number of the class of each image; where no class is called by a number, labels may be numbers of classes."""
    numbers = {name: number for number, name in enumerate(classes)}
    if not any(name.isdecimal() for name in classes):
        numbers |= {str(number): number for number in range(len(classes))}
    for image in images:
        if str(image.label) not in numbers:
            raise DataError(
                f"{image.name} has the label {image.label!r}, and the classes are {_name_classes(classes)}; mend the "
                "label, or list all classes in data.classes"
            )
    return [numbers[str(image.label)] for image in images]


def _name_classes(names: Sequence[str]) -> str:
    more = len(names) - _NUM_NAMED
    return ", ".join(names[:_NUM_NAMED]) + (f" and {more} more" if more > 0 else "")
