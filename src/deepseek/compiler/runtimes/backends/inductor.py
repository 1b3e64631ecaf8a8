"""torch's own compiler, given what it needs to be fast on a CPU: constants, layouts, prepacked weights, int8 patterns.

The model is captured as one graph and handed to inductor directly, with freezing: batch norms fold into convolutions,
weights become constants in oneDNN's blocked layout, int8 patterns become int8 kernels. No frame evaluation stays in the
way of a call, so there are no guards to check, no recompilation that could lose the settings (one after
`torch._dynamo.reset()` computes int8 graphs in FP32, seven times slower and without a word), and nothing to reset.

int8 comes from PT2E with the X86 quantizer: activations 8 bits, calibrated on sample inputs; weights 8 bits per
channel. Two things must be done around it that nobody does for users: activation modules are inlined, since one ReLU
object that is called twice, as in most residual networks, makes the quantizer fail; and inductor's settings, which
importing the quantizer changes for the whole process, are put back.

Measured for ResNet-50, one image, 2 threads: eager 66 ms, freezing 44, bf16 24, int8 18.6.
Source: PT2E as in torchao's documentation; freezing as in torch/_inductor/freezing.py.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from deepseek.compiler.runtimes.backends.eager import (
    in_channels_last,
    lacks_convolutions,
    output_dtypes,
    restore_dtypes,
    to_channels_last,
    with_dtype,
    with_layout,
)
from deepseek.compiler.runtimes.backends.interface import (
    Backend,
    BackendError,
    Built,
    Job,
    Missing,
    Variant,
    export,
    quiet,
)
from deepseek.compiler.runtimes.fallbacks import judge_inductor_int8
from deepseek.compiler.runtimes.selection_policy import Traits
from deepseek.core.extras import has_library, require

FROZEN = {"freezing": True}
CPP = {"freezing": True, "cpp_wrapper": True}
TUNED = {"freezing": True, "max_autotune": True, "max_autotune_gemm_backends": "ATEN,CPP"}


def find_missing() -> Missing | None:
    """A C++ compiler."""
    if any(shutil.which(name) for name in ("g++", "c++", "clang++")):
        return None
    return Missing("a C++ compiler", "install g++ or clang++")


def compile_float(options: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Callable[[Job], Built]:
    """Build the model in `dtype` with inductor under `options`."""

    def run(job: Job) -> Built:
        graph, inputs = job.once(("inductor", dtype), lambda: capture(job, dtype))
        call, _ = compile_graph(copy.deepcopy(graph), inputs, options)
        return Built(with_dtype(with_layout(call), dtype, job))

    return run


def compile_static_int8(options: Mapping[str, Any], *, glue: torch.dtype) -> Callable[[Job], Built]:
    """Build the model with int8 convolutions and matmuls, and what is between them in `glue`."""

    def run(job: Job) -> Built:
        return _compile_quantized(job, "static", options, glue)

    return run


def compile_dynamic_int8(options: Mapping[str, Any]) -> Callable[[Job], Built]:
    """Build the model with int8 linear layers whose inputs are quantized as they come."""

    def run(job: Job) -> Built:
        return _compile_quantized(job, "dynamic", options, torch.float32)

    return run


def capture(job: Job, dtype: torch.dtype) -> tuple[torch.fx.GraphModule, tuple[Tensor, ...]]:
    """Return the model in `dtype` as one graph with channels-last convolutions, and inputs to compile it with."""
    model = in_channels_last(job.copy_model().to(dtype))
    inputs = _cast_inputs(job.inputs, dtype)
    return export(model, inputs).module(check_guards=False), inputs


def compile_graph(
    graph: torch.fx.GraphModule, inputs: Sequence[Tensor], options: Mapping[str, Any]
) -> tuple[Callable[..., Sequence[Tensor]], dict[str, int]]:
    """`graph` compiled for the shapes of `inputs`, and inductor's counters of this compilation alone."""
    from torch._inductor.compile_fx import compile_fx

    inputs = [tensor.contiguous() if 0 in tensor.stride() else tensor for tensor in inputs]
    strides = [tensor.stride() for tensor in inputs]
    with inductor_settings(options), counting() as counters, torch.no_grad():
        compiled = cast("Callable[..., Any]", compile_fx(graph, list(inputs)))
        # The first call compiles what was left for later, with settings that must be the same.
        compiled(*inputs)

    def call(*tensors: Tensor) -> Sequence[Tensor]:
        answer = compiled(*map(_with_strides, tensors, strides))
        return (answer,) if isinstance(answer, Tensor) else answer

    return call, counters


