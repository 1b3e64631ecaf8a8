"""Rows come out of every kind of table alike, and what is wrong with a table is said in one sentence."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest

from deepseek.core.errors import DataError
from deepseek.data.samples import BrokenSampleError
from deepseek.data.table_rows import TableColumns, TableRow, digest_rows, leave_out_broken, read_rows, read_split

ROWS = [{"text": "one, two", "label": "a"}, {"text": 'say "no"\nor not', "label": "b"}, {"text": "é", "label": "a"}]
COLUMNS = TableColumns(("text", "label"))


def write_table(folder: Path, kind: str, rows: list[dict[str, str]] = ROWS) -> str:
    path = folder / f"rows.{kind}"
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if kind in ("csv", "tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(lines)
    return str(path)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "jsonl.gz", "parquet"])
def test_every_kind_of_table_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    rows = read_rows((write_table(tmp_path, kind),), COLUMNS)
    assert [dict(row.values) for row in rows] == ROWS
    assert [row.name for row in rows] == [f"rows.{kind}:{number}" for number in range(3)]


def test_only_the_columns_that_are_asked_for_are_kept(tmp_path: Path) -> None:
    rows = read_rows((write_table(tmp_path, "csv"),), TableColumns(("text",), ("score",)))
    assert [set(row.values) for row in rows] == [{"text"}] * 3


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet"])
def test_a_missing_column_is_named_with_the_nearest_one(kind: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"column 'txt'.*did you mean 'text'"):
        read_rows((write_table(tmp_path, kind),), TableColumns(("txt",)))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"text": "a"}\nnot json\n', "line 2 is not JSON"),
        ("a.jsonl", "[1]\n", "line 1 holds a JSON list"),
        ("a.json", '{"text": "a"}', "expected an array of objects"),
        ("a.json", "[1", "is not JSON"),
        ("a.csv", "text,label\nx\n", "has 1 cells and the first line 2"),
        ("a.csv", "text,text\nx,y\n", "2 columns 'text'"),
        ("a.parquet", "no parquet", "cannot be read as Parquet"),
        ("a.txt", "a text", "is no table"),
        ("a.csv", "text\n", "there is no row in"),
    ],
)
def test_a_broken_table_is_refused_in_a_sentence(name: str, content: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=expected):
        read_rows((str(tmp_path / name),), TableColumns(("text",)))


def test_which_rows_are_held_out_follows_from_their_names(tmp_path: Path) -> None:
    many = [{"text": str(number), "label": "a"} for number in range(200)]
    source = write_table(tmp_path, "csv", many)
    settings = SimpleNamespace(sources=(source,), heldout_sources=(), heldout_fraction=0.2)
    train, heldout = read_split(settings, COLUMNS)
    assert heldout is not None
    assert len(train) + len(heldout) == 200
    assert 20 <= len(heldout) <= 60
    assert {row.name for row in train}.isdisjoint(row.name for row in heldout)
    shorter = write_table(tmp_path, "csv", many[:150])
    assert read_split(settings, COLUMNS)[1] == [row for row in heldout if int(row.values["text"]) < 150]
    assert shorter == source


def test_a_file_of_both_sources_is_held_out(tmp_path: Path) -> None:
    first, second = write_table(tmp_path, "csv"), write_table(tmp_path, "jsonl")
    settings = SimpleNamespace(sources=(str(tmp_path),), heldout_sources=(second,), heldout_fraction=0.0)
    with pytest.warns(UserWarning, match="held out by data.heldout_sources"):
        train, heldout = read_split(settings, COLUMNS)
    assert heldout is not None
    assert train == read_rows((first,), COLUMNS)
    assert heldout == read_rows((second,), COLUMNS)


def test_rows_that_are_held_out_from_themselves_are_both_parts(tmp_path: Path) -> None:
    source = write_table(tmp_path, "csv")
    settings = SimpleNamespace(sources=(source,), heldout_sources=(source,), heldout_fraction=0.0)
    assert read_split(settings, COLUMNS) == (read_rows((source,), COLUMNS), read_rows((source,), COLUMNS))


def test_an_empty_part_says_what_to_change(tmp_path: Path) -> None:
    settings = SimpleNamespace(sources=(write_table(tmp_path, "csv"),), heldout_sources=(), heldout_fraction=1e-9)
    with pytest.raises(DataError, match=r"none of the 3 rows .* held-out part"):
        read_split(settings, COLUMNS)


def test_cells_that_are_no_texts_or_numbers_are_broken() -> None:
    row = TableRow(
        "a.csv:0", {"empty": " ", "nothing": None, "list": [1], "half": "a\ud800b", "one": "1.5", "inf": "inf"}
    )
    for column in ("empty", "nothing", "list", "gone"):
        with pytest.raises(BrokenSampleError, match=r"a\.csv:0 has"):
            row.text(column)
    for column in ("inf", "half", "nothing", "list"):
        with pytest.raises(BrokenSampleError, match="expected a finite number"):
            row.number(column)
    assert row.text("half") == "a\N{REPLACEMENT CHARACTER}b"
    assert row.number("one") == 1.5


def test_broken_rows_are_left_out_by_name_up_to_a_limit() -> None:
    rows = [TableRow(f"a.csv:{number}", {"text": text}) for number, text in enumerate(["x", "", "y", " "])]
    with pytest.warns(UserWarning, match=r"left out: a\.csv:1 has an empty text.*a\.csv:3"):
        assert leave_out_broken(rows, lambda row: row.text("text")) == ["x", "y"]
    with pytest.raises(DataError, match="2 rows cannot be used and 1 may be left out"):
        leave_out_broken(rows, lambda row: row.text("text"), max_broken=1)
    with pytest.raises(DataError, match=r"none of the 1 rows can be used; the first one: a\.csv:1 has an empty text"):
        leave_out_broken(rows[1:2], lambda row: row.text("text"))


def test_the_digest_is_of_names_and_cells_in_their_order() -> None:
    rows = [TableRow("a:0", {"text": "x"}), TableRow("a:1", {"text": "y"})]
    digests = {digest_rows(rows), digest_rows(rows[::-1]), digest_rows([TableRow("a:0", {"text": "z"}), rows[1]])}
    assert len(digests) == 3
    assert digest_rows(rows) == digest_rows(list(rows))
