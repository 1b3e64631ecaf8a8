"""Images with boxes around their objects, read from an annotations file as COCO's are, a sample an image.

    data = open_boxes(settings)
    data.labels                                  ("apple", "pear"): the classes in the order of their ids in the file
    data.train.load(index, random)               BoxSample: the fitted or augmented image, its boxes and classes

The file is JSON with `images` (id, file_name, width, height), `annotations` (image_id, category_id, bbox as left, top,
width, height in pixels, iscrowd) and `categories` (id, name). All of it is checked when it is opened, before a run
begins: every id, every file, every box. A box that reaches beyond its image is cut off at the edge; one that lies
outside of it, or has no size, ends the opening with its name or is left out and counted, as `bad_boxes` says. Boxes of
crowds are left out of training, and an evaluation neither asks for them nor blames what is found there.

Shapes: C channels, H x W image, N boxes; boxes are left, top, right, bottom in pixels.
Source: Lin et al. 2014, "Microsoft COCO" (https://cocodataset.org/#format-data).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from deepseek.core.caller_warnings import warn_caller
from deepseek.core.errors import DataError
from deepseek.core.storage import explained_storage
from deepseek.data.box_augmentation import Picture, augment
from deepseek.data.config import BoxesConfig
from deepseek.data.images import read_image
from deepseek.data.letterbox import letterbox
from deepseek.data.samples import BrokenSampleError
from deepseek.data.sources import is_heldout

_NUM_NAMED = 3


@dataclass(frozen=True)
class AnnotatedImage:
    """One image of a data set, before it is read."""

    path: Path
    width: int
    height: int
    boxes: tuple[tuple[float, float, float, float], ...]
    labels: tuple[int, ...]
    """Number of the class of each box."""
    is_crowd: tuple[bool, ...]
    """Whether a box stands for many objects that nobody counted."""


@dataclass(frozen=True)
class BoxSample:
    """An image as a model sees it."""

    image_CHW: Tensor
    """Red, green, blue from 0 to 1."""
    boxes_N4: Tensor
    labels_N: Tensor
    is_crowd_N: Tensor
    frame_4: Tensor
    """Where the picture is in the image; grey is around it."""


@dataclass(frozen=True)
class BoxBatch:
    """Samples together; boxes of all images one after the other."""

    images_BCHW: Tensor
    boxes_N4: Tensor
    labels_N: Tensor
    is_crowd_N: Tensor
    images_N: Tensor
    """Number of the image of each box."""
    frames_B4: Tensor


@dataclass(frozen=True)
class BoxData:
    """Annotated images to train on and to measure with."""

    train: BoxSource
    heldout: BoxSource | None
    labels: tuple[str, ...]
    """Names of the classes in their order."""


class BoxSource:
    """Annotated images as samples (`samples.SampleSource`)."""

    def __init__(self, images: Sequence[AnnotatedImage], settings: BoxesConfig) -> None:
        self.images, self.settings = tuple(images), settings

    @property
    def digest(self) -> str:
        """Which images these are and what is on them, in their order; moving the folder changes nothing."""
        described = [[image.path.name, image.width, image.height, image.boxes, image.labels] for image in self.images]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int, random: np.random.Generator | None) -> BoxSample:
        """Load one image, fitted into the square of `image_size`, or put together with others by `random`.

        Raises `BrokenSampleError` for a file that is no image, or of another size than its annotations.
        """
        if random is not None:
            return self._augment(index, random)
        size, annotated = self.settings.image_size, self.images[index]
        fitted_CHW, how = letterbox(self._read(index), (size, size))
        scale_4 = torch.tensor([how.scale_x, how.scale_y] * 2)
        shift_4 = torch.tensor([how.left, how.top] * 2)
        return BoxSample(
            fitted_CHW,
            torch.tensor(annotated.boxes, dtype=torch.float32).view(-1, 4) * scale_4 + shift_4,
            torch.tensor(annotated.labels, dtype=torch.int64),
            torch.tensor(annotated.is_crowd, dtype=torch.bool),
            torch.tensor([0, 0, annotated.width, annotated.height]) * scale_4 + shift_4,
        )

    def _augment(self, index: int, random: np.random.Generator) -> BoxSample:
        settings = self.settings.augmentation
        is_mosaic = random.random() < settings.mosaic
        others = random.integers(len(self.images), size=3).tolist() if is_mosaic else []
        pictures = [self._open(number) for number in [index, *others]]
        composed = augment(pictures, self.settings.image_size, settings, random)
        edge = float(self.settings.image_size)
        return BoxSample(
            composed.image_CHW,
            composed.boxes_N4,
            composed.labels_N,
            torch.zeros(len(composed.labels_N), dtype=torch.bool),
            torch.tensor([0.0, 0.0, edge, edge]),
        )

    def _open(self, index: int) -> Picture:
        """Read an image and its boxes, crowds aside."""
        annotated = self.images[index]
        counts_N = ~torch.tensor(annotated.is_crowd, dtype=torch.bool)
        return Picture(
            self._read(index),
            torch.tensor(annotated.boxes, dtype=torch.float32).view(-1, 4)[counts_N],
            torch.tensor(annotated.labels, dtype=torch.int64)[counts_N],
        )

    def _read(self, index: int) -> Tensor:
        annotated = self.images[index]
        try:
            image_CHW = read_image(annotated.path)
        except DataError as error:
            raise BrokenSampleError(str(error)) from error
        height, width = image_CHW.shape[1:]
        if (width, height) != (annotated.width, annotated.height):
            raise BrokenSampleError(
                f"{annotated.path} is {width} x {height} and its annotations are for {annotated.width} x "
                f"{annotated.height}; give them for the image as it is"
            )
        return image_CHW


def collate(samples: Sequence[BoxSample]) -> BoxBatch:
    """Put samples of one size together."""
    counts = torch.tensor([len(sample.labels_N) for sample in samples])
    return BoxBatch(
        images_BCHW=torch.stack([sample.image_CHW for sample in samples]),
        boxes_N4=torch.cat([sample.boxes_N4 for sample in samples]),
        labels_N=torch.cat([sample.labels_N for sample in samples]),
        is_crowd_N=torch.cat([sample.is_crowd_N for sample in samples]),
        images_N=torch.arange(len(samples)).repeat_interleave(counts),
        frames_B4=torch.stack([sample.frame_4 for sample in samples]),
    )


def open_boxes(settings: BoxesConfig) -> BoxData:
    """Open the images to train on and those that are held out; raises `DataError` for what is wrong with them."""
    labels, images = read_annotations(Path(settings.annotations), Path(settings.images), bad_boxes=settings.bad_boxes)
    heldout: list[AnnotatedImage] = []
    if settings.heldout_annotations is not None:
        folder = Path(settings.heldout_images or settings.images)
        others, heldout = read_annotations(Path(settings.heldout_annotations), folder, bad_boxes=settings.bad_boxes)
        if others != labels:
            raise DataError(
                f"{settings.heldout_annotations} has the categories {', '.join(others)} and {settings.annotations} "
                f"has {', '.join(labels)}; both files need the same categories with the same ids"
            )
    elif settings.heldout_fraction:
        named = [(is_heldout(image.path.name, settings.heldout_fraction), image) for image in images]
        images, heldout = (
            [image for is_kept, image in named if not is_kept],
            [image for is_kept, image in named if is_kept],
        )
        if not images or not heldout:
            raise DataError(
                f"heldout_fraction={settings.heldout_fraction} of the {len(named)} images of {settings.annotations} "
                f"leaves {len(images)} to train on and {len(heldout)} held out; add images, change the fraction, or "
                "give heldout_annotations"
            )
    unseen = sorted(set(labels) - {labels[number] for image in images for number in image.labels})
    if unseen:
        warn_caller(f"no training image has a box of {_name(unseen)}, so that nothing is learned about it")
    return BoxData(BoxSource(images, settings), BoxSource(heldout, settings) if heldout else None, labels)


def read_annotations(
    path: Path, folder: Path, *, bad_boxes: Literal["stop", "skip"]
) -> tuple[tuple[str, ...], list[AnnotatedImage]]:
    """Read the names of the classes and the images of an annotations file; `folder` holds the images.

    Images come in the order of the file and classes by their ids. Raises `DataError`.
    """
    content = _read_json(path)
    categories = _by_id(path, "categories", content["categories"], {"name": str})
    images = _by_id(path, "images", content["images"], {"file_name": str, "width": int, "height": int})
    if not images or not content["annotations"]:
        what = "images" if not images else "annotations"
        raise DataError(f"{path} has no {what}, so that there is nothing to learn; give a file with images and boxes")
    if len({type(identifier) for identifier in categories}) > 1:
        raise DataError(
            f"{path} has the categories {_name([repr(identifier) for identifier in categories])}, whose ids are "
            "numbers and texts; give all of them numbers, as COCO has them"
        )
    numbers = {identifier: number for number, identifier in enumerate(sorted(categories))}
    missing = [image["file_name"] for image in images.values() if not (folder / image["file_name"]).is_file()]
    if missing:
        raise DataError(
            f"{path} names images that are not in {folder}: {_name(missing)}; set data.images to their folder"
        )
    boxes: dict[Any, list[_Box]] = {identifier: [] for identifier in images}
    bad: list[str] = []
    for position, annotation in enumerate(content["annotations"]):
        box = _read_box(f"annotation {annotation.get('id', position)} of {path}", annotation, images, numbers)
        if isinstance(box, str):
            bad.append(box)
        else:
            boxes[annotation["image_id"]].append(box)
    if bad and bad_boxes == "stop":
        more = f" (so do {len(bad) - 1} more boxes)" if len(bad) > 1 else ""
        raise DataError(f"{bad[0]}{more}; mend the file, or set data.bad_boxes=skip to leave such boxes out")
    if bad:
        warn_caller(f"{len(bad)} boxes of {path} are left out, the first one since {bad[0]}")
    found = [
        AnnotatedImage(
            folder / image["file_name"],
            image["width"],
            image["height"],
            tuple(box.corners for box in boxes[identifier]),
            tuple(box.label for box in boxes[identifier]),
            tuple(box.is_crowd for box in boxes[identifier]),
        )
        for identifier, image in images.items()
    ]
    return tuple(categories[identifier]["name"] for identifier in sorted(categories)), found


@dataclass(frozen=True)
class _Box:
    corners: tuple[float, float, float, float]
    label: int
    is_crowd: bool


def _read_box(
    name: str, annotation: Mapping[str, Any], images: Mapping[Any, Mapping[str, Any]], numbers: Mapping[Any, int]
) -> _Box | str:
    """Read a box, cut off at the edges of its image; or say what is wrong with it, where only that box is."""
    for key in ("image_id", "category_id"):
        if not isinstance(annotation.get(key), int | str):
            raise DataError(f"{name} has no {key} that is a number or a name; give it one, as COCO's annotations have")
    if annotation["image_id"] not in images:
        raise DataError(f"{name} is for image {annotation['image_id']}, which the file does not have; add the image")
    if annotation["category_id"] not in numbers:
        raise DataError(
            f"{name} has category {annotation['category_id']} and the file has the categories "
            f"{_name(list(numbers))}; add it to them, or mend the box"
        )
    image, bbox = images[annotation["image_id"]], annotation.get("bbox")
    if not isinstance(bbox, list) or not _are_four_numbers(bbox):
        return f"{name} has the box {bbox}, which is not four finite numbers (left, top, width, height)"
    left, top, width, height = map(float, bbox)
    if width <= 0 or height <= 0:
        return f"{name} has a box of no size, {bbox}"
    corners = max(left, 0.0), max(top, 0.0), min(left + width, image["width"]), min(top + height, image["height"])
    if corners[0] >= corners[2] or corners[1] >= corners[3]:
        size = f"{image['width']} x {image['height']}"
        return f"{name} has the box {bbox}, which lies outside its image {image['file_name']} of {size}"
    return _Box(corners, numbers[annotation["category_id"]], bool(annotation.get("iscrowd", 0)))


def _are_four_numbers(values: Sequence[Any]) -> bool:
    return len(values) == 4 and all(isinstance(value, int | float) and math.isfinite(value) for value in values)


def _read_json(path: Path) -> dict[str, list[dict[str, Any]]]:
    if not path.is_file():
        raise DataError(f"{path} does not exist; give the path of an annotations file as data.annotations")
    try:
        with explained_storage(path):
            content = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is no JSON ({error}); give an annotations file as COCO has them") from error
    for key in ("images", "annotations", "categories"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError(f"{path} has no list of {key}; give an annotations file as COCO has them")
    return content  # type: ignore[no-any-return]


def _by_id(
    path: Path, key: str, entries: Sequence[dict[str, Any]], needed: Mapping[str, type]
) -> dict[Any, dict[str, Any]]:
    """Return the entries by their ids, checked for what each of them needs."""
    known: dict[Any, dict[str, Any]] = {}
    for position, entry in enumerate(entries):
        for name, kind in {"id": int | str, **needed}.items():
            if not isinstance(entry.get(name), kind):
                seen = f"has the {name} {entry[name]!r}" if name in entry else f"has no {name}"
                raise DataError(f"entry {position} of {key} in {path} {seen}; give it one, as COCO has them")
        if entry["id"] in known:
            raise DataError(f"{path} has the id {entry['id']} twice in {key}; give each entry an id of its own")
        known[entry["id"]] = entry
    return known


def _name(names: Sequence[Any]) -> str:
    """List the first of many names."""
    more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    return ", ".join(str(name) for name in names[:_NUM_NAMED]) + more
