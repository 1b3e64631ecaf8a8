"""Measuring this machine: how fast it multiplies, how fast its memory is, and what a message between processes costs.

`deepseek plan measure` calls `measure_machine`; out comes a `Cluster` of one device (a GPU each, or all cores of
the processor together) that `save_cluster` stores and `--cluster FILE` reads. Rates are medians over shapes and
repeats, each after a warm-up; alpha and beta come from a straight line through the shortest round trips of growing
messages (Hockney 1994).

A named accelerator reaches shares of its datasheet that were found on other people's runs (`constants.py`). A measured
one brings its own: how deep a matmul must be to run at speed, how fast attention is beside matmuls, elementwise
kernels beside plain copies, and what the host needs to issue one. They are stored with the device (`shares`).

Shapes: R rows, C channels, N columns or heads, B sequences, T tokens, H channels of a head.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deepseek.core.errors import ConfigError, PermanentError
from deepseek.core.machine import describe_machine, describe_versions
from deepseek.core.storage import find_cache_folder
from deepseek.distributed.topology import LinkClass
from deepseek.planning.estimate.compute import BACKWARD_ATTENTION, BYTES_OF_PLAIN_KERNELS
from deepseek.planning.machines.cluster import Accelerator, Cluster, Node
from deepseek.planning.machines.constants import get_constants
from deepseek.planning.machines.local_ranks import run_ranks

FAMILY = "other"
_NUM_LAUNCHES = 1000
_MESSAGE_BYTES = (8, 65536, 1 << 20, 1 << 22)
_NUM_ROUND_TRIPS = (15, 30, 60)  # of each size, in a first try at measuring a link, a second and a third
_PROCESS_TIMEOUT_S = 120.0
LONG_S = 1.0  # beside which warming up is nothing: a bf16 matmul of a CPU without bf16 takes up to twenty


@dataclass(frozen=True)
class Sizes:
    """The sizes that are timed, so large that the device and not the host's pace is measured.

    Products as (rows, columns, depth), attention as (sequences, heads, tokens, channels of a head), elementwise kernels
    as (rows, channels), and the bytes of an array that is copied.
    """

    matmuls: tuple[tuple[int, int, int], ...]
    attention: tuple[int, int, int, int]
    elementwise: tuple[int, int]
    moved_bytes: int


SIZES: dict[str, Sizes] = {
    "cpu": Sizes(
        ((2048, 256, 256), (2048, 1024, 256), (1024, 1024, 1024), (2048, 2048, 1024)),
        (4, 8, 512, 64),
        (4096, 512),
        1 << 27,
    ),
    "cuda": Sizes(
        ((8192, 8192, 1024), (16384, 8192, 1024), (8192, 8192, 8192), (16384, 8192, 8192)),
        (4, 32, 4096, 128),
        (65536, 4096),
        1 << 30,
    ),
}


@dataclass(frozen=True)
class Measured:
    """The measured speeds of one device, and of the link between two processes.

    FLOP/s of matmuls by precision and contracted dimension, FLOP/s of causal attention, bytes/s of copies and of
    elementwise kernels, seconds to issue a kernel; `is_host` where it was the processor itself.
    """

    device: str
    matmul_flops: dict[str, dict[int, float]]
    attention_flops: float
    memory_bandwidth_bytes_per_s: float
    elementwise_bytes_per_s: float
    launch_s: float
    memory_bytes: float
    link: LinkClass
    num_devices: int
    num_processors: int
    is_host: bool = True


def default_file() -> Path:
    """Return the file in which measurements of this machine are kept."""
    return find_cache_folder() / "cluster.json"


def describe_surroundings() -> dict[str, Any]:
    """Describe what a measurement holds for: this machine, and the torch whose kernels were timed."""
    return describe_machine() | {"torch": describe_versions(("torch",))["torch"]}


def measure_machine(*, repeats: int = 5, on_progress: Callable[[str], None] | None = None) -> Measured:
    """Measure the GPUs of this machine, or its processor where it has none.

    `on_progress` is called with what comes next. Raises `PermanentError` when two processes cannot reach each other.
    """
    if repeats < 1:
        raise ConfigError(f"repeats={repeats!r} measures nothing; give at least 1")
    import torch

    report = on_progress or (lambda _: None)
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    sizes = SIZES[device.type]
    rates: dict[str, dict[int, float]] = {}
    for precision in ("fp32", "bf16"):
        report(f"matmuls in {precision}")
        rates[precision] = _rate_matmuls(device, precision, sizes.matmuls, repeats)
    report("attention")
    attention = rate_attention(device, "bf16", sizes.attention, repeats)
    report("memory and elementwise kernels")
    bandwidth = rate_memory(device, sizes.moved_bytes, repeats)
    elementwise = rate_elementwise(device, "bf16", sizes.elementwise, repeats)
    launch_s = time_launch(device, repeats)
    report("messages between two processes")
    link = measure_link()
    return Measured(
        device=torch.cuda.get_device_name() if has_gpu else describe_machine()["processor"],
        matmul_flops=rates,
        attention_flops=attention,
        memory_bandwidth_bytes_per_s=bandwidth,
        elementwise_bytes_per_s=elementwise,
        launch_s=launch_s,
        memory_bytes=float(
            torch.cuda.get_device_properties(0).total_memory if has_gpu else describe_machine()["memory_bytes"]
        ),
        link=link,
        num_devices=torch.cuda.device_count() if has_gpu else 1,
        num_processors=torch.cuda.get_device_properties(0).multi_processor_count
        if has_gpu
        else torch.get_num_threads(),
        is_host=not has_gpu,
    )


def build_cluster(measured: Measured) -> Cluster:
    """Build the cluster of one node that was measured, with the shares of it that were measured.

    >>> link = LinkClass(1e-5, 1e9)
    >>> rates = {"fp32": {256: 1e11, 1024: 1e11}, "bf16": {256: 2e11, 1024: 2e11}}
    >>> cluster = build_cluster(Measured("cpu", rates, 1e11, 1e10, 5e9, 5e-6, 8e9, link, 1, 2))
    >>> cluster.num_devices, cluster.accelerators[0].peak_flops["fp32"]
    (1, 100000000000.0)
    >>> cluster.accelerators[0].constants.attention_fraction, cluster.accelerators[0].constants.memory_fraction
    (0.5, 0.5)
    """
    fits = {precision: fit_depth(rates) for precision, rates in measured.matmul_flops.items()}
    shares = replace(
        get_constants(FAMILY),
        matmul_fraction=1.0,
        matmul_fill_depth=fits["bf16"][1],
        attention_fraction=measured.attention_flops / fits["bf16"][0],
        memory_fraction=measured.elementwise_bytes_per_s / measured.memory_bandwidth_bytes_per_s,
        launch_s=measured.launch_s,
        scale_up_fraction=1.0,
        network_fraction=1.0,
    )
    device = Accelerator(
        name=measured.device,
        memory_bytes=measured.memory_bytes,
        memory_bandwidth_bytes_per_s=measured.memory_bandwidth_bytes_per_s,
        peak_flops={precision: peak for precision, (peak, _) in fits.items()},
        scale_up=measured.link,
        network=measured.link,
        family=FAMILY,
        scale_up_size=max(measured.num_devices, 1),
        processors=measured.num_processors,
        shares=shares,
        is_host=measured.is_host,
    )
    return Cluster((Node(device, measured.num_devices),), measured.link)


def fit_depth(rates: Mapping[int, float]) -> tuple[float, float]:
    """Return FLOP/s of an endlessly deep matmul, and the depth that reaches half of that, from rates at two depths.

    >>> peak, depth = fit_depth({256: 1e11, 1024: 1.6e11})
    >>> f"{peak:.3g} {depth:.0f}"
    '2e+11 256'
    """
    (shallow, low), (deep, high) = min(rates.items()), max(rates.items())
    if low >= high:  # depth does not matter here, or noise was larger
        return statistics.median(rates.values()), 0.0
    slope = (1 / low - 1 / high) / (1 / shallow - 1 / deep)
    floor = 1 / high - slope / deep
    if floor <= 0:  # a product this deep still gains in proportion; take it for the peak
        return high, 0.0
    return 1 / floor, slope / floor


def _rate_matmuls(
    device: Any, precision: str, shapes: tuple[tuple[int, int, int], ...], repeats: int
) -> dict[int, float]:
    """Measure FLOP/s by depth, the median over its shapes; after one that takes long, none of its depth is timed."""
    rates: dict[int, list[float]] = {}
    long: set[int] = set()
    for shape in shapes:
        rows, columns, depth = shape
        if depth in long:
            continue
        rate = rate_matmul(device, precision, shape, repeats)
        rates.setdefault(depth, []).append(rate)
        if 3 * 2.0 * rows * columns * depth / rate > LONG_S:
            long.add(depth)
    return {depth: statistics.median(rates[depth]) for depth in sorted(rates)}


def rate_matmul(device: Any, precision: str, shape: tuple[int, int, int], repeats: int) -> float:
    """Measure FLOP/s of a linear layer going forward and back: its three matmuls lie in memory in three ways."""
    import torch

    rows, columns, depth = shape
    dtype = _find_dtype(precision)
    input_RC, weight_NC = (torch.randn(n, depth, device=device).to(dtype).requires_grad_() for n in (rows, columns))
    gradient_RN = torch.randn(rows, columns, device=device).to(dtype)

    def run() -> None:
        torch.autograd.grad(torch.nn.functional.linear(input_RC, weight_NC), (input_RC, weight_NC), gradient_RN)

    return 3 * 2.0 * rows * columns * depth / median_s(run, device, repeats)


def _find_dtype(precision: str) -> Any:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def rate_memory(device: Any, moved_bytes: int, repeats: int) -> float:
    """Measure bytes/s of reading one array and writing another, neither of which fits a cache."""
    import torch

    source = torch.ones(moved_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2.0 * moved_bytes / median_s(lambda: target.copy_(source), device, repeats)


def rate_elementwise(device: Any, precision: str, shape: tuple[int, int], repeats: int) -> float:
    """Measure bytes/s of a layer's norm, gate and residual with gradients, by the bytes that `compute` counts."""
    import torch
    from torch.nn import functional as F

    dtype = _find_dtype(precision)
    x_RC, gate_RC, up_RC = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(3))
    gradient_RC = torch.randn_like(x_RC)

    def run() -> None:
        normal_RC = F.rms_norm(x_RC.float(), shape[1:]).to(dtype)
        (normal_RC + F.silu(gate_RC) * up_RC).backward(gradient_RC)

    return float(BYTES_OF_PLAIN_KERNELS * dtype.itemsize / 2 * x_RC.numel() / median_s(run, device, repeats))


