"""Events on a screen: progress bars for long work, lines for what happened, a table and a curve at the end.

`follow` is the one reader of event streams. The first Ctrl-C asks the stream to end at its next event, which is where
its state is whole and can be saved; a second one stops at once.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from deepseek.core.events import Event
from deepseek.core.units import format_bytes, format_count, format_seconds


def follow(events: Iterable[Event], *, as_json: bool) -> Event | None:
    """Show all of `events` and return the last one. Raises `KeyboardInterrupt` after Ctrl-C."""
    last = None
    with Interrupt() as interrupt, _display(as_json) as show:
        for event in events:
            show(event)
            last = event
            if interrupt.is_asked:
                if isinstance(events, Generator):
                    events.close()
                raise KeyboardInterrupt
    return last


def print_event(event: Event, *, as_json: bool) -> None:
    """One event as a line, at once."""
    text = json.dumps(event.to_dict()) if as_json else _describe(event.to_dict())
    if text:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def show_table(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """A small table on standard output; numbers to the right."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=any(header))
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 or not any(header) else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def show_summary(report: dict[str, Any], folder: Path, events_file: Path, *, as_json: bool) -> None:
    """The end of the quickstart: the loss as a picture and in the terminal, and the table of what came out."""
    from deepseek.cli.drawing import draw_loss, print_loss

    steps, losses = _read_losses(events_file)
    draw_loss(steps, losses, report, folder / "loss.png")
    if as_json:
        return
    print_loss(steps, losses)
    train, baseline, int8, serve = report["train"], report["baseline"], report["int8"], report["serve"]
    show_table(
        "What came out",
        ("", "value"),
        [
            ("parameters", format_count(train["num_parameters"])),
            ("training loss, first -> last", f"{train['loss_first']:.2f} -> {train['loss_last']:.2f}"),
            ("held-out loss, nats per token", f"{train['heldout_loss']:.3f}"),
            ("  unigram", f"{baseline['unigram_loss']:.3f}"),
            ("  bigram, add-one", f"{baseline['bigram_loss']:.3f}"),
            ("  bigram, discounted", f"{baseline['bigram_discounted_loss']:.3f}"),
            ("training, tokens/s", f"{train['tokens_per_s']:.0f}"),
            ("int8 bytes / FP32 bytes", f"{int8['bytes_ratio']:.3f}"),
            ("int8 held-out loss", f"{int8['heldout_loss']:.3f}"),
            ("int8 decoding speed / FP32", f"{int8['decode_speedup']:.2f}"),
            ("server, first token", f"{serve['first_token_ms']:.0f} ms"),
            ("server, tokens/s", f"{serve['tokens_per_s']:.0f}"),
            ("wall time", format_seconds(report["wall_s"])),
        ],
    )
    Console().print(f"report: {folder / 'report.json'}   picture: {folder / 'loss.png'}   models: {folder}/model*")


class Interrupt:
    """Remembers the first Ctrl-C while the block runs, and lets the second one through."""

    def __init__(self) -> None:
        self.is_asked = False

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: object) -> None:
        if self.is_asked:
            raise KeyboardInterrupt
        self.is_asked = True
        sys.stderr.write("\nstopping at the next safe point; Ctrl-C again stops at once\n")


@contextmanager
def _display(as_json: bool) -> Iterator[Callable[[Event], None]]:
    """A function that shows one event."""
    if as_json:
        yield lambda event: print_event(event, as_json=True)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console()) as progress:
        yield _Bars(progress).show


class _Bars:
    """The progress bars of a run; everything that is no progress is printed above them."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self._num_steps = 0

    def show(self, event: Event) -> None:
        values = event.to_dict()
        if values["kind"] == "tokenizing_progress":
            note = f"{format_count(values['num_tokens'])} tokens"
            self._advance("tokenizing", values["num_text_bytes"], values["total_bytes"], note)
        elif values["kind"] == "step_done":
            note = f"loss {values['loss']:.3f}  {values['tokens_per_s']:.0f} tokens/s"
            self._advance("training", values["step"], self._num_steps, note)
        else:
            self._num_steps = values.get("num_steps", self._num_steps)
            if values["kind"] == "cache_ready":
                self._finish("tokenizing")
            if text := _describe(values):
                self._progress.console.print(text, markup=False, highlight=False)

    def _advance(self, name: str, completed: int, total: int | None, note: str) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, note="")
        self._progress.update(self._tasks[name], completed=completed, total=total, note=note)

    def _finish(self, name: str) -> None:
        if name in self._tasks:
            self._progress.remove_task(self._tasks.pop(name))


# Kind of event -> the line that tells it; a kind that is not here is progress, or says nothing a person waits for.
_LINES = {
    "tokenizer_ready": "tokenizer: {vocab_size} tokens",
    "cache_ready": "text: {num_documents} documents, {num_tokens} tokens in {folder}",
    "run_started": "model: {num_parameters} parameters, {precision}, steps {first_step} to {num_steps}",
    "evaluated": "held-out loss after step {step}: {heldout_loss:.4f} nats per token over {num_tokens} tokens",
    "model_saved": "model: {path} ({num_bytes} bytes)",
    "baselines_measured": (
        "baselines: unigram {unigram_loss:.3f}, bigram {bigram_loss:.3f}, discounted {bigram_discounted_loss:.3f}"
    ),
    "model_quantized": "int8: {path}, {bytes_ratio:.3f} of the bytes, held-out loss {heldout_loss:.4f}",
    "completion_received": "served {prompt!r} -> {text!r}",
    "server_started": "serving {model_name} at {url} (API below {url}/v1); Ctrl-C stops",
    "server_stopping": "stopping ({reason}); {num_open} open requests",
}


def _describe(values: dict[str, Any]) -> str:
    line = _LINES.get(values["kind"])
    if line is None:
        return ""
    shown = {key: format_bytes(value) if key == "num_bytes" else value for key, value in values.items()}
    return line.replace(" bytes)", ")").format(**shown)


def _read_losses(events_file: Path) -> tuple[list[int], list[float]]:
    """Steps and losses of a run, the latest where a step was done twice."""
    losses: dict[int, float] = {}
    for line in events_file.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event["kind"] == "step_done":
            losses[event["step"]] = event["loss"]
    return sorted(losses), [losses[step] for step in sorted(losses)]
