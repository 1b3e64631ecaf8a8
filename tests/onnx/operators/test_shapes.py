"""Operators on shapes where lengths are only known when the model runs."""

import numpy
import pytest
import torch
from onnx import helper

from tests.onnx.checks import FLOAT, INT64, build_model, check_against_runtime


def test_a_slice_up_to_a_length_of_another_input_follows_that_input():
    nodes = [
        helper.make_node("Shape", ["other"], ["length"]),
        helper.make_node("Slice", ["x", "zero", "length"], ["y"]),
    ]
    inputs = {"x": (FLOAT, ["n"]), "other": (FLOAT, ["m"])}
    model = build_model(nodes, inputs, {"y": FLOAT}, weights={"zero": numpy.array([0])})
    converted = check_against_runtime(model, (torch.arange(6.0), torch.zeros(4)))
    assert converted(torch.arange(9.0), torch.zeros(2)).tolist() == [0, 1]


def test_a_range_as_long_as_an_input_grows_with_it():
    nodes = [
        helper.make_node("Size", ["x"], ["size"]),
        helper.make_node("Range", ["zero", "size", "one"], ["y"]),
    ]
    weights = {"zero": numpy.int64(0), "one": numpy.int64(1)}
    model = build_model(nodes, {"x": (FLOAT, ["n", 2])}, {"y": INT64}, weights=weights)
    converted = check_against_runtime(model, (torch.zeros(3, 2),))
    assert converted(torch.zeros(5, 2)).tolist() == list(range(10))


@pytest.mark.parametrize("length", [5, 7])
def test_a_tensor_is_split_into_parts_that_need_not_be_equal(length):
    node = helper.make_node("Split", ["x"], ["a", "b", "c"], num_outputs=3)
    model = build_model([node], {"x": (FLOAT, ["n"])}, {"a": FLOAT, "b": FLOAT, "c": FLOAT}, opset=18)
    check_against_runtime(model, (torch.arange(float(length)),))


def test_a_reshape_to_zero_keeps_the_length_that_stands_there():
    node = helper.make_node("Reshape", ["x", "shape"], ["y"])
    model = build_model([node], {"x": (FLOAT, ["n", 4])}, {"y": FLOAT}, weights={"shape": numpy.array([0, 2, -1])})
    converted = check_against_runtime(model, (torch.randn(3, 4),))
    assert converted(torch.randn(6, 4)).shape == (6, 2, 2)
