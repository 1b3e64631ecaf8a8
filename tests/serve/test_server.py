"""Starting and stopping: ports, signals, draining."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch

from deepseek.core.errors import AddressInUseError, ArtifactError, ConfigError, PermanentError
from deepseek.core.events import Event
from deepseek.data.tokenizing import Tokenizer
from deepseek.models.decoder.model import Decoder
from deepseek.serve.config import ServeConfig
from deepseek.serve.events import ServerStarted, ServerStopping
from deepseek.serve.server import Server, bind, running_server

Make = Callable[..., Any]
ASK = {"model": "deepseek", "prompt": "x", "max_tokens": 40, "ignore_eos": True}


class Slow(Decoder):
    """A decoder that takes its time, so that something can happen meanwhile."""

    def forward(self, *args: Any, **keywords: Any) -> Any:
        time.sleep(0.02)
        return super().forward(*args, **keywords)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.005)


def test_a_port_in_use_is_one_sentence_and_stays_with_its_owner(model: Decoder, tokenizer: Tokenizer) -> None:
    with running_server(model, tokenizer) as server:
        with pytest.raises(AddressInUseError, match=f"^port {server.port} on 127.0.0.1 is used by another process"):
            Server(lambda: (model, tokenizer), ServeConfig(port=server.port))
        assert httpx.get(f"{server.url}/readyz").status_code == 200


@pytest.mark.parametrize(
    ("host", "words"),
    [("no.such.host.invalid", "is not known"), ("192.0.2.1", "no address of this machine"), ("a" * 70, "is not known")],
)
def test_an_address_that_is_not_ours_is_refused(host: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        bind(host, 0)


def test_only_the_given_address_is_listened_on() -> None:
    with bind("127.0.0.1", 0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
        with (
            pytest.raises(OSError, match="refused"),
            socket.create_connection(("127.0.0.2", listener.getsockname()[1])),
        ):
            pass


def test_a_free_port_is_announced_when_the_server_is_ready(model: Decoder, tokenizer: Tokenizer) -> None:
    events: list[Event] = []
    with running_server(model, tokenizer, listen=events.append) as server:
        assert events == [ServerStarted(server.url, "127.0.0.1", server.port, "deepseek", model.config.max_length)]
        assert httpx.get(f"{server.url}/readyz").status_code == 200
    assert isinstance(events[1], ServerStopping)
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url)


def test_a_server_can_be_started_where_another_just_stopped(model: Decoder, tokenizer: Tokenizer) -> None:
    with running_server(model, tokenizer) as server:
        httpx.get(f"{server.url}/healthz")
    with running_server(model, tokenizer, ServeConfig(port=server.port)) as again:
        assert httpx.get(f"{again.url}/healthz").status_code == 200


def test_a_model_that_fails_in_the_warm_up_stops_the_server(make_model: Make, tokenizer: Tokenizer) -> None:
    model = make_model()
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(PermanentError, match="while it warmed up"), running_server(model, tokenizer):
        pass


def test_an_empty_key_is_refused(model: Decoder, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="empty"):
        Server(lambda: (model, tokenizer), ServeConfig(port=0), api_key=" ")


@pytest.mark.parametrize("is_streamed", [False, True])
def test_requests_finish_while_the_server_drains(make_model: Make, tokenizer: Tokenizer, is_streamed: bool) -> None:
    with ThreadPoolExecutor(1) as pool, httpx.Client(timeout=30) as http:
        with running_server(make_model(Slow), tokenizer) as server:
            body = ASK | {"stream": is_streamed}
            answer = pool.submit(http.post, f"{server.url}/v1/completions", json=body)
            wait_until(lambda: server.service.engine_loop.engine.num_running == 1, "the request runs")
            server.stop("test")
            wait_until(lambda: server.service.is_draining, "it drains")
            assert server.service.obstacle is not None
        assert answer.result().status_code == 200
        if is_streamed:
            assert answer.result().text.endswith("data: [DONE]\n\n")
        else:
            assert answer.result().json()["usage"]["completion_tokens"] == 40


@pytest.mark.parametrize("is_streamed", [False, True])
def test_requests_that_take_longer_than_the_drain_end_with_an_error(
    make_model: Make, tokenizer: Tokenizer, is_streamed: bool
) -> None:
    with ThreadPoolExecutor(1) as pool, httpx.Client(timeout=30) as http:
        config = ServeConfig(port=0, shutdown_timeout_s=0.2)
        with running_server(make_model(Slow), tokenizer, config) as server:
            body = ASK | {"stream": is_streamed, "max_tokens": 90}
            answer = pool.submit(http.post, f"{server.url}/v1/completions", json=body)
            wait_until(lambda: server.service.engine_loop.engine.num_running == 1, "the request runs")
        if is_streamed:
            error = json.loads(answer.result().text.split("\n\n")[-2].removeprefix("data: "))["error"]
        else:
            assert answer.result().status_code == 503
            assert "retry-after" in answer.result().headers
            error = answer.result().json()["error"]
        assert "shutting down" in error["message"]


def test_no_threads_and_no_connections_stay_behind(model: Decoder, tokenizer: Tokenizer) -> None:
    before = set(threading.enumerate())
    with running_server(model, tokenizer) as server:
        httpx.post(f"{server.url}/v1/completions", json=ASK)
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_drains_and_ends_the_process_cleanly(number: signal.Signals, status: int) -> None:
    program = textwrap.dedent(
        """
        import sys, warnings
        import torch
        from deepseek.data.tokenizing import train_tokenizer
        from deepseek.models.decoder.model import Decoder, DecoderConfig
        from deepseek.serve.config import ServeConfig
        from deepseek.serve.events import ServerStarted
        from deepseek.serve.server import serve

        class Slow(Decoder):
            def forward(self, *args, **keywords):
                import time
                time.sleep(0.02)
                return super().forward(*args, **keywords)

        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        tokenizer = train_tokenizer(["abc"], vocab_size=257)
        model = Slow(DecoderConfig(vocab_size=300, num_layers=1, hidden_size=16, num_heads=2, max_length=64))
        listen = lambda event: print(event.url, flush=True) if isinstance(event, ServerStarted) else None
        try:
            serve(model, tokenizer, ServeConfig(port=0), listen=listen)
        except KeyboardInterrupt:
            sys.exit(130)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    with ThreadPoolExecutor(1) as pool, httpx.Client(timeout=30) as http:
        answer = pool.submit(http.post, f"{url}/v1/completions", json=ASK)
        running = 'ds_num_requests_running{model_name="deepseek"} 1.0'
        wait_until(lambda: running in httpx.get(f"{url}/metrics").text, "the request runs")
        process.send_signal(number)
        assert answer.result().json()["usage"]["completion_tokens"] == 40
    _, errors = process.communicate(timeout=30)
    assert process.returncode == status
    assert errors == ""


