"""GPUs and other accelerators: what each needs to be here, and the model on it when it is.

An accelerator is entered like any other backend: absent, it says exactly what is missing, and a selection lists that as
the reason; present, the model is copied to it, inputs go there and answers come back to where the samples were. `cuda`
and `rocm` also record a graph of kernels, with inductor's or as they are (`cuda_graphs.py`), which takes launching them
off the processor.

Nothing of this has run on the machine this was written on, which has no accelerator; what could be tested without one
(what is missing, where tensors go) is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deepseek.compiler.runtimes.backends.eager import in_channels_last, output_dtypes, restore_dtypes
from deepseek.compiler.runtimes.backends.inductor import compile_graph
from deepseek.compiler.runtimes.backends.interface import Backend, Built, Job, Missing, Variant, export
from deepseek.compiler.runtimes.cuda_graphs import GraphedFunction, Record, record_on_gpu
from deepseek.core.extras import has_library, require

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def find_missing_cuda() -> Missing | None:
    """An NVIDIA GPU and torch built for it."""
    if torch.version.cuda is None:
        return Missing(
            "a CUDA build of torch", f"this is torch {torch.__version__}; install the build for your CUDA version"
        )
    return None if torch.cuda.is_available() else Missing("an NVIDIA GPU and its driver", "torch sees none here")


def find_missing_rocm() -> Missing | None:
    """An AMD GPU and torch built for it."""
    if torch.version.hip is None:
        return Missing("a ROCm build of torch", f"this is torch {torch.__version__}; install the build for ROCm")
    return None if torch.cuda.is_available() else Missing("an AMD GPU and its driver", "torch sees none here")


def find_missing_tensorrt() -> Missing | None:
    """TensorRT's compiler for torch, and what it runs on."""
    missing = find_missing_cuda()
    if missing is not None:
        return missing
    return None if has_library("torch_tensorrt") else Missing("torch_tensorrt", "pip install torch-tensorrt")


def find_missing_gaudi() -> Missing | None:
    """Intel Gaudi's bridge to torch."""
    if not has_library("habana_frameworks"):
        return Missing("habana_frameworks.torch", "install Intel Gaudi's software on a machine with a Gaudi")
    require("habana_frameworks.torch.core", extra="compile")
    is_there = hasattr(torch, "hpu") and torch.hpu.is_available()
    return None if is_there else Missing("a Gaudi accelerator and its driver", "torch.hpu sees none here")


def find_missing_ascend() -> Missing | None:
    """Huawei Ascend's bridge to torch."""
    if not has_library("torch_npu"):
        return Missing("torch_npu and CANN", "install both on a machine with an Ascend")
    require("torch_npu", extra="compile")
    is_there = hasattr(torch, "npu") and torch.npu.is_available()
    return None if is_there else Missing("an Ascend NPU and its driver", "torch.npu sees none here")


def run_eager(device: str, precision: str) -> Callable[[Job], Built]:
    """Build the model on `device` in `precision`, one operator after the other."""

    def run(job: Job) -> Built:
        model = in_channels_last(job.copy_model().to(device=device, dtype=_DTYPES[precision]))
        return Built(on_device(model, device, _DTYPES[precision], job))

    return run


def run_compiled(device: str, precision: str) -> Callable[[Job], Built]:
    """Build the model on `device` with inductor, its kernels captured as one CUDA graph."""

    def run(job: Job) -> Built:
        dtype = _DTYPES[precision]
        model = in_channels_last(job.copy_model().to(device=device, dtype=dtype))
        inputs = tuple(place(tensor, device, dtype) for tensor in job.inputs)
        graph = export(model, inputs).module(check_guards=False)
        call, _ = compile_graph(graph, inputs, {"freezing": True, "triton.cudagraphs": True})
        return Built(on_device(lambda *tensors: _copy(call(*tensors)), device, dtype, job))

    return run


