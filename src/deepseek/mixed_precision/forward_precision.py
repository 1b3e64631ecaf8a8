"""Precision policies: what a forward pass computes in, while weights and optimizer state stay float32.

A policy is a name. `choose_precision` turns `auto` into the fastest one on this device, and `autocast` gives the
context in which the forward pass runs. On a GPU the instructions decide. On a CPU they do not: bf16 matmuls ran five
times as fast as FP32 ones on a Zen 4, and at 0.55 of their speed on an Intel Xeon that has the same instructions. So
where a CPU has them, one small matmul is timed in both, once in a process, which takes some 20 ms. The answers lie far
to either side of the bound, so a busy machine does not change them; and a run keeps in its checkpoints what it began
with.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Literal, get_args

import torch

from deepseek.core.errors import ConfigError
from deepseek.core.names import explain_unknown

Precision = Literal["auto", "fp32", "bf16"]

_MATMUL_SIZE = 256
_NUM_ROUNDS = 12
# bf16 costs digits: it has to be faster by more than a machine's noise.
_LEAST_BF16_SPEEDUP = 1.1


def choose_precision(precision: Precision, device: torch.device) -> Precision:
    """Choose the concrete policy for `precision` on `device`: `auto` is bf16 where that is faster, else FP32.

    Raises `ConfigError` for an unknown policy, and for bf16 on a GPU that does not have it.
    """
    if precision not in get_args(Precision):
        raise ConfigError(explain_unknown("precision", precision, get_args(Precision)))
    if precision == "auto":
        return "bf16" if is_bf16_faster(device) else "fp32"
    if precision == "bf16" and device.type == "cuda" and not has_native_bf16(device):
        raise ConfigError(
            f"precision 'bf16' was asked for and {device} has no bf16 arithmetic; choose 'fp32' or 'auto'"
        )
    return precision


def has_native_bf16(device: torch.device) -> bool:
    """Return whether bf16 matmuls have instructions of their own on `device`."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def is_bf16_faster(device: torch.device) -> bool:
    """Return whether bf16 matmuls beat FP32 ones on `device`: a GPU goes by its instructions, a CPU is measured."""
    if not has_native_bf16(device):
        return False
    return device.type != "cpu" or measure_bf16_speedup() >= _LEAST_BF16_SPEEDUP


@cache
def measure_bf16_speedup() -> float:
    """Time of one FP32 matmul on the CPU over that of the same in bf16: the shortest of some alternating runs.

    On one thread: two of them wait for each other on a machine that others use, and then any ratio comes out.
    """
    shape = (_MATMUL_SIZE, _MATMUL_SIZE)
    shortest_s = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    with torch.inference_mode(), torch.autocast("cpu", enabled=False), one_thread():
        matrices = {dtype: torch.full(shape, 0.5, dtype=dtype, device="cpu") for dtype in shortest_s}
        for matrix in matrices.values():
            matrix @ matrix  # the first one chooses a kernel
        for _ in range(_NUM_ROUNDS):
            for dtype, matrix in matrices.items():
                began_s = time.perf_counter()
                matrix @ matrix
                shortest_s[dtype] = min(shortest_s[dtype], time.perf_counter() - began_s)
    return shortest_s[torch.float32] / shortest_s[torch.bfloat16]


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread in the block, and afterwards on as many as before."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return the context for a forward pass under a policy.

    >>> with autocast("bf16", torch.device("cpu")):
    ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    torch.bfloat16
    """
    if choose_precision(precision, device) == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
