"""All subjects of one model, interleaved: `compare(config)` yields events, the last of which holds the table.

Every subject runs in its own process (`working.py`). In each round all take their turn, and the figures are medians
over all passes of all rounds. Answers are compared with those of FP32 eager on the same inputs; with labelled data the
share of right answers is measured as well. A subject that cannot run here is a row that says why, and so is one whose
process ends early.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
import warnings
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from deepseek.bench.baselines import Row
from deepseek.bench.variants import Subject, explain_slower
from deepseek.bench.worker import work
from deepseek.compiler.runtimes.timing import PAUSE_S
from deepseek.core.config import Config
from deepseek.core.errors import ConfigError
from deepseek.core.events import Event
from deepseek.core.storage import explained_storage

REFERENCE = Subject("FP32 eager", "eager", "fp32")
_LEAST_ROUND_S = 0.2  # a turn lasts at least this long, so that short passes are not all timer
_WAIT_S = 10.0
Array = np.ndarray[Any, Any]


class BenchConfig(Config):
    """One comparison."""

    model: str
    """Name of the zoo, artifact, Hugging Face folder or ONNX file, as `load_model` takes it."""
    batch_sizes: tuple[int, ...] = (1,)
    """Each gives a table of its own."""
    num_rounds: int = 7
    """Turns that each subject takes."""
    time_budget_s: float = 60.0
    """For one measured choice among backends, seconds."""
    data: str | None = None
    """A `.npz` file with arrays `inputs` (images) and `labels`, on which accuracy is measured."""


@dataclass(frozen=True)
class SubjectReady(Event):
    """A subject is loaded and compiled, or has said why it cannot be."""

    name: str
    batch_size: int
    note: str
    is_refused: bool


@dataclass(frozen=True)
class RoundDone(Event):
    """All subjects took one turn."""

    batch_size: int
    round: int
    num_rounds: int


@dataclass(frozen=True)
class Compared(Event):
    """The whole table."""

    rows: tuple[Row, ...]


@dataclass
class _Process:
    """A subject at work; `refusal` is why it no longer is."""

    subject: Subject
    process: BaseProcess
    connection: Connection
    note: str = ""
    refusal: str | None = None
    latencies_s: list[float] = field(default_factory=list)

    def ask(self, *order: object) -> Any:
        """The answer to `order`; `None`, with the reason kept, when the process has ended."""
        if self.refusal is not None:
            return None
        try:
            self.connection.send(order)
            return self.connection.recv()
        except (EOFError, OSError):
            self._mourn()
            return None

    def wait_until_ready(self) -> None:
        """Take in the note, or the refusal."""
        try:
            state, text = self.connection.recv()
        except EOFError:
            self._mourn()
            return
        if state == "refused":
            self.refusal = text
        else:
            self.note = text

    def stop(self) -> None:
        """Let the process go, by force if it does not."""
        with contextlib.suppress(OSError):
            self.connection.send(None)
        self.process.join(_WAIT_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def _mourn(self) -> None:
        self.process.join(_WAIT_S)
        self.refusal = f"its process ended with status {self.process.exitcode} before it answered"


def compare(config: BenchConfig, subjects: Sequence[Subject]) -> Generator[Event, None, None]:
    """Measure `subjects` of one model; yields events, at last a `Compared` with a row for each subject and batch size.

    Raises `ConfigError` for no subject, for FP32 eager itself not running (nothing could be compared with it), and for
    labelled data that is none.
    """
    if not subjects:
        raise ConfigError("nothing to compare was given; name at least one generation, or a backend and a precision")
    if config.num_rounds < 1 or min(config.batch_sizes, default=0) < 1:
        raise ConfigError(
            f"num_rounds={config.num_rounds} and batch_sizes={config.batch_sizes} were given; both must be at least 1"
        )
    data = None if config.data is None else read_labelled(Path(config.data))
    rows: list[Row] = []
    for batch_size in config.batch_sizes:
        rows += yield from _compare_batch(config, subjects, batch_size, data)
    yield Compared(tuple(rows))


def read_labelled(path: Path) -> tuple[Array, Array]:
    """Inputs `[N, ...]` and labels `[N]` from an `.npz` file; raises `ConfigError` for anything else."""
    with explained_storage(path), path.open("rb") as file:
        try:
            content = np.load(file, allow_pickle=False)
            inputs, labels = content["inputs"], content["labels"]
        except (ValueError, KeyError, EOFError, TypeError, IndexError) as error:
            raise ConfigError(f"{path} is no .npz file with arrays inputs and labels ({error}); write one") from error
    if len(inputs) != len(labels) or len(inputs) == 0:
        raise ConfigError(f"{path} has {len(inputs)} inputs and {len(labels)} labels; give as many of each, at least 1")
    return inputs, labels


def _compare_batch(
    config: BenchConfig, subjects: Sequence[Subject], batch_size: int, data: tuple[Array, Array] | None
) -> Generator[Event, None, list[Row]]:
    """The rows of one batch size."""
    is_measured = any(
        (subject.backend, subject.precision) == (REFERENCE.backend, REFERENCE.precision) for subject in subjects
    )
    asked = list(subjects) if is_measured else [REFERENCE, *subjects]
    settings: dict[str, Any] = {"batch_size": batch_size, "time_budget_s": config.time_budget_s}
    if data is not None:
        settings["shapes"] = {"images": (batch_size, *data[0].shape[1:])}
        if len(data[0]) >= batch_size:
            settings["samples"] = config.data
    with contextlib.ExitStack() as stack:
        processes = []
        for subject in asked:
            process = _start(config, subject, settings)
            stack.callback(process.stop)
            process.wait_until_ready()
            processes.append(process)
            note = process.refusal or process.note
            yield SubjectReady(subject.name, batch_size, note, is_refused=process.refusal is not None)
        reference = next(
            process
            for process in processes
            if (process.subject.backend, process.subject.precision) == ("eager", "fp32")
        )
        if reference.refusal is not None:
            raise ConfigError(f"FP32 eager, which all answers are compared with, does not run: {reference.refusal}")
        timed = [process for process in processes if is_measured or process is not reference]
        for index in range(config.num_rounds):
            for process in timed:
                _take_turn(process)
            yield RoundDone(batch_size, index + 1, config.num_rounds)
        for message in dict.fromkeys(text for process in processes for text in process.ask("warnings") or ()):
            warnings.warn(message, stacklevel=2)
        expected = reference.ask("answers", None)
        rows = [_row(process, batch_size, expected, data) for process in timed]
        return [_with_excuse(process, row, rows) for process, row in zip(timed, rows, strict=True)]


def _with_excuse(process: _Process, row: Row, rows: Sequence[Row]) -> Row:
    """Add to a row that chose its backend by measurement why another one is faster all the same."""
    others = [other for other in rows if other is not row]
    excuse = explain_slower(row, others, process.ask("reason") or "") if row.backend == "auto" else ""
    return replace(row, note="; ".join(note for note in (row.note, excuse) if note))


def _start(config: BenchConfig, subject: Subject, settings: dict[str, Any]) -> _Process:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    arguments = (theirs, subject, config.model, settings)
    process = context.Process(target=work, args=arguments, daemon=True)
    process.start()
    theirs.close()
    return _Process(subject, process, ours)


def _take_turn(process: _Process) -> None:
    time.sleep(PAUSE_S)
    first = process.ask("time", 1)
    if first is not None:
        more = process.ask("time", max(1, round(_LEAST_ROUND_S / first[0])))
        process.latencies_s += more or []


def _row(process: _Process, batch_size: int, expected: Array, data: tuple[Array, Array] | None) -> Row:
    memory_bytes = process.ask("memory")
    answers = process.ask("answers", None)
    accuracy = None if data is None else _accuracy(process, batch_size, *data)
    subject = process.subject
    row = Row(subject.name, subject.backend, subject.precision, batch_size)
    if process.refusal is not None:
        return replace(row, note=process.refusal)
    median_s, p95_s = np.quantile(process.latencies_s, (0.5, 0.95))
    return replace(
        row,
        latency_ms=float(median_s * 1e3),
        latency_p95_ms=float(p95_s * 1e3),
        throughput_per_s=float(batch_size / median_s),
        memory_bytes=memory_bytes,
        agreement=float(np.mean(answers.argmax(1) == expected.argmax(1))),
        cosine=float(_cosines(answers, expected).min()),
        accuracy=accuracy,
        note=process.note,
    )


def _accuracy(process: _Process, batch_size: int, inputs: Array, labels: Array) -> float | None:
    """Share of right answers over whole batches of the labelled data; the rest that fills no batch is padded."""
    right = 0
    for start in range(0, len(inputs), batch_size):
        part = inputs[start : start + batch_size]
        padding = np.repeat(part[-1:], batch_size - len(part), axis=0)
        answers = process.ask("answers", np.concatenate([part, padding]))
        if answers is None:
            return None
        right += int((answers[: len(part)].argmax(1) == labels[start : start + batch_size]).sum())
    return right / len(inputs)


def _cosines(answers_NC: Array, expected_NC: Array) -> Array:
    products = (answers_NC * expected_NC).sum(1)
    lengths = np.linalg.norm(answers_NC, axis=1) * np.linalg.norm(expected_NC, axis=1)
    return np.asarray(products / np.maximum(lengths, np.finfo(np.float32).tiny))