def test_while_the_model_loads_health_is_good_and_requests_are_asked_to_wait(
    model: Decoder, tokenizer: Tokenizer
) -> None:
    may_load = threading.Event()
    events: list[Event] = []

    def load() -> tuple[Decoder, Tokenizer]:
        assert may_load.wait(30)
        return model, tokenizer

    server = Server(load, ServeConfig(port=0, retry_after_s=3), listen=events.append)
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=server.url, timeout=30) as http:
        running = pool.submit(server.run)
        try:
            assert http.get("/healthz").status_code == 200
            ready = http.get("/readyz")
            assert (ready.status_code, ready.headers["retry-after"]) == (503, "3")
            assert ready.json() == {"status": "not ready", "reason": "the model is being loaded"}
            assert http.get("/metrics").status_code == 200
            chat = {"model": "deepseek", "messages": [{"role": "user", "content": "x"}]}
            for answer in (
                http.post("/v1/completions", json=ASK),
                http.post("/v1/completions", json=ASK | {"stream": True}),
                http.post("/v1/chat/completions", json=chat),
                http.get("/v1/models"),
            ):
                assert (answer.status_code, answer.headers["retry-after"]) == (503, "3")
                assert "its model is being loaded" in answer.json()["error"]["message"]
            assert {event.kind for event in events} == {"request_served"}
            may_load.set()
            server.wait_until_ready(running)
            assert http.get("/readyz").status_code == 200
            assert http.post("/v1/completions", json=ASK).status_code == 200
            assert "server_started" in {event.kind for event in events}
        finally:
            may_load.set()
            server.stop("test")
            running.result()


def test_a_model_that_cannot_be_loaded_ends_the_server_with_what_loading_raised() -> None:
    def load() -> tuple[Decoder, Tokenizer]:
        raise ArtifactError("half of the file is missing")

    events: list[Event] = []
    server = Server(load, ServeConfig(port=0), listen=events.append)
    with pytest.raises(ArtifactError, match=r"^half of the file is missing$"):
        server.run()
    assert events == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_does_not_wait_for_a_model_to_load(number: signal.Signals, status: int) -> None:
    program = textwrap.dedent(
        """
        import sys, time
        from deepseek.serve.config import ServeConfig
        from deepseek.serve.server import serve_loading

        def load():
            print("loading", flush=True)
            time.sleep(60)

        try:
            serve_loading(load, ServeConfig(port=0))
        except KeyboardInterrupt:
            sys.exit(130)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == status
    assert errors == ""
