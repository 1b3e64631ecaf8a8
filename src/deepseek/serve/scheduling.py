"""Continuous batching: which sequences take part in the next step of the engine. Pure policy, no torch.

    submit ->  waiting (first come, first served, bounded)  ->  running (one slot of the KV cache each)  ->  remove

A step does two things. It decodes one token for every running sequence whose prompt has been read, and it reads at most
`prefill_tokens` tokens of prompts, in chunks, so that a long prompt delays the others by a bounded time and they delay
it by little. A prompt is always cut at multiples of `prefill_tokens`, whatever else is read in the same step: rounding
in the model, and with it an answer, may depend on where a prompt is cut. A sequence joins as soon as a slot is free and
leaves as soon as it is done; nobody waits for a batch.

`running[i]` is in slot `i`. Slots are kept without gaps: those that decode come first, and at most one, the last, is
still being read. Then a decode step is one view of neighbouring slots. Closing a gap costs at most two slot copies.

Source: Yu et al. 2022, "Orca" (iteration-level scheduling); Agrawal et al. 2023, "Sarathi" (chunked prefill).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

from deepseek.core.errors import OverloadedError
from deepseek.serve.sequences import LiveSequence


@dataclass(frozen=True)
class Chunk:
    """Part of a prompt to be read: tokens `start` to `stop` of `sequence`, into `slot`."""

    sequence: LiveSequence
    slot: int
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        """Whether the prompt is read with this chunk, so that its first token can be chosen."""
        return self.stop == len(self.sequence.request.prompt)


@dataclass(frozen=True)
class Schedule:
    """One step: `decode[i]` is in slot `i`."""

    chunks: tuple[Chunk, ...]
    decode: tuple[LiveSequence, ...]

    @property
    def taking_part(self) -> tuple[LiveSequence, ...]:
        """All sequences that this step works on, each once."""
        return (*(chunk.sequence for chunk in self.chunks), *self.decode)

    @property
    def choosing(self) -> tuple[LiveSequence, ...]:
        """The sequences that get a token in this step: prompts that end, then those that decode."""
        return (*(chunk.sequence for chunk in self.chunks if chunk.is_last), *self.decode)


@dataclass(frozen=True)
class Move:
    """Slot `source` must be copied to slot `target`."""

    source: int
    target: int


class Scheduler:
    """The waiting and the running sequences of one engine."""

    def __init__(self, num_slots: int, max_waiting: int, prefill_tokens: int) -> None:
        self.num_slots = num_slots
        self.max_waiting = max_waiting
        self.prefill_tokens = prefill_tokens
        self.waiting: deque[LiveSequence] = deque()
        self.running: list[LiveSequence] = []

    @property
    def capacity(self) -> int:
        """Sequences that can be in the engine at once, running or waiting."""
        return self.num_slots + self.max_waiting

    @property
    def num_free(self) -> int:
        """Sequences that could be submitted now."""
        return self.capacity - len(self.waiting) - len(self.running)

    def require_room(self, num_sequences: int) -> None:
        """Raise `OverloadedError` when so many more sequences cannot be taken now."""
        if num_sequences > self.num_free:
            raise OverloadedError(
                f"{len(self.running)} sequences are running and {len(self.waiting)} wait, and {num_sequences} more "
                f"were sent, where {self.capacity} is the most; try again later"
            )

    def submit(self, sequences: Collection[LiveSequence]) -> None:
        """Queue all of `sequences`, or none of them: raises `OverloadedError` when they do not all find room."""
        self.require_room(len(sequences))
        self.waiting.extend(sequences)

    def cancelled(self) -> list[LiveSequence]:
        """Sequences that somebody cancelled and that were not removed yet."""
        return [sequence for sequence in (*self.running, *self.waiting) if sequence.is_cancelled]

    def plan(self) -> Schedule:
        """Decide the next step and count its chunks as read; an empty schedule means there is nothing to do."""
        decode = tuple(sequence for sequence in self.running if sequence.is_read)
        chunks = []
        budget = self.prefill_tokens
        while (sequence := self._next_to_read(budget)) is not None:
            stop = min(sequence.num_read + self.prefill_tokens, len(sequence.request.prompt))
            chunks.append(Chunk(sequence, len(self.running) - 1, sequence.num_read, stop))
            budget -= stop - sequence.num_read
            sequence.num_read = stop
        return Schedule(tuple(chunks), decode)

    def remove(self, sequence: LiveSequence) -> list[Move]:
        """Forget `sequence` and close the gap it leaves: the moves, in order, that the KV cache has to follow."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            return []
        gap = self.running.index(sequence)
        last = len(self.running) - 1
        last_decoding = last if self.running[last].is_read else last - 1
        moves = []
        for source in (last_decoding, last):
            if source > gap:
                self.running[gap] = self.running[source]
                moves.append(Move(source, gap))
                gap = source
        self.running.pop()
        return moves

    def _next_to_read(self, budget: int) -> LiveSequence | None:
        """Return the sequence that is being read, else the first waiting one, which takes the next free slot.

        None where its next chunk is longer than `budget`.
        """
        is_reading = bool(self.running) and not self.running[-1].is_read
        if not is_reading and (not self.waiting or len(self.running) == self.num_slots):
            return None
        sequence = self.running[-1] if is_reading else self.waiting[0]
        if min(self.prefill_tokens, len(sequence.request.prompt) - sequence.num_read) > budget:
            return None
        if not is_reading:
            self.running.append(self.waiting.popleft())
        return sequence
