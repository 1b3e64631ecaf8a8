"""From many boxes to those that count, against the sequential rule."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.core.errors import ConfigError
from deepseek.models.yolov7 import suppression
from deepseek.models.yolov7.suppression import overlap, select, to_corners
from tests.models.yolov7.examples import chain

# Coordinates and scores on coarse grids, so that overlaps, ties and chains are many and products are exact.
EIGHTHS = st.integers(0, 8).map(lambda number: number / 8)
BOX = st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(0, 8), st.integers(0, 8))
PREDICTION = st.tuples(BOX, EIGHTHS, st.lists(EIGHTHS, min_size=2, max_size=2)).map(
    lambda each: [*each[0], each[1], *each[2]]
)


def overlap_of_two(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union > 0 else 0.0


def select_one_by_one(predictions_NO, min_score, max_overlap, is_multi_label, max_candidates, max_detections):
    """The definition: take the best box, drop what it overlaps in its class, and so on."""
    found = []
    for x, y, w, h, objectness, *classes in predictions_NO.tolist():
        scores = [objectness * each for each in classes]
        best = max(range(len(scores)), key=lambda label: (scores[label], -label))
        labels = range(len(scores)) if is_multi_label else [best]
        corners = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
        found += [(scores[label], corners, label) for label in labels if scores[label] > min_score]
    waiting = sorted(found, key=lambda each: -each[0])[:max_candidates]
    kept = []
    while waiting:
        best = waiting.pop(0)
        kept.append(best)
        waiting = [each for each in waiting if each[2] != best[2] or overlap_of_two(each[1], best[1]) <= max_overlap]
    return kept[:max_detections]


@settings(max_examples=150, deadline=None)
@given(
    pictures=st.integers(0, 24).flatmap(
        lambda count: st.lists(st.lists(PREDICTION, min_size=count, max_size=count), min_size=1, max_size=3)
    ),
    min_score=st.sampled_from([0.0, 0.125, 0.3]),
    max_overlap=st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 1.0]),
    is_multi_label=st.booleans(),
    max_candidates=st.sampled_from([5, 3000]),
    max_detections=st.sampled_from([3, 300]),
)
def test_the_boxes_that_stay_are_those_of_the_definition(
    pictures, min_score, max_overlap, is_multi_label, max_candidates, max_detections
):
    predictions = torch.tensor(pictures, dtype=torch.float64).reshape(len(pictures), -1, 7)
    rules = {
        "min_score": min_score,
        "max_overlap": max_overlap,
        "is_multi_label": is_multi_label,
        "max_candidates": max_candidates,
        "max_detections": max_detections,
    }
    detections = select(predictions, **rules)
    for index, picture in enumerate(predictions):
        expected = select_one_by_one(picture, **rules)
        boxes, scores, labels = detections.of(index)
        assert scores.tolist() == [score for score, _, _ in expected]
        assert labels.tolist() == [label for _, _, label in expected]
        assert boxes.tolist() == [list(corners) for _, corners, _ in expected]


def test_in_a_chain_every_other_box_stays():
    boxes, *_ = select(chain(41), max_overlap=0.2).of(0)
    assert boxes[:, 0].tolist() == [20.0 * each - 8 for each in range(21)]


def test_many_pictures_are_compared_in_parts_with_the_same_answer(monkeypatch):
    predictions = torch.rand(5, 60, 8, generator=torch.Generator().manual_seed(0)) * 40
    predictions[..., 4:] /= 40
    whole = select(predictions)
    monkeypatch.setattr(suppression, "MAX_PAIRS", 2 * 60 * 60)
    parts = select(predictions)
    torch.testing.assert_close(vars(parts), vars(whole), rtol=0, atol=0)


def test_pictures_are_padded_with_zeros():
    predictions = chain(3).repeat(2, 1, 1)
    predictions[1, :, 4] = 0
    detections = select(predictions, max_overlap=1.0)
    assert detections.counts_B.tolist() == [3, 0]
    assert not detections.boxes_BM4[1].any() and not detections.scores_BM[1].any()


def test_nothing_is_found_where_there_is_nothing():
    for shape in ((2, 0, 7), (0, 5, 7), (2, 5, 7)):
        detections = select(torch.zeros(shape))
        assert detections.counts_B.tolist() == [0] * shape[0]
        assert detections.boxes_BM4.shape == (shape[0], 0, 4)


def test_areas_too_large_for_float16_are_compared_all_the_same():
    box = [320.0, 320.0, 600.0, 600.0, 1.0, 1.0]
    twins = torch.tensor([[box, [322.0, *box[1:4], 0.9, 1.0], [100.0, 100.0, 20.0, 20.0, 0.9, 1.0]]]).half()
    assert select(twins).counts_B.tolist() == [2]


def test_overlap_is_zero_where_no_box_has_an_area():
    points = torch.zeros(1, 2, 4)
    assert overlap(points, points).tolist() == [[[0.0, 0.0], [0.0, 0.0]]]


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ({"min_score": 1.5}, "min_score"),
        ({"max_overlap": -0.1}, "max_overlap"),
        ({"max_candidates": 0}, "max_candidates"),
        ({"max_detections": 0}, "max_detections"),
    ],
)
def test_rules_out_of_range_are_refused(rules, named):
    with pytest.raises(ConfigError, match=named):
        select(torch.zeros(1, 2, 7), **rules)


@pytest.mark.parametrize("shape", [(2, 7), (1, 2, 5)])
def test_what_is_no_prediction_is_refused(shape):
    with pytest.raises(ConfigError, match="expected"):
        select(torch.zeros(shape))


def test_corners_are_half_a_size_from_the_centre():
    assert to_corners(torch.tensor([[10.0, 20.0, 4.0, 6.0]])).tolist() == [[8.0, 17.0, 12.0, 23.0]]
