"""torch itself, one operator after the other: the baseline, and what is left of its speed when layouts and types are
right.

Variants: the model as it was given; channels-last, in which convolutions on a CPU take 0.4 to 0.7 of the time; the
whole model or only its matmuls in bf16 (or fp16, where the processor has it); and linear layers in dynamic int8
through FBGEMM, which is the fastest int8 there is here for one row at a time (a 1024-4096-1024 MLP: 0.19 ms against
1.72 in FP32, one thread). The allocator is the other lever, up to 3x for large activations; it belongs to the process,
so `select(..., tune_allocator=True)` asks for it.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepseek.compiler.runtimes.backends.interface import Backend, Built, Job, Missing, Variant
from deepseek.compiler.runtimes.fallbacks import judge_onednn_kernels, read_onednn_kernels
from deepseek.compiler.runtimes.selection_policy import Traits

_LEVELS = 127
_SMALLEST = 1e-30


def find_missing() -> Missing | None:
    """Nothing: torch is always there."""
    return None


def run_as_given(job: Job) -> Built:
    """Return the model itself."""
    return Built(job.flattened.model, takes_any_shape=True)


def run_channels_last(job: Job) -> Built:
    """Return the model with its convolutions' weights and inputs in channels-last layout."""
    return Built(with_layout(in_channels_last(job.copy_model())), takes_any_shape=True)


def cast(dtype: torch.dtype, *, is_channels_last: bool) -> Callable[[Job], Built]:
    """Build the model with all its weights in `dtype`."""

    def run(job: Job) -> Built:
        model = job.copy_model().to(dtype)
        if is_channels_last:
            return watched(with_dtype(with_layout(in_channels_last(model)), dtype, job), job)
        return watched(with_dtype(model, dtype, job), job)

    return run


def autocast(dtype: torch.dtype) -> Callable[[Job], Built]:
    """Build the model under autocast: matmuls in `dtype`, the rest as torch finds safe."""

    def run(job: Job) -> Built:
        model = with_layout(in_channels_last(job.copy_model()))
        kinds = output_dtypes(job)

        def call(*inputs: Tensor) -> Sequence[Tensor]:
            with torch.autocast("cpu", dtype=dtype):
                return restore_dtypes(model(*inputs), kinds)

        return watched(call, job)

    return run


def run_dynamic_int8(job: Job) -> Built:
    """Return the model with its linear layers in int8, activations quantized as they come."""
    model = job.copy_model()
    num_layers = replace_linears_(model)
    return Built(model, notes=(f"{num_layers} linear layers in int8",), takes_any_shape=True)


def watched(run: Callable[..., Sequence[Tensor]], job: Job) -> Built:
    """`run`, with findings on the kernels that oneDNN chose for it: 16 bits without instructions run in reference
    code."""
    log = listen_to_onednn(lambda: run(*job.inputs))
    return Built(run, tuple(judge_onednn_kernels(read_onednn_kernels(log))), takes_any_shape=True)


def listen_to_onednn(run: Callable[[], object]) -> str:
    """Return oneDNN's report on the kernels of `run`, captured from the process's own output."""
    flush = ctypes.CDLL(None).fflush
    sys.stdout.flush()
    flush(None)
    with tempfile.TemporaryFile() as caught:
        before = os.dup(1)
        os.dup2(caught.fileno(), 1)
        try:
            with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
                run()
            flush(None)
        finally:
            os.dup2(before, 1)
            os.close(before)
        caught.seek(0)
        return caught.read().decode(errors="replace")


