"""What the tests of this room share: small graphs, and ONNX Runtime's answers to them."""

import contextlib
import logging
import warnings

import numpy
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from deepseek.onnx.importing import import_onnx

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def build_model(nodes, inputs, outputs, *, weights=None, opset=17, domain=""):
    weights = weights or {}
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
        [numpy_helper.from_array(numpy.asarray(value), name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def run_reference(model, inputs):
    content = model if isinstance(model, bytes | str) else model.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    feed = {each.name: value.numpy() for each, value in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(each) for each in session.run(None, feed)]


def check_against_runtime(model, inputs, **tolerance):
    converted = import_onnx(model, sample_inputs=inputs)
    with torch.no_grad():
        answer = converted(*inputs)
    answers = answer if isinstance(answer, tuple) else (answer,)
    for ours, theirs in zip(answers, run_reference(model, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, **(tolerance or {"rtol": 1e-4, "atol": 1e-5}))
    return converted


@contextlib.contextmanager
def quiet():
    """Exporters and quantizers talk of what is theirs to mend."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def export(model, inputs, path, *, opset, **options):
    with quiet():
        torch.onnx.export(
            model.eval(), inputs, str(path), dynamo=False, opset_version=opset, input_names=["x"], **options
        )
    return path


def relu_model(**options):
    return build_model([helper.make_node("Relu", ["x"], ["y"])], {"x": (FLOAT, [2])}, {"y": FLOAT}, **options)
