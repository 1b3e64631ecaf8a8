"""Running a function on several gloo ranks of this machine, each a process of its own with one thread."""

import multiprocessing
import queue
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

_TIMEOUT_S = 150


def run_ranks(function, world_size, *arguments):
    """What `function(rank, *arguments)` returned on each rank; a rank that fails fails the test with its traceback."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        ranks = [
            context.Process(
                target=_enter, args=(function, rank, world_size, str(store), answers, arguments), daemon=True
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            found = dict(_read(answers, ranks) for _ in ranks)
        finally:
            for process in ranks:
                process.join(5)
                if process.is_alive():
                    process.kill()
    return [found[rank] for rank in range(world_size)]


def _read(answers, ranks):
    for _ in range(_TIMEOUT_S):
        try:
            rank, value, error = answers.get(timeout=1)
        except queue.Empty:
            assert not any(process.exitcode for process in ranks), "a rank ended without an answer"
            continue
        assert error is None, f"rank {rank} failed:\n{error}"
        return rank, value
    raise AssertionError(f"a rank gave no answer within {_TIMEOUT_S} s")


def _enter(function, rank, world_size, store, answers, arguments):
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        value = function(rank, *arguments)
        dist.destroy_process_group()
        answers.put((rank, value, None))
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))
        raise
