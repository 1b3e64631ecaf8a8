"""Anchors that fit a data set."""

import math

import pytest
import torch

from deepseek.core.errors import ConfigError
from deepseek.models.yolov7.anchors import fit_anchors


def test_clusters_of_boxes_are_found():
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[float(2**k), 2.0**k * (1 + k % 3)] for k in range(2, 8)] * 2)[:9]
    centres[6:] = torch.tensor([[400.0, 20.0], [20.0, 400.0], [900.0, 900.0]])
    sizes = (centres[:, None] * torch.exp(0.02 * torch.randn(9, 50, 2, generator=generator))).flatten(0, 1)
    anchors = fit_anchors(sizes[torch.randperm(len(sizes), generator=generator)])
    found = [anchor for level in anchors for anchor in level]
    for width, height in centres.tolist():
        assert any(abs(math.log(w / width)) < 0.02 and abs(math.log(h / height)) < 0.02 for w, h in found)
    areas = [width * height for width, height in found]
    assert areas == sorted(areas)


def test_no_box_can_move_to_another_anchor_and_no_anchor_to_a_better_place():
    """Lloyd's conditions: a box is nearest to its anchor, and an anchor the mean of its boxes, in logarithms."""
    sizes = torch.exp(torch.randn(300, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)) * 40
    anchors = torch.tensor(fit_anchors(sizes), dtype=torch.float64).view(-1, 2).log()
    nearest = [min(range(9), key=lambda k: (point - anchors[k]).square().sum().item()) for point in sizes.log()]
    for k in range(9):
        mine = sizes.log()[[number for number, anchor in enumerate(nearest) if anchor == k]]
        torch.testing.assert_close(mine.mean(0), anchors[k], rtol=0, atol=0.02)  # anchors are rounded


def test_fewer_boxes_than_anchors_are_enough():
    anchors = fit_anchors(torch.tensor([[10.0, 20.0], [30.0, 30.0]]))
    assert {anchor for level in anchors for anchor in level} == {(10.0, 20.0), (30.0, 30.0)}


def test_no_boxes_are_refused():
    with pytest.raises(ConfigError, match="no boxes to fit anchors to"):
        fit_anchors(torch.zeros(0, 2))
