import dataclasses
import errno
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from deepseek.core.errors import StorageError
from deepseek.core.events import Event, record


@dataclass(frozen=True)
class StepDone(Event):
    step: int
    loss: float


def test_the_kind_is_the_name_in_snake_case():
    assert StepDone(1, 0.5).kind == "step_done"
    assert Event().kind == "event"


def test_an_event_is_plain_values_and_frozen():
    event = StepDone(1, 0.5)
    assert event.to_dict() == {"kind": "step_done", "step": 1, "loss": 0.5} and next(iter(event.to_dict())) == "kind"
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.step = 2


def test_events_pass_on_as_they_are_and_each_is_one_line_with_its_time(tmp_path):
    events = [StepDone(1, 0.5), StepDone(2, 1 / 3)]
    began_s = time.time()
    passed = list(record(iter(events), tmp_path / "new" / "events.jsonl"))
    assert all(one is other for one, other in zip(passed, events, strict=True))
    lines = [json.loads(line) for line in (tmp_path / "new" / "events.jsonl").read_text().splitlines()]
    assert [{key: line[key] for key in ("kind", "step", "loss")} for line in lines] == [e.to_dict() for e in events]
    assert all(began_s - 0.001 <= line["time_s"] <= time.time() + 0.001 for line in lines)


def test_a_second_run_is_appended(tmp_path):
    for step in (1, 2):
        list(record([StepDone(step, 0.0)], tmp_path / "events.jsonl"))
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 2


def test_an_event_is_on_disk_before_the_next_is_made(tmp_path):
    path = tmp_path / "events.jsonl"
    for number, _ in enumerate(record((StepDone(step, 0.0) for step in range(3)), path), start=1):
        assert len(path.read_text().splitlines()) == number


def test_what_was_seen_stays_when_the_source_fails_with_its_own_error(tmp_path):
    def fail():
        yield StepDone(1, 0.0)
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(tmp_path / "corpus.txt"))

    path = tmp_path / "events.jsonl"
    with pytest.raises(FileNotFoundError, match=r"corpus\.txt"):
        list(record(fail(), path))
    assert json.loads(path.read_text())["step"] == 1


def test_a_full_disk_elsewhere_is_not_called_this_files(tmp_path):
    def fail():
        yield StepDone(1, 0.0)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left on device") as caught:
        list(record(fail(), tmp_path / "events.jsonl"))
    assert not isinstance(caught.value, StorageError)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("file/events.jsonl", "a file is in the way"),
        ("file/deeper/events.jsonl", "a part of this path is a file"),
        ("folder", "this path is a folder"),
        ("x" * 300, "its name is too long"),
    ],
)
def test_a_place_that_cannot_be_written_is_explained(tmp_path, path, reason):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match=f"cannot be written: {reason}"):
        list(record([StepDone(1, 0.0)], tmp_path / path))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_reader_that_stops_early_closes_the_file(tmp_path):
    events = record((StepDone(step, 0.0) for step in range(3)), tmp_path / "events.jsonl")
    next(events)
    events.close()  # an open file would be a ResourceWarning, which is an error here
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 1


def test_line_that_a_kill_tore_is_dropped_and_the_next_process_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    list(record([StepDone(1, 0.5)], path))
    with path.open("a", encoding="utf-8") as file:
        file.write('{"time_s": 12.5, "kind": "step_d')
    list(record([StepDone(2, 0.25)], path))
    assert [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()] == [1, 2]


def test_stream_that_fails_at_once_leaves_no_file(tmp_path: Path) -> None:
    def fail() -> Iterator[StepDone]:
        raise ValueError("broken")
        yield

    with pytest.raises(ValueError, match="broken"):
        list(record(fail(), tmp_path / "events.jsonl"))
    assert list(tmp_path.iterdir()) == []