def _with_strides(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return `tensor`, or a copy that lies in memory as compiled code asserts: a view of a caller may lie otherwise."""
    if tensor.stride() == strides:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


@contextmanager
def inductor_settings(options: Mapping[str, Any]) -> Iterator[None]:
    """Inductor's settings within the block; afterwards all are as they were."""
    import torch._inductor.config as settings

    with settings.patch(dict(options)), quiet():
        yield


@contextmanager
def counting() -> Iterator[dict[str, int]]:
    """Inductor's counters of what happens in the block; filled when it ends."""
    from torch._dynamo.utils import counters

    before = dict(counters["inductor"])
    during: dict[str, int] = {}
    yield during
    during.update({name: count - before.get(name, 0) for name, count in counters["inductor"].items()})


def quantize_graph(job: Job, mode: str) -> torch.fx.GraphModule:
    """Return the model as a graph with int8 patterns, calibrated on the job's samples when `mode` is static."""
    with quantizer_library() as (quantizing, x86):
        config = x86.get_default_x86_inductor_quantization_config(
            is_dynamic=mode == "dynamic", reduce_range=not torch.cpu._is_vnni_supported()
        )
        quantizer = x86.X86InductorQuantizer().set_global(config)
        model = in_channels_last(inline_activations_(job.copy_model()))
        graph = export(model, tuple(to_channels_last(tensor) for tensor in job.inputs)).module(check_guards=False)
        prepared = quantizing.prepare_pt2e(graph, quantizer)
        for inputs in job.calibration:
            prepared(*(to_channels_last(tensor) for tensor in inputs))
        converted: torch.fx.GraphModule = quantizing.convert_pt2e(prepared)
    return converted


@contextmanager
def quantizer_library() -> Iterator[tuple[Any, Any]]:
    """torchao's PT2E and its X86 quantizer, with inductor's settings put back: importing it changes one of them."""
    import torch._inductor.config as settings

    before = settings.pre_grad_custom_pass
    try:
        with quiet():
            quantizing = require("torchao.quantization.pt2e.quantize_pt2e", extra="compile")
            x86 = require("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer", extra="compile")
        yield quantizing, x86
    finally:
        settings.pre_grad_custom_pass = before


class Inlined(nn.Module):
    """An activation whose operator belongs to no module, so that each of its calls stands for itself in a graph."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self._run = activation.forward

    def forward(self, *inputs: Tensor) -> Tensor:
        y: Tensor = self._run(*inputs)
        return y


def inline_activations_(model: nn.Module) -> nn.Module:
    """Replace modules that have neither weights nor children in place by what they compute.

    The quantizer finds patterns by the module that an operator came from, and fails on one that was called twice.
    """
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if path and type(module).__module__ == nn.modules.activation.__name__ and not _has_weights(module):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, Inlined(module))
    return model


def count_quantized(graph: torch.fx.GraphModule) -> int:
    """Return the number of convolutions and matmuls of `graph` whose weights are int8."""
    heavy = {torch.ops.aten.conv2d.default, torch.ops.aten.conv1d.default, torch.ops.aten.linear.default}
    return sum(node.target in heavy and _is_dequantized(node.args[1]) for node in graph.graph.nodes)


def lacks_torchao(traits: Traits) -> str | None:
    """int8 needs the quantizer."""
    if not has_library("torchao"):
        return "int8 needs torchao: pip install 'deepseek-engine[compile]'"
    if traits.num_convolutions + traits.num_linears == 0:
        return "the model has no convolution and no linear layer to run in int8"
    return None


def lacks_torchao_or_linears(traits: Traits) -> str | None:
    """Dynamic int8 covers linear layers only."""
    if traits.num_convolutions > traits.num_linears:
        return "most of the model is convolutions, which dynamic int8 does not cover"
    return lacks_torchao(traits)


def lacks_matmuls(traits: Traits) -> str | None:
    """Tuning tries kernels of matmuls; convolutions have one each."""
    return (
        None
        if traits.num_linears > traits.num_convolutions
        else "tuning tries kernels of linear layers, of which there are few"
    )


def _compile_quantized(job: Job, mode: str, options: Mapping[str, Any], glue: torch.dtype) -> Built:
    graph = copy.deepcopy(job.once(("pt2e", mode), lambda: quantize_graph(job, mode)))
    num_heavy = count_quantized(graph)
    if num_heavy == 0:
        raise BackendError("the quantizer found no pattern that it knows in this model")
    inputs = tuple(to_channels_last(tensor) for tensor in job.inputs)
    with quantizer_library() as (_, x86):
        passes = {"pre_grad_custom_pass": x86.quant_lift_up} if hasattr(x86, "quant_lift_up") else {}
        with torch.autocast("cpu", torch.bfloat16, enabled=glue == torch.bfloat16):
            if glue == torch.bfloat16:
                graph = torch.export.export(graph, inputs, strict=False).module(check_guards=False)
            call, counters = compile_graph(graph, inputs, {**options, **passes})
    kinds = output_dtypes(job)
    run = with_layout(call)
    return Built(
        lambda *tensors: restore_dtypes(run(*tensors), kinds),
        findings=tuple(judge_inductor_int8(counters, num_heavy)),
        notes=(f"{num_heavy} convolutions and matmuls in int8", f"calibrated on {len(job.calibration)} samples"),
    )


def _cast_inputs(inputs: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(to_channels_last(tensor.to(dtype) if tensor.is_floating_point() else tensor) for tensor in inputs)


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def _is_dequantized(node: Any) -> bool:
    return isinstance(node, torch.fx.Node) and "dequantize" in str(node.target)


BACKEND = Backend(
    name="inductor",
    summary="torch's compiler with frozen, prepacked weights",
    find_missing=find_missing,
    variants=(
        Variant("freezing", "fp32", "frozen weights", compile_float(FROZEN), 33),
        Variant("cpp", "fp32", "called from C++", compile_float(CPP), 44, refines="freezing"),
        Variant("tuned", "fp32", "kernels of matmuls tried out", compile_float(TUNED), 50, lacks_matmuls, "freezing"),
        Variant("freezing", "bf16", "frozen bf16 weights", compile_float(FROZEN, torch.bfloat16), 30),
        Variant("cpp", "bf16", "called from C++", compile_float(CPP, torch.bfloat16), 40, refines="freezing"),
        Variant(
            "tuned",
            "bf16",
            "kernels of matmuls tried out",
            compile_float(TUNED, torch.bfloat16),
            49,
            lacks_matmuls,
            "freezing",
        ),
        Variant(
            "static_bf16",
            "int8",
            "int8 convolutions and matmuls, bf16 between them",
            compile_static_int8(FROZEN, glue=torch.bfloat16),
            32,
            lacks_torchao,
        ),
        Variant(
            "static",
            "int8",
            "int8 convolutions and matmuls, FP32 between them",
            compile_static_int8(FROZEN, glue=torch.float32),
            34,
            lacks_torchao,
            "static_bf16",
        ),
        Variant(
            "dynamic",
            "int8",
            "int8 linear layers, inputs quantized as they come",
            compile_dynamic_int8(FROZEN),
            31,
            lacks_torchao_or_linears,
        ),
        Variant(
            "static_cpp",
            "int8",
            "int8 called from C++",
            compile_static_int8(CPP, glue=torch.float32),
            41,
            lacks_convolutions,
            "static",
        ),
    ),
    unsupported={"fp16": "inductor has no fp16 kernels for a CPU that are faster than FP32"},
)
