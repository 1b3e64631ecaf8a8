"""Inputs to try a model with: they fit, and they are valid for any vocabulary."""

import numpy
import pytest
import torch
from onnx import helper

from deepseek.core.errors import ConfigError
from deepseek.onnx.files import UnsupportedOperatorError
from deepseek.onnx.importing import import_onnx
from deepseek.onnx.sample_inputs import build_inputs, describe_inputs
from tests.onnx.checks import FLOAT, INT64, build_model, check_against_runtime, relu_model


def test_sample_inputs_that_do_not_fit_are_explained():
    with pytest.raises(ConfigError, match=r"takes 1 inputs \(x\) and 2 were given"):
        import_onnx(relu_model(), sample_inputs=(torch.ones(2), torch.ones(2)))
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    model = build_model(nodes, {"x": (FLOAT, ["n"])}, {"y": FLOAT}, weights={"w": numpy.ones(3, "f")})
    with pytest.raises(UnsupportedOperatorError, match="Add of opset 17"):
        import_onnx(model, sample_inputs=(torch.ones(5),))
    specs = describe_inputs(model)
    assert build_inputs(specs, {"x": [3]})[0].shape == (3,)
    with pytest.raises(ConfigError, match=r"did you mean 'x'|known: x"):
        build_inputs(specs, {"xx": [3]})
    fixed = describe_inputs(relu_model())
    assert build_inputs(fixed, batch_size=2)[0].shape == (2,)
    with pytest.raises(ConfigError, match="has 2 rows, always, and batch_size=3"):
        build_inputs(fixed, batch_size=3)
    with pytest.raises(ConfigError, match=r"shape \(any\) and \(3, 4\) was given"):
        build_inputs(specs, {"x": [3, 4]})


@pytest.mark.parametrize("name", ["segment_ids", "token_type_ids", "attention_mask", "characters"])
def test_integers_are_rows_of_any_table(name):
    table = numpy.arange(8, dtype="f").reshape(2, 4)
    node = helper.make_node("Gather", ["table", name], ["y"])
    model = build_model([node], {name: (INT64, ["n", "length"])}, {"y": FLOAT}, weights={"table": table})
    (indices,) = build_inputs(describe_inputs(model), batch_size=4, sequence_length=50)
    assert set(indices.unique().tolist()) <= {0, 1}
    check_against_runtime(model, (indices,))
