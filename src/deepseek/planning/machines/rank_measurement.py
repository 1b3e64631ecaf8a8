"""Measuring ranks of one host: what each of several processes reaches while all the others compute as well.

`deepseek plan check --ranks N` calls `measure_ranks`. A processor measured alone (`measurement.py`) says nothing of
four ranks on two cores: they share cores, caches, memory and the loopback that carries their messages. So N processes
of one thread measure the same thing at the same time, and the cluster that comes out has N devices with these speeds,
and says how many cores they share (`Cluster.num_cores`): a rank that waits leaves its share to the others.

Messages are measured as training sends them, in all-reduces of Gloo over pairs (all pairs at once) and over all ranks:

    seconds = start + 2 (n-1) alpha + 2 (n-1)/n bytes / bandwidth

is fitted to them by least squares of relative errors, with no part below 0. What of a message is still waited for
beside a matmul is measured too: on a host the processor carries both.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from deepseek.core.errors import ConfigError, PermanentError
from deepseek.core.machine import describe_machine
from deepseek.core.process_memory import forget_peak, peak_bytes
from deepseek.distributed.topology import LinkClass
from deepseek.planning.machines.cluster import Accelerator, Cluster, Node
from deepseek.planning.machines.constants import get_constants
from deepseek.planning.machines.local_ranks import run_ranks
from deepseek.planning.machines.measurement import (
    FAMILY,
    fit_depth,
    rate_attention,
    rate_elementwise,
    rate_matmul,
    rate_memory,
    time_launch,
)

# Sizes of small local runs, in the forms of `measurement.Sizes`: what a rank computes at once there.
_MATMULS = ((512, 256, 256), (512, 1024, 256), (512, 256, 1024), (512, 1024, 1024))
_ATTENTION = (4, 4, 128, 64)
_ELEMENTWISE = (1024, 256)
_MOVED_BYTES = 1 << 25
_BUFFER_BYTES = (1 << 8, 1 << 14, 1 << 18, 1 << 20, 1 << 22, 1 << 23)
_REPEATS = 7
_MOST_RANKS = 64
_TIMEOUT_S = 300.0
PRECISION = "fp32"
"""What local ranks train in: processors without instructions for 16 bits are the rule."""


@dataclass(frozen=True)
class CollectiveTime:
    """Seconds of an all-reduce of `num_bytes` over `size` ranks."""

    size: int
    num_bytes: int
    seconds: float


@dataclass(frozen=True)
class MeasuredRanks:
    """What each rank reaches while all compute: medians over the ranks."""

    num_ranks: int
    matmul_flops: dict[int, float]
    attention_flops: float
    memory_bandwidth_bytes_per_s: float
    elementwise_bytes_per_s: float
    launch_s: float
    exposed_fraction: float
    group_bytes: float
    all_reduces: tuple[CollectiveTime, ...]


def measure_ranks(num_ranks: int) -> MeasuredRanks:
    """Measure `num_ranks` ranks of this machine, all at once; raises `PermanentError` where they cannot meet."""
    if not 2 <= num_ranks <= _MOST_RANKS:
        raise ConfigError(f"{num_ranks} ranks share nothing that could be measured here; give 2 to {_MOST_RANKS}")
    found = run_ranks(__name__, [str(num_ranks)], num_ranks, _TIMEOUT_S)
    ranks: list[dict[str, Any]] = found["ranks"]

    def average(name: str) -> float:
        return statistics.median(float(rank[name]) for rank in ranks)

    depths = [int(depth) for depth in ranks[0]["matmul_flops"]]
    return MeasuredRanks(
        num_ranks=num_ranks,
        matmul_flops={depth: statistics.median(rank["matmul_flops"][str(depth)] for rank in ranks) for depth in depths},
        attention_flops=average("attention_flops"),
        memory_bandwidth_bytes_per_s=average("memory_bandwidth_bytes_per_s"),
        elementwise_bytes_per_s=average("elementwise_bytes_per_s"),
        launch_s=average("launch_s"),
        exposed_fraction=average("exposed_fraction"),
        group_bytes=average("group_bytes"),
        all_reduces=tuple(CollectiveTime(*row) for row in found["all_reduces"]),
    )


def build_rank_cluster(measured: MeasuredRanks, num_cores: int | None = None) -> Cluster:
    """Build the cluster whose devices are ranks of one host, with the speeds that were measured.

    `num_cores` are those that the ranks share; without it all of this machine.

    >>> sizes = [(n, s) for n in (2, 4) for s in (8, 10**6)]
    >>> times = tuple(CollectiveTime(n, s, 1e-3 + 2 * (n - 1) * (1e-4 + s / n / 1e9)) for n, s in sizes)
    >>> cluster = build_rank_cluster(MeasuredRanks(4, {256: 1e10, 1024: 1e10}, 5e9, 4e9, 2e9, 1e-5, 0.9, 0.0, times), 2)
    >>> cluster.num_devices, cluster.num_cores, round(cluster.scale_up.alpha_s, 6)
    (4, 2, 0.0001)
    """
    peak, depth = fit_depth(measured.matmul_flops)
    start_s, link = fit_all_reduces(measured.all_reduces)
    shares = replace(
        get_constants(FAMILY),
        matmul_fraction=1.0,
        matmul_fill_depth=depth,
        attention_fraction=measured.attention_flops / peak,
        memory_fraction=measured.elementwise_bytes_per_s / measured.memory_bandwidth_bytes_per_s,
        launch_s=measured.launch_s,
        scale_up_fraction=1.0,
        network_fraction=1.0,
        collective_s=start_s,
        exposed_fraction=measured.exposed_fraction,
        communicator_bytes=measured.group_bytes,
    )
    machine = describe_machine()
    device = Accelerator(
        name=f"a rank of {measured.num_ranks} on {machine['processor']}",
        memory_bytes=machine["memory_bytes"] / measured.num_ranks,
        memory_bandwidth_bytes_per_s=measured.memory_bandwidth_bytes_per_s,
        peak_flops={PRECISION: peak},
        scale_up=link,
        network=link,
        family=FAMILY,
        scale_up_size=measured.num_ranks,
        processors=1,
        shares=shares,
        is_host=True,
    )
    return Cluster((Node(device, measured.num_ranks),), link, num_cores=num_cores or machine["num_cores"])


def fit_all_reduces(times: Sequence[CollectiveTime]) -> tuple[float, LinkClass]:
    """Fit what an all-reduce takes to start, and the link that carries it; no part is below 0.

    >>> rows = [CollectiveTime(n, s, 1e-3 + 2 * (n - 1) * (1e-4 + s / n / 1e9)) for n in (2, 4) for s in (8, 10**6)]
    >>> start_s, link = fit_all_reduces(rows)
    >>> round(start_s, 6), round(link.alpha_s, 6), round(link.bandwidth_bytes_per_s / 1e9, 3)
    (0.001, 0.0001, 1.0)
    """
    rows = np.array([[1.0, 2.0 * (t.size - 1), 2.0 * (t.size - 1) / t.size * t.num_bytes] for t in times])
    rows = rows / np.array([t.seconds for t in times])[:, None]  # errors count relative to what was measured
    kept = list(range(rows.shape[1]))
    found = np.zeros(rows.shape[1])
    while kept:
        answer, *_ = np.linalg.lstsq(rows[:, kept], np.ones(len(rows)), rcond=None)
        if np.all(answer >= 0):
            found[kept] = answer
            break
        del kept[int(np.argmin(answer))]
    start_s, alpha_s, byte_s = (float(value) for value in found)
    if byte_s <= 0:
        raise PermanentError(
            f"all-reduces of {[(t.num_bytes, t.seconds) for t in times]} do not take longer when they are longer; "
            "measure on a quieter machine"
        )
    return start_s, LinkClass(alpha_s, 1.0 / byte_s)


def run_rank(store: str, world_size: int, rank: int) -> dict[str, Any]:
    """Measure as one of the ranks, in step with the others; return what all of them found."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    device = torch.device("cpu")

    def together(measure: Callable[..., float], *arguments: Any) -> float:
        dist.barrier()
        return measure(device, *arguments, _REPEATS)

    rates: dict[int, list[float]] = {}
    for shape in _MATMULS:
        rates.setdefault(shape[2], []).append(together(rate_matmul, PRECISION, shape))
    own: dict[str, Any] = {
        "matmul_flops": {depth: statistics.median(found) for depth, found in rates.items()},
        "attention_flops": together(rate_attention, PRECISION, _ATTENTION),
        "memory_bandwidth_bytes_per_s": together(rate_memory, _MOVED_BYTES),
        "elementwise_bytes_per_s": together(rate_elementwise, PRECISION, _ELEMENTWISE),
        "launch_s": together(time_launch),
        "exposed_fraction": measure_exposed(world_size),
    }
    before = _note_memory()
    pairs = [dist.new_group([first, first + 1]) for first in range(0, world_size - 1, 2)]
    mine = pairs[rank // 2] if rank // 2 < len(pairs) else None
    all_reduces = _time_all_reduces(2, mine)
    own["group_bytes"] = max(peak_bytes() - before - max(_BUFFER_BYTES), 0)
    if world_size > 2:
        all_reduces += _time_all_reduces(world_size, dist.group.WORLD)
    ranks: list[Any] = [None] * world_size
    dist.all_gather_object(ranks, own)
    dist.destroy_process_group()
    return {"ranks": ranks, "all_reduces": all_reduces}


def _note_memory() -> int:
    forget_peak()
    return peak_bytes()


def _time_all_reduces(size: int, group: Any) -> list[tuple[int, int, float]]:
    """Return (ranks, bytes, seconds) of all-reduces over `group`; a rank without one waits for the others."""
    import torch
    import torch.distributed as dist

    found = []
    for num_bytes in _BUFFER_BYTES:
        buffer = torch.zeros(num_bytes // 4)
        seconds = []
        for _ in range(_REPEATS + 1):
            dist.barrier()
            began_s = time.perf_counter()
            if group is not None:
                dist.all_reduce(buffer, group=group)
            seconds.append(time.perf_counter() - began_s)
        slowest = torch.tensor([statistics.median(seconds[1:])], dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        found.append((size, num_bytes, float(slowest)))
    return found


def measure_exposed(world_size: int) -> float:
    """Measure the share of an all-reduce that is still waited for when matmuls of about its length run beside it."""
    import torch
    import torch.distributed as dist

    buffer = torch.zeros(max(_BUFFER_BYTES) // 4)
    left, right = torch.randn(256, 512), torch.randn(512, 512)

    def compute(count: int) -> None:
        for _ in range(count):
            left @ right

    def exchange() -> Any:
        return dist.all_reduce(buffer, async_op=True)

    def take(work: Callable[[], object]) -> float:
        seconds = []
        for _ in range(_REPEATS + 1):
            dist.barrier()
            began_s = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began_s)
        return statistics.median(seconds[1:])

    message_s = take(lambda: exchange().wait())
    count = torch.tensor([max(int(message_s / max(take(lambda: compute(4)) / 4, 1e-6)), 1)])
    dist.broadcast(count, 0)  # all ranks compute alike
    matmuls = int(count)
    compute_s = take(lambda: compute(matmuls))

    def do_both() -> None:
        work = exchange()
        compute(matmuls)
        work.wait()

    both_s = take(do_both)
    return min(max((both_s - compute_s) / min(message_s, compute_s), 0.0), 1.0)


if __name__ == "__main__":
    _found = run_rank(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    if sys.argv[3] == "0":
        sys.stdout.write(json.dumps(_found))
