"""Measuring this machine: how fast it multiplies, how fast its memory is, and what a message between processes costs.

`deepseek plan --measure` calls `measure_machine`; out comes a `Cluster` of one device (a GPU each, or all cores of
the processor together) that `save_cluster` stores and `--cluster FILE` reads. Rates are medians over shapes and
repeats, each after a warm-up; alpha and beta come from a straight line through round trips of growing messages
(Hockney 1994).

The planner multiplies datasheet peaks by the shares in `constants.py`. A measured rate already is what is reached, so
it is divided by the share first: prediction then starts from what was measured.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek.core.errors import ConfigError, PermanentError
from deepseek.core.machine import describe_machine
from deepseek.core.storage import find_cache_folder
from deepseek.distributed.cluster import Accelerator, Cluster, LinkClass, Node
from deepseek.distributed.constants import get_constants

FAMILY = "other"
MATMUL_SHAPES = ((2048, 256, 256), (2048, 1024, 256), (1024, 1024, 1024), (2048, 2048, 1024))
_MESSAGE_BYTES = (8, 65536, 1 << 20, 1 << 22)
_MOVED_BYTES = 1 << 27
_PROCESS_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Measured:
    """What was measured: FLOP/s by precision and shape, bytes/s of memory, and the link between two processes."""

    device: str
    matmul_flops: dict[str, dict[str, float]]
    memory_bandwidth_bytes_per_s: float
    memory_bytes: float
    link: LinkClass
    num_devices: int
    num_processors: int


def default_file() -> Path:
    """Where measurements of this machine are kept."""
    return find_cache_folder() / "cluster.json"


def measure_machine(*, repeats: int = 5, on_progress: Callable[[str], None] | None = None) -> Measured:
    """Measure the GPUs of this machine, or its processor where it has none.

    `on_progress` is told what comes next. Raises `PermanentError` when two processes cannot reach each other.
    """
    if repeats < 1:
        raise ConfigError(f"repeats={repeats!r} measures nothing; give at least 1")
    import torch

    tell = on_progress or (lambda _: None)
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    rates: dict[str, dict[str, float]] = {}
    for precision in ("fp32", "bf16"):
        tell(f"matrix products in {precision}")
        rates[precision] = {
            "x".join(map(str, shape)): _time_matmul(device, precision, shape, repeats) for shape in MATMUL_SHAPES
        }
    tell("memory")
    bandwidth = _time_memory(device, repeats)
    tell("messages between two processes")
    link = measure_link()
    return Measured(
        device=torch.cuda.get_device_name() if has_gpu else describe_machine()["processor"],
        matmul_flops=rates,
        memory_bandwidth_bytes_per_s=bandwidth,
        memory_bytes=float(
            torch.cuda.get_device_properties(0).total_memory if has_gpu else describe_machine()["memory_bytes"]
        ),
        link=link,
        num_devices=torch.cuda.device_count() if has_gpu else 1,
        num_processors=torch.cuda.get_device_properties(0).multi_processor_count
        if has_gpu
        else torch.get_num_threads(),
    )


def make_cluster(measured: Measured) -> Cluster:
    """The cluster of one node that was measured; peaks are the median over shapes.

    >>> link = LinkClass(1e-5, 1e9)
    >>> cluster = make_cluster(Measured("cpu", {"fp32": {"a": 1e11}, "bf16": {"a": 2e11}}, 1e10, 8e9, link, 1, 2))
    >>> cluster.num_devices, cluster.accelerators[0].peak_flops["fp32"] > 1e11
    (1, True)
    """
    shares = get_constants(FAMILY)
    peaks = {
        precision: statistics.median(rates.values()) / shares.matmul_fraction
        for precision, rates in measured.matmul_flops.items()
    }
    links = LinkClass(measured.link.alpha_s, measured.link.bandwidth_bytes_per_s / shares.scale_up_fraction)
    network = LinkClass(measured.link.alpha_s, measured.link.bandwidth_bytes_per_s / shares.network_fraction)
    device = Accelerator(
        name=measured.device,
        memory_bytes=measured.memory_bytes,
        memory_bandwidth_bytes_per_s=measured.memory_bandwidth_bytes_per_s / shares.memory_fraction,
        peak_flops=peaks,
        scale_up=links,
        network=network,
        family=FAMILY,
        scale_up_size=max(measured.num_devices, 1),
        processors=measured.num_processors,
    )
    return Cluster((Node(device, measured.num_devices),), network)


def _time_matmul(device: Any, precision: str, shape: tuple[int, int, int], repeats: int) -> float:
    """FLOP/s of one product."""
    import torch

    rows, columns, depth = shape
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    left = torch.randn(rows, depth, device=device).to(dtype)
    right = torch.randn(columns, depth, device=device).to(dtype)
    return 2.0 * rows * columns * depth / _median_s(lambda: torch.nn.functional.linear(left, right), device, repeats)


def _time_memory(device: Any, repeats: int) -> float:
    """Bytes/s of reading one array and writing another, neither of which fits a cache."""
    import torch

    source = torch.ones(_MOVED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2.0 * _MOVED_BYTES / _median_s(lambda: target.copy_(source), device, repeats)


def _median_s(work: Callable[[], object], device: Any, repeats: int) -> float:
    import torch

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    finish()
    seconds = []
    for _ in range(repeats):
        began_s = time.perf_counter()
        work()
        finish()
        seconds.append(time.perf_counter() - began_s)
    return statistics.median(seconds)


def measure_link() -> LinkClass:
    """Alpha and beta of messages between two processes of this machine, over gloo's loopback."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "deepseek.distributed.measuring", f"{folder}/store"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen(  # noqa: S603 - our own command
                [*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
            )
            for rank in range(2)
        ]
        try:
            answers = [process.communicate(timeout=_PROCESS_TIMEOUT_S) for process in ranks]
        except subprocess.TimeoutExpired as error:
            raise PermanentError(
                f"two processes exchanged no message within {_PROCESS_TIMEOUT_S:g} s; allow local sockets and try again"
            ) from error
        finally:
            for process in ranks:
                process.kill()
                process.wait()
    if any(process.returncode for process in ranks):
        last = [answer[1].strip().splitlines()[-1:] for answer in answers]
        raise PermanentError(f"two processes could not exchange messages ({last}); allow local sockets and try again")
    return fit_link([(int(size), float(seconds)) for size, seconds in json.loads(answers[0][0])])


def fit_link(times: list[tuple[int, float]]) -> LinkClass:
    """The line through (bytes, seconds) of one way, least squares of relative errors; alpha is at least 0.

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


def play_ping_pong(store: str, rank: int, *, repeats: int = 15) -> list[tuple[int, float]]:
    """One of two ranks: send messages there and back, and time them; (bytes, seconds one way)."""
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
            for turn in range(2):
                if rank == turn:
                    dist.send(buffer, 1 - rank)
                else:
                    dist.recv(buffer, 1 - rank)
            seconds.append((time.perf_counter() - began_s) / 2)
        times.append((size, statistics.median(seconds[2:])))
    dist.destroy_process_group()
    return times


if __name__ == "__main__":
    _times = play_ping_pong(sys.argv[1], int(sys.argv[2]))
    if sys.argv[2] == "0":
        sys.stdout.write(json.dumps(_times))
