"""Silent fallbacks, found: what a runtime did instead of what it was asked for, and said nothing about.

This is where users lose most: an int8 pattern that does not match computes in FP32, a bf16 hint is ignored on a
processor without bf16, a provider that cannot start hands everything to the next one, a library falls back to reference
code. Each check here reads what the runtime itself recorded (counters, executed graphs, kernel names) and returns
findings. A serious finding means that the candidate is not what it says, and it is refused. Graph breaks and recompile
limits need no check: every compiled candidate is one exported graph for fixed shapes, and one that is not is an error.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

# Operators whose speed is the model's speed, as the runtimes call them.
HEAVY_ONNX = ("Conv", "MatMul", "Gemm", "FusedConv", "FusedMatMul", "FusedGemm")
HEAVY_ONNX_INT8 = (
    "QLinearConv",
    "ConvInteger",
    "QGemm",
    "MatMulIntegerToFloat",
    "QLinearMatMul",
    "DynamicQuantizeMatMul",
    "MatMulInteger",
)
HEAVY_OPENVINO = ("Convolution", "FullyConnected", "MatMul", "GroupConvolution", "Deconvolution")
_OPENVINO_PRECISIONS = {"fp32": {"f32"}, "bf16": {"bf16"}, "fp16": {"f16"}, "int8": {"u8", "i8"}}
LEAST_SHARE = 0.5
"""Of the heavy operators, how many must run in the precision asked for."""


@dataclass(frozen=True)
class Fallback:
    """Something that a runtime did instead of what it was asked for."""

    what: str
    is_serious: bool = False

    def __str__(self) -> str:
        return self.what


def judge_share(num_right: int, num_heavy: int, precision: str, how: str) -> list[Fallback]:
    """Return the findings for `num_right` of `num_heavy` heavy operators that run in `precision`.

    >>> judge_share(0, 3, "int8", "as the executed graph says")[0].is_serious
    True
    >>> judge_share(3, 3, "int8", "as the executed graph says")
    []
    """
    if num_right >= num_heavy:
        return []
    what = f"{num_heavy - num_right} of {num_heavy} convolutions and matmuls do not run in {precision}, {how}"
    return [Fallback(what, is_serious=num_right < LEAST_SHARE * num_heavy)]


def judge_inductor_int8(counters: Mapping[str, int], num_heavy: int) -> list[Fallback]:
    """Whether the int8 patterns of a graph with `num_heavy` quantized layers became int8 kernels.

    `counters` are those of inductor, for this compilation alone.
    """
    packed = ("qconv_weight_prepack_matcher_count", "qlinear_weight_prepack_matcher_count")
    return judge_share(
        sum(counters.get(name, 0) for name in packed), num_heavy, "int8", "since their fusion did not fire"
    )


def judge_onnx_operators(operators: Iterable[str], precision: str) -> list[Fallback]:
    """Return the findings on the operators of the graph that ONNX Runtime executes."""
    if precision != "int8":
        return []
    counts = Counter(operators)
    num_int8 = sum(counts[name] for name in HEAVY_ONNX_INT8)
    num_heavy = num_int8 + sum(counts[name] for name in HEAVY_ONNX)
    return judge_share(num_int8, num_heavy, precision, "as the optimized graph says")


def judge_providers(registered: Sequence[str], asked: str) -> list[Fallback]:
    """Return a finding when the provider that ONNX Runtime prefers is not the one asked for, which it drops with a log
    line.

    >>> str(judge_providers(["CPUExecutionProvider"], "CUDAExecutionProvider")[0])
    'CUDAExecutionProvider was dropped; the session runs on CPUExecutionProvider'
    """
    if registered and registered[0] == asked:
        return []
    elsewhere = registered[0] if registered else "nothing"
    return [Fallback(f"{asked} was dropped; the session runs on {elsewhere}", is_serious=True)]


def judge_openvino_layers(layers: Iterable[tuple[str, str]], precision: str) -> list[Fallback]:
    """Return the findings on the executed layers of OpenVINO, each a (type, precision it ran in)."""
    heavy = [runtime for kind, runtime in layers if kind in HEAVY_OPENVINO]
    num_right = sum(runtime.lower() in _OPENVINO_PRECISIONS[precision] for runtime in heavy)
    return judge_share(num_right, len(heavy), precision, "as the executed graph says")


def read_onednn_kernels(log: str) -> Counter[str]:
    """Kernels in what oneDNN prints when it is verbose: `convolution brgconv:avx512_core_bf16` -> how often.

    >>> read_onednn_kernels("onednn_verbose,v1,primitive,exec,cpu,matmul,gemm:jit:f32,undef,...,0.1")
    Counter({'matmul gemm:jit:f32': 1})
    """
    lines = re.findall(r"^onednn_verbose,(?:v\d+,)?(?:primitive,)?exec,cpu,([^,]+),([^,]+),", log, flags=re.MULTILINE)
    return Counter(f"{primitive} {kernel}" for primitive, kernel in lines)


def judge_onednn_kernels(kernels: Mapping[str, int]) -> list[Fallback]:
    """Return the findings on kernels that are oneDNN's reference code, which exists to be right and not to be fast."""
    slow = {name: count for name, count in kernels.items() if " ref" in name or "simple" in name}
    heavy = {name: count for name, count in slow.items() if name.startswith(("convolution", "matmul", "inner_product"))}
    return [
        Fallback(f"oneDNN runs {name} {count} times, which is its slow reference code") for name, count in heavy.items()
    ]
