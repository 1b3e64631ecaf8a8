"""The ranks of a benchmark: one process each, on this machine or on hosts of `shaped_hosts.py`.

Each rank is `python -m MODULE JOB`, the job as JSON, and meets the others at the file `job["meeting"]`. Rank
0 writes what was measured with `answer`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks.shaped_hosts import Host

_TIMEOUT_S = 1500
_MARK = "RESULT "


def run_ranks(module: str, hosts: Sequence[Host | None], job: dict[str, Any]) -> dict[str, Any]:
    """Run `job` with one rank on each of `hosts`, `None` for this machine; return what rank 0 answered.

    No rank outlives the call, and a rank that fails ends the benchmark with what it wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", module, json.dumps({**job, "meeting": f"file://{folder}/store"})]
        ranks = []
        for rank, host in enumerate(hosts):
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(len(hosts)),
                "LOCAL_WORLD_SIZE": str(len(hosts)),
                "OMP_NUM_THREADS": "1",
                "DEEPSEEK_CACHE_DIR": folder,
                **({} if host is None else {"GLOO_SOCKET_IFNAME": "eth0"}),
            }
            ranks.append(
                subprocess.Popen(
                    command if host is None else host.command(command),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=environment,
                )
            )
        try:
            answers = [rank.communicate(timeout=_TIMEOUT_S) for rank in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
    for rank, process in enumerate(ranks):
        if process.returncode:
            sys.exit(f"rank {rank} failed with exit code {process.returncode}:\n{answers[rank][1][-4000:]}")
    line = next(line for line in answers[0][0].splitlines() if line.startswith(_MARK))
    return dict(json.loads(line.removeprefix(_MARK)))


def answer(result: dict[str, Any]) -> None:
    """Write what was measured, as rank 0."""
    sys.stdout.write(_MARK + json.dumps(result) + "\n")
    sys.stdout.flush()


def place_ranks(num_hosts: int, ranks_per_host: int, placement: str) -> list[int]:
    """Return the host of each rank: host by host ("contiguous"), or in turns over the hosts ("dealt out")."""
    ranks = range(num_hosts * ranks_per_host)
    return [rank // ranks_per_host if placement == "contiguous" else rank % num_hosts for rank in ranks]
