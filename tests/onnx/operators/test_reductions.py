"""How reductions say which axes they mean, in each opset."""

import numpy
import pytest
import torch
from onnx import helper

from tests.onnx.checks import FLOAT, INT64, build_model, check_against_runtime


@pytest.mark.parametrize("keepdims", [0, 1])
def test_axes_are_an_attribute_in_old_opsets_and_an_input_in_new_ones(keepdims):
    x = (torch.arange(24.0).reshape(2, 3, 4),)
    old = helper.make_node("ReduceMean", ["x"], ["y"], axes=[-1, 0], keepdims=keepdims)
    check_against_runtime(build_model([old], {"x": (FLOAT, [2, 3, 4])}, {"y": FLOAT}, opset=13), x)
    new = helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=keepdims)
    weights = {"axes": numpy.array([-1, 0])}
    check_against_runtime(build_model([new], {"x": (FLOAT, [2, 3, 4])}, {"y": FLOAT}, weights=weights, opset=18), x)


@pytest.mark.parametrize(("noop", "shape"), [(0, (1, 1)), (1, (2, 3))])
def test_no_axes_mean_all_of_them_or_none(noop, shape):
    node = helper.make_node("ReduceSum", ["x"], ["y"], noop_with_empty_axes=noop)
    model = build_model([node], {"x": (FLOAT, [2, 3])}, {"y": FLOAT})
    converted = check_against_runtime(model, (torch.randn(2, 3),))
    assert converted(torch.randn(2, 3)).shape == shape


def test_whole_numbers_stay_what_they_are():
    node = helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=0)
    model = build_model([node], {"x": (INT64, [2, 3])}, {"y": INT64}, weights={"axes": numpy.array([1])})
    check_against_runtime(model, (torch.tensor([[1, 2, 3], [2**40, 5, 6]]),))
