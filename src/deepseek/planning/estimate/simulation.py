"""Pipeline schedules, event by event: which stage works on which micro-batch when, and how long everybody waits.

A schedule is an order of work for each stage (`order_work`): forward and backward passes of chunks of layers, and for
zero bubble the weight gradients apart. `simulate` plays the orders: an event starts when its stage is free and what it
needs has arrived, a message takes `message_s`. Nothing is assumed about even stages, so imbalance shows as it would.

    gpipe        all forwards, then all backwards                       (Huang et al. 2019)
    1f1b         a few forwards, then one backward per forward          (Narayanan et al. 2019, 2021)
    interleaved  the same with `virtual_stages` chunks on each stage    (Narayanan et al. 2021, 2.2)
    zero_bubble  backward split in two; weight gradients fill the gaps  (Qi et al. 2023, ZB-H1)

`time_schedule` is the closed form that the search uses; for even stages it equals the simulation (tested), for uneven
ones it is close from above.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
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


@dataclass(frozen=True)
class Event:
    """Work that was done on `stage` from `start_s` to `end_s`."""

    stage: int
    work: Work
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """All events of one step, in order of their start."""

    events: tuple[Event, ...]
    num_stages: int

    @property
    def step_time_s(self) -> float:
        """When the last stage is done."""
        return max(event.end_s for event in self.events)

    @property
    def bubble_fraction(self) -> float:
        """Share of the stages' time in which they wait."""
        busy = sum(event.end_s - event.start_s for event in self.events)
        return 1.0 - busy / (self.step_time_s * self.num_stages)

    def count_held(self, stage: int) -> int:
        """Most micro-batch chunks whose activations `stage` holds at once."""
        changes: list[tuple[float, int]] = []
        for event in self.events:
            if event.stage == stage and event.work.kind == "forward":
                changes.append((event.start_s, 1))
            elif event.stage == stage and event.work.kind == "backward":
                changes.append((event.end_s, -1))
        held, most = 0, 0
        for _, change in sorted(changes):
            held += change
            most = max(most, held)
        return most


@dataclass(frozen=True)
class StageWork:
    """Seconds of one chunk of one stage for one micro-batch; `weight_s` is a part of `backward_s`."""

    forward_s: float
    backward_s: float
    weight_s: float = 0.0


def order_work(
    schedule: str, num_stages: int, stage: int, num_micro_batches: int, virtual_stages: int = 1
) -> list[Work]:
    """What `stage` does, in order.

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
    """`warm` forwards, then forward and backward in turns, then the backwards that are left."""
    order = forwards[:warm]
    for forward, backward in zip(forwards[warm:], backwards, strict=False):
        order += [forward, backward]
    return order + backwards[len(forwards) - warm :]


def _order_interleaved(num_stages: int, stage: int, num_micro_batches: int, chunks: int) -> list[Work]:
    total = num_micro_batches * chunks

    def place(step: int, kind: Kind) -> Work:
        group, inside = divmod(step, num_stages * chunks)
        chunk, offset = divmod(inside, num_stages)
        return Work(kind, group * num_stages + offset, chunk if kind == "forward" else chunks - 1 - chunk)

    forwards = [place(step, "forward") for step in range(total)]
    backwards = [place(step, "backward") for step in range(total)]
    warm = min((num_stages - stage - 1) * 2 + (chunks - 1) * num_stages, total)
    return _alternate(forwards, backwards, warm)


def _delay_weights(order: list[Work], stage: int) -> list[Work]:
    """Weight gradients follow `stage` backwards later, so that the drain of the pipeline finds work (ZB-H1)."""
    delayed: list[Work] = []
    waiting: list[Work] = []
    for work in order:
        delayed.append(work)
        if work.kind == "backward":
            waiting.append(Work("weight", work.micro_batch, work.chunk))
            if len(waiting) > stage:
                delayed.append(waiting.pop(0))
    return delayed + waiting


def simulate(
    schedule: str,
    stages: Sequence[StageWork],
    num_micro_batches: int,
    *,
    virtual_stages: int = 1,
    message_s: float = 0.0,
) -> Timeline:
    """Play a schedule; `stages[i]` is the work of one chunk of stage `i`, for one micro-batch.

    >>> even = [StageWork(1.0, 2.0)] * 4
    >>> simulate("1f1b", even, 8).step_time_s, simulate("gpipe", even, 8).step_time_s
    (33.0, 33.0)
    """
    count = len(stages)
    orders = [order_work(schedule, count, stage, num_micro_batches, virtual_stages) for stage in range(count)]
    is_split = schedule == "zero_bubble"
    done: dict[tuple[str, int, int], float] = {}
    free = [0.0] * count
    places = [0] * count
    events: list[Event] = []
    while any(places[stage] < len(orders[stage]) for stage in range(count)):
        moved = False
        for stage in range(count):
            while places[stage] < len(orders[stage]):
                work = orders[stage][places[stage]]
                ready = _find_ready(work, stage, count, virtual_stages, done, message_s)
                if ready is None:
                    break
                start = max(free[stage], ready)
                end = start + _take(stages[stage], work.kind, is_split)
                done[work.kind, work.micro_batch, work.chunk * count + stage] = end
                events.append(Event(stage, work, start, end))
                free[stage], places[stage], moved = end, places[stage] + 1, True
        assert moved, "the orders wait for each other"
    return Timeline(tuple(sorted(events, key=lambda event: (event.start_s, event.stage))), count)


def _take(stage: StageWork, kind: Kind, is_split: bool) -> float:
    if kind == "forward":
        return stage.forward_s
    if kind == "weight":
        return stage.weight_s
    return stage.backward_s - (stage.weight_s if is_split else 0.0)


def _find_ready(
    work: Work, stage: int, count: int, chunks: int, done: dict[tuple[str, int, int], float], message_s: float
) -> float | None:
    """When what `work` needs has arrived, or `None` while it has not been started."""
    virtual = work.chunk * count + stage
    if work.kind == "weight":
        return done.get(("backward", work.micro_batch, virtual))
    if work.kind == "forward":
        return _receive(done, ("forward", work.micro_batch, virtual - 1), message_s) if virtual else 0.0
    if virtual == count * chunks - 1:
        return done.get(("forward", work.micro_batch, virtual))
    return _receive(done, ("backward", work.micro_batch, virtual + 1), message_s)


def _receive(done: dict[tuple[str, int, int], float], key: tuple[str, int, int], message_s: float) -> float | None:
    sent = done.get(key)
    return None if sent is None else sent + message_s


def time_schedule(
    schedule: str,
    num_stages: int,
    num_micro_batches: int,
    work: StageWork,
    *,
    virtual_stages: int = 1,
) -> float:
    """Seconds of one step with even stages, in closed form; `work` is a whole stage's, for one micro-batch.

    >>> time_schedule("interleaved", 4, 8, StageWork(1.0, 2.0), virtual_stages=2)
    28.5
    """
    _check_counts(schedule, num_stages, num_micro_batches, virtual_stages)
    both = work.forward_s + work.backward_s
    bubble = (num_stages - 1) * both / virtual_stages
    if schedule == "zero_bubble":
        bubble -= min(2 * (num_stages - 1), num_micro_batches + num_stages - 2) * work.weight_s
    return num_micro_batches * both + bubble


def group_events(timeline: Timeline) -> dict[int, list[Event]]:
    """The events of each stage, in order."""
    rows: dict[int, list[Event]] = defaultdict(list)
    for event in timeline.events:
        rows[event.stage].append(event)
    return dict(rows)
