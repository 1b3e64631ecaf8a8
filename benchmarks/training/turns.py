"""Sides that are processes of their own and take turns: settings of allocators and threads hold for a whole process.

    with started("benchmarks.training.images", order) as side:       the benchmark
        side.rate()                                                  one round: units per second
    serve(rounds(order))                                             the process, once it knows its order

A side is a generator: what it does up to each `yield` is one round, and it yields how many units that was and its
losses. The first round builds the model and compiles; `measuring.measure` leaves it out. A library that has the loop
itself calls `Turns` where a round ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

Round = tuple[int, list[float]]
"""Units that were learned from, and the loss of each step."""


@dataclass
class RunningSide:
    """A process that does a round whenever it is asked."""

    requests: IO[str]
    answers: IO[str]
    losses: list[float] = field(default_factory=list)
    """Of all steps so far."""

    def rate(self) -> float:
        """Do one round; return its units per second."""
        print("go", file=self.requests, flush=True)
        answer = self.answers.readline()
        if not answer:
            raise RuntimeError("the process of a side ended; its last lines are above")
        values = json.loads(answer)
        self.losses += values["losses"]
        return float(values["units"] / values["seconds"])


@contextmanager
def started(module: str, order: Mapping[str, Any]) -> Iterator[RunningSide]:
    """Run `python -m module ORDER`, which serves rounds, in a process that ends with the block."""
    command = [sys.executable, "-m", module, json.dumps(order)]
    root = Path(__file__).parent.parent.parent
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdin is not None and process.stdout is not None
        yield RunningSide(process.stdin, process.stdout)
        process.stdin.close()  # which ends its loop


class Turns:
    """What a process says to its benchmark; what libraries print goes to the errors instead."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._began_s = 0.0

    def wait(self) -> bool:
        """Wait to be asked for a round, whose time begins then; `False` where there are no more."""
        is_asked = bool(sys.stdin.readline())
        self._began_s = time.perf_counter()
        return is_asked

    def answer(self, num_units: int, losses: list[float]) -> None:
        """Say that the round is done."""
        seconds = time.perf_counter() - self._began_s
        print(json.dumps({"units": num_units, "seconds": seconds, "losses": losses}), file=self._answers, flush=True)


def set_up_as_the_command_does() -> None:
    """Do what `deepseek train` does to its process; before torch is loaded."""
    from deepseek.core.allocator import keep_freed_memory
    from deepseek.core.openmp import yield_cores

    yield_cores()
    keep_freed_memory()


def serve(rounds: Iterator[Round]) -> None:
    """Do a round whenever one is asked for."""
    turns = Turns()
    while turns.wait():
        turns.answer(*next(rounds))
