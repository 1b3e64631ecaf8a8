"""The loop and its streams with an engine that is made by hand, so that every moment can be held."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import cast

import pytest

from deepseek.core.errors import ArtifactError, OverloadedError, PermanentError, RequestError
from deepseek.serve.engine import Engine
from deepseek.serve.engine_loop import EngineLoop
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
def at_work(engine: CountingEngine, observe: Callable[[Sequence[Output]], None] = list) -> Iterator[EngineLoop]:
    loop = EngineLoop(lambda: cast("Engine", engine), stall_timeout_s=30, observe=observe)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(loop.run)
        try:
            yield loop
        finally:
            engine.may_warm_up.set()
            loop.stop()
            running.result()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


def ask(*lengths: int) -> list[GenerationRequest]:
    return [GenerationRequest((1,), length) for length in lengths]


def test_each_stream_gets_its_own_outputs_by_the_index_of_its_requests() -> None:
    observed: list[Output] = []

    async def work() -> None:
        with at_work(CountingEngine(), observed.extend) as loop:
            await until(lambda: loop.is_ready)
            streams = [loop.open(ask(3, 1)), loop.open(ask(2))]
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
        with at_work(engine) as loop:
            await until(lambda: loop.is_ready)
            stream = loop.open(ask(1, 10**9))
            async for index, output in stream:
                if index == 0 and output.finish_reason:
                    break
            loop.close(stream)
            loop.close(stream)
            await until(lambda: not engine.has_work)
            assert engine.cancelled == [stream.sequences[1].id]

    asyncio.run(work())


def test_an_engine_that_raises_ends_every_stream_and_refuses_new_ones() -> None:
    async def work() -> None:
        engine = CountingEngine()
        with at_work(engine) as loop:
            await until(lambda: loop.is_ready)
            streams = [loop.open(ask(10**9)) for _ in range(2)]
            engine.error = RuntimeError("the device is lost")
            for stream in streams:
                with pytest.raises(RequestError, match="the device is lost") as raised:
                    async for _ in stream:
                        pass
                assert (raised.value.status, raised.value.code) == (500, "engine_failed")
            assert not loop.is_alive
            with pytest.raises(RequestError, match="restart the server"):
                loop.open(ask(1))

    asyncio.run(work())


def test_before_it_is_warm_and_after_it_stopped_it_takes_nothing() -> None:
    async def work() -> None:
        engine = CountingEngine()
        engine.may_warm_up.clear()
        with at_work(engine) as loop:
            with pytest.raises(OverloadedError, match="starting"):
                loop.open(ask(1))
            engine.may_warm_up.set()
            await until(lambda: loop.is_ready)
            stream = loop.open(ask(10**9))
            await asyncio.to_thread(loop.stop)
            with pytest.raises(RequestError, match="the server stopped") as raised:
                async for _ in stream:
                    pass
            assert raised.value.status == 503
            with pytest.raises(OverloadedError, match="stopping"):
                loop.open(ask(1))

    asyncio.run(work())


def test_an_engine_that_fails_in_its_warm_up_says_so_to_whoever_starts_the_server() -> None:
    engine = CountingEngine()
    engine.error = ValueError("no weights")
    loop = EngineLoop(lambda: cast("Engine", engine), stall_timeout_s=30, observe=list)
    with pytest.raises(PermanentError, match="no weights"):
        loop.run()
    assert loop.is_stopped
    assert not loop.is_alive


def test_what_loading_raises_reaches_whoever_starts_the_server_as_it_is() -> None:
    def load() -> Engine:
        raise ArtifactError("half of the file is missing")

    loop = EngineLoop(load, stall_timeout_s=30, observe=list)
    with pytest.raises(ArtifactError, match=r"^half of the file is missing$"):
        loop.run()
    assert not loop.is_alive


def test_loading_may_take_longer_than_a_stall_and_everything_happens_in_one_thread() -> None:
    threads = []
    is_loading, may_load = threading.Event(), threading.Event()

    class Watched(CountingEngine):
        def warm_up(self) -> None:
            threads.append(threading.current_thread())

        def step(self) -> list[Output]:
            threads.append(threading.current_thread())
            return super().step()

    def load() -> Engine:
        threads.append(threading.current_thread())
        is_loading.set()
        assert may_load.wait(30)
        return cast("Engine", Watched())

    async def work() -> None:
        loop = EngineLoop(load, stall_timeout_s=0.01, observe=list)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(loop.run)
            await asyncio.to_thread(is_loading.wait, 30)
            await asyncio.sleep(0.05)
            assert loop.is_alive
            assert not loop.is_ready
            with pytest.raises(OverloadedError, match="being loaded"):
                _ = loop.engine
            may_load.set()
            await until(lambda: loop.is_ready)
            async for _ in loop.open(ask(3)):
                pass
            loop.stop()
            running.result()

    asyncio.run(work())
    assert len(threads) == 5
    assert len(set(threads)) == 1
