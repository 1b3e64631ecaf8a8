"""Rows with named columns, from CSV, TSV, JSON Lines, JSON and Parquet files.

    rows = read_rows(("reviews.csv", "more/*.parquet"), TableColumns(("text", "label")))
    rows[0].name, rows[0].values["text"]            "reviews.csv:0", "I liked it."

    train, heldout = read_split(config, TableColumns(("text", "label")))

Tasks that learn from labelled texts read their data with this; `sources.py` finds the files and opens them, also behind
URLs and compression. A `.json` file is an array of objects. Cells of a CSV are texts; those of the other kinds are what
they are there. All rows are read into memory, the columns that are asked for and no others.

As with documents, whether a row is for training or held out follows from a hash of its name alone, the file below its
source and the number of the row.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, Protocol

from deepseek.core.caller_warnings import warn_caller
from deepseek.core.errors import DataError
from deepseek.core.names import explain_unknown
from deepseek.data.documents import SourceFile, decode, explained_reading, open_file, open_parquet, parse_csv
from deepseek.data.samples import MAX_BROKEN, BrokenSampleError
from deepseek.data.sources import is_heldout, list_source, name_some

_HALF_PAIR = re.compile("[\ud800-\udfff]")  # JSON can spell half a surrogate pair, which no UTF-8 text holds


@dataclass(frozen=True)
class TableColumns:
    """The columns that are read."""

    required: tuple[str, ...]
    """Those that every file must have."""
    optional: tuple[str, ...] = ()
    """Those that are read where a file has them."""

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.required, *self.optional)


@dataclass(frozen=True)
class TableRow:
    """One row."""

    name: str
    """The file below its source and the number of the row: `reviews.csv:0`."""
    values: Mapping[str, Any]
    """Its cells by column."""

    def text(self, column: str) -> str:
        """Return the text in `column`; raises `BrokenSampleError` where there is none."""
        value = self.values.get(column)
        if not isinstance(value, str):
            seen = "nothing" if value is None else f"a {type(value).__name__}"
            raise BrokenSampleError(f"{self.name} has {seen} in {column!r}; expected a text")
        if not value.strip():
            raise BrokenSampleError(f"{self.name} has an empty text in {column!r}; fill it in or take the row away")
        return _HALF_PAIR.sub("\N{REPLACEMENT CHARACTER}", value)

    def number(self, column: str) -> float:
        """Return the number in `column`; raises `BrokenSampleError` where there is none."""
        value = self.values.get(column)
        try:
            found = float(value) if isinstance(value, str | int | float) else float("nan")
        except ValueError:
            found = float("nan")
        if not abs(found) < float("inf"):
            raise BrokenSampleError(f"{self.name} has {value!r} in {column!r}; expected a finite number")
        return found


class TableSources(Protocol):
    """Where rows come from, and which of them are held out."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Files, folders, globs or URLs."""

    @property
    def heldout_sources(self) -> tuple[str, ...]:
        """The same for the held-out rows; when empty, rows of `sources` are held out."""

    @property
    def heldout_fraction(self) -> float:
        """Share of rows that are held out, where there are no `heldout_sources`."""


def read_split(config: TableSources, columns: TableColumns) -> tuple[list[TableRow], list[TableRow] | None]:
    """Read the training rows and the held-out rows, `None` where nothing is held out.

    Raises `DataError` where one of the two would be empty. A file that both name is held out, and a warning says so;
    where both are the same sources, they are the same rows.
    """
    if config.heldout_sources == config.sources:
        rows = read_rows(config.sources, columns)
        return rows, rows
    if config.heldout_sources:
        heldout_files = _list_files(config.heldout_sources)
        names = {file.identity for file in heldout_files}
        files = _list_files(config.sources)
        if shared := sorted(file.path for file in files if file.identity in names):
            warn_caller(f"held out by data.heldout_sources and so not trained on: {name_some(shared)}")
        train = _read_files([file for file in files if file.identity not in names], columns)
        return _require_rows(train, config.sources), _require_rows(
            _read_files(heldout_files, columns), config.heldout_sources
        )
    rows = read_rows(config.sources, columns)
    fraction = config.heldout_fraction
    if not fraction:
        return rows, None
    parts = [[row for row in rows if is_heldout(row.name, fraction) == held_out] for held_out in (False, True)]
    for part, name in zip(parts, ("training", "held-out"), strict=True):
        if not part:
            raise DataError(
                f"none of the {len(rows)} rows of {', '.join(config.sources)} falls into the {name} part at "
                f"heldout_fraction={fraction}; change the fraction, or name heldout_sources"
            )
    return parts[0], parts[1]


