"""What a server says about itself: that it started, what it answered, that it stops. Prompts and answers are not in it.

Heard by whoever passed `listen` to `serve` or `running_server`; the command prints them, as text or JSON lines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from deepseek.core.events import Event


@dataclass(frozen=True)
class ServerStarted(Event):
    """The server is ready; `url` is where, and the API is below `url`/v1."""

    url: str
    host: str
    port: int
    model_name: str
    max_length: int
    """Longest prompt and answer together, in tokens."""


@dataclass(frozen=True)
class RequestServed(Event):
    """A request under `/v1` was answered; a client that hung up before its answer has status 499."""

    request_id: str
    method: str
    path: str
    status: int
    duration_s: float


@dataclass(frozen=True)
class ServerStopping(Event):
    """The server takes no more requests; `num_open` sequences may go on for `timeout_s`."""

    reason: str
    num_open: int
    timeout_s: float


Listener: TypeAlias = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Listen to nothing."""
