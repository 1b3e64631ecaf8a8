"""Running the server: bind, warm up, answer until a signal, drain, stop.

    serve(model, tokenizer, config)               blocks until SIGTERM (returns) or Ctrl-C (KeyboardInterrupt)
    serve_loading(load, config)                   the same; health is answered while `load` loads the model
    with running_server(model, tokenizer) as s:   the same in a thread, at `s.url`; for tests and notebooks

    thread that calls `run`:  load -> warm up -> step, step, ... (`engine_loop.py`)
    thread of its own:        uvicorn answers, from the first moment on

The address is bound when the `Server` is made, so that a port in use is known at once and port 0 by its number. While
the model loads and while it drains, the server refuses requests and `/readyz` answers 503; requests that are running go
on for `shutdown_timeout_s`, and what is open then ends with an error that says so. A second Ctrl-C does not wait, and
none waits for a model to load.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import FrameType
from typing import TYPE_CHECKING, TypeAlias

from deepseek.core.errors import AddressInUseError, ConfigError
from deepseek.core.extras import require
from deepseek.data.chat_templates import check_template
from deepseek.data.tokenizing import Tokenizer
from deepseek.models.decoder.model import Decoder
from deepseek.serve.config import ServeConfig
from deepseek.serve.engine import Engine
from deepseek.serve.events import Listener, ServerStarted, ServerStopping, ignore

if TYPE_CHECKING:
    import uvicorn

    from deepseek.serve.app import Service

Loader: TypeAlias = Callable[[], tuple[Decoder, Tokenizer]]

_GRACE_S = 5.0  # for error answers to reach their clients after the drain ran out of time
_BACKLOG = 2048  # connections that the system holds while the server is busy
_POLL_S = 0.05
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - where a client reaches a server that listens everywhere


def serve(
    model: Decoder,
    tokenizer: Tokenizer,
    config: ServeConfig | None = None,
    *,
    api_key: str | None = None,
    listen: Listener = ignore,
) -> None:
    """Serve `model` until SIGTERM or Ctrl-C, then drain; call it from the main thread.

    `listen` hears `ServerStarted` and `ServerStopping`. With an `api_key`, `/v1` wants it as a bearer token. Returns
    after SIGTERM and raises `KeyboardInterrupt` after Ctrl-C. Raises `AddressInUseError` when the port is taken, and
    `ConfigError` when the address is not this machine's or when model, tokenizer and config contradict each other.
    """
    serve_loading(lambda: (model, tokenizer), config, api_key=api_key, listen=listen)


def serve_loading(
    load: Loader, config: ServeConfig | None = None, *, api_key: str | None = None, listen: Listener = ignore
) -> None:
    """Like `serve`, of the model that `load` gives; until it does, health is answered and requests are asked to wait.

    Raises what `load` raises. A signal does not wait for it.
    """
    server = Server(load, config or ServeConfig(), api_key=api_key, listen=listen)
    previous = {number: signal.signal(number, server.handle_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run()
    except KeyboardInterrupt:
        if server.stop_reason is None:
            raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if server.stop_reason == signal.SIGINT.name:
        raise KeyboardInterrupt


@contextlib.contextmanager
def running_server(
    model: Decoder,
    tokenizer: Tokenizer,
    config: ServeConfig | None = None,
    *,
    api_key: str | None = None,
    listen: Listener = ignore,
) -> Iterator[Server]:
    """A ready server in a background thread, on a free port unless `config` names one; drained at the end.

    A thread that has loaded or run a model keeps OpenMP threads of its own, and the server is slower by half for it;
    `serve` and the command have one thread that computes.
    """
    server = Server(lambda: (model, tokenizer), config or ServeConfig(port=0), api_key=api_key, listen=listen)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="deepseek-http") as pool:
        running = pool.submit(server.run)
        try:
            server.wait_until_ready(running)
            yield server
        finally:
            server.stop("the block ended")
            running.result()


class Server:
    """One listening address with an engine behind it: made, run once, stopped from any thread."""

    def __init__(
        self,
        load: Loader,
        config: ServeConfig,
        *,
        api_key: str | None = None,
        listen: Listener = ignore,
    ) -> None:
        self.config = config
        self.service = build_service(load, config, api_key, listen)
        self.stop_reason: str | None = None
        self._listen = listen
        self._ready = threading.Event()
        self._uvicorn = _build_uvicorn(self.service)
        self._socket = bind(config.host, config.port)
        self.port: int = self._socket.getsockname()[1]

    @property
    def url(self) -> str:
        """The address where clients find the server; the API is below `url`/v1."""
        host = _LOOPBACK.get(self.config.host, self.config.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def run(self) -> None:
        """Load the model and serve it until `stop`, then drain. Blocks; raises what loading raises."""
        engine_loop = self.service.engine_loop
        with contextlib.closing(self._socket), ThreadPoolExecutor(1, thread_name_prefix="deepseek-http") as pool:
            answering = pool.submit(self._answer)
            try:
                engine_loop.run()
            finally:
                engine_loop.stop()
                answering.result()

    def stop(self, reason: str) -> None:
        """Begin to drain; a second call changes nothing."""
        self.stop_reason = self.stop_reason or reason

    def handle_signal(self, number: int, frame: FrameType | None) -> None:
        """Drain; on a second Ctrl-C, or while the model loads, leave at once."""
        if self.stop_reason is not None and number == signal.SIGINT:
            self._uvicorn.force_exit = True
        self.stop(signal.Signals(number).name)
        if not self.service.engine_loop.is_ready:
            raise KeyboardInterrupt  # in the main thread, which is the one that loads

    def wait_until_ready(self, running: Future[None]) -> None:
        """Block until requests are served; raises what `run` raised if it ended before."""
        while not self._ready.wait(_POLL_S):
            if running.done():
                running.result()
                return

    def _answer(self) -> None:
        """Run the HTTP server in this thread until `stop`, or until the engine's loop ends."""
        with asyncio.Runner(loop_factory=self._uvicorn.config.get_loop_factory()) as runner:
            runner.run(self._answer_until_stopped())

    async def _answer_until_stopped(self) -> None:
        serving = asyncio.create_task(self._uvicorn.serve(sockets=[self._socket]))
        try:
            await self._watch(serving)
            if self.stop_reason is not None:
                await self._drain(serving)
        finally:
            self._uvicorn.should_exit = True
            self.service.engine_loop.stop()
            await serving

    async def _watch(self, serving: asyncio.Task[None]) -> None:
        """Announce the server once it is ready, and wait for the word to stop."""
        while not (self.stop_reason is not None or self.service.engine_loop.is_stopped or serving.done()):
            if self._uvicorn.started and self.service.obstacle is None and not self._ready.is_set():
                self._listen(self._describe_start())
                self._ready.set()
            await asyncio.sleep(_POLL_S)

    def _describe_start(self) -> ServerStarted:
        config, engine = self.config, self.service.engine_loop.engine
        return ServerStarted(self.url, config.host, self.port, config.model_name, engine.max_length)

    async def _drain(self, serving: asyncio.Task[None]) -> None:
        """Let requests finish for a while, then end them."""
        self.service.is_draining = True
        engine_loop, timeout_s = self.service.engine_loop, self.config.shutdown_timeout_s
        self._listen(ServerStopping(self.stop_reason or "", engine_loop.num_open, timeout_s))
        deadline_s = time.monotonic() + timeout_s
        while engine_loop.num_open and time.monotonic() < deadline_s:
            if serving.done() or self._uvicorn.force_exit:
                break
            await asyncio.sleep(_POLL_S)  # and answer new requests with 503
        self._uvicorn.should_exit = True
        await asyncio.wait((serving,), timeout=max(0.0, deadline_s - time.monotonic()))
        engine_loop.fail_all("the server is shutting down and this request took too long; send it again")


