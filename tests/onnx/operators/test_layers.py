"""Convolutions and pooling pad as ONNX says."""

import numpy
import pytest
import torch
from onnx import helper
from torch import nn

from deepseek.onnx.files import UnsupportedOperatorError
from deepseek.onnx.importing import import_onnx
from tests.onnx.checks import FLOAT, INT64, build_model, check_against_runtime


@pytest.mark.parametrize(
    ("attributes", "shape"),
    [
        ({"pads": [1, 2, 0, 1], "kernel_shape": [3, 3]}, (2, 3, 8, 9)),
        ({"auto_pad": "SAME_UPPER", "strides": [2, 2], "kernel_shape": [3, 3]}, (1, 3, 7, 8)),
        ({"auto_pad": "SAME_LOWER", "strides": [3, 2], "kernel_shape": [3, 3]}, (1, 3, 7, 8)),
        ({"dilations": [2, 1], "kernel_shape": [3, 3]}, (1, 3, 9, 9)),
        ({"group": 3, "kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, (2, 3, 5, 5)),
    ],
)
def test_convolutions_pad_as_onnx_says(attributes, shape):
    generator = numpy.random.default_rng(0)
    weight = generator.standard_normal((6, 3 // attributes.get("group", 1), 3, 3)).astype("f")
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], **attributes)
    weights = {"w": weight, "b": generator.standard_normal(6).astype("f")}
    model = build_model([node], {"x": (FLOAT, shape)}, {"y": FLOAT}, weights=weights)
    converted = check_against_runtime(model, (torch.randn(shape),))
    assert [type(each) for each in converted.children()] == [nn.Conv2d]


@pytest.mark.parametrize("count_include_pad", [0, 1])
@pytest.mark.parametrize("pads", [[0, 1, 1, 0], [1, 1, 1, 1], [2, 2, 2, 2]])
def test_average_pooling_counts_padding_as_onnx_says(count_include_pad, pads):
    node = helper.make_node(
        "AveragePool", ["x"], ["y"], kernel_shape=[3, 3], pads=pads, count_include_pad=count_include_pad
    )
    model = build_model([node], {"x": (FLOAT, [1, 2, 6, 7])}, {"y": FLOAT})
    check_against_runtime(model, (torch.randn(1, 2, 6, 7),))


def test_a_use_that_is_not_followed_is_refused_and_never_nearly_right():
    node = helper.make_node("MaxPool", ["x"], ["y", "indices"], kernel_shape=[2, 2])
    model = build_model([node], {"x": (FLOAT, [1, 1, 4, 4])}, {"y": FLOAT, "indices": INT64})
    with pytest.raises(UnsupportedOperatorError, match=r"MaxPool of opset 17 .*indices of a pooling"):
        import_onnx(model)
