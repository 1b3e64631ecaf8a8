"""Silent fallbacks: what the runtimes recorded, judged. The runtimes themselves are in test_backends.py."""

from __future__ import annotations

import pytest

from deepseek.compiler.runtimes.fallbacks import (
    judge_inductor_int8,
    judge_onednn_kernels,
    judge_onnx_operators,
    judge_openvino_layers,
    judge_providers,
    judge_share,
    read_onednn_kernels,
)

VERBOSE = """onednn_verbose,v1,info,oneDNN v3.12.0
onednn_verbose,v1,primitive,info,template:operation,engine,primitive,implementation
onednn_verbose,v1,primitive,exec,cpu,convolution,brgconv:avx512_core_bf16,forward_inference,src:bf16,,,mb1,0.4
onednn_verbose,v1,primitive,exec,cpu,convolution,brgconv:avx512_core_bf16,forward_inference,src:bf16,,,mb1,0.3
onednn_verbose,v1,primitive,exec,cpu,matmul,ref:any,undef,src:f16,,,2x2:2x2,9.9
onednn_verbose,v1,primitive,exec,cpu,reorder,ref:any,undef,src:f32,,,2x2,0.1
"""


@pytest.mark.parametrize(("num_right", "num_findings", "is_serious"), [(4, 0, False), (3, 1, False), (1, 1, True)])
def test_a_share_is_serious_when_most_runs_otherwise(num_right, num_findings, is_serious):
    findings = judge_share(num_right, 4, "int8", "as said")
    assert len(findings) == num_findings
    assert any(each.is_serious for each in findings) == is_serious


def test_int8_patterns_that_did_not_fire_are_serious():
    fired = {"qconv_weight_prepack_matcher_count": 53, "qlinear_weight_prepack_matcher_count": 1}
    assert judge_inductor_int8(fired, 54) == []
    (finding,) = judge_inductor_int8({}, 54)
    assert finding.is_serious and "54 of 54" in str(finding)


def test_openvino_layers_in_another_precision_are_found():
    layers = [("Convolution", "f32"), ("Convolution", "BF16"), ("Reorder", "f32"), ("FullyConnected", "f32")]
    (finding,) = judge_openvino_layers(layers, "bf16")
    assert finding.is_serious and "2 of 3" in str(finding)
    assert judge_openvino_layers([("Convolution", "u8"), ("MatMul", "i8")], "int8") == []


def test_onnx_products_left_in_float_are_found_in_int8_only():
    assert judge_onnx_operators(["QLinearConv", "Relu"], "int8") == []
    (finding,) = judge_onnx_operators(["QLinearConv", "Conv", "FusedConv"], "int8")
    assert finding.is_serious
    assert judge_onnx_operators(["Conv", "FusedConv"], "fp32") == []


def test_a_provider_that_was_dropped_is_found():
    assert judge_providers(["CUDAExecutionProvider", "CPUExecutionProvider"], "CUDAExecutionProvider") == []
    assert judge_providers(["CPUExecutionProvider"], "CUDAExecutionProvider")[0].is_serious


def test_kernels_of_onednn_are_read_from_what_it_prints():
    kernels = read_onednn_kernels(VERBOSE)
    assert kernels["convolution brgconv:avx512_core_bf16"] == 2
    (finding,) = judge_onednn_kernels(kernels)  # a reorder by reference code is no product, and harmless
    assert "matmul ref:any 1 times" in str(finding)
