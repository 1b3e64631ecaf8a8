"""Scenes with exact boxes, composed from cut-out pictures on photographs: data to try a detector on.

    compose_scenes(Path("pictures"), Path("photographs"), Path("scenes"), num_images=800, seed=0)

writes `scenes/images/*.jpg` and `scenes/annotations.json`, which the data kind `boxes` reads. `pictures` holds a folder
for each class with PNG files that are transparent around the object; `photographs` holds JPEG or PNG files. A scene is
a random piece of a photograph with objects of random classes and sizes on it, of which none hides more than
`MAX_HIDDEN` of another. A box is the smallest around the pixels of an object that are more opaque than transparent.

The same arguments give the same scenes: every scene is drawn by a generator of its own, from (seed, number).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from deepseek.core.errors import DataError
from deepseek.core.storage import new_folder, write_file
from deepseek.data.images import read_image, read_picture, save_image

MAX_HIDDEN = 0.3
"""Share of the smaller of two boxes that they may have in common."""
SMALLEST_SIDE, LARGEST_SIDE = 0.12, 0.45
"""Longer side of an object, as a share of the scene's."""
NUM_TRIES = 20
"""Places that are tried for an object before it is left out."""
_SMALLEST_PIECE = 0.4  # of a photograph's shorter side
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
Corners = tuple[int, int, int, int]


@dataclass(frozen=True)
class _Cutout:
    """One picture of an object."""

    label: int
    picture_4HW: Tensor


def compose_scenes(
    pictures: Path,
    photographs: Path,
    folder: Path,
    *,
    num_images: int,
    size: int = 256,
    max_objects: int = 6,
    seed: int,
) -> None:
    """Compose `num_images` scenes of `size` x `size` pixels with 1 to `max_objects` objects each, as the new `folder`.

    Raises `DataError` where there is no class folder with pictures, or no photograph.
    """
    names = sorted(path.name for path in pictures.iterdir() if path.is_dir()) if pictures.is_dir() else []
    cutouts = [
        _Cutout(label, _crop_to_object(path))
        for label, name in enumerate(names)
        for path in _list_images(pictures / name)
    ]
    backgrounds = [read_image(path) for path in _list_images(photographs)]
    if not cutouts or not backgrounds:
        missing = f"{pictures} has no folder with pictures" if not cutouts else f"{photographs} has no photograph"
        raise DataError(f"{missing}; expected a folder for each class with PNG files, and a folder of photographs")
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    with new_folder(folder) as temporary:
        (temporary / "images").mkdir(parents=True)
        for number in range(num_images):
            random = np.random.Generator(np.random.PCG64([seed, number]))
            scene_CHW, objects = _compose(cutouts, backgrounds, size, max_objects, random)
            name = f"{number:06d}.jpg"
            save_image(scene_CHW, temporary / "images" / name)
            images.append({"id": number, "file_name": name, "width": size, "height": size})
            for label, (left, top, right, bottom) in objects:
                bbox = [left, top, right - left, bottom - top]
                identifier = len(annotations) + 1
                annotations.append({"id": identifier, "image_id": number, "category_id": label, "bbox": bbox})
        categories = [{"id": label, "name": name} for label, name in enumerate(names)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        write_file(temporary / "annotations.json", json.dumps(content).encode())


def _compose(
    cutouts: list[_Cutout], backgrounds: list[Tensor], size: int, max_objects: int, random: np.random.Generator
) -> tuple[Tensor, list[tuple[int, Corners]]]:
    """Compose one scene, and list the class and the box of each object."""
    scene_CHW = _cut_piece(backgrounds[random.integers(len(backgrounds))], size, random)
    objects: list[tuple[int, Corners]] = []
    for _ in range(random.integers(1, max_objects + 1)):
        cutout = cutouts[random.integers(len(cutouts))]
        height, width = cutout.picture_4HW.shape[1:]
        side = size * SMALLEST_SIDE * (LARGEST_SIDE / SMALLEST_SIDE) ** random.random()
        scale = side / max(height, width)
        inner = max(1, round(height * scale)), max(1, round(width * scale))
        scaled_4HW = F.interpolate(cutout.picture_4HW[None], inner, mode="bilinear", antialias=True)[0]
        if random.random() < 0.5:
            scaled_4HW = scaled_4HW.flip(2)
        inside = find_object(scaled_4HW[3])
        for _ in range(NUM_TRIES):
            left, top = int(random.integers(size - inner[1] + 1)), int(random.integers(size - inner[0] + 1))
            box = left + inside[0], top + inside[1], left + inside[2], top + inside[3]
            if all(_share_in_common(box, other) <= MAX_HIDDEN for _, other in objects):
                place_CHW = scene_CHW[:, top : top + inner[0], left : left + inner[1]]
                place_CHW.lerp_(scaled_4HW[:3], scaled_4HW[3:])
                objects.append((cutout.label, box))
                break
    return scene_CHW, objects


def find_object(opacity_HW: Tensor) -> Corners:
    """Find the smallest box around what is more opaque than transparent.

    >>> import torch
    >>> opacity = torch.zeros(4, 6)
    >>> opacity[1:3, 2:5] = 1
    >>> find_object(opacity)
    (2, 1, 5, 3)
    """
    rows, columns = (opacity_HW > 0.5).nonzero(as_tuple=True)
    if not len(rows):
        return 0, 0, opacity_HW.shape[1], opacity_HW.shape[0]
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def _crop_to_object(path: Path) -> Tensor:
    """Read a picture without the transparent margins; raises `DataError` where all of it is transparent."""
    picture_4HW = read_picture(path)
    if not (picture_4HW[3] > 0.5).any():
        raise DataError(f"{path} is transparent everywhere; give a picture of an object")
    left, top, right, bottom = find_object(picture_4HW[3])
    return picture_4HW[:, top:bottom, left:right]


def _cut_piece(photograph_CHW: Tensor, size: int, random: np.random.Generator) -> Tensor:
    """Cut a random square out of a photograph, mirrored or not, scaled to `size`."""
    height, width = photograph_CHW.shape[1:]
    shorter = min(height, width)
    side = int(random.integers(max(1, int(_SMALLEST_PIECE * shorter)), shorter + 1))
    left, top = random.integers(width - side + 1), random.integers(height - side + 1)
    piece_CHW = photograph_CHW[:, top : top + side, left : left + side]
    piece_CHW = piece_CHW.flip(2) if random.random() < 0.5 else piece_CHW
    return F.interpolate(piece_CHW[None], (size, size), mode="bilinear", antialias=True)[0]


def _share_in_common(box: Corners, other: Corners) -> float:
    """Return how much of the smaller of two boxes lies in the other."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    smaller = min((each[2] - each[0]) * (each[3] - each[1]) for each in (box, other))
    return max(0, width) * max(0, height) / smaller


def _list_images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
