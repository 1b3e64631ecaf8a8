"""Resize against ONNX Runtime."""

import numpy
import pytest
import torch
from onnx import helper

from tests.onnx.checks import FLOAT, build_model, check_against_runtime


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("mapping", ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"])
@pytest.mark.parametrize("sizes", [[1, 2, 9, 4], [1, 2, 3, 13]])
def test_resizing_agrees_with_onnx_runtime(mode, mapping, sizes):
    node = helper.make_node(
        "Resize", ["x", "", "", "sizes"], ["y"], mode=mode, coordinate_transformation_mode=mapping, nearest_mode="floor"
    )
    model = build_model([node], {"x": (FLOAT, [1, 2, 5, 6])}, {"y": FLOAT}, weights={"sizes": numpy.array(sizes)})
    check_against_runtime(model, (torch.randn(1, 2, 5, 6),))