def rate_attention(device: Any, precision: str, shape: tuple[int, int, int, int], repeats: int) -> float:
    """Measure FLOP/s of causal attention going forward and back, counting the scores that are kept."""
    import torch
    from torch.nn import functional as F

    num_sequences, num_heads, num_tokens, size = shape
    dtype = _find_dtype(precision)
    query_BNTH, key_BNTH, value_BNTH = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(3))
    gradient_BNTH = torch.randn_like(query_BNTH)

    def run() -> None:
        mixed_BNTH = F.scaled_dot_product_attention(query_BNTH, key_BNTH, value_BNTH, is_causal=True)
        mixed_BNTH.backward(gradient_BNTH)

    forward = 0.5 * 4 * num_sequences * num_heads * num_tokens**2 * size
    return (1 + BACKWARD_ATTENTION) * forward / median_s(run, device, repeats)


def time_launch(device: Any, repeats: int) -> float:
    """Measure the seconds that the host needs for a kernel with nothing to do."""
    import torch

    x = torch.zeros(1, device=device, requires_grad=True)

    def run() -> None:
        for _ in range(_NUM_LAUNCHES):
            x.add(1)

    return median_s(run, device, repeats) / _NUM_LAUNCHES


def median_s(work: Callable[[], object], device: Any, repeats: int) -> float:
    """Measure seconds of `work` by the median after a first call, or by that alone where it is a long one."""
    import torch

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    began_s = time.perf_counter()
    work()
    finish()
    if (first_s := time.perf_counter() - began_s) > LONG_S:
        return first_s
    seconds = []
    for _ in range(repeats):
        began_s = time.perf_counter()
        work()
        finish()
        seconds.append(time.perf_counter() - began_s)
    return statistics.median(seconds)


