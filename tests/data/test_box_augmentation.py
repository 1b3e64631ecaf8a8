"""Augmented boxes stay on their objects: checked by looking for the objects in the pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from deepseek.data.box_augmentation import Picture, augment, compose, crop, mirror
from deepseek.data.config import BoxAugmentationConfig
from deepseek.data.letterbox import GREY

STILL = BoxAugmentationConfig(mosaic=0, scale=0, translate=0, flip=0, hue=0, saturation=0, brightness=0)


def make_picture(width: int, height: int, box: tuple[int, int, int, int], color: int) -> Picture:
    """Black with one bright box of red, green or blue."""
    image_CHW = torch.zeros(3, height, width)
    left, top, right, bottom = box
    image_CHW[color, top:bottom, left:right] = 1.0
    return Picture(image_CHW, torch.tensor([box], dtype=torch.float32), torch.tensor([color]))


PICTURES = [
    make_picture(80, 40, (10, 5, 40, 30), 0),
    make_picture(50, 90, (5, 40, 45, 80), 1),
    make_picture(64, 64, (0, 0, 64, 64), 2),
    make_picture(30, 30, (10, 10, 20, 25), 0),
]


def find_in_pixels(picture: Picture, number: int) -> list[float]:
    """The smallest box around bright pixels of a color near the box of this number."""
    bright_HW = picture.image_CHW[picture.labels_N[number]] > 0.5
    left, top, right, bottom = (round(each) for each in picture.boxes_N4[number].tolist())
    near_HW = torch.zeros_like(bright_HW)
    near_HW[max(0, top - 2) : bottom + 2, max(0, left - 2) : right + 2] = True
    rows, columns = (bright_HW & near_HW).nonzero(as_tuple=True)
    return [columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]


@pytest.mark.parametrize("num_pictures", [1, 4])
@pytest.mark.parametrize("seed", range(8))
def test_boxes_are_where_their_objects_are(num_pictures: int, seed: int) -> None:
    settings = BoxAugmentationConfig(hue=0, saturation=0, brightness=0)
    result = augment(PICTURES[:num_pictures], 96, settings, np.random.default_rng(seed))
    assert result.image_CHW.shape == (3, 96, 96)
    assert ((result.boxes_N4 >= 0) & (result.boxes_N4 <= 96)).all()
    for number in range(len(result.labels_N)):
        assert find_in_pixels(result, number) == pytest.approx(result.boxes_N4[number].tolist(), abs=1.5)


def test_a_mosaic_has_a_picture_in_each_of_its_quarters() -> None:
    whole = [Picture(torch.full((3, 8, 8), level), torch.zeros(0, 4), torch.zeros(0)) for level in (0.1, 0.2, 0.3, 0.4)]
    settings = BoxAugmentationConfig(scale=0, translate=0)
    for seed in range(5):
        image_HW = compose(whole, 64, settings, np.random.default_rng(seed)).image_CHW[0]
        places = [((image_HW - level).abs() < 1e-5).nonzero().float() for level in (0.1, 0.2, 0.3, 0.4)]
        upper_left, upper_right, lower_left, lower_right = places
        assert all(len(place) for place in places)
        assert upper_left.amax(0).tolist() == [lower_left[:, 0].amin() - 1, upper_right[:, 1].amin() - 1]
        assert lower_right.amin(0).tolist() == [upper_right[:, 0].amax() + 1, lower_left[:, 1].amax() + 1]


def test_without_changes_a_picture_is_only_fitted() -> None:
    result = augment(PICTURES[:1], 80, STILL, np.random.default_rng(0))
    assert torch.equal(result.image_CHW[:, 20:60], PICTURES[0].image_CHW)
    assert (result.image_CHW[:, :20] * 255).round().unique().tolist() == [round(GREY * 255)]
    assert result.boxes_N4.tolist() == [[10.0, 25.0, 40.0, 50.0]]


def test_boxes_of_which_too_little_is_left_are_dropped() -> None:
    boxes = torch.tensor(
        [
            [-40.0, 10.0, 8.0, 20.0],  # a sixth is left
            [-100.0, 10.0, 8.0, 20.0],  # less than a tenth
            [98.5, 10.0, 110.0, 20.0],  # 1.5 pixels wide
            [200.0, 10.0, 220.0, 20.0],  # outside
            [10.0, 10.0, 20.0, 20.0],
        ]
    )
    left = crop(Picture(torch.zeros(3, 100, 100), boxes, torch.arange(5)))
    assert left.labels_N.tolist() == [0, 4]
    assert left.boxes_N4.tolist() == [[0.0, 10.0, 8.0, 20.0], [10.0, 10.0, 20.0, 20.0]]


def test_mirroring_twice_changes_nothing() -> None:
    twice = mirror(mirror(PICTURES[1]))
    assert torch.equal(twice.image_CHW, PICTURES[1].image_CHW) and torch.equal(twice.boxes_N4, PICTURES[1].boxes_N4)


@pytest.mark.parametrize(
    ("changes", "seen"),
    [({"brightness": 0.4}, "value"), ({"saturation": 0.7}, "saturation"), ({"hue": 0.1}, "hue")],
    ids=["brightness", "saturation", "hue"],
)
def test_colors_change_and_boxes_do_not(changes: dict[str, Any], seen: str) -> None:
    image_CHW = torch.tensor([0.8, 0.4, 0.2])[:, None, None].expand(3, 16, 16).contiguous()
    picture = Picture(image_CHW, torch.tensor([[2.0, 2.0, 8.0, 8.0]]), torch.tensor([0]))
    results = [augment([picture], 16, STILL.override(changes), np.random.default_rng(seed)) for seed in range(4)]
    colors = [result.image_CHW[:, 0, 0] for result in results]
    assert all(torch.equal(result.boxes_N4, picture.boxes_N4) for result in results)
    assert len({tuple(color.tolist()) for color in colors}) == 4
    for color in colors:
        high, low = color.max().item(), color.min().item()
        if seen != "value":
            assert high == pytest.approx(0.8, abs=0.01)
        if seen != "saturation":
            assert (high - low) / high == pytest.approx(0.75, abs=0.02)
