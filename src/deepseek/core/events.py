"""Events: what long work says while it goes on.

A training loop, a conversion or a benchmark is a generator of events; the console, a JSONL file, Prometheus and the
hub are readers of them. An event is a frozen dataclass of plain values, so that it can be written, sent and compared,
and nobody who reads one holds the thing that sent it.

    @dataclass(frozen=True)
    class StepDone(Event):
        step: int
        loss: float

    for event in record(train(config), Path("events.jsonl")):
        print(event)
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from deepseek.core.storage import explained_storage, write_file

E = TypeVar("E", bound="Event")


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that happened; subclasses add plain fields."""

    @property
    def kind(self) -> str:
        """The class name in snake case, which is its name in files: `StepDone` is `step_done`."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    def to_dict(self) -> dict[str, Any]:
        """Plain values with the kind first."""
        return {"kind": self.kind} | dataclasses.asdict(self)


def record(events: Iterable[E], path: Path) -> Iterator[E]:
    """Pass events on, appending each as one JSON line with the time it was seen (seconds since 1970).

    A line that an earlier process was killed in the middle of is dropped. Raises `StorageError` when `path` cannot be
    written; what `events` itself runs into is its own error.
    """
    _prepare(path)
    for event in events:
        _append(path, json.dumps({"time_s": round(time.time(), 3)} | event.to_dict()) + "\n")
        yield event


def _append(path: Path, line: str) -> None:
    with explained_storage(path), path.open("a", encoding="utf-8") as file:
        file.write(line)


def _prepare(path: Path) -> None:
    """Say that `path` cannot be written before any work is done, and drop a torn line from it."""
    with explained_storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            write_file(path, whole)
