"""The training loss against formulas written once more in plain Python."""

import itertools

import pytest
import torch

from deepseek.models.yolov7.label_assignment import ObjectTargets
from deepseek.models.yolov7.model import TINY_ANCHORS
from deepseek.models.yolov7.training_loss import DetectionLossConfig, complete_iou, training_loss
from tests.models.yolov7 import one_by_one
from tests.models.yolov7.test_label_assignment import NUM_CLASSES, SIZES, as_list, assign, make_objects, make_raw

ANCHORS = torch.tensor(TINY_ANCHORS, dtype=torch.float64)
CONFIG = DetectionLossConfig()
GAINS = {"box_gain": 0.05, "objectness_gain": 1.0, "class_gain": 0.5}
BOXES = [
    (0.0, 0.0, 10.0, 10.0),
    (2.0, 3.0, 12.0, 9.0),
    (1.0, 1.0, 4.0, 9.0),  # inside the first
    (30.0, 40.0, 35.0, 60.0),  # far from all others
    (0.0, 0.0, 20.0, 20.0),  # the first, twice as large
]
PAIRS = list(itertools.permutations(BOXES, 2))


def test_complete_iou_is_that_of_the_paper():
    ours = complete_iou(*(torch.tensor(boxes, dtype=torch.float64) for boxes in zip(*PAIRS, strict=True)))
    assert ours.tolist() == pytest.approx([one_by_one.ciou(a, b) for a, b in PAIRS], abs=1e-12)
    assert (ours < 0).any() and (ours > 0.1).any()
    assert complete_iou(*[torch.tensor(BOXES)] * 2).tolist() == [1.0] * len(BOXES)


def test_the_gradient_of_complete_iou_takes_the_weight_of_the_aspect_as_a_constant():
    step = 1e-5
    for a, b in PAIRS:
        box = torch.tensor([a], dtype=torch.float64, requires_grad=True)
        complete_iou(box, torch.tensor([b], dtype=torch.float64)).sum().backward()
        weight = one_by_one.aspect_weight(a, b)
        for corner in range(4):
            if a[corner] == b[corner]:
                continue  # a kink
            ends = [[x + sign * step * (number == corner) for number, x in enumerate(a)] for sign in (1, -1)]
            slope = (one_by_one.ciou(ends[0], b, weight) - one_by_one.ciou(ends[1], b, weight)) / (2 * step)
            assert box.grad[0, corner].item() == pytest.approx(slope, abs=1e-8)


