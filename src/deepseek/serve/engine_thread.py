"""The thread that drives an engine, and the asynchronous streams in which a server reads what comes out.

    event loop: open(requests) -> Stream  ...  async for index, output in stream  ...  stream.close()
    thread:     step(), step(), step() ... each output is handed to its stream's event loop

The model runs in one thread of its own, so that the event loop always answers, health checks above all. A stream that
is closed early, because its client hung up, cancels what it had open. If a step raises, the engine is not to be trusted
any more: every stream gets the error, new ones are refused, and `is_alive` stays false from then on.
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


class EngineThread:
    """One engine at work; `observe` is called with the outputs of every step, in the thread."""

    def __init__(self, engine: Engine, *, stall_timeout_s: float, observe: Observer) -> None:
        self.engine = engine
        self.is_ready = False
        """Whether the engine is warmed up."""
        self._stall_timeout_s = stall_timeout_s
        self._observe = observe
        self._streams: dict[int, Stream] = {}  # by sequence id
        self._lock = threading.Lock()  # guards _streams and _failure together
        self._failure: str | None = None
        self._is_stopping = False
        self._wake = threading.Event()
        self._beat_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="deepseek-engine", daemon=True)

    def start(self) -> None:
        """Warm the engine up and begin to step."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current step; streams that are open end with an error."""
        self._is_stopping = True
        self.fail_all("the server stopped")
        self._wake.set()
        self._thread.join()

    @property
    def beat_age_s(self) -> float:
        """Seconds since the engine last finished a step, or had nothing to do."""
        return time.monotonic() - self._beat_s

    @property
    def is_alive(self) -> bool:
        """Whether the engine makes progress."""
        return self._failure is None and self._thread.is_alive() and self.beat_age_s < self._stall_timeout_s

    def raise_if_never_ready(self) -> None:
        """Raise `PermanentError` when the engine failed before it was warmed up, for a server that should not start."""
        if self._failure is not None and not self.is_ready:
            raise PermanentError(f"the engine failed while it warmed up ({self._failure}); check the model")

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
            raise OverloadedError(f"the server is {'stopping' if self._is_stopping else 'starting'}; try again later")

    def _run(self) -> None:
        try:
            self.engine.warm_up()
            self.is_ready = True
            while not self._is_stopping:
                self._beat_s = time.monotonic()
                self._advance()
        except Exception as error:  # whatever it was, those who wait must hear of it
            logger.exception("the engine failed and serves no more requests")
            self._fail(f"{type(error).__name__}: {error}")

    def _advance(self) -> None:
        """One step, or a short sleep when there is nothing to do."""
        if not self.engine.has_work:
            self._wake.wait(_IDLE_S)
            self._wake.clear()
            return
        outputs = self.engine.step()
        self._observe(outputs)
        for output in outputs:
            self._deliver(output)

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
