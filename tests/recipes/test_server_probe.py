"""A server that dies, hangs, or breaks off its answer is one sentence, and no process stays behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from deepseek.core.errors import PermanentError
from deepseek.recipes.server_probe import complete, probe_server, server_process


def event(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text}]}).encode() + b"\n\n"


@contextmanager
def answering(write: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[tuple[str, list[dict[str, object]]]]:
    """A server that answers as `write` says; its URL, and the bodies that it was sent."""
    bodies: list[dict[str, object]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            write(self)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", bodies
        finally:
            server.shutdown()
            thread.join()


def send(*pieces: bytes, status: int = 200) -> Callable[[BaseHTTPRequestHandler], None]:
    def write(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.end_headers()
        for piece in pieces:
            handler.wfile.write(piece)

    return write


def test_a_streamed_answer_is_put_together_and_timed() -> None:
    with answering(send(event("a"), event("b"), event(""), b"data: [DONE]\n\n")) as (url, bodies):
        completion = complete(url, "def ", max_tokens=7)
        complete(url, "def ", max_tokens=8, sampling={"temperature": 0.5, "seed": 3})
    assert completion.text == "ab"
    assert completion.prompt == "def "
    assert completion.first_token_ms > 0
    assert completion.tokens_per_s > 0
    body = {"model": "deepseek", "prompt": "def ", "stream": True}
    assert bodies == [
        body | {"max_tokens": 7, "temperature": 0},
        body | {"max_tokens": 8, "temperature": 0.5, "seed": 3},
    ]


def test_one_token_alone_has_no_rate() -> None:
    with answering(send(event("a"), b"data: [DONE]\n\n")) as (url, _):
        assert complete(url, "def ", max_tokens=1).tokens_per_s == 0


@pytest.mark.parametrize(
    ("pieces", "status", "words"),
    [
        ([b'{"error": {"message": "no room"}}'], 503, "answered 503 .*no room"),
        ([], 200, "broke off its answer"),
        ([b"data: [DONE]\n\n"], 200, "before the first token"),
        ([event("a"), event("b")], 200, "broke off its answer"),
        ([event("a"), b'data: {"error": {"message": "the engine failed"}}\n\n'], 200, "an error: the engine failed"),
    ],
    ids=["refused", "nothing", "no token", "no end", "an error in the middle"],
)
def test_an_answer_that_is_none_is_one_sentence(pieces: list[bytes], status: int, words: str) -> None:
    with (
        answering(send(*pieces, status=status)) as (url, _),
        pytest.raises(PermanentError, match=words) as caught,
    ):
        complete(url, "def ", max_tokens=4)
    assert "\n" not in str(caught.value)


def test_a_server_that_is_not_there_is_one_sentence() -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        with pytest.raises(PermanentError, match="ConnectionRefusedError"):
            complete(f"http://127.0.0.1:{unheard.getsockname()[1]}", "def ", max_tokens=4)


# The server is started with sys.executable; a script in its place behaves as a test wants.
STARTED = """echo '{"kind": "server_started", "url": "http://127.0.0.1:1"}'"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a shell script in the place of the server; it writes its process id to a file first."""

    def put(script: str) -> Path:
        program, number = tmp_path / "python", tmp_path / "pid"
        program.write_text(f"#!/bin/bash\necho $$ > {number}\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        return number

    return put


def is_gone(number: Path) -> bool:
    return not psutil.pid_exists(int(number.read_text()))


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("exit 3", "ended with status 3 before it was ready"),
        (f"trap 'exit 7' TERM\n{STARTED}\nwhile true; do sleep 0.02; done", "ended with status 7 and 0 was expected"),
    ],
    ids=["dies at once", "ends badly"],
)
def test_a_server_that_does_not_end_cleanly_is_one_sentence(
    stand_in: Callable[[str], Path], tmp_path: Path, script: str, words: str
) -> None:
    number = stand_in(script)
    with pytest.raises(PermanentError, match=words), server_process(tmp_path):
        pass
    assert is_gone(number)


def test_a_server_that_is_never_ready_is_killed(stand_in: Callable[[str], Path], tmp_path: Path) -> None:
    number = stand_in("trap '' TERM\nexec sleep 60")
    with (
        pytest.raises(PermanentError, match=r"not ready after 0\.5 s"),
        server_process(tmp_path, start_timeout_s=0.5),
    ):
        pass
    assert is_gone(number)


def test_a_server_that_dies_while_it_is_asked_is_one_sentence(stand_in: Callable[[str], Path], tmp_path: Path) -> None:
    number = stand_in(STARTED)
    with pytest.raises(PermanentError, match="broke off its answer"):
        list(probe_server(tmp_path, ["def "]))
    assert is_gone(number)


def test_a_server_is_stopped_when_its_reader_leaves(stand_in: Callable[[str], Path], tmp_path: Path) -> None:
    number = stand_in(f"trap 'exit 0' TERM\n{STARTED}\nwhile true; do sleep 0.02; done")
    with pytest.raises(ZeroDivisionError), server_process(tmp_path):
        _ = 1 / 0
    assert is_gone(number)


def test_ctrl_c_in_a_terminal_does_not_reach_the_server(stand_in: Callable[[str], Path], tmp_path: Path) -> None:
    """It goes to the foreground group, and the server has a group of its own."""
    before = signal.getsignal(signal.SIGINT)
    number = stand_in(f"trap 'exit 0' TERM\n{STARTED}\nwhile true; do sleep 0.02; done")
    with server_process(tmp_path):
        assert os.getpgid(int(number.read_text())) != os.getpgrp()
    assert signal.getsignal(signal.SIGINT) == before
