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
            sys.stdout.write("RESULT " + json.dumps(result) + "\n")
            sys.stdout.flush()
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
        for _ in range(job["rounds"]):
            for name, run in sides.items():
                buffer.fill_(1.0)
                seconds, wire = _measure(comm, run)
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
    """Seconds one way of messages inside a host and across, for the simulation's links."""
    hosts = comm.topology.hosts
    pairs = {
        "inside": next(other for other in range(1, len(hosts)) if hosts[other] == hosts[0]),
        "across": next(other for other in range(1, len(hosts)) if hosts[other] != hosts[0]),
    }
    found: dict[str, list[tuple[int, float]]] = {}
    for link, other in pairs.items():
        found[link] = []
        for size in (64, 1 << 14, 1 << 20, 1 << 22):
            buffer = torch.zeros(size, dtype=torch.uint8)
            seconds = []
            for _ in range(6):
                comm.barrier()
                began_s = time.perf_counter()
                if comm.get_rank() == 0:
                    comm.send(buffer, other)
                    comm.recv(buffer, other)
                elif comm.get_rank() == other:
                    comm.recv(buffer, 0)
                    comm.send(buffer, 0)
                seconds.append((time.perf_counter() - began_s) / 2)
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
