"""Running a function on several gloo ranks of this machine, each a process with one thread, forked from one server.

The server imports torch once, so that a world of four costs a second and not four imports. Ranks meet at a file, not
at a port. A rank that is late is asked for the stacks of its threads before all are killed, so that a test that hangs
says where.
"""

import faulthandler
import importlib
import inspect
import multiprocessing
import os
import queue
import signal
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_S = 120.0
_CONTEXT = multiprocessing.get_context("forkserver")
_ROOT = Path(__file__).parents[2]
_PRELOADED = [
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "deepseek.distributed.communicator",
    "pytest",
    "tests.distributed.ranks",
]
_CONTEXT.set_forkserver_preload(_PRELOADED)


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit code, what its function returned, or the traceback of what it raised."""

    exit_code: int | None
    value: Any
    error: str | None


def run_ranks(function, world_size, *arguments, is_grouped=True, timeout_s=TIMEOUT_S):
    """What `function(rank, *arguments)` returned on each rank; a rank that fails fails the test with its traceback.

    With `is_grouped=False` no process group is made: MASTER_ADDR and the like are not set either, and the path of a
    file that a store may be made of is in STORE_FILE, the ranks in RANK and WORLD_SIZE.
    """
    ended = end_ranks(function, world_size, *arguments, is_grouped=is_grouped, timeout_s=timeout_s)
    errors = [f"rank {rank} failed:\n{each.error}" for rank, each in enumerate(ended) if each.error]
    assert not errors, "\n".join(errors)
    assert all(each.exit_code == 0 for each in ended), f"exit codes {[each.exit_code for each in ended]}"
    return [each.value for each in ended]


def end_ranks(function, world_size, *arguments, is_grouped=True, timeout_s=TIMEOUT_S):
    """How each rank of `function(rank, *arguments)` ended; one still alive in the end fails the test."""
    with tempfile.TemporaryDirectory() as folder:
        answers = _CONTEXT.Queue()
        ranks = [
            _CONTEXT.Process(
                target=_enter,
                args=(_locate(function), rank, world_size, folder, answers, is_grouped, arguments),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            found = _collect(answers, ranks, folder, timeout_s)
            stacks = _read_stacks(ranks, folder)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        assert not stacks, f"ranks were still busy after {timeout_s:g} s:\n{stacks}"
        return [
            Ended(process.exitcode, *found.get(rank, (None, None if process.exitcode == 0 else "it gave no answer")))
            for rank, process in enumerate(ranks)
        ]


def _locate(function):
    """The module and name by which another process imports it; pytest names test files in its own way."""
    path = Path(inspect.getfile(function)).relative_to(_ROOT).with_suffix("")
    return ".".join(path.parts), function.__qualname__


def _collect(answers, ranks, folder, timeout_s):
    """The answers; the time begins when all ranks have imported their work, for which they get `TIMEOUT_S`."""
    found, has_begun, until_s = {}, False, time.monotonic() + TIMEOUT_S
    while any(process.is_alive() for process in ranks) and time.monotonic() < until_s:
        if not has_begun and all((Path(folder) / f"begun{rank}").exists() for rank in range(len(ranks))):
            has_begun, until_s = True, time.monotonic() + timeout_s
        found |= _drain(answers, wait_s=0.05)
    return found | _drain(answers, wait_s=0.05)


def _drain(answers, wait_s):
    found = {}
    while True:
        try:
            rank, value, error = answers.get(timeout=wait_s)
        except queue.Empty:
            return found
        found[rank] = (value, error)


def _read_stacks(ranks, folder):
    late = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for rank in late:
        os.kill(ranks[rank].pid, signal.SIGUSR1)
    if late:
        time.sleep(0.5)
    return "\n".join(f"rank {rank}:\n{(Path(folder) / f'stacks{rank}').read_text()}" for rank in late)


def _enter(location, rank, world_size, folder, answers, is_grouped, arguments):
    torch.set_num_threads(1)
    with (Path(folder) / f"stacks{rank}").open("w") as stacks:
        faulthandler.register(signal.SIGUSR1, stacks)
        store = str(Path(folder) / "store")
        try:
            function = getattr(importlib.import_module(location[0]), location[1])
            (Path(folder) / f"begun{rank}").touch()
            if is_grouped:
                dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
            else:
                os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), STORE_FILE=store)
            value = function(rank, *arguments)
            if is_grouped:
                dist.destroy_process_group()
            answers.put((rank, value, None))
        except BaseException:
            answers.put((rank, None, traceback.format_exc()))
            raise
