"""Collectives run for real between processes of this machine, beside what the alpha-beta model says of their messages.

`deepseek plan measure --collectives N` starts N processes that run every schedule of `distributed/collectives` over
gloo's loopback, message by message. Beside the fastest of some rounds stands what `time_steps` makes of the same
messages and the measured link, so a user sees how far the model of Hockney (1994) carries here: more processes than
cores share the processor, which the model does not know.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from deepseek.core.errors import ConfigError
from deepseek.distributed.collectives import COLLECTIVES
from deepseek.distributed.collectives.messages import count_sent
from deepseek.distributed.topology import LinkClass
from deepseek.planning.estimate.communication import time_steps
from deepseek.planning.machines.local_ranks import run_ranks

BUFFER_BYTES = (1 << 12, 1 << 22)
_ELEMENT_BYTES = 4
_NUM_ROUNDS = 5
_MOST_PROCESSES = 64
_TIMEOUT_S = 240.0


@dataclass(frozen=True)
class MeasuredCollective:
    """One collective over one size of buffer: seconds as estimated from its messages, and as measured."""

    name: str
    world_size: int
    buffer_bytes: int
    sent_bytes: int
    num_steps: int
    estimated_s: float
    measured_s: float

    def to_dict(self) -> dict[str, Any]:
        """Return everything by name."""
        return asdict(self)


def measure_collectives(world_size: int, link: LinkClass) -> tuple[MeasuredCollective, ...]:
    """Run every collective between `world_size` processes whose messages take what `link` says.

    Raises `PermanentError` where the processes cannot reach each other.
    """
    if not 2 <= world_size <= _MOST_PROCESSES:
        raise ConfigError(f"{world_size} processes exchange nothing useful here; give 2 to {_MOST_PROCESSES}")
    measured = run_ranks(__name__, [str(world_size)], world_size, _TIMEOUT_S)
    return tuple(
        _describe(name, world_size, int(size), float(seconds), link)
        for name, times in measured.items()
        for size, seconds in times
    )


def _describe(name: str, world_size: int, num_elements: int, measured_s: float, link: LinkClass) -> MeasuredCollective:
    steps = COLLECTIVES[name](world_size, num_elements, choose_domain(world_size))
    return MeasuredCollective(
        name,
        world_size,
        num_elements * _ELEMENT_BYTES,
        max(count_sent(steps, rank) for rank in range(world_size)) * _ELEMENT_BYTES,
        len(steps),
        time_steps(steps, _ELEMENT_BYTES, world_size, link, link),
        measured_s,
    )


def choose_domain(world_size: int) -> int:
    """Choose ranks of one domain for the schedules that know domains: two levels where the ranks make them.

    >>> choose_domain(4), choose_domain(3)
    (2, 1)
    """
    return 2 if world_size > 2 and world_size % 2 == 0 else 1


def count_elements(world_size: int, buffer_bytes: int) -> int:
    """Count the elements of a buffer of about `buffer_bytes` that all ranks share evenly."""
    return -(-buffer_bytes // (_ELEMENT_BYTES * world_size)) * world_size


def run_rank(store: str, world_size: int, rank: int) -> dict[str, list[tuple[int, float]]]:
    """Run every collective as one of the ranks; return (elements, fewest seconds) by collective."""
    import torch
    import torch.distributed as dist

    from deepseek.distributed.collectives.executing import run_steps_

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    times: dict[str, list[tuple[int, float]]] = {}
    for name, order_messages in COLLECTIVES.items():
        times[name] = []
        for num_elements in (count_elements(world_size, size) for size in BUFFER_BYTES):
            buffer_N = torch.ones(num_elements)
            steps = order_messages(world_size, num_elements, choose_domain(world_size))
            seconds = []
            for _ in range(_NUM_ROUNDS + 1):
                buffer_N.fill_(1.0)  # sums of ones stay small, however many rounds
                dist.barrier()
                began_s = time.perf_counter()
                run_steps_(buffer_N, steps)
                dist.barrier()  # a collective is done when its last rank is
                seconds.append(time.perf_counter() - began_s)
            times[name].append((num_elements, min(seconds[1:])))
    dist.destroy_process_group()
    return times


if __name__ == "__main__":
    _times = run_rank(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    if sys.argv[3] == "0":
        sys.stdout.write(json.dumps(_times))
