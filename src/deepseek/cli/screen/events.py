"""Events on a screen: progress bars for long work, lines for what happened.

What is not a terminal gets lines alone: a log would keep every state of a bar, or none.

`follow` is the one reader of event streams. The first Ctrl-C, SIGTERM or SIGHUP (a terminal that is closed) asks the
stream to end at its next event, which is where its state is whole and can be saved; a second one stops at once.
"""

from __future__ import annotations

import io
import json
import math
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from deepseek.cli import Stopped, abandon_output
from deepseek.core.events import Event, record
from deepseek.core.intervals import find_ends
from deepseek.core.units import format_bytes, format_count

_STEP_LINE_EVERY_S = 10.0
_WIDE = 80  # columns of a terminal on which a bar has room for the count of its steps
_MOST_WAITING = 1000  # events that nobody has read yet
_LAST_LINES_S = 1.0
_OPENING = "opening model and data"
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def follow(events: Generator[Event, None, None], *, file: Path | None = None, as_json: bool) -> Event | None:
    """Show all of `events`, appending them to `file`, and return the last one.

    Raises `Stopped` after Ctrl-C, SIGTERM or SIGHUP. However it ends, `events` is closed, which is when a run saves
    itself.
    """
    last = None
    with Interrupt() as interrupt, _display(as_json) as show, closing(events):
        for event in record(events, file) if file else events:
            show(event)
            last = event
            if interrupt.number is not None:
                raise Stopped(interrupt.number)
    return last


def print_event(event: Event, *, as_json: bool) -> None:
    """Print one event as a line, at once."""
    _write_line(_to_line(event, as_json=as_json))


