"""Which predictions answer for which object, against loops and on cases made by hand."""

import pytest
import torch

from deepseek.models.yolov7.label_assignment import ObjectTargets, choose, find_candidates, match
from deepseek.models.yolov7.model import TINY_ANCHORS
from deepseek.models.yolov7.training_loss import read_candidates
from tests.models.yolov7 import one_by_one

SIZES = ((8, 12), (4, 6), (2, 3))  # of images of 64 x 96
NUM_CLASSES = 4


def make_raw(num_images, seed, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    shape = lambda size: (num_images, 3, *size, 5 + NUM_CLASSES)  # noqa: E731
    return [spread * torch.randn(shape(size), generator=generator, dtype=torch.float64) for size in SIZES]


def make_objects(num_images, num_objects, seed):
    """Boxes in images of 64 x 96, some of whose centres are in the middle of a cell or on its edge."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    centres = draw(num_objects, 2) * torch.tensor([96.0, 64.0])
    centres = torch.where(draw(num_objects, 1) < 0.3, (centres / 4).round() * 4, centres)
    halves = torch.exp2(draw(num_objects, 2) * 4)
    limits = torch.tensor([96.0, 64.0] * 2, dtype=torch.float64)
    boxes = torch.minimum(torch.cat([centres - halves, centres + halves], dim=1).clamp(min=0), limits)
    labels = torch.randint(NUM_CLASSES, (num_objects,), generator=generator)
    return ObjectTargets(boxes, labels, torch.randint(num_images, (num_objects,), generator=generator))


def as_list(objects):
    return list(zip(objects.images_N.tolist(), objects.labels_N.tolist(), objects.boxes_N4.tolist(), strict=True))


def in_tuples(candidates):
    parts = (candidates.levels_C, candidates.images_C, candidates.anchors_C, candidates.rows_C, candidates.columns_C)
    return list(zip(*(part.tolist() for part in parts), strict=True))


def assign(raw, objects):
    anchors = torch.tensor(TINY_ANCHORS, dtype=torch.float64)
    candidates = find_candidates(raw, objects, anchors, max_ratio=4.0)
    answers = match(candidates, *read_candidates(raw, candidates, anchors), objects, len(raw[0]))
    return {where: number for where, number in zip(in_tuples(candidates), answers.tolist(), strict=True) if number >= 0}


@pytest.mark.parametrize("seed", range(5))
def test_candidates_are_the_cells_and_anchors_of_the_definition_each_once(seed):
    objects = make_objects(3, 20, seed)
    anchors = torch.tensor(TINY_ANCHORS, dtype=torch.float64)
    found = in_tuples(find_candidates(make_raw(3, seed), objects, anchors, max_ratio=4.0))
    assert found == one_by_one.find_candidates(SIZES, as_list(objects), TINY_ANCHORS, 4.0)
    assert len(found) > 50


def test_an_object_in_the_upper_left_of_a_cell_has_the_cells_to_the_left_and_above():
    # Centre (18, 26): on stride 8 at (2.25, 3.25); 10 x 12 fits the first two anchors (9 x 6, 13 x 16).
    objects = ObjectTargets(torch.tensor([[13.0, 20.0, 23.0, 32.0]]), torch.tensor([1]), torch.tensor([0]))
    candidates = find_candidates(make_raw(1, 0), objects, torch.tensor(TINY_ANCHORS), max_ratio=2.1)
    on_fine = [where for where in in_tuples(candidates) if where[0] == 0]
    assert on_fine == [(0, 0, anchor, row, column) for anchor in (0, 1) for row, column in ((2, 2), (3, 1), (3, 2))]


@pytest.mark.parametrize("corner", [(0.0, 0.0), (96.0, 64.0)])
def test_an_object_in_a_corner_of_the_image_stays_on_the_grid(corner):
    x, y = corner
    objects = ObjectTargets(torch.tensor([[x - 4, y - 4, x + 4, y + 4]]), torch.tensor([0]), torch.tensor([0]))
    candidates = find_candidates(make_raw(1, 0), objects, torch.tensor(TINY_ANCHORS), max_ratio=4.0)
    places = {(row, column) for _, _, _, row, column in in_tuples(candidates)}
    assert places == ({(0, 0)} if corner == (0.0, 0.0) else {(7, 11), (3, 5)})


@pytest.mark.parametrize("seed", range(6))
def test_predictions_answer_for_the_objects_that_loops_give_them(seed):
    raw, objects = make_raw(3, seed, spread=1.0), make_objects(3, 16, seed + 100)
    expected = one_by_one.assign(raw, as_list(objects), TINY_ANCHORS, 4.0)
    assert assign(raw, objects) == expected
    assert len(expected) > 10


def test_as_many_answer_as_the_best_overlaps_add_up_to_and_one_at_least():
    iou = torch.tensor([[0.9, 0.8, 0.7, 0.6], [0.1, 0.0, 0.0, 0.2]])
    assert choose(torch.tensor([[1.0, 2.0, 3.0, 9.0], [9.0, 9.0, 9.0, 1.0]]), iou).tolist() == [0, 0, 0, 1]


def test_a_prediction_that_two_objects_want_goes_to_the_cheaper_one():
    iou = torch.tensor([[0.9, 0.2, 0.0], [0.8, 0.3, 0.0]])  # one match each
    assert choose(torch.tensor([[1.0, 2.0, 9.0], [0.5, 3.0, 9.0]]), iou).tolist() == [1, -1, -1]


def test_of_equal_candidates_the_earlier_answers():
    iou = torch.full((1, 5), 0.5)  # adds up to 2
    assert choose(torch.zeros(1, 5), iou).tolist() == [0, 0, -1, -1, -1]


def test_images_do_not_see_the_objects_of_others():
    raw, objects = make_raw(2, 3, spread=1.0), make_objects(2, 12, 4)
    together = assign(raw, objects)
    for image in (0, 1):
        mine = objects.images_N == image
        alone = ObjectTargets(objects.boxes_N4[mine], objects.labels_N[mine], torch.zeros_like(objects.images_N[mine]))
        numbers = mine.nonzero().flatten().tolist()
        found = assign([level[image : image + 1] for level in raw], alone)
        expected = {where: number for where, number in together.items() if where[1] == image}
        assert {(level, image, *rest): numbers[number] for (level, _, *rest), number in found.items()} == expected


def test_a_batch_without_objects_has_no_candidates():
    empty = ObjectTargets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    assert assign(make_raw(2, 0), empty) == {}