def read_rows(sources: Sequence[str], columns: TableColumns) -> list[TableRow]:
    """Read the rows of all files of `sources`, in order; raises `DataError` where there are none."""
    return _require_rows(_read_files(_list_files(sources), columns), sources)


def leave_out_broken(
    rows: Iterable[TableRow], parse: Callable[[TableRow], Any], *, max_broken: int = MAX_BROKEN
) -> list[Any]:
    """Return what `parse` makes of the rows, without those that it refuses with `BrokenSampleError`.

    A warning names them; raises `DataError` where they are more than `max_broken` or all.
    """
    parsed: list[Any] = []
    problems: list[str] = []
    for row in rows:
        try:
            parsed.append(parse(row))
        except BrokenSampleError as error:
            problems.append(str(error))
    if problems and not parsed:
        raise DataError(f"none of the {len(problems)} rows can be used; the first one: {problems[0]}")
    if len(problems) > max_broken:
        raise DataError(
            f"{len(problems)} rows cannot be used and {max_broken} may be left out; the first one: {problems[0]}"
        )
    if problems:
        warn_caller(f"left out: {'; '.join(problems[:3])}{f' and {len(problems) - 3} more' * (len(problems) > 3)}")
    return parsed


def digest_rows(rows: Iterable[TableRow]) -> str:
    """SHA-256 over the names and the cells of rows, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.name, dict(row.values)], default=repr).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _require_rows(rows: list[TableRow], sources: Sequence[str]) -> list[TableRow]:
    if not rows:
        raise DataError(f"there is no row in {', '.join(sources)}; name CSV, JSONL or Parquet files that hold some")
    return rows


def _list_files(sources: Sequence[str]) -> list[SourceFile]:
    firsts: dict[str, SourceFile] = {}
    for source in sources:
        for file in list_source(source):
            if not file.may_be_table and file.is_named:
                raise DataError(f"{file.path} is no table; expected one of {', '.join(_READERS)}")
            if file.may_be_table:
                firsts.setdefault(file.identity, file)
    return list(firsts.values())


def _read_files(files: Iterable[SourceFile], columns: TableColumns) -> list[TableRow]:
    rows: list[TableRow] = []
    for file in files:
        with explained_reading(file), open_file(file) as stream:
            for number, values in enumerate(_READERS[file.kind](file, stream, columns)):
                kept = {column: values[column] for column in columns.names if column in values}
                rows.append(TableRow(f"{file.name}:{number}", kept))
    return rows


def _require_columns(where: str, known: Iterable[str], columns: TableColumns) -> None:
    known = list(known)
    for column in columns.required:
        if column not in known:
            raise DataError(f"{where}: {explain_unknown('column', column, known)}")


def _read_csv(file: SourceFile, stream: IO[bytes], columns: TableColumns) -> Iterator[Mapping[str, Any]]:
    names, rows = parse_csv(file, decode(file.name, stream.read()), columns.required)
    _require_columns(file.path, names, columns)
    return iter(rows)


def _read_json(file: SourceFile, stream: IO[bytes], columns: TableColumns) -> Iterator[Mapping[str, Any]]:
    text = decode(file.name, stream.read()).text
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{file.path} is not JSON ({error}); expected an array of objects") from error
    if not isinstance(values, list):
        raise DataError(f"{file.path} holds a JSON {type(values).__name__}; expected an array of objects")
    return (_require_object(row, f"{file.path} row {number}", columns) for number, row in enumerate(values))


def _read_json_lines(file: SourceFile, stream: IO[bytes], columns: TableColumns) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(decode(file.name, stream.read()).text.split("\n"), start=1):
        if line.strip():
            where = f"{file.path} line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{where} is not JSON ({error}); expected one object on each line") from error
            yield _require_object(row, where, columns)


def _require_object(row: Any, where: str, columns: TableColumns) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where} holds a JSON {type(row).__name__}; expected an object with the columns as its fields")
    _require_columns(where, row, columns)
    return row


def _read_parquet(file: SourceFile, stream: IO[bytes], columns: TableColumns) -> Iterator[Mapping[str, Any]]:
    names, rows = open_parquet(file, stream, columns.names)
    _require_columns(file.path, names, columns)
    return rows


_READERS: dict[str, Callable[[SourceFile, IO[bytes], TableColumns], Iterator[Mapping[str, Any]]]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".jsonlines": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