@contextmanager
def progress_on_errors() -> Iterator[Callable[[Event], None]]:
    """Show the progress of events as bars on standard error, where that is a terminal, and nothing where it is not."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda event: None
        return
    with Progress(*_list_columns(), console=console, transient=True) as progress:
        bars = _Bars(progress)
        bars.begin(_OPENING)
        yield bars.show


@contextmanager
def printing_beside(*, as_json: bool) -> Iterator[Callable[[Event], None]]:
    """Print events in a thread of its own, for work that goes on however slowly they are read, or not at all.

    Some events wait for their reader; those beyond are left out, and their number is said at the end.
    """
    waiting: queue.Queue[Event | None] = queue.Queue(_MOST_WAITING)
    num_lost = 0

    def show(event: Event) -> None:
        nonlocal num_lost
        try:
            waiting.put_nowait(event)
        except queue.Full:
            num_lost += 1

    printer = threading.Thread(target=_print_all, args=(waiting, as_json), name="deepseek-printer", daemon=True)
    printer.start()
    try:
        yield show
    finally:
        if waiting.full():  # the end takes the place of one
            num_lost += waiting.get_nowait() is not None
        waiting.put_nowait(None)
        printer.join(_LAST_LINES_S)
        if printer.is_alive():
            num_lost += waiting.qsize()  # the end is one of them, and the event that is being written is not
        if num_lost:
            _say(f"{num_lost} event{'s' * (num_lost > 1)} not printed, since nobody read them")


def _print_all(waiting: queue.Queue[Event | None], as_json: bool) -> None:
    for event in iter(waiting.get, None):
        line = _to_line(event, as_json=as_json)
        try:
            if line:
                _write_unbuffered(f"{line}\n")
        except OSError as error:
            abandon_output()
            _say(f"events are not printed any more, since nobody reads them ({error})")
            return


def _write_unbuffered(text: str) -> None:
    """Write to standard output without its lock, which Python needs when it exits, even while this write waits."""
    try:
        descriptor = sys.stdout.fileno()
    except io.UnsupportedOperation:  # a stream in memory, which takes everything
        sys.stdout.write(text)
        return
    left = text.encode(sys.stdout.encoding, errors="replace")
    while left:
        left = left[os.write(descriptor, left) :]


def _say(message: str) -> None:
    sys.stderr.write(f"deepseek: {message}\n")


def _to_line(event: Event, *, as_json: bool) -> str:
    return json.dumps(event.to_dict()) if as_json else _describe(event.to_dict())


def _write_line(text: str) -> None:
    if text:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


@contextmanager
def ignored_signals() -> Iterator[None]:
    """Leave Ctrl-C, SIGTERM and SIGHUP to somebody else while the block runs: rank 0 stops all ranks together."""
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in _STOPPING}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Interrupt:
    """Remembers the first Ctrl-C, SIGTERM or SIGHUP while the block runs, and lets the second one through.

    A signal that is ignored stays so: `nohup` ignores SIGHUP.
    """

    def __init__(self) -> None:
        self.number: signal.Signals | None = None
        """The signal that came; `None` while none has."""

    def __enter__(self) -> Self:
        handled = [number for number in _STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._handle) for number in handled}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.number is not None:
            raise Stopped(self.number)
        self.number = signal.Signals(number)
        with suppress(OSError):  # the terminal may be what is gone
            sys.stderr.write("deepseek: stopping at the next safe point; Ctrl-C again stops at once\n")


@contextmanager
def _display(as_json: bool) -> Iterator[Callable[[Event], None]]:
    """A function that shows one event."""
    if as_json:
        yield lambda event: print_event(event, as_json=True)
        return
    if not Console().is_terminal:
        lines = _Lines()
        try:
            yield lines.show
        except Stopped:
            lines.show_last_step()
            raise
        lines.show_last_step()
        return
    with Progress(*_list_columns(), console=Console()) as progress:
        yield _Bars(progress).show


def _list_columns() -> tuple[ProgressColumn, ...]:
    return (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )


class _Lines:
    """A line for everything that happened, now and then one for a step, and always one for the last step."""

    def __init__(self) -> None:
        self._step_shown_s = -math.inf
        self._run: dict[str, Any] = {}
        self._unshown: Event | None = None

    def show(self, event: Event) -> None:
        if event.kind == "step_done":
            self._unshown = event
            if time.monotonic() - self._step_shown_s >= _STEP_LINE_EVERY_S:
                self.show_last_step()
            return
        values = event.to_dict()
        if values["kind"] == "run_started":
            self._run = {"num_steps": values["num_steps"], "unit": values["unit"]}
        if _describe(values):  # whatever is said next comes after the step that it followed
            self.show_last_step()
        print_event(event, as_json=False)

    def show_last_step(self) -> None:
        """Print the step that came last, unless it is on the screen."""
        if self._unshown is not None:
            _write_line(_describe(self._unshown.to_dict() | self._run))
            self._unshown, self._step_shown_s = None, time.monotonic()


class _Bars:
    """The progress bars of a run; everything that is no progress is printed above them.

    A bar is there for as long as its work goes on, but the one of training stays.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self._num_steps = 0
        self._unit = ""

    def show(self, event: Event) -> None:
        values = event.to_dict()
        self._end(_ENDS.get(values["kind"], ""))
        if values["kind"] == "tokenizing_progress":
            note = f"{format_count(values['num_tokens'])} tokens"
            self._advance("tokenizing", values["num_text_bytes"], values["total_bytes"], note)
        elif values["kind"] == "run_started":
            self._num_steps, self._unit = values["num_steps"], values["unit"]
            self._advance("training", values["first_step"], self._num_steps, "")
        elif values["kind"] == "step_done":
            count = f"{values['step']}/{self._num_steps}  " if self._progress.console.width >= _WIDE else ""
            note = f"{count}loss {values['loss']:.3f}  {_show_rate(values['units_per_s'])} {self._unit}/s"
            self._advance("training", values["step"], self._num_steps, note)
        elif values["kind"] == "phase_started":
            self.begin(values["phase"])
        elif values["kind"] == "evaluation_progress":
            note = f"{format_count(values['num_units'])} units"
            self._advance("evaluating", values["num_batches"], values["total_batches"] or None, note)
        if values["kind"] != "step_done" and (text := _describe(values)):
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin(self, name: str) -> None:
        """Show a bar of work that does not say how far it is."""
        self._advance(name, 0, None, "")

    def _advance(self, name: str, completed: int, total: int | None, note: str) -> None:
        if name not in self._tasks:  # a resumed run begins with what is done, which is no speed to measure
            self._tasks[name] = self._progress.add_task(name, completed=completed, total=total, note=note)
        self._progress.update(self._tasks[name], completed=completed, total=total, note=note)

    def _end(self, name: str) -> None:
        if name in self._tasks:
            self._progress.remove_task(self._tasks.pop(name))


