"""The thread and its streams with an engine that is made by hand, so that every moment can be held."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import pytest

from deepseek.core.errors import OverloadedError, PermanentError, RequestError
from deepseek.serve.engine_thread import EngineThread
from deepseek.serve.sequences import FinishReason, GenerationRequest, LiveSequence, Output, collect


class CountingEngine:
    """Gives every sequence the texts "0", "1", ... one a step, to its `max_tokens`."""

    def __init__(self) -> None:
        self.open: deque[LiveSequence] = deque()
        self.cancelled: list[int] = []
        self.error: Exception | None = None
        self.may_warm_up = threading.Event()
        self.may_warm_up.set()

    def warm_up(self) -> None:
        assert self.may_warm_up.wait(30)
        if self.error is not None:
            raise self.error

    def submit(self, sequences: Sequence[LiveSequence]) -> None:
        self.open.extend(sequences)

    def cancel(self, sequence: LiveSequence) -> None:
        self.cancelled.append(sequence.id)
        sequence.is_cancelled = True

    @property
    def has_work(self) -> bool:
        return bool(self.open)

    def step(self) -> list[Output]:
        if self.error is not None:
            raise self.error
        outputs = []
        for sequence in list(self.open):
            text = str(len(sequence.tokens))
            sequence.tokens.append(0)
            is_last = len(sequence.tokens) == sequence.request.max_tokens
            reason = FinishReason.CANCELLED if sequence.is_cancelled else FinishReason.LENGTH if is_last else None
            if reason:
                self.open.remove(sequence)
            outputs.append(Output(sequence.id, sequence.request, text, num_generated=1, finish_reason=reason))
        return outputs


@contextmanager
def at_work(engine: CountingEngine, observe: Callable[[Sequence[Output]], None] = list) -> Iterator[EngineThread]:
    thread = EngineThread(cast("Any", engine), stall_timeout_s=30, observe=observe)  # type: ignore[arg-type]
    thread.start()
    try:
        yield thread
    finally:
        engine.may_warm_up.set()
        thread.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


def ask(*lengths: int) -> list[GenerationRequest]:
    return [GenerationRequest((1,), length) for length in lengths]


def test_each_stream_gets_its_own_outputs_by_the_index_of_its_requests() -> None:
    observed: list[Output] = []

    async def work() -> None:
        with at_work(CountingEngine(), observed.extend) as thread:
            await until(lambda: thread.is_ready)
            streams = [thread.open(ask(3, 1)), thread.open(ask(2))]
            for stream, expected in zip(streams, [["012", "0"], ["01"]], strict=True):
                outputs: list[list[Output]] = [[] for _ in expected]
                async for index, output in stream:
                    outputs[index].append(output)
                assert [collect(of_one).text for of_one in outputs] == expected

    asyncio.run(work())
    assert len(observed) == 6


def test_closing_early_cancels_what_is_open_and_only_that() -> None:
    async def work() -> None:
        engine = CountingEngine()
        with at_work(engine) as thread:
            await until(lambda: thread.is_ready)
            stream = thread.open(ask(1, 10**9))
            async for index, output in stream:
                if index == 0 and output.finish_reason:
                    break
            thread.close(stream)
            thread.close(stream)
            await until(lambda: not engine.has_work)
            assert engine.cancelled == [stream.sequences[1].id]

    asyncio.run(work())


def test_an_engine_that_raises_ends_every_stream_and_refuses_new_ones() -> None:
    async def work() -> None:
        engine = CountingEngine()
        with at_work(engine) as thread:
            await until(lambda: thread.is_ready)
            streams = [thread.open(ask(10**9)) for _ in range(2)]
            engine.error = RuntimeError("the device is lost")
            for stream in streams:
                with pytest.raises(RequestError, match="the device is lost") as raised:
                    async for _ in stream:
                        pass
                assert (raised.value.status, raised.value.code) == (500, "engine_failed")
            assert not thread.is_alive
            with pytest.raises(RequestError, match="restart the server"):
                thread.open(ask(1))
            thread.raise_if_never_ready()  # it was

    asyncio.run(work())


def test_before_it_is_warm_and_after_it_stopped_it_takes_nothing() -> None:
    async def work() -> None:
        engine = CountingEngine()
        engine.may_warm_up.clear()
        with at_work(engine) as thread:
            with pytest.raises(OverloadedError, match="starting"):
                thread.open(ask(1))
            engine.may_warm_up.set()
            await until(lambda: thread.is_ready)
            stream = thread.open(ask(10**9))
            await asyncio.to_thread(thread.stop)
            with pytest.raises(RequestError, match="the server stopped") as raised:
                async for _ in stream:
                    pass
            assert raised.value.status == 503
            with pytest.raises(OverloadedError, match="stopping"):
                thread.open(ask(1))

    asyncio.run(work())


def test_an_engine_that_fails_in_its_warm_up_says_so_to_whoever_starts_the_server() -> None:
    async def work() -> None:
        engine = CountingEngine()
        engine.error = ValueError("no weights")
        with at_work(engine) as thread:
            await until(lambda: not thread.is_alive)
            with pytest.raises(PermanentError, match="no weights"):
                thread.raise_if_never_ready()

    asyncio.run(work())
