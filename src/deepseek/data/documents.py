r"""What a file holds, as documents: plain text, JSON Lines, JSON arrays, CSV and Parquet.

    for document in read_documents(file, text_field="text", separator=None):
        use(document.name, document.text)

`Corpus` (sources.py) finds the files and calls this for each. What is read, and what is not:
- Text is UTF-8, or what its byte order mark says: UTF-8, UTF-16 or UTF-32. The mark is no text, and in a text file
  `\r\n` is one line end.
- Bytes that are not UTF-8 become U+FFFD; each document carries how often that happened. A file with NUL bytes, with
  more than two control characters in a hundred, or with three tenths of its characters replaced, is no text (an image,
  another encoding), and `NotTextError` says so; so is an archive of several files.
- JSON and CSV files are tables where they have the text field: an array of JSON objects, or one after the other, in
  a `.json`; CSV and TSV with a line of names, also between semicolons. Others are the text they are, as in a folder
  of code; where a table was probably meant, a warning says which fields there are, or, where the file was named as a
  source, an error. Rows with a null instead of a text are left out, and counted in a warning.
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

from deepseek.core.caller_warnings import warn_caller
from deepseek.core.errors import DataError
from deepseek.core.extras import require
from deepseek.core.names import explain_unknown

_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
# Longer marks first: UTF-32's begins with UTF-16's.
_BYTE_ORDER_MARKS = (
    (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe\x00\x00", "utf-32-le"),
    (b"\x00\x00\xfe\xff", "utf-32-be"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)
_MOST_REPLACED = 0.3  # share of the characters of a text
_MOST_CONTROL = 0.02
_CONTROL = re.compile(r"[\x01-\x07\x0e-\x1a\x1c-\x1f]")  # all but those that move on a page, and escape sequences


class NotTextError(DataError):
    """A file that was to be read as text holds something else."""


@dataclass(frozen=True)
class Document:
    """One text with the name that decides on which side of the split it lies."""

    name: str
    text: str
    num_undecodable: int = 0
    """Places where bytes that are not UTF-8 were replaced by U+FFFD."""
    is_null: bool = False
    """Whether its row holds a null instead of a text."""


@dataclass(frozen=True)
class SourceFile:
    """A file of a source; `name` is its path below the source, the same on every machine."""

    name: str
    path: str
    size_bytes: int
    filesystem: Any
    """The fsspec filesystem that opens `path`."""
    is_named: bool = False
    """Whether the source is this very file, and not a folder or a glob that has it."""
    said: set[str] = field(default_factory=set, compare=False, repr=False)
    """Warnings that were given, which a corpus that is read several times gives once."""

    def warn(self, message: str) -> None:
        """Warn with `message`, unless that was said."""
        if message not in self.said:
            self.said.add(message)
            warn_caller(message)

    @property
    def identity(self) -> str:
        """The same for two names of one file on one filesystem."""
        protocol = self.filesystem.protocol
        is_local = "file" in ((protocol,) if isinstance(protocol, str) else protocol)
        if not is_local:
            return f"{protocol}:{self.path}"
        found = Path(self.path).stat()
        return f"{found.st_dev}:{found.st_ino}"

    @property
    def kind(self) -> str:
        """The suffix that says how the file is read; `part-0.jsonl.gz` is `.jsonl`."""
        stem, suffix = posixpath.splitext(self.path)
        return (posixpath.splitext(stem)[1] if suffix in _COMPRESSIONS else suffix).lower()

    @property
    def may_be_table(self) -> bool:
        """Whether each of its rows may be a document."""
        return self.kind in _TABLE_READERS


def read_documents(file: SourceFile, *, text_field: str, separator: str | None) -> Iterator[Document]:
    """Yield the documents of `file`; raises `DataError` where it is damaged, and `NotTextError` where it is no text."""
    with explained_reading(file), open_file(file) as stream:
        if file.kind in _TABLE_READERS:
            num_nulls = 0
            for document in _TABLE_READERS[file.kind](file, stream, text_field):
                num_nulls += document.is_null
                yield document
            if num_nulls:
                rows = "1 row" if num_nulls == 1 else f"{num_nulls} rows"
                file.warn(f"left out of {file.path}: {rows} with a null in {text_field!r}")
        else:
            yield from _read_text(file, stream.read(), separator)


@contextmanager
def open_file(file: SourceFile) -> Iterator[IO[bytes]]:
    """Open `file` without its compression; `NotTextError` for a zip of several files, which would lose all but one."""
    if file.path.lower().endswith(".zst"):
        arrow = require("pyarrow", extra="data")
        with file.filesystem.open(file.path, "rb") as packed, arrow.CompressedInputStream(packed, "zstd") as stream:
            yield io.BufferedReader(stream)
        return
    if file.path.lower().endswith(".zip"):
        with file.filesystem.open(file.path, "rb") as packed, zipfile.ZipFile(packed) as archive:
            if len(archive.namelist()) > 1:
                raise NotTextError(f"{file.path} is an archive of {len(archive.namelist())} files; unpack it")
    with file.filesystem.open(file.path, "rb", compression="infer") as stream:
        yield stream


def decode(name: str, content: bytes) -> Document:
    """Return `content` as text in the encoding that its byte order mark says, or in UTF-8."""
    encoding, content = _split_mark(content)
    try:
        return Document(name, content.decode(encoding))
    except UnicodeDecodeError:
        text = content.decode(encoding, errors="replace")
        genuine = content.decode(encoding, errors="ignore").count("\ufffd")
        return Document(name, text, text.count("\ufffd") - genuine)


def _split_mark(content: bytes) -> tuple[str, bytes]:
    for mark, encoding in _BYTE_ORDER_MARKS:
        if content.startswith(mark):
            return encoding, content[len(mark) :]
    return "utf-8", content


def _read_text(file: SourceFile, content: bytes, separator: str | None) -> Iterator[Document]:
    whole = _decode_text(file, content)
    if separator is None:
        yield whole
        return
    encoding, body = _split_mark(content)
    if encoding == "utf-8":
        pieces = [decode("", piece) for piece in body.replace(b"\r\n", b"\n").split(separator.encode())]
    else:
        pieces = [Document("", piece) for piece in whole.text.split(separator)]
        pieces[0] = replace(pieces[0], num_undecodable=whole.num_undecodable)
    for number, piece in enumerate(pieces):
        yield replace(piece, name=f"{file.name}:{number}")


def _decode_text(file: SourceFile, content: bytes) -> Document:
    document = decode(file.name, content)
    _refuse_binary(file, document)
    return replace(document, text=document.text.replace("\r\n", "\n"))


def _refuse_binary(file: SourceFile, document: Document) -> None:
    """Raise `NotTextError` for what is no text."""
    length = len(document.text)
    bounds = (
        ("NUL bytes", document.text.count("\0"), 0),
        ("places that are not UTF-8", document.num_undecodable, max(1, _MOST_REPLACED * length)),
        ("control characters", len(_CONTROL.findall(document.text)), max(1, _MOST_CONTROL * length)),
    )
    for kind, count, most in bounds:
        if count > most:
            raise NotTextError(
                f"{file.path} is no text: it has {count} {kind} among {length} characters; "
                "leave it out, or write it in UTF-8"
            )


def _read_jsonl(file: SourceFile, stream: IO[bytes], text_field: str) -> Iterator[Document]:
    head = stream.readline()
    encoding, first = _split_mark(head)
    if encoding == "utf-8":
        lines: Iterator[bytes] = chain([first], stream)
    else:
        lines = (line.encode() for line in io.StringIO(decode(file.name, head + stream.read()).text, newline="\n"))
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _read_json_line(f"{file.name}:{number}", line, f"{file.path} line {number}", text_field)


def _read_json_line(name: str, line: bytes, where: str, text_field: str) -> Document:
    decoded = decode(name, line)
    try:
        values = json.loads(decoded.text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON ({error}); expected one object on each line") from error
    if not isinstance(values, dict):
        raise DataError(f"{where} holds a JSON {type(values).__name__}; expected an object with the text in a field")
    document = _document_of(name, values, text_field, where)
    return replace(document, num_undecodable=document.num_undecodable + decoded.num_undecodable)


def _read_json(file: SourceFile, stream: IO[bytes], text_field: str) -> Iterator[Document]:
    """An array of objects, or one after the other, that have the field; anything else is a text."""
    content = stream.read()
    whole = _decode_text(file, content)
    values = _parse_values(whole.text)
    is_array = len(values) == 1 and isinstance(values[0], list)
    found = values[0] if is_array else values
    rows = found if (is_array or len(values) > 1) and all(isinstance(row, dict) for row in found) else []
    if any(text_field in row for row in rows):
        for number, row in enumerate(rows):
            yield _document_of(f"{file.name}:{number}", row, text_field, f"{file.path} row {number}")
        return
    if rows:
        _report_missing_field(file, list(dict.fromkeys(field for row in rows for field in row)), text_field)
    elif any(_has_field(inner, text_field) for value in found for inner in _inside(value)):
        _report_table(file, f"its objects with a {text_field!r} lie inside others; write them as an array")
    elif found and all(isinstance(row, str) for row in found):
        _report_table(file, f"it is a list of texts; write each as an object with the text in {text_field!r}")
    yield from _read_text(file, content, None)


def _parse_values(text: str) -> list[Any]:
    """Parse one JSON value after the other; nothing comes of a text that is no JSON."""
    decoder, values, position = json.JSONDecoder(), [], 0
    try:
        while position < len(text):
            if text[position].isspace():
                position += 1
                continue
            value, position = decoder.raw_decode(text, position)
            values.append(value)
    except json.JSONDecodeError:
        return []
    return values


def _has_field(value: Any, text_field: str) -> bool:
    """Return whether `value` or something inside it is an object with a text in the field."""
    is_row = isinstance(value, dict) and isinstance(value.get(text_field), str)
    return is_row or any(_has_field(inner, text_field) for inner in _inside(value))


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _read_csv(file: SourceFile, stream: IO[bytes], text_field: str) -> Iterator[Document]:
    content = stream.read()
    decoded = decode(file.name, content)
    names, rows = parse_csv(file, decoded, (text_field,))
    if text_field not in names:
        if names:
            _report_missing_field(file, names, text_field)
        yield from _read_text(file, content, None)
    for number, row in enumerate(rows):
        document = _document_of(f"{file.name}:{number}", row, text_field, f"{file.path} row {number}")
        yield replace(document, num_undecodable=decoded.num_undecodable if number == 0 else 0)


def parse_csv(file: SourceFile, document: Document, columns: Sequence[str]) -> tuple[list[str], list[dict[str, str]]]:
    """Return the columns of a CSV or TSV file and its rows; no rows where one of `columns` is not among them.

    Raises `DataError` for a row with too few or too many cells and for a column of `columns` that stands there twice.
    """
    _refuse_binary(file, document)
    limit = csv.field_size_limit(len(document.text) + 1)
    try:
        lines = io.StringIO(document.text, newline="")
        delimiter = _find_delimiter(lines, next(iter(columns), None), "\t" if file.kind == ".tsv" else ",")
        table = csv.DictReader(lines, delimiter=delimiter, strict=True)
        names = list(table.fieldnames or ())
        for column in columns:
            if names.count(column) > 1:
                raise csv.Error(f"it has {names.count(column)} columns {column!r}")
        if not set(columns) <= set(names):
            return names, []
        return names, [_require_whole(row, number) for number, row in enumerate(table)]
    except csv.Error as error:
        raise DataError(f"{file.path} cannot be read as a table ({error}); mend it or leave it out") from error
    finally:
        csv.field_size_limit(limit)


def _find_delimiter(lines: io.StringIO, column: str | None, usual: str) -> str:
    """Return what separates the cells: of a line `sep=;`, which is passed, else whatever makes `column` a name.

    Spreadsheets write semicolons where a comma is the decimal point.
    """
    head = lines.readline()
    if stated := re.fullmatch(r'"?sep=([^\w\s]|\t)"?\s*', head):
        return stated[1]
    lines.seek(0)
    for delimiter in (usual, ",", ";", "\t", "|"):
        if column in next(csv.reader([head], delimiter=delimiter), []):
            return delimiter
    return usual


def _require_whole(row: dict[str | None, Any], number: int) -> dict[str, Any]:
    """Return `row`; raises where a comma in a text that is not quoted, or a cut line, leaves it with other cells."""
    if None in row or None in row.values():
        num_cells = sum(value is not None for key, value in row.items() if key is not None) + len(row.get(None) or ())
        num_names = len(row) - (None in row)
        raise csv.Error(f"row {number} has {num_cells} cells and the first line {num_names}; quote texts with commas")
    return cast("dict[str, Any]", row)


def _report_missing_field(file: SourceFile, names: Sequence[str], text_field: str) -> None:
    _report_table(file, explain_unknown("text_field", text_field, names))


def _report_table(file: SourceFile, problem: str) -> None:
    """Warn of a table that is read as the text it is; one that was named is refused."""
    if file.is_named:
        raise DataError(f"{file.path}: {problem}")
    file.warn(f"{file.path} is read as plain text, and it may be a table: {problem}")


def _read_parquet(file: SourceFile, stream: IO[bytes], text_field: str) -> Iterator[Document]:
    names, rows = open_parquet(file, stream, (text_field,))
    if text_field not in names:
        _text_of(dict.fromkeys(names), text_field, file.path)
    for number, row in enumerate(rows):
        yield _document_of(f"{file.name}:{number}", row, text_field, f"{file.path} row {number}")


def open_parquet(
    file: SourceFile, stream: IO[bytes], columns: Sequence[str]
) -> tuple[list[str], Iterator[dict[str, Any]]]:
    """Return the columns of a Parquet file, and its rows with those of `columns` that it has."""
    parquet = require("pyarrow.parquet", extra="data")
    with _explained_parquet(file):
        table = parquet.ParquetFile(stream)
        names = list(table.schema_arrow.names)
    return names, _iterate_parquet(file, table, [column for column in columns if column in names])


def _iterate_parquet(file: SourceFile, table: Any, columns: list[str]) -> Iterator[dict[str, Any]]:
    with _explained_parquet(file):
        for batch in table.iter_batches(columns=columns):
            yield from batch.to_pylist()


@contextmanager
def _explained_parquet(file: SourceFile) -> Iterator[None]:
    arrow = require("pyarrow", extra="data")
    try:
        yield
    except arrow.ArrowException as error:
        raise DataError(f"{file.path} cannot be read as Parquet ({error}); write it again or leave it out") from error


def _document_of(name: str, values: dict[str, Any], text_field: str, where: str) -> Document:
    # JSON can spell half a surrogate pair (\ud800), which no UTF-8 text holds; it goes the way of other broken bytes.
    document = decode(name, _text_of(values, text_field, where).encode("utf-8", "surrogatepass"))
    return replace(document, is_null=values[text_field] is None)


def _text_of(values: dict[str, Any], text_field: str, where: str) -> str:
    """Return the text among `values`; a null is an empty text."""
    if text_field not in values:
        raise DataError(f"{where}: {explain_unknown('text_field', text_field, values)}")
    text = values[text_field]
    if text is not None and not isinstance(text, str):
        raise DataError(
            f"{where} has a {type(text).__name__} in {text_field!r}; expected text: choose another text_field"
        )
    return text or ""


@contextmanager
def explained_reading(file: SourceFile) -> Iterator[None]:
    """Raise `DataError` with the name of `file` for whatever reading it runs into."""
    try:
        yield
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, ValueError, RecursionError) as error:
        raise DataError(f"{file.path} cannot be read ({error}); check that it is whole and yours to read") from error


_TABLE_READERS: dict[str, Callable[[SourceFile, IO[bytes], str], Iterator[Document]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".jsonlines": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
