"""Operators element by element, against ONNX Runtime."""

import torch
from onnx import helper

from deepseek.onnx.importing import import_onnx
from tests.onnx.checks import FLOAT, build_model, check_against_runtime


def test_softmax_before_opset_13_takes_all_that_follows_as_one_row():
    inputs = (torch.randn(2, 3, 4),)
    for opset in (11, 13):
        model = build_model(
            [helper.make_node("Softmax", ["x"], ["y"], axis=1)], {"x": (FLOAT, [2, 3, 4])}, {"y": FLOAT}, opset=opset
        )
        check_against_runtime(model, inputs)
    old = build_model([helper.make_node("Softmax", ["x"], ["y"])], {"x": (FLOAT, [2, 3, 4])}, {"y": FLOAT}, opset=11)
    torch.testing.assert_close(import_onnx(old)(*inputs).sum((1, 2)), torch.ones(2))
