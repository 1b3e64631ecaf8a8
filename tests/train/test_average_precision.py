"""Mean average precision, against COCO's definition in plain loops and cases made by hand."""

from __future__ import annotations

import contextlib
import io
import math
import random
import sys
from collections.abc import Sequence

import pytest
import torch

from deepseek.core.errors import DataError, MissingExtraError
from deepseek.train.average_precision import AveragePrecision, require_pycocotools, resample
from deepseek.train.scores import draw_weights

Box = tuple[float, float, float, float]
Found = tuple[Box, float, int]
True_ = tuple[Box, int, bool]
Images = list[tuple[list[Found], list[True_]]]
THRESHOLDS = [0.5 + 0.05 * number for number in range(10)]


def gather(images: Images) -> AveragePrecision:
    measured = AveragePrecision()
    for found, true in images:
        columns = list(zip(*found, strict=True)) or [(), (), ()]
        rows = list(zip(*true, strict=True)) or [(), (), ()]
        measured.add_image(
            torch.tensor(columns[0], dtype=torch.float64).view(-1, 4),
            torch.tensor(columns[1], dtype=torch.float64),
            torch.tensor(columns[2], dtype=torch.long),
            torch.tensor(rows[0], dtype=torch.float64).view(-1, 4),
            torch.tensor(rows[1], dtype=torch.long),
            torch.tensor(rows[2], dtype=torch.bool),
        )
    return measured


def measure(images: Images) -> dict[str, float]:
    return gather(images).compute()


def overlap(found: Box, true: Box, is_crowd: bool) -> float:
    """Intersection over union; over the found box alone where the true one is a crowd."""
    across = max(0.0, min(found[2], true[2]) - max(found[0], true[0]))
    down = max(0.0, min(found[3], true[3]) - max(found[1], true[1]))
    area, true_area = ((box[2] - box[0]) * (box[3] - box[1]) for box in (found, true))
    return across * down / (area if is_crowd else area + true_area - across * down)


def precision_of_class(images: Images, label: int, threshold: float) -> float | None:
    verdicts: list[tuple[float, bool]] = []
    num_true = 0
    for found, all_true in images:
        true = [each for each in all_true if each[1] == label]
        num_true += sum(not is_crowd for _, _, is_crowd in true)
        claimed: set[int] = set()
        for box, score, _ in sorted((each for each in found if each[2] == label), key=lambda each: -each[1])[:100]:
            overlaps = {number: overlap(box, other, crowd) for number, (other, _, crowd) in enumerate(true)}
            free = [k for k in overlaps if overlaps[k] >= threshold and not true[k][2] and k not in claimed]
            if free:
                claimed.add(max(free, key=lambda k: (overlaps[k], k)))
                verdicts.append((score, True))
            elif not any(overlaps[k] >= threshold and true[k][2] for k in overlaps):
                verdicts.append((score, False))
    if not num_true:
        return None
    verdicts.sort(key=lambda verdict: -verdict[0])
    points, num_right = [], 0
    for number, (_, is_right) in enumerate(verdicts, 1):
        num_right += is_right
        points.append((num_right / num_true, num_right / number))
    best = [max((precision for recall, precision in points if recall >= k / 100), default=0.0) for k in range(101)]
    return sum(best) / 101


def average(images: Images, thresholds: Sequence[float]) -> float:
    values = [precision_of_class(images, label, threshold) for label in range(4) for threshold in thresholds]
    known = [value for value in values if value is not None]
    return sum(known) / len(known)


def draw_images(seed: int) -> Images:
    """Found boxes near true ones, twice on some, on none of others, with crowds and images without anything."""
    generator = random.Random(seed)
    images: Images = []
    for _ in range(8):
        true: list[True_] = []
        found: list[Found] = []
        for _ in range(generator.randrange(6)):
            left, top, side = (generator.uniform(4, 60) for _ in range(3))
            label = generator.randrange(3)
            true.append(((left, top, left + side, top + side), label, generator.random() < 0.15))
            for _ in range(generator.randrange(3)):
                moved = [edge + generator.gauss(0, side / 12) for edge in (left, top, left + side, top + side)]
                box = (moved[0], moved[1], max(moved[2], moved[0] + 1), max(moved[3], moved[1] + 1))
                found.append((box, generator.random(), label if generator.random() < 0.8 else generator.randrange(4)))
        images.append((found, true))
    return images