def build_service(load: Loader, config: ServeConfig, api_key: str | None = None, listen: Listener = ignore) -> Service:
    """Build the engine's loop and its metrics, ready to be run.

    Raises `MissingExtraError` without the serve libraries, and `ConfigError` for a key that is none; the loop raises
    `DataError` for a broken chat template.
    """
    for library in ("uvicorn", "starlette", "prometheus_client"):
        require(library, extra="serve")
    from deepseek.serve.app import Service
    from deepseek.serve.engine_loop import EngineLoop
    from deepseek.serve.metrics import Metrics

    if api_key is not None and not (api_key.strip() and api_key.isascii()):
        raise ConfigError("the API key is empty or has characters beyond ASCII; choose another, or none at all")
    metrics = Metrics(config.model_name)

    def load_engine() -> Engine:
        model, tokenizer = load()
        check_template(tokenizer)
        engine = Engine(model, tokenizer, config)
        metrics.watch(engine)
        return engine

    engine_loop = EngineLoop(load_engine, stall_timeout_s=config.stall_timeout_s, observe=metrics.observe)
    return Service(engine_loop, metrics, config, api_key, listen)


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens on `host` and `port`; port 0 is a free one.

    Raises `AddressInUseError` when another process has the port, and `ConfigError` when the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(f"host {host!r} is not known ({error}); give an address of this machine") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise _explain(error, host, port) from error
    return listener


def _explain(error: OSError, host: str, port: int) -> AddressInUseError | ConfigError:
    if error.errno == errno.EADDRINUSE:
        return AddressInUseError(
            f"port {port} on {host} is used by another process; choose another port, or 0 for a free one"
        )
    advice = {
        errno.EACCES: "this user may not listen there; choose a port from 1024 on",
        errno.EADDRNOTAVAIL: "this is no address of this machine; choose 127.0.0.1 or 0.0.0.0",
    }
    return ConfigError(f"cannot listen on {host} port {port}: {advice.get(error.errno or 0, str(error))}")


def _build_uvicorn(service: Service) -> uvicorn.Server:
    import uvicorn

    from deepseek.serve.app import build_app

    class Quiet(uvicorn.Server):
        """Signals are handled by `serve`, so that a drained server ends with the exit status of a success."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    return Quiet(
        uvicorn.Config(
            build_app(service),
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=math.ceil(service.config.shutdown_timeout_s + _GRACE_S),
        )
    )