def measure_link() -> LinkClass:
    """Measure alpha and beta of messages between two processes of this machine, over gloo's loopback.

    A machine so busy that long messages are not the slower ones is measured again, twice at most.
    """
    for repeats in _NUM_ROUND_TRIPS[:-1]:
        times = _exchange_messages(repeats)
        with contextlib.suppress(PermanentError):
            return fit_link(times)
    return fit_link(_exchange_messages(_NUM_ROUND_TRIPS[-1]))


def _exchange_messages(repeats: int) -> list[tuple[int, float]]:
    """Let two processes exchange messages; return (bytes, seconds one way)."""
    measured = run_ranks(__name__, [str(repeats)], world_size=2, timeout_s=_PROCESS_TIMEOUT_S)
    return [(int(size), float(seconds)) for size, seconds in measured]


def fit_link(times: list[tuple[int, float]]) -> LinkClass:
    """Fit a line to (bytes, seconds) of one way by least squares of relative errors; alpha is at least 0.

    >>> link = fit_link([(0, 1e-5), (1000, 2e-5), (2000, 3e-5)])
    >>> round(link.alpha_s * 1e6, 3), round(link.bandwidth_bytes_per_s / 1e6, 3)
    (10.0, 100.0)
    """
    weights = [1.0 / seconds**2 for _, seconds in times]
    total = sum(weights)
    mean_size = sum(weight * size for weight, (size, _) in zip(weights, times, strict=True)) / total
    mean_s = sum(weight * seconds for weight, (_, seconds) in zip(weights, times, strict=True)) / total
    spread = sum(weight * (size - mean_size) ** 2 for weight, (size, _) in zip(weights, times, strict=True))
    shared = sum(
        weight * (size - mean_size) * (seconds - mean_s) for weight, (size, seconds) in zip(weights, times, strict=True)
    )
    if spread <= 0 or shared <= 0:
        raise PermanentError(
            f"messages of {times} do not take longer when they are longer; measure on a quieter machine"
        )
    beta = shared / spread
    return LinkClass(max(mean_s - beta * mean_size, 0.0), 1.0 / beta)


def exchange_ping_pong(store: str, rank: int, repeats: int) -> list[tuple[int, float]]:
    """Send messages there and back as one of two ranks; return (bytes, fewest seconds one way)."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    times = []
    for size in _MESSAGE_BYTES:
        buffer = torch.zeros(size, dtype=torch.uint8)
        seconds = []
        for _ in range(repeats + 2):
            dist.barrier()
            began_s = time.perf_counter()
            for sender in range(2):
                if rank == sender:
                    dist.send(buffer, 1 - rank)
                else:
                    dist.recv(buffer, 1 - rank)
            seconds.append((time.perf_counter() - began_s) / 2)
        times.append((size, min(seconds)))  # whoever else wants the processor only makes a message take longer
    dist.destroy_process_group()
    return times


if __name__ == "__main__":
    _times = exchange_ping_pong(sys.argv[1], int(sys.argv[3]), int(sys.argv[2]))
    if sys.argv[3] == "0":
        sys.stdout.write(json.dumps(_times))