@pytest.mark.parametrize("seed", range(6))
def test_it_is_what_the_definition_says(seed: int) -> None:
    images = draw_images(seed)
    measured = measure(images)
    assert measured["map_50"] == pytest.approx(average(images, THRESHOLDS[:1]), abs=1e-9)
    assert measured["map_50_95"] == pytest.approx(average(images, THRESHOLDS), abs=1e-9)
    assert 0.05 < measured["map_50_95"] < measured["map_50"] < 1


BOX = (10.0, 10.0, 20.0, 20.0)


def test_a_box_that_covers_nine_tenths_counts_up_to_there() -> None:
    found = [((10.0, 10.0, 20.0, 19.05), 0.9, 0)]  # an overlap of 0.905: right at nine of ten thresholds
    assert measure([(found, [(BOX, 0, False)])]) == pytest.approx({"map_50": 1.0, "map_50_95": 0.9})


def test_a_second_box_on_the_same_object_is_wrong() -> None:
    first, second = (BOX, 0.9, 0), (BOX, 0.8, 0)
    other = ((50.0, 50.0, 60.0, 60.0), 0.1, 0)
    true = [(BOX, 0, False), ((50.0, 50.0, 60.0, 60.0), 0, False)]
    # Right, wrong, right: precision 1 up to a recall of a half (51 points of 101), then 2/3.
    expected = (51 + 50 * 2 / 3) / 101
    assert measure([([first, second, other], true)])["map_50"] == pytest.approx(expected)


def test_what_is_found_in_a_crowd_counts_neither_way() -> None:
    in_crowd = ((80.0, 80.0, 90.0, 90.0), 0.95, 0)
    crowd = ((60.0, 60.0, 100.0, 100.0), 0, True)
    assert measure([([in_crowd, (BOX, 0.5, 0)], [(BOX, 0, False), crowd])])["map_50"] == pytest.approx(1.0)


def test_classes_weigh_alike_and_those_without_a_true_box_not_at_all() -> None:
    true = [(BOX, 0, False), ((50.0, 50.0, 60.0, 60.0), 1, False)]
    assert measure([([(BOX, 0.9, 0), (BOX, 0.9, 3)], true)])["map_50"] == pytest.approx(0.5)


def test_nothing_found_is_zero() -> None:
    assert measure([([], [(BOX, 0, False)])]) == {"map_50": 0.0, "map_50_95": 0.0}


def test_nothing_to_find_is_refused() -> None:
    with pytest.raises(DataError, match="the 2 held-out images have no box to find"):
        measure([([(BOX, 0.9, 0)], []), ([], [(BOX, 0, True)])])


def test_it_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    measure(draw_images(0))
    assert capsys.readouterr().out == ""


def test_a_missing_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    with pytest.raises(MissingExtraError, match=r"pycocotools is needed here .*\[train\]"):
        require_pycocotools()


@pytest.mark.parametrize("seed", range(3))
def test_a_resample_is_what_a_set_of_these_images_measures(seed: int) -> None:
    """Images that are drawn twice are two images to pycocotools, and a weight here."""
    images = draw_images(seed) + draw_images(seed + 10)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = gather(images).evaluate()
    weights = draw_weights(len(images))
    weights = weights[(weights.max(axis=1) > 2)][:6]
    for row, found in zip(weights, resample(evaluation, weights), strict=True):
        drawn = [image for image, weight in zip(images, row, strict=True) for _ in range(weight)]
        with contextlib.redirect_stdout(io.StringIO()):
            expected = gather(drawn).compute()
        assert found.tolist() == pytest.approx([expected["map_50"], expected["map_50_95"]], abs=1e-9)


def test_enough_images_have_an_interval_that_is_wider_where_they_are_fewer() -> None:
    few, many = (measure([image for seed in range(num) for image in draw_images(seed)]) for num in (2, 12))
    widths = []
    for found in (few, many):
        for name in ("map_50", "map_50_95"):
            assert found[f"{name}_low"] < found[name] < found[f"{name}_high"]
        widths.append(found["map_50_high"] - found["map_50_low"])
    assert widths[1] == pytest.approx(widths[0] / math.sqrt(6), rel=0.5)
    assert few == measure(draw_images(0) + draw_images(1))
    assert "map_50_low" not in measure(draw_images(0))


def test_images_without_a_box_to_find_in_a_resample_leave_it_out() -> None:
    nothing: Images = [([(BOX, 0.9, 0)], [])] * 11
    found = measure([*nothing, ([(BOX, 0.9, 0)], [(BOX, 0, False)])])
    assert 0 < found["map_50_low"] <= found["map_50"] <= found["map_50_high"] <= 1