def run_recorded(device: str, precision: str, record: Record = record_on_gpu) -> Callable[[Job], Built]:
    """Build the model on `device`, its kernels recorded once and started as one: nothing is compiled."""

    def run(job: Job) -> Built:
        dtype = _DTYPES[precision]
        model = in_channels_last(job.copy_model().to(device=device, dtype=dtype))
        return Built(on_device(GraphedFunction(model, record=record), device, dtype, job))

    return run


def run_tensorrt(precision: str) -> Callable[[Job], Built]:
    """Build the model with TensorRT in `precision`."""

    def run(job: Job) -> Built:
        library = require("torch_tensorrt", extra="compile")
        dtype = _DTYPES[precision]
        model = job.copy_model().to(device="cuda", dtype=dtype)
        inputs = tuple(place(tensor, "cuda", dtype) for tensor in job.inputs)
        compiled = library.dynamo.compile(export(model, inputs), arg_inputs=inputs)
        return Built(on_device(compiled, "cuda", dtype, job))

    return run


def on_device(run: Callable[..., Any], device: str, dtype: torch.dtype, job: Job) -> Callable[..., Sequence[Tensor]]:
    """`run` with its inputs moved to `device`, and its answers moved back to where the samples' answers are."""
    kinds = output_dtypes(job)
    home = job.flattened.outputs[0].device

    def call(*inputs: Tensor) -> Sequence[Tensor]:
        answers = run(*(place(tensor, device, dtype) for tensor in inputs))
        answers = (answers,) if isinstance(answers, Tensor) else answers
        return restore_dtypes([answer.to(home) for answer in answers], kinds)

    return call


def place(tensor: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    """`tensor` on `device`; floating values in `dtype`."""
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else tensor.dtype, non_blocking=True)


def _copy(answers: Sequence[Tensor]) -> list[Tensor]:
    """Copy the answers: a captured graph writes into the same memory in every call."""
    return [answer.clone() for answer in answers]


def _variants(device: str, *, is_compiled: bool) -> tuple[Variant, ...]:
    eager = [
        Variant("eager", precision, f"on {device}, channels-last", run_eager(device, precision), 2)
        for precision in ("fp32", "bf16", "fp16")
    ]
    if not is_compiled:
        return tuple(eager)
    compiled = [
        Variant("graph", precision, "inductor and one captured graph", run_compiled(device, precision), 1)
        for precision in ("fp32", "bf16", "fp16")
    ]
    recorded = [
        Variant("recorded", precision, "kernels recorded once and replayed", run_recorded(device, precision), 3)
        for precision in ("fp32", "bf16", "fp16")
    ]
    return (*compiled, *eager, *recorded)


_NO_INT8 = {"int8": "int8 on an accelerator is not among its variants; ask for fp16 or bf16"}

CUDA = Backend(
    "cuda", "torch on an NVIDIA GPU", find_missing_cuda, _variants("cuda", is_compiled=True), _NO_INT8, ("cpu", "cuda")
)
ROCM = Backend(
    "rocm", "torch on an AMD GPU", find_missing_rocm, _variants("cuda", is_compiled=True), _NO_INT8, ("cpu", "cuda")
)
TENSORRT = Backend(
    "tensorrt",
    "TensorRT on an NVIDIA GPU",
    find_missing_tensorrt,
    tuple(Variant("engine", precision, "one engine", run_tensorrt(precision), 1) for precision in ("fp32", "fp16")),
    {**_NO_INT8, "bf16": "bf16 engines are not among its variants; ask for fp16"},
    ("cpu", "cuda"),
)
GAUDI = Backend(
    "gaudi",
    "torch on an Intel Gaudi",
    find_missing_gaudi,
    _variants("hpu", is_compiled=False),
    _NO_INT8,
    ("cpu", "hpu"),
)
ASCEND = Backend(
    "ascend",
    "torch on a Huawei Ascend",
    find_missing_ascend,
    _variants("npu", is_compiled=False),
    _NO_INT8,
    ("cpu", "npu"),
)
