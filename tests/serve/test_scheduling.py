"""The policy of continuous batching, without a model: every rule as a property over random traffic."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.core.errors import OverloadedError
from deepseek.serve.scheduling import Move, Schedule, Scheduler
from deepseek.serve.sequences import GenerationRequest, LiveSequence


def make_sequence(prompt_length: int = 4, max_tokens: int = 3) -> LiveSequence:
    return LiveSequence(GenerationRequest(prompt=(1,) * prompt_length, max_tokens=max_tokens))


class Slots:
    """What the KV cache would hold: for each slot, the sequence whose keys are in it and how many."""

    def __init__(self, num_slots: int) -> None:
        self.slots: list[tuple[int, int] | None] = [None] * num_slots

    def run(self, schedule: Schedule) -> None:
        for chunk in schedule.chunks:
            expected = None if chunk.start == 0 else (chunk.sequence.id, chunk.start)
            assert chunk.start == 0 or self.slots[chunk.slot] == expected, "a prompt goes on where it ended"
            self.slots[chunk.slot] = (chunk.sequence.id, chunk.stop)
        for slot, sequence in enumerate(schedule.decode):
            assert self.slots[slot] == (sequence.id, sequence.num_cached), "decoding needs all earlier keys in its slot"
            self.slots[slot] = (sequence.id, sequence.num_cached + 1)
        for sequence in schedule.choosing:
            sequence.tokens.append(0)

    def follow(self, moves: list[Move]) -> None:
        for move in moves:
            self.slots[move.target] = self.slots[move.source]


requests = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 6)), min_size=1, max_size=12)


@settings(deadline=None)
@given(
    requests=requests,
    num_slots=st.integers(1, 4),
    prefill_tokens=st.integers(1, 24),
    cancels=st.dictionaries(st.integers(0, 30), st.integers(0, 11), max_size=6),
)
def test_all_sequences_finish_with_their_own_keys_and_in_bounded_time(
    requests: list[tuple[int, int]], num_slots: int, prefill_tokens: int, cancels: dict[int, int]
) -> None:
    scheduler = Scheduler(num_slots, len(requests), prefill_tokens)
    slots = Slots(num_slots)
    sequences = [make_sequence(*lengths) for lengths in requests]
    scheduler.submit(sequences)
    most_steps = sum(length + max_tokens for length, max_tokens in requests)
    for step in range(most_steps + len(cancels) + 1):
        if (victim := cancels.get(step)) is not None and victim < len(sequences):
            sequences[victim].is_cancelled = True
        for sequence in scheduler.cancelled():
            slots.follow(scheduler.remove(sequence))
        schedule = scheduler.plan()
        assert sum(chunk.stop - chunk.start for chunk in schedule.chunks) <= prefill_tokens
        assert len(scheduler.running) <= num_slots
        assert all(sequence.is_read for sequence in scheduler.running[:-1]), "at most the last is still being read"
        slots.run(schedule)
        for sequence in schedule.choosing:
            if len(sequence.tokens) == sequence.request.max_tokens:
                slots.follow(scheduler.remove(sequence))
        if not scheduler.running and not scheduler.waiting:
            break
    assert not scheduler.running
    assert not scheduler.waiting
    for sequence in sequences:
        assert sequence.is_cancelled or len(sequence.tokens) == sequence.request.max_tokens


@given(requests=requests, num_slots=st.integers(1, 4))
def test_every_decodable_sequence_decodes_in_every_step(requests: list[tuple[int, int]], num_slots: int) -> None:
    scheduler = Scheduler(num_slots, len(requests), prefill_tokens=2)
    scheduler.submit([make_sequence(*lengths) for lengths in requests])
    while scheduler.running or scheduler.waiting:
        decodable = {sequence.id for sequence in scheduler.running if sequence.is_read}
        schedule = scheduler.plan()
        assert {sequence.id for sequence in schedule.decode} == decodable
        for sequence in schedule.choosing:
            sequence.tokens.append(0)
            if len(sequence.tokens) == sequence.request.max_tokens:
                scheduler.remove(sequence)


def test_prompts_start_in_the_order_they_came() -> None:
    scheduler = Scheduler(num_slots=2, max_waiting=8, prefill_tokens=3)
    sequences = [make_sequence(prompt_length=length, max_tokens=1) for length in (7, 1, 5, 2)]
    scheduler.submit(sequences)
    started: list[int] = []
    while scheduler.running or scheduler.waiting:
        schedule = scheduler.plan()
        started += [chunk.sequence.id for chunk in schedule.chunks if chunk.start == 0]
        for sequence in schedule.choosing:
            scheduler.remove(sequence)
    assert started == [sequence.id for sequence in sequences]


def test_several_short_prompts_share_one_step_and_none_is_cut_to_fit() -> None:
    scheduler = Scheduler(num_slots=4, max_waiting=8, prefill_tokens=10)
    scheduler.submit([make_sequence(prompt_length=4) for _ in range(3)])
    schedule = scheduler.plan()
    assert [(chunk.slot, chunk.start, chunk.stop) for chunk in schedule.chunks] == [(0, 0, 4), (1, 0, 4)]
    assert [chunk.is_last for chunk in schedule.chunks] == [True, True]
    assert [(chunk.slot, chunk.start, chunk.stop) for chunk in scheduler.plan().chunks] == [(2, 0, 4)]


@given(requests=requests, num_slots=st.integers(1, 4), prefill_tokens=st.integers(1, 5))
def test_a_prompt_is_cut_where_it_would_be_cut_alone(
    requests: list[tuple[int, int]], num_slots: int, prefill_tokens: int
) -> None:
    scheduler = Scheduler(num_slots, len(requests), prefill_tokens)
    scheduler.submit([make_sequence(*lengths) for lengths in requests])
    while scheduler.running or scheduler.waiting:
        schedule = scheduler.plan()
        for chunk in schedule.chunks:
            assert chunk.start % prefill_tokens == 0
            assert chunk.stop == chunk.start + prefill_tokens or chunk.is_last
        for sequence in schedule.choosing:
            sequence.tokens.append(0)
            if len(sequence.tokens) == sequence.request.max_tokens:
                scheduler.remove(sequence)


def test_a_batch_that_does_not_fit_is_refused_whole() -> None:
    scheduler = Scheduler(num_slots=1, max_waiting=2, prefill_tokens=4)
    scheduler.submit([make_sequence(), make_sequence()])
    with pytest.raises(OverloadedError, match="2 more were sent, where 3 is the most"):
        scheduler.submit([make_sequence(), make_sequence()])
    assert len(scheduler.waiting) == 2
    scheduler.submit([make_sequence()])


def test_a_cancelled_waiting_sequence_leaves_without_moves() -> None:
    scheduler = Scheduler(num_slots=1, max_waiting=2, prefill_tokens=4)
    first, second = make_sequence(), make_sequence()
    scheduler.submit([first, second])
    scheduler.plan()
    second.is_cancelled = True
    assert scheduler.cancelled() == [second]
    assert scheduler.remove(second) == []
    assert scheduler.running == [first]


def test_the_policy_needs_no_torch() -> None:
    rooms = ", ".join(
        f"deepseek.serve.{name}" for name in ("scheduling", "detokenizing", "requests", "responses", "config")
    )
    program = f"import sys, {rooms}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