# Kind of event -> the bar that it ends.
_ENDS = {
    "evaluation_progress": _OPENING,
    "cache_ready": "tokenizing",
    "baselines_measured": "counting n-grams",
    "model_quantized": "int8",
    "report_written": "serving",
}


# Kind of event -> the line that tells it; a kind that is not here is progress, or says nothing a person waits for.
_LINES = {
    "tokenizer_ready": "tokenizer: {vocab_size} tokens",
    "cache_ready": "text: {num_documents} documents, {num_tokens} tokens in {folder}",
    "init_loaded": "begins with {summary}{new_tensors}",
    "run_started": "model: {num_parameters} parameters, {precision}, steps {first_step} to {num_steps}",
    "plan_applied": "plan: {plan} on {num_ranks} ranks, {num_micro_batches} x {micro_batch_rows} rows a step on each",
    "activations_checkpointed": "activations: {policy}, {num_blocks} blocks computed again in the backward pass",
    "step_done": "step {step} of {num_steps}: loss {loss:.3f}, {units_per_s} {unit}/s",
    "step_damped": "step {step} damped to {factor:.3g} of its learning rate: {reason}",
    "step_skipped": "step {step} skipped: {reason}; {num_in_a_row} in a row",
    "run_rewound": "step {step}: {reason}; back to step {to_step}, its batch is left out from now on",
    "memory_measured": "memory of step {step}: {peak_bytes} at the peak; see {page}",
    "memory_leak_suspected": "memory may leak since step {since_step}: {tensors} (module: {modules})",
    "evaluated": "held-out after step {step}: loss {heldout_loss:.4f}{metrics} over {num_units} {unit}",
    "stopped_early": "stopped after step {step}: {metric} has not improved on {best:.4f} at step {best_step}",
    "model_saved": "model: {path} ({num_bytes})",
    "baselines_measured": (
        "baselines: unigram {unigram_loss:.3f}, bigram {bigram_loss:.3f}, discounted {bigram_discounted_loss:.3f}"
    ),
    "model_quantized": "int8: {path}, {bytes_ratio:.3f} of the bytes, held-out loss {heldout_loss:.4f}",
    "completion_received": "served {prompt!r} -> {text!r}",
    "server_started": "serving {model_name} at {url} (API below /v1), {max_length} tokens of context; Ctrl-C stops",
    "request_served": "{method} {path} {status} in {duration_s:.3f} s",
    "server_stopping": "stopping ({reason}); {num_open} open requests",
}
_UNDECODABLE = "; {num_undecodable} places in {num_undecodable_documents} of them are not UTF-8 and became U+FFFD"


def _show_rate(rate: float) -> str:
    """Write a number per second: whole, or with a digit where it is small."""
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}"


def _show_metrics(metrics: dict[str, float]) -> str:
    """Write measurements after one another, each with its interval where it has one."""
    intervals = {
        name: f" ({metrics[low]:.4f} to {metrics[high]:.4f})" for name, (low, high) in find_ends(metrics).items()
    }
    ends = {end for both in find_ends(metrics).values() for end in both}
    return "".join(
        f", {name} {value:.4f}{intervals.get(name, '')}" for name, value in metrics.items() if name not in ends
    )


# Field of an event -> how it is written, where its own text would not do.
_SHOWN: dict[str, Callable[[Any], str]] = {
    "num_bytes": format_bytes,
    "peak_bytes": format_bytes,
    "tensors": "; ".join,
    "modules": ", ".join,
    "units_per_s": _show_rate,
    "metrics": _show_metrics,
    "new_tensors": lambda names: f"; new: {', '.join(names)}" if names else "",
}


def _describe(values: dict[str, Any]) -> str:
    line = _LINES.get(values["kind"], "")
    if values.get("num_undecodable"):
        line += _UNDECODABLE
    shown = {key: _SHOWN[key](value) if key in _SHOWN else value for key, value in values.items()}
    return line.format(**({"num_steps": "?", "unit": "units"} | shown))
