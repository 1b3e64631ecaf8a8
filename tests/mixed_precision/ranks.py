"""Runs one piece of code on several gloo ranks and returns what each printed as its answer."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

PROLOGUE = """
import datetime, json, sys
import torch
import torch.distributed as dist
rank, world_size = int(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=world_size,
                        timeout=datetime.timedelta(seconds=60))
def answer(value):
    print("ANSWER " + json.dumps(value), flush=True)
"""
EPILOGUE = "\ndist.destroy_process_group()\n"


def run_on_ranks(code, world_size, folder):
    """The answers by rank; an error of any rank fails the test with that rank's traceback."""
    program = PROLOGUE + textwrap.dedent(code) + EPILOGUE
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), str(world_size), str(Path(folder) / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(world_size)
    ]
    results = [process.communicate(timeout=120) for process in processes]
    for process, (_, errors) in zip(processes, results, strict=True):
        assert process.returncode == 0, errors
    return [json.loads(output.split("ANSWER ", 1)[1].splitlines()[0]) for output, _ in results]
