"""Pipeline schedules: who computes what when, as one table of orders.

`order_work` says in which order one stage does its work: forward and backward passes of chunks of layers, and for zero
bubble the weight gradients apart. `planning/estimate/simulation.py` times these orders; whatever executes a pipeline
follows the same ones, so what was estimated is what runs. Pure values, no tensors.

    gpipe        all forwards, then all backwards                       (Huang et al. 2019)
    1f1b         a few forwards, then one backward per forward          (Narayanan et al. 2019, 2021)
    interleaved  the same with `virtual_stages` chunks on each stage    (Narayanan et al. 2021, 2.2)
    zero_bubble  backward split in two; weight gradients fill the gaps  (Qi et al. 2023, ZB-H1)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deepseek.core.errors import ConfigError
from deepseek.core.names import explain_unknown
from deepseek.distributed.plan import SCHEDULES

Kind = Literal["forward", "backward", "weight"]


@dataclass(frozen=True)
class Work:
    """One item of a stage's order: a pass of one micro-batch through one of the stage's chunks."""

    kind: Kind
    micro_batch: int
    chunk: int = 0


def order_work(
    schedule: str, num_stages: int, stage: int, num_micro_batches: int, virtual_stages: int = 1
) -> list[Work]:
    """List what `stage` does, in order.

    >>> [work.kind[0] for work in order_work("1f1b", 2, 0, 3)]
    ['f', 'f', 'b', 'f', 'b', 'b']
    """
    _check_counts(schedule, num_stages, num_micro_batches, virtual_stages)
    if schedule == "interleaved":
        return _order_interleaved(num_stages, stage, num_micro_batches, virtual_stages)
    forwards = [Work("forward", index) for index in range(num_micro_batches)]
    backwards = [Work("backward", index) for index in range(num_micro_batches)]
    if schedule == "gpipe":
        return forwards + backwards
    warm = min(num_stages - stage - 1, num_micro_batches)
    order = _alternate(forwards, backwards, warm)
    return _delay_weights(order, stage) if schedule == "zero_bubble" else order


def _check_counts(schedule: str, num_stages: int, num_micro_batches: int, virtual_stages: int) -> None:
    if schedule not in SCHEDULES:
        raise ConfigError(explain_unknown("schedule", schedule, SCHEDULES))
    for name, value in (("stages", num_stages), ("micro-batches", num_micro_batches), ("chunks", virtual_stages)):
        if value < 1:
            raise ConfigError(f"a pipeline with {value} {name} does nothing; give at least 1")
    if schedule == "interleaved" and num_micro_batches % num_stages:
        raise ConfigError(
            f"{num_micro_batches} micro-batches cannot be interleaved over {num_stages} stages; choose a multiple"
        )


def _alternate(forwards: list[Work], backwards: list[Work], warm: int) -> list[Work]:
    """Order `warm` forwards, then one forward and one backward by turns, then the backwards that are left."""
    order = forwards[:warm]
    for forward, backward in zip(forwards[warm:], backwards, strict=False):
        order += [forward, backward]
    return order + backwards[len(forwards) - warm :]


def _order_interleaved(num_stages: int, stage: int, num_micro_batches: int, chunks: int) -> list[Work]:
    """Order groups of `num_stages` micro-batches: each group passes chunk after chunk, backward in reverse."""
    total = num_micro_batches * chunks

    def find_work(step: int, kind: Kind) -> Work:
        group, inside = divmod(step, num_stages * chunks)
        chunk, offset = divmod(inside, num_stages)
        return Work(kind, group * num_stages + offset, chunk if kind == "forward" else chunks - 1 - chunk)

    forwards = [find_work(step, "forward") for step in range(total)]
    backwards = [find_work(step, "backward") for step in range(total)]
    warm = min((num_stages - stage - 1) * 2 + (chunks - 1) * num_stages, total)
    return _alternate(forwards, backwards, warm)


def _delay_weights(order: list[Work], stage: int) -> list[Work]:
    """Put weight gradients `stage` backwards later, so that the drain of the pipeline finds work (ZB-H1)."""
    delayed: list[Work] = []
    waiting: list[Work] = []
    for work in order:
        delayed.append(work)
        if work.kind == "backward":
            waiting.append(Work("weight", work.micro_batch, work.chunk))
            if len(waiting) > stage:
                delayed.append(waiting.pop(0))
    return delayed + waiting
