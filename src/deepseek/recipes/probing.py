"""Asking a real server: a process of its own is started on a free port, answers over HTTP, and is stopped.

The client is plain `http.client`, so that what is measured is what any client would see. Times are wall clock at the
client: until the first token, and tokens per second after it.
"""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from deepseek.core.errors import PermanentError

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Completion:
    """One streamed answer."""

    prompt: str
    text: str
    first_token_ms: float
    tokens_per_s: float


def probe_server(model: Path, prompts: Sequence[str], *, max_tokens: int = 48) -> Iterator[Completion]:
    """Start a server of `model`, ask it for each of `prompts`, and stop it; raises when it does not end cleanly."""
    with server_process(model) as url:
        for prompt in prompts:
            yield complete(url, prompt, max_tokens=max_tokens)


@contextmanager
def server_process(model: Path) -> Iterator[str]:
    """A server in its own process; yields its URL, and stops it with SIGTERM at the end."""
    command = [sys.executable, "-m", "deepseek", "serve", str(model), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603 - our own command
        try:
            yield _wait_for_url(process)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                status = process.wait(timeout=_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
        if status != 0:
            raise PermanentError(f"the server ended with status {status} and 0 was expected; see its messages above")


def complete(url: str, prompt: str, *, max_tokens: int) -> Completion:
    """Stream one greedy completion of `prompt` from the server at `url`."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=_START_TIMEOUT_S)
    body = {"model": "deepseek", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
    began_s = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != http.HTTPStatus.OK:
        raise PermanentError(f"the server answered {answer.status} to a completion: {answer.read().decode()}")
    pieces, arrivals_s = [], []
    for line in answer:
        payload = line.decode().removeprefix("data: ").strip()
        if payload and payload != "[DONE]":
            pieces.append(json.loads(payload)["choices"][0]["text"])
            arrivals_s.append(time.perf_counter())
    connection.close()
    elapsed_s = arrivals_s[-1] - arrivals_s[0]
    rate = (len(arrivals_s) - 1) / elapsed_s if elapsed_s > 0 else 0.0
    return Completion(prompt, "".join(pieces), (arrivals_s[0] - began_s) * 1000, rate)


def _wait_for_url(process: subprocess.Popen[str]) -> str:
    """The URL in the server's first event."""
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event["kind"] == "server_started":
            return str(event["url"])
    raise PermanentError(f"the server ended with status {process.wait()} before it was ready; see its messages above")
