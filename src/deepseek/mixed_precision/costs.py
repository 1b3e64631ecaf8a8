"""What 16 bits are worth for one layer: seconds of its forward and backward, and bytes kept for it, both measured.

Bytes are those that the layer keeps and those of its result, which the operator after it keeps.

Instructions decide, not the name of the format: on a CPU with bf16 products, a wide linear layer gets four times faster
and a narrow one slower, and a CPU without them loses everywhere. Each distinct layer and input shape is run a few times
in both precisions, once, on random values of its own generator, so that the run's random numbers stay what they were.
"""

from __future__ import annotations

import time
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_NUM_RUNS = 4


@dataclass(frozen=True)
class Saving:
    """FP32 less 16 bits."""

    seconds: float
    num_bytes: float
    is_measured: bool = True


def assume_saving(layer: nn.Module, input_shape: tuple[int, ...] | None) -> Saving:
    """Without measuring: half the bytes of the input, and time in proportion to the multiply-adds."""
    num_elements = float(torch.Size(input_shape).numel()) if input_shape else 1.0
    num_weights = float(sum(each.numel() for each in layer.parameters(recurse=False)))
    return Saving(num_weights * 1e-12, 2 * num_elements, is_measured=False)


def measure_saving(layer: nn.Module, input_shape: tuple[int, ...], low: torch.dtype) -> Saving | None:
    """The layer by itself on one tensor of that shape, or None for one that takes other inputs."""
    weight = next(layer.parameters(recurse=False))
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(input_shape, generator=generator, device=weight.device, requires_grad=True)
    forward = types.MethodType(type(layer).forward, layer)
    try:
        runs = {dtype: _measure(forward, x, layer, dtype) for dtype in (torch.float32, low)}
    except (TypeError, ValueError, RuntimeError):  # its inputs are not one tensor: the caller assumes instead
        return None
    (wide_s, wide_bytes), (low_s, low_bytes) = runs[torch.float32], runs[low]
    return Saving(wide_s - low_s, wide_bytes - low_bytes)


def _measure(forward: Callable[[Tensor], Tensor], x: Tensor, layer: nn.Module, dtype: torch.dtype) -> tuple[float, int]:
    parameters = [each for each in layer.parameters(recurse=False) if each.requires_grad]
    sources = [x, *parameters]
    durations_s = []
    kept_bytes = 0
    for _ in range(_NUM_RUNS):
        kept: dict[int, int] = {}

        def note(value: Tensor, kept: dict[int, int] = kept) -> Tensor:
            if not any(value.data_ptr() == each.data_ptr() for each in parameters):
                kept[value.data_ptr()] = value.numel() * value.element_size()
            return value

        began_s = _now_s(x.device)
        narrow = torch.autocast(x.device.type, dtype=dtype, enabled=dtype != torch.float32)
        with narrow, torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
            y = forward(x)
        torch.autograd.grad(y, sources, torch.ones_like(y), allow_unused=True)
        durations_s.append(_now_s(x.device) - began_s)
        kept_bytes = sum(kept.values()) + y.numel() * y.element_size()
    return min(durations_s), kept_bytes


def _now_s(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
