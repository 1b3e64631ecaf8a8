"""Unequal devices: more layers for fast and roomy stages, more micro-batches for fast replicas.

`assign_layers` cuts a sequence of layers into contiguous stages so that the slowest stage is as fast as possible and no
stage holds more layers than its memory allows (dynamic programming, exact). `assign_batches` gives whole micro-batches
to replicas so that the last one is done as early as possible (exact). Both are plain functions on numbers;
`mixed_clusters.py` calls them, and a `DeviceShares` is what comes out.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepseek.core.errors import ConfigError
from deepseek.planning.machines.cluster import Accelerator, Cluster


@dataclass(frozen=True)
class Share:
    """The share of one stage, or of one replica: devices by rank, its slowest accelerator, layers and micro-batches."""

    first_device: int
    num_devices: int
    accelerator: str
    layers: int
    micro_batches: int


@dataclass(frozen=True)
class DeviceShares:
    """How a plan is laid over unequal devices: one share per stage of the pipeline, or per replica without one."""

    shares: tuple[Share, ...]
    is_by_stage: bool


def assign_layers(
    layer_costs: Sequence[float], seconds_per_cost: Sequence[float], capacities: Sequence[int]
) -> tuple[list[int], float] | None:
    """Return the layers of each stage, in order, and the seconds of the slowest; `None` if they do not all find room.

    Every stage gets at least one layer and at most `capacities[stage]`.

    >>> assign_layers([1.0] * 9, [1.0, 2.0], [9, 9])
    ([6, 3], 6.0)
    """
    total, count = len(layer_costs), len(seconds_per_cost)
    sums = np.concatenate([[0.0], np.cumsum(layer_costs)])
    spans = sums[None, :] - sums[:, None]  # [start, end]
    lengths = np.arange(total + 1)[None, :] - np.arange(total + 1)[:, None]
    best = np.where(np.arange(total + 1) == 0, 0.0, np.inf)
    choices = []
    for seconds, capacity in zip(seconds_per_cost, capacities, strict=True):
        spent = np.where((lengths >= 1) & (lengths <= capacity), spans * seconds, np.inf)
        slowest = np.maximum(best[:, None], spent)
        choices.append(np.argmin(slowest, axis=0))
        best = np.min(slowest, axis=0)
    if not np.isfinite(best[total]):
        return None
    ends = [total]
    for stage in reversed(range(count)):
        ends.append(int(choices[stage][ends[-1]]))
    return [end - start for start, end in itertools.pairwise(reversed(ends))], float(best[total])


def assign_batches(seconds_each: Sequence[float], total: int) -> list[int]:
    """Return the micro-batches of each replica, at least one, so that the last replica is done as early as possible.

    >>> assign_batches([1.0, 2.0], 9)
    [6, 3]
    """
    if total < len(seconds_each):
        raise ConfigError(f"{total} micro-batches are too few for {len(seconds_each)} replicas; give each at least one")
    rates = [1.0 / seconds for seconds in seconds_each]
    # What the ideal gives, rounded down, is never more than an optimum gives; the rest goes where it ends earliest.
    assigned = [max(int(total * rate / sum(rates) - 1e-9), 1) for rate in rates]
    while sum(assigned) > total:
        last = max(
            (replica for replica in range(len(assigned)) if assigned[replica] > 1),
            key=lambda replica: assigned[replica] * seconds_each[replica],
        )
        assigned[last] -= 1
    ends = [
        ((count + 1) * seconds, index)
        for index, (count, seconds) in enumerate(zip(assigned, seconds_each, strict=True))
    ]
    heapq.heapify(ends)
    for _ in range(total - sum(assigned)):
        _, index = ends[0]
        assigned[index] += 1
        heapq.heapreplace(ends, ((assigned[index] + 1) * seconds_each[index], index))
    return assigned


def list_kinds(cluster: Cluster) -> list[Accelerator]:
    """List the different accelerators, in order of rank."""
    return list({device.name: device for device in cluster.accelerators}.values())


def cut_blocks(cluster: Cluster, size: int) -> list[tuple[str, ...]]:
    """List the names of the accelerators in each block of `size` neighbouring devices.

    >>> mixed = Cluster.of("H100-SXM-80GB", gpus_per_node=2).join(Cluster.of("A100-SXM-80GB", gpus_per_node=2))
    >>> cut_blocks(mixed, 2)
    [('H100-SXM-80GB',), ('A100-SXM-80GB',)]
    """
    names = [device.name for device in cluster.accelerators]
    return [tuple(dict.fromkeys(names[start : start + size])) for start in range(0, len(names), size)]
