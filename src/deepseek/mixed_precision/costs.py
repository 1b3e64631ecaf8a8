"""What 16 bits are worth for one layer: seconds of its forward and backward, and bytes kept for it, both measured.

Bytes are those that the layer keeps and those of its result, which the operator after it keeps. The layer's input is in
the precision that is tried, as it is where its neighbours run like it: with a cast counted to one side, small layers
looked slower in 16 bits, and one FP32 layer left among the others made a ResNet-18's step 3 % longer. A difference in
time that a busy machine may have made counts as none.

Neither the name of the format decides nor the instructions: on one CPU with bf16 matmuls a wide linear layer gets four
times faster and a narrow one slower, another CPU with the same instructions loses with both, and one without them does
anyway. Each distinct layer and input shape is run a few times in both precisions, once, on random values of its own
generator, so that the run's random numbers stay what they were.
"""

from __future__ import annotations

import statistics
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_NUM_RUNS = 5
_NOISE = 0.2  # share of the time below which a difference counts as none


@dataclass(frozen=True)
class Saving:
    """FP32 less 16 bits."""

    seconds: float
    num_bytes: float
    is_measured: bool = True


def assume_saving(layer: nn.Module, input_shape: tuple[int, ...] | None) -> Saving:
    """Without measuring: half the bytes of the input, and time in proportion to the multiply-adds."""
    num_elements = float(torch.Size(input_shape).numel()) if input_shape else 1.0
    num_weights = float(sum(parameter.numel() for parameter in layer.parameters(recurse=False)))
    return Saving(num_weights * 1e-12, 2 * num_elements, is_measured=False)


def measure_saving(layer: nn.Module, input_shape: tuple[int, ...], low: torch.dtype) -> Saving | None:
    """Measure the layer by itself on one tensor of that shape; return None for one that takes other inputs."""
    weight = next(layer.parameters(recurse=False))
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(input_shape, generator=generator, device=weight.device)
    inputs = {dtype: x.to(dtype).requires_grad_() for dtype in (torch.float32, low)}
    forward = types.MethodType(type(layer).forward, layer)
    durations_s: dict[torch.dtype, list[float]] = {torch.float32: [], low: []}
    kept_bytes: dict[torch.dtype, int] = {}
    try:
        for _ in range(_NUM_RUNS):  # in turns, so that a busy machine disturbs both alike
            for dtype, durations in durations_s.items():
                seconds, kept_bytes[dtype] = _run(forward, inputs[dtype], layer, dtype)
                durations.append(seconds)
    except (TypeError, ValueError, RuntimeError):  # its inputs are not one tensor: the caller assumes instead
        return None
    seconds = compare(durations_s[torch.float32], durations_s[low])
    return Saving(seconds, kept_bytes[torch.float32] - kept_bytes[low])


def compare(wide_s: Sequence[float], low_s: Sequence[float]) -> float:
    """Return the seconds saved, or 0 where the shortest runs and the median over pairs of neighbours disagree.

    >>> compare([5.0, 4.0, 9.0], [2.0, 2.0, 2.0]), compare([4.0, 4.0, 4.0], [9.0, 3.9, 3.9])
    (2.0, 0.0)
    """
    shortest = min(wide_s) - min(low_s)
    typical = statistics.median(wide - low for wide, low in zip(wide_s, low_s, strict=True))
    is_clear = shortest * typical > 0 and abs(shortest) > _NOISE * min(wide_s)
    return shortest if is_clear else 0.0


def _run(forward: Callable[[Tensor], Tensor], x: Tensor, layer: nn.Module, dtype: torch.dtype) -> tuple[float, int]:
    """Measure the seconds of one forward and backward, and the bytes between them."""
    parameters = [parameter for parameter in layer.parameters(recurse=False) if parameter.requires_grad]
    weights = {parameter.data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def note(value: Tensor) -> Tensor:
        if value.data_ptr() not in weights:
            kept[value.data_ptr()] = value.numel() * value.element_size()
        return value

    narrow = torch.autocast(x.device.type, dtype=dtype, enabled=dtype != torch.float32)
    began_s = _now_s(x.device)
    with narrow, torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        y = forward(x)
    torch.autograd.grad(y, [x, *parameters], torch.ones_like(y), allow_unused=True)
    return _now_s(x.device) - began_s, sum(kept.values()) + y.numel() * y.element_size()


def _now_s(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
