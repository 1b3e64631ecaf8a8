"""Files whose weights ask for lengths that their inputs leave open are imported, and what was found runs."""

import numpy
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper

from deepseek.models.model_sources import LoadConfig, open_source
from deepseek.onnx.files import UnsupportedOperatorError
from tests.onnx.checks import FLOAT, INT64, build_model


def ones(*shape):
    return numpy.ones(shape, "f")


def numbers(*values):
    return numpy.array(values, "i8")


PAIRS = {"TopK": INT64, "Split": FLOAT}  # operators of two outputs, and the type of the second
# name -> inputs, weights, nodes as (operator, inputs, attributes)
FILES = {
    "MatMul": ({"x": ["n", "k"]}, {"w": ones(33, 2)}, [("MatMul", ["x", "w"], {})]),
    "MatMul of two": ({"x": ["n", "k"], "z": ["k", "m"]}, {}, [("MatMul", ["x", "z"], {})]),
    "MatMul of two without names": ({"x": [None, None], "z": [None, None]}, {}, [("MatMul", ["x", "z"], {})]),
    "Gemm": ({"x": ["n", "k"]}, {"w": ones(5, 33)}, [("Gemm", ["x", "w"], {"transB": 1})]),
    "Gemm of a column": ({"x": ["k", "n"]}, {"w": ones(5, 33)}, [("Gemm", ["x", "w"], {"transA": 1, "transB": 1})]),
    "Conv": ({"x": ["n", "c", "h", "w"]}, {"k": ones(4, 3, 3, 3)}, [("Conv", ["x", "k"], {})]),
    "Conv in groups": ({"x": ["n", "c", 9]}, {"k": ones(4, 3, 3)}, [("Conv", ["x", "k"], {"group": 2})]),
    "Conv on a long signal": ({"x": ["n", 1, "t"]}, {"k": ones(4, 1, 400)}, [("Conv", ["x", "k"], {})]),
    "TopK": ({"x": ["n", "k"]}, {"c": numbers(50)}, [("TopK", ["x", "c"], {})]),
    "TopK of rows": ({"x": ["n", "k"]}, {"c": numbers(5)}, [("TopK", ["x", "c"], {"axis": 0})]),
    "LayerNormalization": ({"x": ["n", "k"]}, {"w": ones(33)}, [("LayerNormalization", ["x", "w"], {})]),
    "Einsum": ({"x": ["n", "k"]}, {"w": ones(33, 2)}, [("Einsum", ["x", "w"], {"equation": "nk,kj->nj"})]),
    "Reshape": ({"x": ["n", "k"]}, {"s": numbers(-1, 7, 5)}, [("Reshape", ["x", "s"], {})]),
    "Add": ({"x": ["n", "k"]}, {"w": ones(33)}, [("Add", ["x", "w"], {})]),
    "Split": ({"x": ["n", "k"]}, {"s": numbers(7, 5)}, [("Split", ["x", "s"], {"axis": 1})]),
    "Gather": ({"x": ["n", "k"]}, {"i": numbers(20, 3)}, [("Gather", ["x", "i"], {"axis": 1})]),
    "BatchNormalization": ({"x": ["n", "c"]}, {"s": ones(6)}, [("BatchNormalization", ["x", "s", "s", "s", "s"], {})]),
    "GroupNormalization": (
        {"x": ["n", "c", "t"]},
        {"s": ones(6)},
        [("GroupNormalization", ["x", "s", "s"], {"num_groups": 3})],
    ),
    "two demands": (
        {"x": ["n", "k"]},
        {"w": ones(33, 7), "c": numbers(5)},
        [("MatMul", ["x", "w"], {}), ("TopK", ["o0", "c"], {"axis": 0})],
    ),
    "an image for a flat layer": (
        {"x": ["n", 1, "h", "w"]},
        {"k": ones(3, 1, 16, 16), "m": ones(3 * 14 * 14, 2)},
        [("Conv", ["x", "k"], {"strides": [16, 16]}), ("Flatten", ["o0"], {}), ("MatMul", ["o1", "m"], {})],
    ),
}


def write(path, inputs, weights, operators):
    made = [
        helper.make_node(operator, names, [f"o{index}", "other"][: 1 + (operator in PAIRS)], **attributes)
        for index, (operator, names, attributes) in enumerate(operators)
    ]
    described = {name: (FLOAT, shape) for name, shape in inputs.items()}
    outputs = {f"o{len(made) - 1}": FLOAT} | ({"other": PAIRS[operators[-1][0]]} if operators[-1][0] in PAIRS else {})
    onnx.save(build_model(made, described, outputs, weights=weights, opset=21), path)
    return path


@pytest.mark.parametrize("name", FILES)
def test_lengths_that_the_operators_ask_for_are_found(name, tmp_path):
    path, config = write(tmp_path / "m.onnx", *FILES[name]), LoadConfig()
    opened = open_source(path, config)
    inputs = opened.draw_inputs(config)
    with torch.no_grad():
        answer = opened.model(*inputs)
    session = onnxruntime.InferenceSession(str(path))
    feed = {port.name: tensor.numpy() for port, tensor in zip(session.get_inputs(), inputs, strict=True)}
    theirs = torch.from_numpy(session.run(None, feed)[0])
    torch.testing.assert_close(answer[0] if isinstance(answer, tuple) else answer, theirs, rtol=1e-3, atol=1e-3)


def test_lengths_that_are_not_found_are_asked_for_by_shapes(tmp_path):
    weights = {"w": ones(33, 7), "v": ones(34, 7)}
    nodes = [("MatMul", ["x", "w"], {}), ("MatMul", ["x", "v"], {})]
    path = write(tmp_path / "m.onnx", {"x": ["n", "k"]}, weights, nodes)
    with pytest.raises(UnsupportedOperatorError, match=r"MatMul of opset 21.*open lengths \(n, k\).*by shapes"):
        open_source(path, LoadConfig())


def test_lengths_that_a_user_gave_are_kept(tmp_path):
    path = write(tmp_path / "m.onnx", *FILES["MatMul"])
    config = LoadConfig(shapes={"x": [3, 33]})
    assert open_source(path, config).draw_inputs(config)[0].shape == (3, 33)
    with pytest.raises(UnsupportedOperatorError, match="MatMul of opset 21"):
        open_source(path, LoadConfig(shapes={"x": [3, 32]}))


def test_an_operator_that_is_not_followed_starts_no_search(tmp_path):
    path = write(tmp_path / "m.onnx", {"x": ["n", "k"]}, {}, [("Det", ["x"], {})])
    with pytest.raises(UnsupportedOperatorError, match="not in the table of operators") as caught:
        open_source(path, LoadConfig())
    assert "open lengths" not in str(caught.value)
