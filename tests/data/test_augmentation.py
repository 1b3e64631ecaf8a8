"""What is drawn lies where it should, and what is computed is what the words say, also in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deepseek.data.augmentation import augment, center, change_colors, draw_box, scaled_edge
from deepseek.data.config import AugmentationConfig

PLAIN = {"min_area": 1.0, "flip": 0.0}


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def draw_image(width: int = 20, height: int = 12) -> Any:
    return Image.fromarray(generator(7).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_the_same_generator_gives_the_same_pixels_and_another_one_others() -> None:
    changes = AugmentationConfig(brightness=0.4, contrast=0.4, saturation=0.4)
    first, again, other = (augment(draw_image(), changes, 8, generator(seed)) for seed in (1, 1, 2))
    assert first.shape == (8, 8, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@settings(deadline=None)
@given(
    width=st.integers(1, 500),
    height=st.integers(1, 500),
    min_area=st.floats(0.05, 1),
    max_stretch=st.floats(1, 3),
    seed=st.integers(0, 9),
)
def test_a_box_lies_in_the_image_and_is_neither_too_small_nor_too_long(
    width: int, height: int, min_area: float, max_stretch: float, seed: int
) -> None:
    box = draw_box(width, height, AugmentationConfig(min_area=min_area, max_stretch=max_stretch), generator(seed))
    left, top, right, bottom = box
    assert -1e-9 <= left < right <= width + 1e-6 and -1e-9 <= top < bottom <= height + 1e-6
    ratio = (right - left) / (bottom - top)
    assert 1 / max_stretch - 1e-6 <= ratio <= max_stretch + 1e-6
    is_middle = np.isclose(right - left, min(width, height)) and np.isclose(ratio, 1)
    assert is_middle or (right - left) * (bottom - top) >= min_area * width * height * (1 - 1e-6)


def test_boxes_are_spread_over_sizes_and_places() -> None:
    random = generator()
    boxes = np.array([draw_box(100, 100, AugmentationConfig(min_area=0.1), random) for _ in range(2000)])
    shares = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 1e4
    assert 0.1 <= shares.min() < 0.12 and shares.max() > 0.9
    assert boxes[:, 0].max() > 40 and abs(boxes[:, 0].mean() - (100 - boxes[:, 2]).mean()) < 2


def test_without_any_change_the_middle_square_is_seen() -> None:
    pixels = augment(draw_image(20, 12), AugmentationConfig(**PLAIN), 12, generator())
    np.testing.assert_array_equal(pixels, np.asarray(draw_image(20, 12))[:, 4:16])


@pytest.mark.parametrize(("flip", "num_mirrored"), [(0.0, (0, 0)), (1.0, (200, 200)), (0.3, (40, 80))])
def test_a_share_of_the_images_is_mirrored(flip: float, num_mirrored: tuple[int, int]) -> None:
    random = generator()
    changes = AugmentationConfig(min_area=1.0, flip=flip)
    whole = np.asarray(draw_image(12, 12))
    mirrored = 0
    for _ in range(200):
        pixels = augment(draw_image(12, 12), changes, 12, random)
        is_mirrored = np.array_equal(pixels, whole[:, ::-1])
        assert is_mirrored or np.array_equal(pixels, whole)
        mirrored += is_mirrored
    assert num_mirrored[0] <= mirrored <= num_mirrored[1]


@pytest.mark.parametrize("changed", ["brightness", "contrast", "saturation"])
@pytest.mark.parametrize("seed", range(4))
def test_colors_change_as_the_formulas_say(changed: str, seed: int) -> None:
    pixels = np.asarray(draw_image())
    found = change_colors(pixels, AugmentationConfig(**{changed: 0.8}), generator(seed))
    draws = generator(seed).random(3)
    factor = 1 + 0.8 * (2 * draws[["brightness", "contrast", "saturation"].index(changed)] - 1)
    values = pixels.astype(np.float64)
    grey = values @ np.array([0.299, 0.587, 0.114])
    other = {"brightness": 0.0, "contrast": grey.mean(), "saturation": grey[..., None]}[changed]
    expected = np.clip(factor * values + (1 - factor) * other, 0, 255)
    assert np.abs(found - expected).max() <= 0.51


def test_colors_that_are_not_to_change_do_not() -> None:
    pixels = np.asarray(draw_image())
    np.testing.assert_array_equal(change_colors(pixels, AugmentationConfig(), generator()), pixels)


@pytest.mark.parametrize("size", [(31, 20), (20, 31), (7, 9), (64, 64)])
def test_the_middle_has_the_size_that_is_asked_for_and_is_alike_on_both_sides(size: tuple[int, int]) -> None:
    width, height = size
    ramp = np.broadcast_to(np.linspace(0, 255, width), (height, width)).round().astype(np.uint8)
    pixels = center(Image.fromarray(np.repeat(ramp[..., None], 3, axis=2)), 8, crop_share=0.8)
    assert pixels.shape == (8, 8, 3)
    scale = scaled_edge(8, 0.8) / min(width, height)
    assert abs(int(pixels[0, 0, 0]) + int(pixels[0, -1, 0]) - 255) <= 255 / (width * scale) + 2
