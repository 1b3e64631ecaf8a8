"""Answers are where they say, no held-out sentence is learned from, and baselines are what they say."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek.core.errors import DataError
from deepseek.recipes.stdlib_questions import (
    ENTRIES_PER_PASSAGE,
    MOST_QUESTIONS,
    ask,
    compose_questions,
    measure_baselines,
    read_entries,
)

SHAPES = '''
def area(width, height=2.5, *, unit=None):
    """Return the area of a rectangle.

    >>> area(2, 3)
    6
    """

class Box:
    """A box with a lid. It can be opened."""

    def __init__(self, color="red"): ...

    def open(self):
        """Open the lid of the box."""

    def _hinge(self):
        """Move the hinge a little."""

def undocumented(): ...
'''


def write_modules(folder: Path, num_modules: int) -> Path:
    """Modules of three functions each, the last of which all have in common."""
    folder.mkdir()
    for number in range(num_modules):
        functions = [("load", f"Load record {number} from disk."), ("size", f"Return the size of {number} records.")]
        lines = [f'def {name}_{number}(path, limit={number}):\n    "{text}"\n' for name, text in functions]
        (folder / f"module_{number}.py").write_text("".join(lines) + 'def close(x):\n    "Close what is open."\n')
    return folder


def read_rows(folder: Path) -> dict[str, list[dict[str, Any]]]:
    parts = {part: (folder / f"{part}.jsonl").read_text().splitlines() for part in ("train", "heldout")}
    return {part: [json.loads(line) for line in lines] for part, lines in parts.items()}


def test_entries_are_what_is_public_and_documented() -> None:
    assert [entry.text for entry in read_entries(SHAPES)] == [
        "area(width, height=2.5, unit=None): Return the area of a rectangle.",
        "Box(color='red'): A box with a lid. It can be opened.",
        "Box.open(): Open the lid of the box.",
    ]


def test_what_is_asked_depends_on_what_the_entry_says() -> None:
    area, box, opening = read_entries(SHAPES)
    answers = [{question.answer for question in ask(entry, np.random.default_rng(0))} for entry in (area, box, opening)]
    assert answers == [
        {"the area of a rectangle", "2.5", "None"},
        {"A box with a lid", "'red'"},
        {"Open the lid of the box"},
    ]
    for entry in (area, box, opening):
        for question in ask(entry, np.random.default_rng(1)):
            assert entry.name in question.text
            assert entry.text[question.begin :].startswith(question.answer)


def test_answers_stand_in_passages_where_they_say(tmp_path: Path) -> None:
    compose_questions(tmp_path / "questions", sources=(str(write_modules(tmp_path / "code", 40)),))
    rows = read_rows(tmp_path / "questions")
    assert rows["heldout"]
    for row in rows["train"] + rows["heldout"]:
        (text,), (begin,) = row["answers"]["text"], row["answers"]["answer_start"]
        assert row["context"][begin : begin + len(text)] == text
        assert len(row["context"].split("\n")) == ENTRIES_PER_PASSAGE
    counts: defaultdict[tuple[str, str], int] = defaultdict(int)
    for row in rows["heldout"]:
        counts[row["module"], row["context"]] += 1
    assert max(counts.values()) <= ENTRIES_PER_PASSAGE * MOST_QUESTIONS


def test_no_module_and_no_first_sentence_is_in_both_parts(tmp_path: Path) -> None:
    """`close` is in every module, so training passages lose it and are too short, unless two more entries follow."""
    folder = write_modules(tmp_path / "code", 40)
    for path in folder.glob("*.py"):
        path.write_text(path.read_text() + f'def last_{path.stem}(x):\n    "Do the last thing of {path.stem}."\n')
    compose_questions(tmp_path / "questions", sources=(str(folder),))
    rows = read_rows(tmp_path / "questions")
    assert rows["train"]
    assert not {row["module"] for row in rows["train"]} & {row["module"] for row in rows["heldout"]}
    assert any("Close what is open." in row["context"] for row in rows["heldout"])
    assert not any("Close what is open." in row["context"] for row in rows["train"])


def test_the_same_seed_gives_the_same_questions_and_another_one_others(tmp_path: Path) -> None:
    sources = (str(write_modules(tmp_path / "code", 40)),)
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        compose_questions(tmp_path / name, sources=sources, seed=seed)
    assert read_rows(tmp_path / "one") == read_rows(tmp_path / "two")
    assert read_rows(tmp_path / "one")["heldout"] != read_rows(tmp_path / "three")["heldout"]


def test_baselines_are_what_their_names_say(tmp_path: Path) -> None:
    context = "\n".join(["load(path): Load a record.", "size(path): Return the size.", "close(x): Close the file."])
    questions = [("What does load do?", "Load a record"), ("What does close do?", "Close the file")]
    rows = [{"question": text, "context": context, "answers": {"text": [answer]}} for text, answer in questions]
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = measure_baselines(tmp_path)
    assert scores["first_entry"]["exact_match"] == 0.5
    assert scores["nearest_entry"]["exact_match"] == 1.0
    # SQuAD leaves articles out: "load record" and "close file" share no word.
    assert scores["first_entry"]["f1"] == 0.5


def test_a_file_that_is_not_python_is_named(tmp_path: Path) -> None:
    folder = write_modules(tmp_path / "code", 40)
    (folder / "notes.txt").write_text("any text may lie beside")
    (folder / "old.py").write_text("print 'hello'")
    with pytest.raises(DataError, match=r"old\.py is not Python"):
        compose_questions(tmp_path / "questions", sources=(str(folder),))
    assert not (tmp_path / "questions").exists()
