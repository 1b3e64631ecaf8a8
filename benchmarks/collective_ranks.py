"""What one rank of `benchmarks.collectives` does: `python -m benchmarks.collective_ranks JOB`, the job as JSON.

All sides take turns in every round; a round's time is that of the slowest rank. Rank 0 writes the result as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.rank_processes import answer
from deepseek.core.errors import DeepSeekError
from deepseek.distributed import DeepSeekComm, average_gradients, comm_overlap
from deepseek.distributed.collective_ledger import CollectiveLedger

_COUNTER = Path("/sys/class/net/eth0/statistics/tx_bytes")


def main() -> None:
    """Join, run every part of the job, and write what was measured."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    with DeepSeekComm.init("gloo", init_method=job["meeting"], timeout_s=240) as comm:
        result = {name: _PARTS[name](comm, job) for name in job["parts"]}
        if comm.get_rank() == 0:
            answer(result)
        comm.barrier()


def time_all_reduces(comm: DeepSeekComm, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Seconds of each side at each size, and bytes over the cards of all hosts beside the formula's."""
    rows = []
    for size in job["sizes"]:
        buffer = torch.ones(size // 4)
        sides = {
            "gloo": lambda buffer=buffer: dist.all_reduce(buffer),
            **{
                name: lambda buffer=buffer, name=name: comm.all_reduce(buffer, algorithm=name)
                for name in ("auto", "ring", "hierarchical")
            },
        }
        for run in sides.values():
            run()  # connects, and for auto: measures
        times: dict[str, list[float]] = {name: [] for name in sides}
        wires: dict[str, list[float]] = {name: [] for name in sides}
        names = list(sides)
        for index in range(job["rounds"]):
            first = index % len(names)  # another one each time: who follows a pause finds the connections slower
            for name in names[first:] + names[:first]:
                buffer.fill_(1.0)
                seconds, wire = _measure(comm, sides[name])
                times[name].append(seconds)
                wires[name].append(wire)
        chosen = comm.algorithms.find("world:all_reduce", size)
        rows.append({"bytes": size, "seconds": times, "wire_bytes": wires, "chosen": chosen})
    return rows


def time_all_to_alls(comm: DeepSeekComm, job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of skewed expert traffic padded to the longest part, and as it is; for two kinds of skew."""
    return {kind: _time_all_to_all(comm, job, kind) for kind in ("own favorites", "one favorite")}


def _time_all_to_all(comm: DeepSeekComm, job: dict[str, Any], kind: str) -> dict[str, list[float]]:
    """Loads follow Zipf's law: with the ranks' favorite experts spread over all, or with one that all prefer."""
    size, rank, width = comm.get_world_size(), comm.get_rank(), 256
    weights = [1.0 / (expert + 1) for expert in range(size)]
    parts = [round(job["tokens"] * weight / sum(weights)) for weight in weights]
    counts = [
        [parts[(target - (source if kind == "own favorites" else 0)) % size] for target in range(size)]
        for source in range(size)
    ]
    sent, received = counts[rank], [row[rank] for row in counts]
    rows, padded = torch.ones(sum(sent), width), torch.ones(max(parts) * size, width)
    arrived = torch.empty_like(padded)
    sides: dict[str, Callable[[], object]] = {
        "padded, gloo": lambda: dist.all_to_all_single(arrived, padded),
        "padded, ring": lambda: comm.all_to_all(padded, algorithm="ring"),
        **{
            f"uneven, {name}": lambda name=name: comm.all_to_all(rows, sent, received, algorithm=name)
            for name in ("native", "ring", "pairwise", "hierarchical")
        },
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round_index in range(job["rounds"] + 1):
        for name, run in sides.items():
            seconds, _ = _measure(comm, run)
            if round_index:
                times[name].append(seconds)
    return times


def time_links(comm: DeepSeekComm, job: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """Seconds of a step of messages inside hosts and across, for the simulation's links.

    All ranks take part, as in a step of a schedule: each swaps a message with one on its host, or on the next host, and
    sizes are what all ranks of a host send together. Hosts have two ranks each, and their number is even.
    """
    placement, per_host = comm.topology.placement, comm.topology.domain_size
    position = placement.index(comm.get_rank())
    inside = placement[position ^ 1]
    across = placement[position + per_host if position // per_host % 2 == 0 else position - per_host]
    found: dict[str, list[tuple[int, float]]] = {}
    for link, other in (("inside", inside), ("across", across)):
        found[link] = []
        for size in (64, 1 << 14, 1 << 20, 1 << 22):
            share = torch.zeros(size // per_host, dtype=torch.uint8)
            arrived = torch.empty_like(share)
            seconds = []
            for _ in range(6):
                dist.barrier()
                began_s = time.perf_counter()
                operations = [dist.P2POp(dist.isend, share, other), dist.P2POp(dist.irecv, arrived, other)]
                for work in dist.batch_isend_irecv(operations):
                    work.wait()
                slowest = torch.tensor([time.perf_counter() - began_s], dtype=torch.float64)
                dist.all_reduce(slowest, dist.ReduceOp.MAX)
                seconds.append(float(slowest))
            found[link].append((size, sorted(seconds[1:])[len(seconds) // 2 - 1]))
    return found


def time_overlap(comm: DeepSeekComm, job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a backward pass of DDP whose reductions hide behind it, and whose reductions do not."""
    torch.manual_seed(0)
    width = job["width"]
    layers = [layer for _ in range(8) for layer in (torch.nn.Linear(width, width), torch.nn.ReLU())]
    model = DistributedDataParallel(torch.nn.Sequential(*layers), bucket_cap_mb=width * width * 4 / 2**20)
    model.register_comm_hook(None, average_gradients(comm))
    batch = torch.randn(job["batch"], width)
    times: dict[str, list[float]] = {"overlapped": [], "blocking": []}
    exposed: dict[str, list[float]] = {"overlapped": [], "blocking": []}
    for round_index in range(job["rounds"] + 2):  # DDP builds its buckets anew after the first, and auto measures them
        for name, seconds_of in times.items():
            loss = model(batch).square().mean()
            with comm_overlap(enabled=name == "overlapped") as overlap:
                seconds, _ = _measure(comm, loss.backward)
            if round_index > 1:
                seconds_of.append(seconds)
                exposed[name].append(overlap.exposed_s)
    return {"seconds": times, "exposed_s": exposed}


def time_ledger(comm: DeepSeekComm, job: dict[str, Any]) -> dict[str, float]:
    """Seconds that the ledger adds to a call, measured alone, beside a 1 MiB all-reduce over one host's loopback."""
    members = [rank for rank, host in enumerate(comm.topology.hosts) if host == 0]
    group = dist.new_group(members)
    buffer = torch.ones(1 << 18)
    seconds = []
    if comm.get_rank() in members:
        for _ in range(21):
            dist.barrier(group)
            began_s = time.perf_counter()
            dist.all_reduce(buffer, group=group)
            seconds.append(time.perf_counter() - began_s)
    comm.barrier()
    ledger, num_calls = CollectiveLedger(), 20_000
    began_s = time.thread_time()
    for _ in range(num_calls):
        ledger.end(ledger.begin("world", "all_reduce", (1 << 18,), "float32", 1 << 20), {"inside": 1, "across": 2})
    return {
        "call_s": (time.thread_time() - began_s) / num_calls,
        "all_reduce_s": sorted([*seconds, 0.0])[len(seconds) // 2],
    }


def _measure(comm: DeepSeekComm, run: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the slowest rank, and bytes that left the cards of all hosts."""
    dist.barrier()
    before = int(_COUNTER.read_text()) if _COUNTER.exists() else 0
    began_s = time.perf_counter()
    run()
    seconds = time.perf_counter() - began_s
    dist.barrier()
    wire = (int(_COUNTER.read_text()) - before) if _COUNTER.exists() else 0
    is_first = comm.get_rank() == comm.topology.hosts.index(comm.topology.hosts[comm.get_rank()])
    slowest = torch.tensor([seconds], dtype=torch.float64)
    total = torch.tensor([wire if is_first else 0], dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    dist.all_reduce(total)
    return float(slowest), float(total)


_PARTS: dict[str, Callable[[DeepSeekComm, dict[str, Any]], Any]] = {
    "links": time_links,
    "all_reduce": time_all_reduces,
    "all_to_all": time_all_to_alls,
    "overlap": time_overlap,
    "ledger": time_ledger,
}

if __name__ == "__main__":
    try:
        main()
    except DeepSeekError as error:
        sys.exit(str(error))
