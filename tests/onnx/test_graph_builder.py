"""Shapes that ONNX computes with tensors are followed as plain numbers."""

import numpy
import torch
from onnx import helper, numpy_helper

from tests.onnx.checks import FLOAT, build_model, check_against_runtime


def test_lengths_are_followed_as_numbers_through_a_flatten_written_by_an_exporter():
    """Shape, Gather, Unsqueeze, Concat, Reshape: one graph, which also takes other lengths."""
    model = build_model(
        [
            helper.make_node("Shape", ["x"], ["shape"]),
            helper.make_node("Gather", ["shape", "zero"], ["batch"]),
            helper.make_node("Unsqueeze", ["batch", "axes"], ["row"]),
            helper.make_node("Concat", ["row", "rest"], ["target"], axis=0),
            helper.make_node("Reshape", ["x", "target"], ["y"]),
        ],
        {"x": (FLOAT, ["n", 3, 4])},
        {"y": FLOAT},
        weights={"zero": numpy.int64(0), "axes": numpy.array([0]), "rest": numpy.array([-1])},
    )
    converted = check_against_runtime(model, (torch.randn(2, 3, 4),))
    assert converted(torch.randn(5, 3, 4)).shape == (5, 12)
    program = torch.export.export(
        converted, (torch.randn(2, 3, 4),), dynamic_shapes=({0: torch.export.Dim("n", min=2, max=64)},)
    )
    assert program.module()(torch.randn(7, 3, 4)).shape == (7, 12)


def test_expanding_to_a_computed_shape_needs_no_values():
    """ConstantOfShape, Equal to -1, Where, Expand: how exporters write `expand(-1, n)`."""
    model = build_model(
        [
            helper.make_node("Shape", ["x"], ["length"]),
            helper.make_node("Concat", ["two", "length"], ["wanted"], axis=0),
            helper.make_node("Shape", ["wanted"], ["rank"]),
            helper.make_node("ConstantOfShape", ["rank"], ["ones"], value=numpy_helper.from_array(numpy.array([1]))),
            helper.make_node("Equal", ["wanted", "minus"], ["is_open"]),
            helper.make_node("Where", ["is_open", "ones", "wanted"], ["target"]),
            helper.make_node("Expand", ["x", "target"], ["y"]),
        ],
        {"x": (FLOAT, ["n"])},
        {"y": FLOAT},
        weights={"two": numpy.array([2]), "minus": numpy.array([-1])},
    )
    converted = check_against_runtime(model, (torch.randn(6),))
    assert converted(torch.randn(3)).shape == (2, 3)
