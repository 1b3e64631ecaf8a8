"""The ranks of a run: how they come together, agree, and stop at one point of it.

    with joined(config, plan) as ranks:             # None where the run has one process
        best = ranks.share(lambda: judge(model))    # rank 0 does it, all get the result
        yield from in_step(events, ranks)           # rank 0 yields, all go on together, or stop together

Every rank runs the same loop and comes by the same events. Rank 0 alone has a reader, writes the folder, and hears of
Ctrl-C; after each event it tells the others whether to go on, so that all of them leave the loop between the same two
steps and save the run together. A rank that fails is not waited for: its launcher ends the others.
"""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

import deepseek
from deepseek.core.errors import CommunicationError, ConfigError, first_line
from deepseek.core.events import Event
from deepseek.distributed.communicator import DeepSeekComm, is_from_the_wire
from deepseek.distributed.launch_environment import read_launch_environment
from deepseek.distributed.parallel.legality import describe
from deepseek.distributed.plan import Plan
from deepseek.train.config import TrainConfig

T = TypeVar("T")
TIMEOUT_S = 1800.0
"""Seconds that ranks wait for each other, for rank 0 as well when it evaluates or saves."""


class Ranks:
    """This process among the ranks of a run."""

    def __init__(self, comm: DeepSeekComm) -> None:
        self.rank = comm.get_rank()
        self.world_size = comm.get_world_size()

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that evaluates, writes and is read."""
        return self.rank == 0

    def share(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0, and return its result on all ranks; what it raises ends rank 0, and so all."""
        answer: list[Any] = [function() if self.is_first else None]
        dist.broadcast_object_list(answer, 0)
        result: T = answer[0]
        return result

    def collect(self, value: T) -> list[T]:
        """Return the `value` of each rank, in order."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def require_alike(self, settings: dict[str, Any], code: str) -> None:
        """Raise `ConfigError` with the first rank that has other settings or other code than rank 0, and what differs.

        `settings` have dotted names.
        """
        answers = self.collect((settings, code))
        first_settings, first_code = answers[0]
        for rank, (others, other_code) in enumerate(answers):
            names = [name for name in first_settings | others if first_settings.get(name) != others.get(name)]
            if names:
                name = names[0]
                raise ConfigError(
                    f"rank {rank} has {name}={others.get(name)!r} and rank 0 {name}={first_settings.get(name)!r}; "
                    "start all ranks with the same settings"
                )
            if other_code != first_code:
                raise ConfigError(
                    f"rank {rank} runs other code than rank 0 (digests {other_code[:12]} and {first_code[:12]}); "
                    "install the same on all machines"
                )


@contextmanager
def joined(config: TrainConfig, plan: Plan | None) -> Iterator[Ranks | None]:
    """Join the other ranks of a run while the block runs; `None` where this process is alone.

    Raises `ConfigError` where it is alone and `plan` is for several, and `CommunicationError` where ranks that work
    together lose each other.
    """
    is_nested = dist.is_initialized()
    world_size = dist.get_world_size() if is_nested else read_launch_environment(os.environ).world_size
    if world_size == 1:
        if plan is not None and plan.num_devices > 1:
            raise ConfigError(
                f"the plan {describe(plan)} is for {plan.num_devices} ranks and this process is alone; start them "
                f"with: deepseek launch --ranks {plan.num_devices} train ..."
            )
        yield None
        return
    backend = {"cpu": "gloo", "cuda": "nccl"}.get(torch.device(config.device).type, "auto")
    try:
        with DeepSeekComm.init("auto" if is_nested else backend, timeout_s=TIMEOUT_S) as comm:
            yield Ranks(comm)
    except RuntimeError as error:
        if not is_from_the_wire(error):
            raise
        raise CommunicationError(
            f"another rank is gone or late ({first_line(error)}); what it said is the reason, and the same command "
            "goes on from the last checkpoint"
        ) from error


def in_step(events: Generator[Event, None, None], ranks: Ranks | None) -> Generator[Event, None, None]:
    """Yield `events` on rank 0 alone; when its reader leaves, all ranks close theirs at the same one.

    All ranks have to come by the same events.
    """
    if ranks is None:
        yield from events
        return
    for event in events:
        is_left = False
        if ranks.is_first:
            try:
                yield event
            except GeneratorExit:
                is_left = True
        if ranks.share(lambda left=is_left: left):  # type: ignore[misc]
            events.close()
            return


def digest_code(task: type) -> str:
    """Return the SHA-256 of the package and of the file of `task`, which ranks have to share."""
    package = Path(deepseek.__file__).parent
    files = [*sorted(package.rglob("*.py")), *([Path(inspect.getfile(task))] if _has_file(task) else [])]
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _has_file(task: type) -> bool:
    try:
        inspect.getfile(task)
    except (OSError, TypeError):  # made in an interactive session
        return False
    return True
