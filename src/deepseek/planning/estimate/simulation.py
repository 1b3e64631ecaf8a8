"""Pipelines timed event by event: which stage works on which micro-batch when, and how long everybody waits.

`simulate` runs the orders of `distributed/schedules.py` against a clock: an event starts when its stage is free and
what it needs has arrived, a message takes `message_s`. Nothing is assumed about even stages, so imbalance shows as it
would. The search uses the closed form in `step.py`, which equals this for even stages and is close from above for
uneven ones (tested); `deepseek plan --picture` plots the events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deepseek.distributed.schedules import Kind, Work, order_work


@dataclass(frozen=True)
class TimelineEvent:
    """Work that was done on `stage` from `start_s` to `end_s`."""

    stage: int
    work: Work
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """All events of one step, in order of their start."""

    events: tuple[TimelineEvent, ...]
    num_stages: int

    @property
    def step_time_s(self) -> float:
        """Seconds until the last stage is done."""
        return max(event.end_s for event in self.events)

    @property
    def bubble_fraction(self) -> float:
        """Share of the stages' time in which they wait."""
        busy = sum(event.end_s - event.start_s for event in self.events)
        return 1.0 - busy / (self.step_time_s * self.num_stages)


@dataclass(frozen=True)
class StageWork:
    """Seconds of one chunk of one stage for one micro-batch; `weight_s` is a part of `backward_s`."""

    forward_s: float
    backward_s: float
    weight_s: float = 0.0


@dataclass(frozen=True)
class _Pass:
    """One kind of pass of one micro-batch through one chunk, whose chunks are numbered along the whole model."""

    kind: Kind
    micro_batch: int
    virtual_stage: int


def simulate(
    schedule: str,
    stages: Sequence[StageWork],
    num_micro_batches: int,
    *,
    virtual_stages: int = 1,
    message_s: float = 0.0,
) -> Timeline:
    """Time a schedule; `stages[i]` is the work of one chunk of stage `i`, for one micro-batch.

    >>> even = [StageWork(1.0, 2.0)] * 4
    >>> simulate("1f1b", even, 8).step_time_s, simulate("gpipe", even, 8).step_time_s
    (33.0, 33.0)
    """
    count = len(stages)
    orders = [order_work(schedule, count, stage, num_micro_batches, virtual_stages) for stage in range(count)]
    is_split = schedule == "zero_bubble"
    done_s: dict[_Pass, float] = {}
    free_s = [0.0] * count
    num_done = [0] * count
    events: list[TimelineEvent] = []
    while any(num_done[stage] < len(orders[stage]) for stage in range(count)):
        has_moved = False
        for stage in range(count):
            while num_done[stage] < len(orders[stage]):
                work = orders[stage][num_done[stage]]
                current = _Pass(work.kind, work.micro_batch, work.chunk * count + stage)
                ready_s = _find_ready(current, count * virtual_stages - 1, done_s, message_s)
                if ready_s is None:
                    break
                start_s = max(free_s[stage], ready_s)
                end_s = start_s + _get_seconds(stages[stage], work.kind, is_split)
                done_s[current] = end_s
                events.append(TimelineEvent(stage, work, start_s, end_s))
                free_s[stage], num_done[stage], has_moved = end_s, num_done[stage] + 1, True
        assert has_moved, "the orders wait for each other"
    return Timeline(tuple(sorted(events, key=lambda event: (event.start_s, event.stage))), count)


def _get_seconds(stage: StageWork, kind: Kind, is_split: bool) -> float:
    if kind == "forward":
        return stage.forward_s
    if kind == "weight":
        return stage.weight_s
    return stage.backward_s - (stage.weight_s if is_split else 0.0)


def _find_ready(current: _Pass, last: int, done_s: dict[_Pass, float], message_s: float) -> float | None:
    """Return when what a pass needs has arrived, or `None` while that has not been computed.

    The pass before it on the same stage needs no message; `last` is the model's last chunk, where backward begins.
    """
    if current.kind == "forward" and current.virtual_stage == 0:
        return 0.0
    if current.kind == "weight":
        needed, sent_s = _Pass("backward", current.micro_batch, current.virtual_stage), 0.0
    elif current.kind == "forward":
        needed, sent_s = _Pass("forward", current.micro_batch, current.virtual_stage - 1), message_s
    elif current.virtual_stage == last:
        needed, sent_s = _Pass("forward", current.micro_batch, current.virtual_stage), 0.0
    else:
        needed, sent_s = _Pass("backward", current.micro_batch, current.virtual_stage + 1), message_s
    computed_s = done_s.get(needed)
    return None if computed_s is None else computed_s + sent_s
