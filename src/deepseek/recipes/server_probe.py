"""Asking a real server: a process of its own is started on a free port, answers over HTTP, and is stopped.

The client is plain `http.client`, so that what is measured is what any client would see. Times are wall clock at the
client: until the first token, and tokens per second after it. Whatever the server does instead of answering (it dies,
it hangs, it sends an error in the middle of a stream) ends here with one sentence, and never with a server left behind.
"""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from deepseek.core.errors import PermanentError

_START_TIMEOUT_S = 180.0  # importing torch takes a minute on a machine that is busy enough
_ANSWER_TIMEOUT_S = 60.0  # for each piece of an answer
_STOP_TIMEOUT_S = 30.0
GREEDY: Mapping[str, float] = {"temperature": 0}
_END_OF_STREAM = "[DONE]"


@dataclass(frozen=True)
class Completion:
    """One streamed answer."""

    prompt: str
    text: str
    first_token_ms: float
    tokens_per_s: float


def probe_server(
    model: Path, prompts: Sequence[str], *, max_tokens: int = 48, sampling: Mapping[str, float] = GREEDY
) -> Iterator[Completion]:
    """Start a server of `model`, ask it for each of `prompts`, and stop it; raises when it does not end cleanly."""
    with server_process(model) as url:
        for prompt in prompts:
            yield complete(url, prompt, max_tokens=max_tokens, sampling=sampling)


@contextmanager
def server_process(model: Path, *, start_timeout_s: float = _START_TIMEOUT_S) -> Iterator[str]:
    """A server in its own process; yields its URL, and stops it with SIGTERM at the end.

    Raises `PermanentError` when it is not ready within `start_timeout_s`, or ends with another status than 0.
    """
    command = [sys.executable, "-m", "deepseek", "serve", str(model), "--port", "0", "--json"]
    # A process group of its own: Ctrl-C in a terminal goes to all of the terminal's group, and when to stop this server
    # is decided here.
    with subprocess.Popen(  # noqa: S603 - our own command
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, process_group=0
    ) as process:
        try:
            yield _wait_for_url(process, start_timeout_s)
        finally:
            status = _stop(process)
        if status != 0:
            raise PermanentError(f"the server ended with status {status} and 0 was expected; see its messages above")


def complete(
    url: str,
    prompt: str,
    *,
    max_tokens: int,
    sampling: Mapping[str, float] = GREEDY,
    timeout_s: float = _ANSWER_TIMEOUT_S,
) -> Completion:
    """Stream one completion of `prompt` from the server at `url`; `PermanentError` when it does not arrive.

    `sampling` goes into the body as it is: `temperature`, `top_p`, `seed`; no part of the answer may take longer than
    `timeout_s`.
    """
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=timeout_s)
    body = {"model": "deepseek", "prompt": prompt, "max_tokens": max_tokens, "stream": True, **sampling}
    began_s = time.perf_counter()
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        with connection.getresponse() as answer:
            pieces, arrivals_s = _read_stream(answer)
    except (OSError, http.client.HTTPException) as error:
        reason = f"{type(error).__name__}: {error}"
        raise PermanentError(f"the server at {url} broke off its answer ({reason}); see its messages above") from error
    finally:
        connection.close()
    elapsed_s = arrivals_s[-1] - arrivals_s[0]
    rate = (len(arrivals_s) - 1) / elapsed_s if elapsed_s > 0 else 0.0
    return Completion(prompt, "".join(pieces), (arrivals_s[0] - began_s) * 1000, rate)


def _read_stream(answer: http.client.HTTPResponse) -> tuple[list[str], list[float]]:
    """Read the texts of a streamed answer, and when each came."""
    if answer.status != http.HTTPStatus.OK:
        raise PermanentError(f"the server answered {answer.status} to a completion: {answer.read().decode()}")
    pieces: list[str] = []
    arrivals_s: list[float] = []
    for line in answer:
        payload = line.decode().removeprefix("data: ").strip()
        if payload == _END_OF_STREAM:
            break
        if payload:
            pieces.append(_read_text(json.loads(payload)))
            arrivals_s.append(time.perf_counter())
    else:
        raise http.client.IncompleteRead("".join(pieces).encode())
    if not pieces:
        raise PermanentError("the server ended its answer before the first token; see its messages above")
    return pieces, arrivals_s


def _read_text(event: dict[str, Any]) -> str:
    """Read the text of one event of a stream; an error in the middle of it is an event too."""
    if "error" in event:
        raise PermanentError(f"the server ended its answer with an error: {event['error']['message']}")
    return str(event["choices"][0]["text"])


def _wait_for_url(process: subprocess.Popen[str], timeout_s: float) -> str:
    """Wait for the URL in the first event; a server that is not there in time is killed, ending its output."""
    assert process.stdout is not None
    timer = threading.Timer(timeout_s, process.kill)
    timer.start()
    try:
        for line in process.stdout:
            event = json.loads(line)
            if event["kind"] == "server_started":
                threading.Thread(target=deque, args=(process.stdout, 0), daemon=True).start()  # reads what follows
                return str(event["url"])
    finally:
        timer.cancel()
    if process.wait() in (-signal.SIGINT, 128 + signal.SIGINT):
        # Ctrl-C in a terminal reaches a process that has just been made before it is in a group of its own.
        raise KeyboardInterrupt
    raise PermanentError(
        f"the server ended with status {process.returncode} before it was ready, or was not ready after "
        f"{timeout_s:g} s; see its messages above"
    )


def _stop(process: subprocess.Popen[str]) -> int:
    """Ask the server to end, and make it when it does not; its exit status."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(timeout=_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
