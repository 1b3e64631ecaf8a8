"""The reader of events: signals, what it closes, what it writes where, whatever the events hold."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Generator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from deepseek.cli import Stopped
from deepseek.cli.screen.events import _Bars, follow, print_event, printing_beside
from deepseek.core.errors import StorageError
from deepseek.core.events import Event
from deepseek.train.events import Evaluated, RunStarted, StepDone


@dataclass(frozen=True)
class Counted(Event):
    number: int


@dataclass(frozen=True)
class Told(Event):
    number: int
    text: str


class Source:
    """Events that know how they were left."""

    def __init__(self, signals: dict[int, signal.Signals] | None = None) -> None:
        self.signals = signals or {}
        self.num_made = 0
        self.was_left = False

    def events(self, count: int = 5) -> Generator[Event, None, None]:
        try:
            for number in range(count):
                if number in self.signals:
                    os.kill(os.getpid(), self.signals[number])
                self.num_made += 1
                yield Counted(number)
        except GeneratorExit:
            self.was_left = True
            raise


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_stream_at_its_next_event(
    number: signal.Signals, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    source = Source({2: number})
    with pytest.raises(Stopped) as stopped:
        follow(source.events(), file=tmp_path / "events.jsonl", as_json=True)
    assert stopped.value.number == number
    assert (source.num_made, source.was_left) == (3, True)
    out, err = capsys.readouterr()
    assert out.count("\n") == 3
    assert err == "deepseek: stopping at the next safe point; Ctrl-C again stops at once\n"
    assert (tmp_path / "events.jsonl").read_text().count("\n") == 3
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_signal_does_not_wait() -> None:
    def impatient() -> Generator[Event, None, None]:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        yield Counted(0)

    with pytest.raises(Stopped):
        follow(impatient(), as_json=True)


def test_a_stream_that_ends_returns_its_last_event() -> None:
    source = Source()
    assert follow(source.events(3), as_json=True) == Counted(2)
    assert not source.was_left
    assert follow(source.events(0), as_json=True) is None


def test_a_stream_is_closed_when_showing_fails(tmp_path: Path) -> None:
    """A run saves itself when it is closed, also when its screen or its log is the problem."""
    source = Source()
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        follow(source.events(), file=tmp_path / "file" / "events.jsonl", as_json=True)
    assert source.num_made == 0

    class Unprintable(Counted):
        def to_dict(self) -> dict[str, object]:
            raise BrokenPipeError

    def events() -> Generator[Event, None, None]:
        try:
            yield Unprintable(0)
        except GeneratorExit:
            source.was_left = True
            raise

    with pytest.raises(BrokenPipeError):
        follow(events(), as_json=True)
    assert source.was_left


def test_an_error_while_a_stopped_run_saves_itself_comes_out() -> None:
    def failing() -> Generator[Event, None, None]:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            yield Counted(0)
        except GeneratorExit:
            raise StorageError("the disk is full") from None

    with pytest.raises(StorageError, match="the disk is full"):
        follow(failing(), as_json=True)


def step(number: int) -> StepDone:
    return StepDone(number, loss=2.5, learning_rate=0.1, grad_norm=1.0, num_units=64, units_per_s=1000.0)


def run_started(first_step: int) -> RunStarted:
    return RunStarted(7000, "causal_lm", "tokens", 90000, "bf16", first_step, 650, 0.003)


def test_a_log_gets_a_step_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    def events() -> Generator[Event, None, None]:
        yield run_started(0)
        yield from map(step, range(1, 400))

    follow(events(), as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "model: 7000 parameters, bf16, steps 0 to 650",
        "step 1 of 650: loss 2.500, 1000 tokens/s",
        "step 399 of 650: loss 2.500, 1000 tokens/s",  # the last one, however soon it came
    ]


def test_the_last_step_stands_before_what_followed_it_and_once(capsys: pytest.CaptureFixture[str]) -> None:
    def events() -> Generator[Event, None, None]:
        yield run_started(0)
        yield from map(step, (1, 2, 3))
        yield Counted(0)  # nothing that anybody waits for
        yield step(4)
        yield Evaluated(4, 3.25, {"accuracy": 0.5}, 100, "tokens")

    follow(events(), as_json=False)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "step 1 of 650: loss 2.500, 1000 tokens/s",
        "step 4 of 650: loss 2.500, 1000 tokens/s",
        "held-out after step 4: loss 3.2500, accuracy 0.5000 over 100 tokens",
    ]


def test_the_last_step_before_a_signal_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    def events() -> Generator[Event, None, None]:
        yield run_started(0)
        yield step(1)
        os.kill(os.getpid(), signal.SIGINT)
        yield step(2)

    with pytest.raises(Stopped):
        follow(events(), as_json=False)
    assert capsys.readouterr().out.splitlines()[-1] == "step 2 of 650: loss 2.500, 1000 tokens/s"


def test_an_ignored_signal_stays_ignored() -> None:
    """As `nohup` leaves it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert follow(Source({1: signal.SIGHUP}).events(3), as_json=True) == Counted(2)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_bar_of_a_resumed_run_begins_where_it_was() -> None:
    """Steps that another process did are no speed of this one, and would promise an end that does not come."""
    with Progress(console=Console(file=StringIO(), force_terminal=True)) as progress:
        bars = _Bars(progress)
        bars.show(run_started(400))
        (task,) = progress.tasks
        assert (task.completed, task.total, task.speed) == (400, 650, None)
        bars.show(step(405))
        assert (task.completed, task.total) == (405, 650)
        assert not task.finished


def test_an_event_nobody_waits_for_is_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_event(Counted(1), as_json=False)
    assert capsys.readouterr().out == ""
    print_event(Counted(1), as_json=True)
    assert capsys.readouterr().out == '{"kind": "counted", "number": 1}\n'


def test_events_that_are_read_are_all_printed_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    with printing_beside(as_json=True) as show:
        for number in range(100):
            show(Counted(number))
    output = capsys.readouterr()
    assert [json.loads(line)["number"] for line in output.out.splitlines()] == list(range(100))
    assert output.err == ""


def test_work_goes_on_while_nobody_reads_its_events_and_their_number_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pipe holds 64 KB, and who writes to a full one waits."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "w", encoding="utf-8") as unread, os.fdopen(reading, encoding="utf-8") as reader:
        monkeypatch.setattr("sys.stdout", unread)
        with printing_beside(as_json=True) as show:
            for number in range(5_000):
                show(Told(number, "x" * 1000))
        said = capsys.readouterr().err
        (printer,) = (thread for thread in threading.enumerate() if thread.name == "deepseek-printer")
        os.set_blocking(reading, False)
        text = ""
        while printer.is_alive():  # it goes on where it stood, now that somebody reads
            text += reader.read() or ""
            printer.join(0.01)
        numbers = [json.loads(line)["number"] for line in (text + (reader.read() or "")).splitlines()]
    assert numbers == sorted(set(numbers)) and numbers[0] == 0 and 1000 < len(numbers) < 4_000
    assert re.fullmatch(r"deepseek: \d+ events not printed, since nobody read them\n", said)


def test_an_interval_stands_behind_its_measurement(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6, "flow": 1.0, "flow_low": 2.0}
    print_event(Evaluated(4, 3.25, metrics, 100, "images"), as_json=False)
    expected = "loss 3.2500, accuracy 0.5000 (0.4000 to 0.6000), flow 1.0000, flow_low 2.0000 over 100 images"
    assert expected in capsys.readouterr().out
