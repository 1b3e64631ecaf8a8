"""Quantized files against ONNX Runtime."""

import pytest
import torch
from torch import nn

from deepseek.onnx.files import read_onnx
from deepseek.onnx.importing import import_onnx
from tests.onnx.checks import export, quiet, run_reference
from tests.processors import needs_avx512


@needs_avx512
@pytest.mark.parametrize("kind", ["QDQ", "QOperator", "dynamic"])
def test_quantized_files_agree_with_onnx_runtime(kind, tmp_path):
    """A small network quantized by ONNX Runtime's own tool, run as floats on the same steps."""
    from onnxruntime import quantization

    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten()]
    linear = [nn.Linear(4 * 16, 16, bias=False), nn.ReLU(), nn.Linear(16, 5, bias=False)]
    model = nn.Sequential(*layers, *(linear if kind != "QOperator" else []))
    inputs = (torch.randn(4, 3, 8, 8),)
    export(model, inputs, tmp_path / "float.onnx", opset=13)
    with quiet():
        if kind == "dynamic":
            quantization.quantize_dynamic(
                tmp_path / "float.onnx", tmp_path / "int8.onnx", op_types_to_quantize=["MatMul"]
            )
        else:
            form = getattr(quantization.QuantFormat, kind)
            quantization.quantize_static(
                tmp_path / "float.onnx", tmp_path / "int8.onnx", Samples(inputs), quant_format=form
            )
    proto = read_onnx(tmp_path / "int8.onnx")
    with torch.no_grad():
        ours, exact = import_onnx(proto, sample_inputs=inputs)(*inputs), model(*inputs)
    (theirs,) = run_reference(str(tmp_path / "int8.onnx"), inputs)
    step = (theirs.max() - theirs.min()) / 255
    assert float((ours - theirs).abs().max()) <= 2.5 * float(step)
    assert float((ours - exact).abs().max()) > 0  # it is the quantized one


class Samples:
    """What ONNX Runtime's quantizer calibrates with."""

    def __init__(self, inputs):
        self.left = [{"x": inputs[0].numpy()}]

    def get_next(self):
        return self.left.pop() if self.left else None
