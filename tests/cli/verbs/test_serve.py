"""`deepseek serve` as an operator meets it: events, signals, ports, and requests that are wrong."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from deepseek.serve.server import bind
from tests.cli.commands import Result, assert_one_sentence, environment, start

Call = Callable[..., Result]


@dataclass
class Server:
    """A server process that is ready."""

    process: subprocess.Popen[str]
    url: str

    def stop(self, number: signal.Signals) -> Result:
        """Send a signal, and wait for the end."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=30)
        return Result(self.process.returncode, out, err)


@contextmanager
def serving(*arguments: object, **options: Any) -> Iterator[Server]:
    with start("serve", *arguments, "--port", "0", "--json", **options) as process:
        try:
            assert process.stdout is not None
            yield Server(process, json.loads(process.stdout.readline())["url"])
        finally:
            process.kill()


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with serving(model) as server:
        yield server


def test_sigterm_ends_a_server_with_status_0_and_events_to_the_last(model: Path) -> None:
    with serving(model, "--model-name", "tiny") as server:
        assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"] == "tiny"
        result = server.stop(signal.SIGTERM)
    assert (result.status, result.err) == (0, "")
    assert result.kinds == ["request_served", "server_stopping"]
    assert [result.events[0][name] for name in ("method", "path", "status")] == ["GET", "/v1/models", 200]
    assert result.events[1]["reason"] == "SIGTERM"


def test_ctrl_c_ends_a_server_with_status_130(model: Path) -> None:
    with serving(model) as server:
        result = server.stop(signal.SIGINT)
    assert_one_sentence(result, 130, "stopped")
    assert result.kinds == ["server_stopping"]


def test_deepseek_serve_is_the_same_server_and_says_where_it_is(model: Path) -> None:
    program = Path(sys.executable).with_name("deepseek-serve")
    command = [str(program), str(model), "--port", "0", "--quantize", "int8"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert url is not None
        assert httpx.get(f"{url[0]}/readyz").status_code == 200
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
    assert process.returncode == 0
    assert "stopping (SIGTERM); 0 open requests" in rest


def test_a_key_in_the_environment_is_asked_for(model: Path) -> None:
    with serving(model, env=environment() | {"DEEPSEEK_API_KEY": "secret"}) as server:
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        assert httpx.get(f"{server.url}/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
        assert "secret" not in server.stop(signal.SIGTERM).out


def test_a_port_in_use_is_one_sentence(call: Call, model: Path) -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        result = call("serve", model, "--port", port, "--json")
    assert_one_sentence(result, 1, f"port {port}", "another process", "choose another port")
    assert result.out == ""


def test_a_context_longer_than_the_models_is_one_sentence(call: Call, model: Path) -> None:
    result = call("serve", model, "--port", 0, "--max-length", 4096, "--json")
    assert_one_sentence(result, 2, "4096", "64")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{not json", "JSON"),
        (b"", "JSON"),
        (b'{"model": "deepseek", "prompt": "def ", "max_tokens": 4096}', "64 tokens"),
        (b'{"model": "deepseek", "prompt": "' + b"def " * 100 + b'"}', "64 tokens"),
        (b'{"model": "deepseek", "prompt": "def ", "max_tokns": 4}', "max_tokns"),
    ],
    ids=["broken JSON", "nothing", "answer over the context", "prompt over the context", "misspelt key"],
)
def test_a_bad_request_is_answered_400_with_one_sentence(server: Server, body: bytes, words: str) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert words in message
    assert "\n" not in message
    assert server.process.poll() is None


def test_a_client_that_hangs_up_frees_its_place_and_disturbs_nobody(server: Server) -> None:
    host, port = httpx.URL(server.url).host, httpx.URL(server.url).port
    body = json.dumps({"model": "deepseek", "prompt": "def ", "max_tokens": 60, "stream": True, "ignore_eos": True})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}\r\n\r\n"
    for _ in range(12):  # more than the places there are
        with socket.create_connection((host, port or 0)) as connection:
            connection.sendall((head + body).encode())
            connection.recv(1)
    deadline_s = time.monotonic() + 20
    while 'num_requests_running{model_name="deepseek"} 0.0' not in httpx.get(f"{server.url}/metrics").text:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    answer = httpx.post(f"{server.url}/v1/completions", json={"model": "deepseek", "prompt": "def ", "max_tokens": 4})
    assert answer.status_code == 200


def test_a_server_whose_log_stands_still_goes_on_serving(model: Path) -> None:
    """A reader that has stopped reading, such as a pager: 64 KB of lines fill its pipe."""
    with serving(model, stderr=subprocess.PIPE) as server, httpx.Client() as client:
        for _ in range(1000):
            assert client.get(f"{server.url}/v1/models/none-of-this-name", timeout=60).status_code == 404
        assert server.stop(signal.SIGTERM).status == 0


def test_a_server_whose_output_nobody_reads_goes_on_serving(model: Path) -> None:
    with serving(model, stderr=subprocess.PIPE) as server:
        assert server.process.stdout is not None
        server.process.stdout.close()
        body = {"model": "deepseek", "prompt": "def ", "max_tokens": 4, "temperature": 0}
        answers = [httpx.post(f"{server.url}/v1/completions", json=body) for _ in range(3)]
        server.process.send_signal(signal.SIGTERM)
        assert server.process.stderr is not None
        errors = server.process.stderr.read()
        assert server.process.wait(timeout=30) == 0
    assert [answer.status_code for answer in answers] == [200] * 3
    assert errors.count("\n") == 1
    assert "events are not printed any more" in errors
