"""The loop that drives an engine, and the asynchronous streams in which a server reads what comes out.

    event loop:     open(requests) -> Stream  ...  async for index, output in stream  ...  stream.close()
    engine's loop:  load, warm up, step(), step() ... each output is handed to its stream's event loop

The HTTP server's event loop runs in another thread, so that it always answers, health checks above all. The model is
loaded, warmed up and stepped by the one thread that calls `run`: GNU's OpenMP runtime counts the threads of the teams
of all of a process's threads, and once they are more than the processors each wait ends in sleep. A second team makes
decoding up to 2.7 times slower on two free cores, so no other thread of a server may compute with tensors.

A stream that is closed early, because its client hung up, cancels what it had open. If a step raises, the engine is not
to be trusted any more: every stream gets the error, new ones are refused, and `is_alive` stays false from then on.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeAlias

from deepseek.core.errors import DeepSeekError, OverloadedError, PermanentError, RequestError
from deepseek.serve.engine import Engine
from deepseek.serve.sequences import GenerationRequest, LiveSequence, Output

logger = logging.getLogger(__name__)

Observer: TypeAlias = Callable[[Sequence[Output]], None]
_IDLE_S = 0.5  # how often the thread shows that it lives while there is nothing to do


class Stream:
    """The outputs for the requests of one `open`; read and closed in the event loop that opened it."""

    def __init__(self, sequences: Sequence[LiveSequence]) -> None:
        self.sequences = sequences
        self._index_of = {sequence.id: index for index, sequence in enumerate(sequences)}
        self._queue: asyncio.Queue[Output | DeepSeekError] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def put(self, item: Output | DeepSeekError) -> None:
        """Hand over an output, or the error that ends the stream; from any thread."""
        self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Output]]:
        """(Index of the request, output) until all requests are finished; raises what `put` was given."""
        num_open = len(self.sequences)
        while num_open:
            item = await self._queue.get()
            if isinstance(item, DeepSeekError):
                raise item
            num_open -= item.finish_reason is not None
            yield self._index_of[item.sequence_id], item


class EngineLoop:
    """One engine at work; `observe` is called with the outputs of every step, in the thread that steps."""

    def __init__(self, load: Callable[[], Engine], *, stall_timeout_s: float, observe: Observer) -> None:
        self.is_ready = False
        """Whether the engine is loaded and warmed up."""
        self._load = load
        self._engine: Engine | None = None
        self._stall_timeout_s = stall_timeout_s
        self._observe = observe
        self._streams: dict[int, Stream] = {}  # by sequence id
        self._lock = threading.Lock()  # guards _streams and _failure together
        self._failure: str | None = None
        self._is_stopping = False
        self._wake = threading.Event()
        self._beat_s = time.monotonic()
        self._stopped = threading.Event()

    @property
    def engine(self) -> Engine:
        """The engine; raises `OverloadedError` while it loads."""
        if self._engine is None:
            raise OverloadedError("the server is starting and its model is being loaded; try again later")
        return self._engine

    def run(self) -> None:
        """Load the engine and step it until `stop`. Blocks; call it once.

        Raises what loading raises, and `PermanentError` when the engine fails while it warms up. An engine that fails
        later is kept, so that everybody who asks hears why, until `stop`.
        """
        try:
            self._engine = self._load()
            self._warm_up(self._engine)
            self._step(self._engine)
        finally:
            self._stopped.set()

    def stop(self) -> None:
        """End `run` after its current step; streams that are open end with an error. From any thread."""
        self._is_stopping = True
        self.fail_all("the server stopped")
        self._wake.set()

    @property
    def is_stopped(self) -> bool:
        """Whether `run` has ended."""
        return self._stopped.is_set()

    @property
    def beat_age_s(self) -> float:
        """Seconds since the engine last finished a step, or had nothing to do."""
        return time.monotonic() - self._beat_s

    @property
    def is_alive(self) -> bool:
        """Whether the engine makes progress; loading may take as long as it takes."""
        is_stalled = self.is_ready and self.beat_age_s >= self._stall_timeout_s
        return self._failure is None and not self.is_stopped and not is_stalled

    @property
    def num_open(self) -> int:
        """Sequences that will be finished: those that run or wait, unless the engine failed."""
        if self._engine is None or self._failure is not None:
            return 0
        return self._engine.num_running + self._engine.num_waiting

    def open(self, requests: Sequence[GenerationRequest]) -> Stream:
        """Submit `requests`; the caller closes the stream.

        Raises `OverloadedError` when the queue is full or the engine is starting or stopping, and `RequestError`
        with status 500 when it has failed.
        """
        stream = Stream([LiveSequence(request) for request in requests])
        with self._lock:
            self._require_service()
            self.engine.submit(stream.sequences)
            self._streams.update((sequence.id, stream) for sequence in stream.sequences)
        self._wake.set()
        return stream

    def close(self, stream: Stream) -> None:
        """Cancel what is still open in `stream`; closing twice does nothing."""
        with self._lock:
            for sequence in stream.sequences:
                if self._streams.pop(sequence.id, None):
                    self.engine.cancel(sequence)
        self._wake.set()

    def fail_all(self, message: str, *, status: int = 503) -> None:
        """End every open stream with an error and cancel its requests."""
        with self._lock:
            streams = set(self._streams.values())
        for stream in streams:
            self.close(stream)
            stream.put(RequestError(message, status=status))

    def _require_service(self) -> None:
        if self._failure is not None:
            raise _engine_error(self._failure)
        if not self.is_ready or self._is_stopping:
            doing = "stopping" if self._is_stopping else "starting and its model is being loaded"
            raise OverloadedError(f"the server is {doing}; try again later")

    def _warm_up(self, engine: Engine) -> None:
        try:
            engine.warm_up()
        except Exception as error:
            self._failure = f"{type(error).__name__}: {error}"
            raise PermanentError(f"the engine failed while it warmed up ({self._failure}); check the model") from error
        self._beat_s = time.monotonic()
        self.is_ready = True

    def _step(self, engine: Engine) -> None:
        """Step, or sleep for a while when there is nothing to do, until `stop`."""
        while not self._is_stopping:
            self._beat_s = time.monotonic()
            if self._failure is None and engine.has_work:
                self._advance(engine)
            else:
                self._wake.wait(_IDLE_S)
                self._wake.clear()

    def _advance(self, engine: Engine) -> None:
        try:
            outputs = engine.step()
            self._observe(outputs)
            for output in outputs:
                self._deliver(output)
        except Exception as error:  # whatever it was, those who wait must hear of it
            logger.exception("the engine failed and serves no more requests")
            self._fail(f"{type(error).__name__}: {error}")

    def _deliver(self, output: Output) -> None:
        """Hand an output to its stream, unless that was closed in the meantime."""
        with self._lock:
            is_last = output.finish_reason is not None
            stream = self._streams.pop(output.sequence_id, None) if is_last else self._streams.get(output.sequence_id)
        if stream is not None:
            stream.put(output)

    def _fail(self, message: str) -> None:
        with self._lock:
            self._failure = message
            streams, self._streams = set(self._streams.values()), {}
        for stream in streams:
            stream.put(_engine_error(message))


def _engine_error(cause: str) -> RequestError:
    return RequestError(f"the engine failed ({cause}); restart the server", status=500, code="engine_failed")
