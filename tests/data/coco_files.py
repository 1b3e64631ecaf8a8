"""Annotation files as COCO has them, with small images, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NAMES = ("cat", "dog", "owl")


def write_images(folder: Path, sizes: list[tuple[int, int]], seed: int = 0) -> None:
    """Noise of (width, height) each, as 000.png, 001.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for number, (width, height) in enumerate(sizes):
        pixels = random.integers(256, size=(height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")


def describe(sizes: list[tuple[int, int]], boxes: list[tuple[Any, ...]], **changes: Any) -> dict[str, Any]:
    """The content of a file; a box is (image, category, left, top, width, height), or with 1 behind it a crowd."""
    images = [
        {"id": 10 + number, "file_name": f"{number:03d}.png", "width": width, "height": height}
        for number, (width, height) in enumerate(sizes)
    ]
    annotations = [
        {"id": number, "image_id": 10 + image, "category_id": category, "bbox": bbox[:4], "iscrowd": int(len(bbox) > 4)}
        for number, (image, category, *bbox) in enumerate(boxes)
    ]
    # Ids with gaps, and not in order.
    categories = [{"id": 3, "name": "dog"}, {"id": 1, "name": "cat"}, {"id": 7, "name": "owl"}]
    return {"images": images, "annotations": annotations, "categories": categories} | changes


def write_data(folder: Path, sizes: list[tuple[int, int]], boxes: list[tuple[Any, ...]], **changes: Any) -> Path:
    """Images below folder/images and folder/boxes.json, which is returned."""
    write_images(folder / "images", sizes)
    path = folder / "boxes.json"
    path.write_text(json.dumps(describe(sizes, boxes, **changes)))
    return path


def write_squares(folder: Path, num_images: int, size: int = 64, seed: int = 0) -> Path:
    """Dark images with a bright red, green or blue square or two each, which a small detector can learn."""
    random = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    boxes = []
    for number in range(num_images):
        pixels = random.integers(60, size=(size, size, 3), dtype=np.uint8)
        for _ in range(random.integers(1, 3)):
            side, color = int(random.integers(size // 4, size // 2)), int(random.integers(3))
            left, top = (int(random.integers(size - side)) for _ in range(2))
            pixels[top : top + side, left : left + side] = 255 * (np.arange(3) == color)
            boxes.append((number, (1, 3, 7)[color], left, top, side, side))
        Image.fromarray(pixels).save(folder / "images" / f"{number:03d}.png")
    path = folder / "boxes.json"
    path.write_text(json.dumps(describe([(size, size)] * num_images, boxes)))
    return path
