"""Composed scenes: boxes are exact, and the same arguments give the same scenes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from deepseek.core.errors import DataError
from deepseek.data.boxes import open_boxes
from deepseek.data.config import BoxesConfig
from deepseek.data.images import read_image
from deepseek.data.scenes import compose_scenes

COLORS = {"blue": (0, 0, 255), "red": (255, 0, 0)}


@pytest.fixture
def materials(tmp_path: Path) -> tuple[Path, Path]:
    """Opaque discs with transparent margins of two classes, and a dark photograph."""
    for name, color in COLORS.items():
        (tmp_path / "pictures" / name).mkdir(parents=True)
        picture = Image.new("RGBA", (50, 40), (0, 0, 0, 0))
        ImageDraw.Draw(picture).ellipse((8, 4, 40, 34), fill=(*color, 255))
        picture.save(tmp_path / "pictures" / name / "disc.png")
    (tmp_path / "photographs").mkdir()
    Image.new("RGB", (90, 70), (40, 60, 40)).save(tmp_path / "photographs" / "dark.png")
    return tmp_path / "pictures", tmp_path / "photographs"


def compose(materials: tuple[Path, Path], folder: Path, **changes: Any) -> dict[str, Any]:
    compose_scenes(*materials, folder, **{"num_images": 6, "size": 96, "seed": 0} | changes)
    content: dict[str, Any] = json.loads((folder / "annotations.json").read_text())
    return content


def test_boxes_are_the_smallest_around_what_is_seen(materials: tuple[Path, Path], tmp_path: Path) -> None:
    content = compose(materials, tmp_path / "scenes", max_objects=1, num_images=12)
    assert [category["name"] for category in content["categories"]] == ["blue", "red"]
    assert len(content["annotations"]) == len(content["images"]) == 12
    for image, annotation in zip(content["images"], content["annotations"], strict=True):
        pixels = (read_image(tmp_path / "scenes" / "images" / image["file_name"]) * 255).permute(1, 2, 0).numpy()
        channel = 2 if annotation["category_id"] == 0 else 0
        rows, columns = np.nonzero(pixels[..., channel] > 148)  # half way from the photograph to the disc
        seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        left, top, width, height = annotation["bbox"]
        assert seen == pytest.approx([left, top, left + width, top + height], abs=2)  # JPEG blurs by a pixel or two
        assert 0.1 * 96 < max(width, height) < 0.46 * 96


def test_no_object_hides_much_of_another(materials: tuple[Path, Path], tmp_path: Path) -> None:
    content = compose(materials, tmp_path / "scenes", max_objects=8, num_images=8)
    counts = [0] * 8
    for image in range(8):
        boxes = [each["bbox"] for each in content["annotations"] if each["image_id"] == image]
        counts[image] = len(boxes)
        for number, (left, top, width, height) in enumerate(boxes):
            for other in boxes[:number]:
                across = min(left + width, other[0] + other[2]) - max(left, other[0])
                down = min(top + height, other[1] + other[3]) - max(top, other[1])
                assert max(0, across) * max(0, down) <= 0.3 * min(width * height, other[2] * other[3])
    assert max(counts) > 2


def test_the_same_arguments_give_the_same_scenes_and_another_seed_others(
    materials: tuple[Path, Path], tmp_path: Path
) -> None:
    contents = [compose(materials, tmp_path / str(number), seed=number // 2) for number in range(3)]
    assert contents[0] == contents[1] != contents[2]
    name = "images/000003.jpg"
    assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()


def test_the_data_kind_reads_what_was_composed(materials: tuple[Path, Path], tmp_path: Path) -> None:
    compose(materials, tmp_path / "scenes", num_images=30)
    path = tmp_path / "scenes" / "annotations.json"
    data = open_boxes(BoxesConfig(annotations=str(path), images=str(path.parent / "images"), image_size=96))
    assert data.labels == ("blue", "red") and data.heldout is not None
    assert len(data.train) + len(data.heldout) == 30


def test_folders_without_pictures_are_refused_and_nothing_is_written(
    materials: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for pictures, photographs, message in (
        (tmp_path / "empty", materials[1], "empty has no folder with pictures"),
        (tmp_path / "nowhere", materials[1], "nowhere has no folder with pictures"),
        (materials[0], tmp_path / "empty", "empty has no photograph"),
    ):
        with pytest.raises(DataError, match=message):
            compose((pictures, photographs), tmp_path / "scenes")
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(materials[0] / "red" / "nothing.png")
    with pytest.raises(DataError, match=r"nothing.png is transparent everywhere"):
        compose(materials, tmp_path / "scenes")
    assert not (tmp_path / "scenes").exists()