def test_gradcheck_agrees_where_aspects_are_equal():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 5.0], [3.0, 2.0, 9.0, 5.0]], dtype=torch.float64, requires_grad=True)
    others = torch.tensor([[1.0, 1.0, 13.0, 7.0], [0.0, 0.0, 8.0, 4.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda each: complete_iou(each, others), [boxes])


def images_of(objects, images):
    """The objects of some images, numbered anew."""
    mine = torch.isin(objects.images_N, torch.tensor(images))
    numbers = torch.tensor([images.index(image) for image in objects.images_N[mine].tolist()], dtype=torch.long)
    return ObjectTargets(objects.boxes_N4[mine], objects.labels_N[mine], numbers)


@pytest.mark.parametrize("seed", range(3))
def test_the_loss_is_the_sum_over_the_images_of_the_published_terms(seed):
    raw, objects = make_raw(3, seed, spread=1.0), make_objects(3, 10, seed)
    listed = as_list(objects)
    answers = one_by_one.assign(raw, listed, TINY_ANCHORS, 4.0)
    expected = [one_by_one.loss_of_image(raw, listed, TINY_ANCHORS, image, answers, **GAINS) for image in range(3)]
    assert training_loss(raw, objects, ANCHORS, CONFIG).item() == pytest.approx(sum(expected), rel=1e-10)


@pytest.mark.parametrize("gain", GAINS)
def test_every_gain_weighs_its_own_term(gain):
    raw, objects = make_raw(1, 5, spread=1.0), make_objects(1, 6, 5)
    answers = one_by_one.assign(raw, as_list(objects), TINY_ANCHORS, 4.0)
    gains = dict.fromkeys(GAINS, 0.0) | {gain: 2.0}
    ours = training_loss(raw, objects, ANCHORS, DetectionLossConfig(**gains)).item()
    expected = one_by_one.loss_of_image(raw, as_list(objects), TINY_ANCHORS, 0, answers, **gains)
    assert ours == pytest.approx(expected, rel=1e-10) and ours > 0.01


def test_losses_and_gradients_of_micro_batches_add_up_to_those_of_the_batch():
    raw, objects = make_raw(4, 7, spread=1.0), make_objects(4, 12, 8)
    leaves = [level.requires_grad_() for level in raw]
    whole = training_loss(leaves, objects, ANCHORS, CONFIG)
    gradients = torch.autograd.grad(whole, leaves)
    parts = [([level[images] for level in leaves], images_of(objects, images)) for images in ([0, 2], [1], [3])]
    losses = [training_loss(*part, ANCHORS, CONFIG) for part in parts]
    torch.testing.assert_close(sum(losses), whole)
    torch.testing.assert_close(torch.autograd.grad(sum(losses), leaves), gradients)


def test_predictions_that_equal_the_objects_have_almost_no_loss():
    boxes = torch.tensor([[10.0, 10.0, 30.0, 40.0], [40.0, 5.0, 90.0, 60.0], [60.0, 50.0, 70.0, 60.0]])
    objects = ObjectTargets(boxes.double(), torch.tensor([0, 1, 3]), torch.tensor([0, 0, 1]))
    raw = [torch.full((2, 3, *size, 5 + NUM_CLASSES), -20.0, dtype=torch.float64) for size in SIZES]
    wrong = training_loss(raw, objects, ANCHORS, CONFIG).item()
    for image, label, (left, top, right, bottom) in as_list(objects):
        for level, where, anchor, row, column in one_by_one.find_candidates(
            SIZES, [(image, label, (left, top, right, bottom))], TINY_ANCHORS, 4.0
        ):
            stride, sizes = one_by_one.STRIDES[level], TINY_ANCHORS[level][anchor]
            shares = [
                ((left + right) / 2 / stride - column + 0.5) / 2,
                ((top + bottom) / 2 / stride - row + 0.5) / 2,
                ((right - left) / sizes[0]) ** 0.5 / 2,
                ((bottom - top) / sizes[1]) ** 0.5 / 2,
            ]
            raw[level][where, anchor, row, column, :4] = torch.tensor(shares, dtype=torch.float64).logit()
            raw[level][where, anchor, row, column, 5 + label] = 20.0
    for level, *place in assign(raw, objects):
        raw[level][tuple(place)][4] = 20.0
    assert training_loss(raw, objects, ANCHORS, CONFIG).item() < 1e-7 < 0.1 < wrong


def test_predictions_in_bfloat16_are_compared_in_float32():
    raw, objects = [level.bfloat16() for level in make_raw(2, 1)], make_objects(2, 8, 1)
    objects = ObjectTargets(objects.boxes_N4.float(), objects.labels_N, objects.images_N)
    loss = training_loss(raw, objects, ANCHORS.float(), CONFIG)
    wide = training_loss([level.float() for level in raw], objects, ANCHORS.float(), CONFIG)
    assert loss.dtype == torch.float32 and torch.equal(loss, wide)


def test_images_without_objects_learn_that_there_are_none():
    raw = [level.requires_grad_() for level in make_raw(2, 2)]
    empty = ObjectTargets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    training_loss(raw, empty, ANCHORS, CONFIG).backward()
    for level in raw:
        assert (level.grad[..., 4] > 0).all()
        assert level.grad[..., :4].count_nonzero() == level.grad[..., 5:].count_nonzero() == 0


def test_one_class_has_no_class_loss():
    raw, objects = [level[..., :6] for level in make_raw(1, 3)], make_objects(1, 4, 3)
    objects = ObjectTargets(objects.boxes_N4, torch.zeros_like(objects.labels_N), objects.images_N)
    only_classes = DetectionLossConfig(box_gain=0, objectness_gain=0)
    assert training_loss(raw, objects, ANCHORS, only_classes).item() == 0