class DynamicInt8Linear(nn.Module):
    """A linear layer over int8 weights, one scale per output; each input tensor gets one scale as it comes.

    Shapes: (..., inputs) to (..., outputs), float32. The matmul is FBGEMM's; where the processor lacks VNNI, inputs
    take 7 bits, with which its 16-bit sums cannot overflow.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.reduce_range = not torch.cpu._is_vnni_supported()
        self.packed = pack_linear(linear)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.quantized.linear_dynamic(x, self.packed, self.reduce_range)
        return y


def pack_linear(linear: nn.Linear) -> Any:
    """Return the weights of `linear` in int8, in the order in which FBGEMM reads them."""
    weight = linear.weight.detach().float()
    scales = weight.abs().amax(dim=1).clamp_min(_SMALLEST) / _LEVELS
    values = (weight / scales[:, None]).round().clamp(-_LEVELS, _LEVELS).to(torch.int8)
    bias = None if linear.bias is None else linear.bias.detach().float()
    with warnings.catch_warnings():
        # Quantized tensors are deprecated as a way to program, and still the only way to hand weights to this kernel.
        warnings.simplefilter("ignore")
        zeros = torch.zeros(len(scales), dtype=torch.long)
        stored = torch._make_per_channel_quantized_tensor(values.contiguous(), scales.double(), zeros, 0)
        return torch.ops.quantized.linear_prepack(stored, bias)


def replace_linears_(model: nn.Module) -> int:
    """Replace every linear layer in place by its dynamic int8 one, and say how many there were."""
    replaced: dict[int, DynamicInt8Linear] = {}
    paths = [path for path, module in model.named_modules(remove_duplicate=False) if type(module) is nn.Linear]
    for path in paths:
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        layer = replaced.setdefault(id(linear), DynamicInt8Linear(linear))
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
    return len(replaced)


def with_layout(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` with images (4-D inputs) handed over in channels-last layout."""

    def call(*inputs: Tensor) -> Any:
        return run(*(to_channels_last(tensor) for tensor in inputs))

    return call


def with_dtype(run: Callable[..., Any], dtype: torch.dtype, job: Job) -> Callable[..., Sequence[Tensor]]:
    """`run` with floating inputs handed over in `dtype` and its answers in the types of the reference."""
    kinds = output_dtypes(job)

    def call(*inputs: Tensor) -> Sequence[Tensor]:
        return restore_dtypes(
            run(*(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in inputs)), kinds
        )

    return call


def output_dtypes(job: Job) -> tuple[torch.dtype, ...]:
    """Return the types of the reference's answers."""
    return tuple(output.dtype for output in job.flattened.outputs)


def restore_dtypes(outputs: Sequence[Tensor], kinds: Sequence[torch.dtype]) -> tuple[Tensor, ...]:
    """`outputs` in the types that the model itself answers in."""
    return tuple(output.to(kind) for output, kind in zip(outputs, kinds, strict=True))


def to_channels_last(tensor: Tensor) -> Tensor:
    """Return a batch of images in channels-last layout; anything else as it is."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def in_channels_last(model: nn.Module) -> nn.Module:
    """`model` with its 4-D weights in channels-last layout, changed in place."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def lacks_convolutions(traits: Traits) -> str | None:
    """Channels-last is about convolutions."""
    return None if traits.num_convolutions else "the model has no convolution, so there is no layout to choose"


def lacks_linears(traits: Traits) -> str | None:
    """Dynamic int8 is about linear layers, and has nothing for convolutions."""
    if not traits.num_linears:
        return "the model has no linear layer to run in int8"
    if traits.num_convolutions > traits.num_linears:
        return "most of the model is convolutions, which this int8 does not cover"
    return None


def lacks_fp16(traits: Traits) -> str | None:
    """fp16 where the processor has no instructions for it is slower than FP32 by an order of magnitude."""
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return None
    return "this processor has no fp16 instructions for oneDNN to use"


def lacks_fbgemm(traits: Traits) -> str | None:
    """Dynamic int8 needs FBGEMM."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return "this build of torch has no FBGEMM"
    return lacks_linears(traits)


BACKEND = Backend(
    name="eager",
    summary="torch, one operator after the other",
    find_missing=find_missing,
    variants=(
        Variant("plain", "fp32", "the model as it was given", run_as_given, prior=0),
        Variant("channels_last", "fp32", "channels-last layout", run_channels_last, 27, lacks_convolutions),
        Variant("cast", "bf16", "all weights in bf16", cast(torch.bfloat16, is_channels_last=True), 25),
        Variant("autocast", "bf16", "matmuls in bf16", autocast(torch.bfloat16), 26),
        Variant("cast", "fp16", "all weights in fp16", cast(torch.float16, is_channels_last=True), 63, lacks_fp16),
        Variant("dynamic", "int8", "linear layers in int8 by FBGEMM", run_dynamic_int8, 14, lacks_fbgemm),
    ),
    devices=("cpu", "cuda", "hpu", "npu"),
)
