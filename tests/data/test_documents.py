"""What a file holds is read as what it is: every encoding with a mark, every kind of table, and code as text."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pyarrow import parquet

from deepseek.core.errors import DataError
from deepseek.data.documents import Document, decode
from deepseek.data.sources import Corpus


def _write_jsonl(path: Path, lines: list[object]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@given(st.binary(max_size=200))
def test_replaced_places_are_those_that_the_codec_reports(content: bytes) -> None:
    assume(not content.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")))
    reported = []
    codecs.register_error("counting", lambda error: (reported.append(error) or "\ufffd", error.end))
    text = content.decode("utf-8", errors="counting")
    assert decode("x", content) == Document("x", text, len(reported))


def test_jsonl_takes_the_chosen_field_and_skips_blank_lines_and_nulls(tmp_path: Path) -> None:
    path = _write_jsonl(tmp_path / "a.jsonl", [{"body": "one", "text": "no"}, {"body": None}, {"body": "two"}])
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.warns(UserWarning, match=r"left out of .*a\.jsonl: 1 row with a null in 'body'$"):
        documents = list(Corpus((str(path),), text_field="body"))
    assert documents == [Document("a.jsonl:1", "one"), Document("a.jsonl:3", "two")]


def test_half_a_surrogate_in_json_is_replaced_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\\ud800b \\ud83d\\ude00"}')
    (document,) = Corpus((str(tmp_path),))
    assert document.num_undecodable > 0
    assert document.text.startswith("a\ufffd")
    assert document.text.endswith("b 😀")


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        ('{"texts": "x"}', "unknown text_field 'text'; did you mean 'texts'"),
        ('{"text": 3}', "has a int in 'text'"),
        ("[1]", "holds a JSON list"),
        ('{"text": ', "is not JSON"),
    ],
)
def test_a_malformed_json_line_is_named_by_its_number(tmp_path: Path, line: str, seen: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line, encoding="utf-8")
    with pytest.raises(DataError, match="line 2") as raised:
        list(Corpus((str(tmp_path),)))
    assert seen in str(raised.value)


def test_parquet_rows_are_documents_and_nulls_are_left_out(tmp_path: Path) -> None:
    table = pa.table({"text": ["one", None, "three"], "label": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    with pytest.warns(UserWarning, match=r"left out of .*a\.parquet: 1 row with a null in 'text'$"):
        documents = list(Corpus((str(tmp_path),)))
    assert documents == [Document("a.parquet:0", "one"), Document("a.parquet:2", "three")]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_rows_with_a_null_are_counted_once_however_often_and_in_parts_a_corpus_is_read(
    tmp_path: Path, name: str
) -> None:
    rows = [{"text": None if number % 4 == 0 else f"text {number}"} for number in range(12)]
    content = json.dumps(rows) if name == "a.json" else "\n".join(map(json.dumps, rows))
    (tmp_path / name).write_text(content)
    with pytest.warns(UserWarning) as warned:
        parts = Corpus((str(tmp_path),)).split(0.5)
        texts = [document.text for _ in range(2) for part in parts for document in part]
    assert sorted(texts) == sorted(2 * [row["text"] for row in rows if row["text"]])
    assert [str(warning.message) for warning in warned] == [
        f"left out of {tmp_path / name}: 3 rows with a null in 'text'"
    ]


@pytest.mark.parametrize(
    "content",
    [
        'id;text\n1;a, b\n2;"c; d"\n',
        'text;id\r\na, b;1\r\n"c; d";2\r\n',
        'sep=;\ntext;id\na, b;1\n"c; d";2\n',
        '\ufeff"id";"text"\n1;"a, b"\n2;"c; d"\n',
        "id\ttext\n1\ta, b\n2\tc; d\n",
        "id|text\n1|a, b\n2|c; d\n",
    ],
)
def test_cells_between_other_signs_than_commas_are_cells(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.csv").write_text(content, encoding="utf-8", newline="")
    assert [document.text for document in read(tmp_path / "a.csv")] == ["a, b", "c; d"]


def test_a_missing_parquet_column_lists_the_columns(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"content": ["one"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"unknown text_field 'text'.*known: content"):
        list(Corpus((str(tmp_path),)))


@pytest.mark.parametrize(("name", "content"), [("a.parquet", b"PAR1 not really"), ("a.txt.gz", b"\x1f\x8b\x08 no")])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} cannot be read"):
        list(Corpus((str(tmp_path),)))


def test_a_truncated_gzip_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(bytes(range(256)) * 50)[:-20])
    with pytest.raises(DataError, match=r"a\.txt\.gz cannot be read"):
        list(Corpus((str(tmp_path),)))


ENCODINGS = ("utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be")
MARKS = {"utf-16-be": codecs.BOM_UTF16_BE, "utf-32-be": codecs.BOM_UTF32_BE}


def encode(text: str, encoding: str) -> bytes:
    """With a mark, which Python writes for some encodings and leaves to us for others."""
    return MARKS.get(encoding, b"") + text.encode(encoding)


def read(path: Path, **settings: Any) -> list[Document]:
    return list(Corpus((str(path),), **settings))


@pytest.mark.parametrize("encoding", ENCODINGS)
@given(text=st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=50))
def test_text_with_a_mark_is_read_in_its_encoding_without_the_mark(encoding: str, text: str) -> None:
    assert decode("x", encode(text, encoding)) == Document("x", text)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_files_of_every_kind_may_have_a_mark(tmp_path: Path, encoding: str) -> None:
    for name, content in {
        "a.txt": "größer\r\n漢字\n",
        "b.jsonl": '{"text": "größer\\r\\n漢字"}\r\n\r\n{"text": "zwei"}',
        "c.csv": 'number,text\r\n1,"größer, 漢字"\r\n',
        "d.json": '[{"text": "größer"}, {"text": "漢字"}]',
    }.items():
        (tmp_path / name).write_bytes(encode(content, encoding))
    assert read(tmp_path) == [
        Document("a.txt", "größer\n漢字\n"),
        Document("b.jsonl:1", "größer\r\n漢字"),
        Document("b.jsonl:3", "zwei"),
        Document("c.csv:0", "größer, 漢字"),
        Document("d.json:0", "größer"),
        Document("d.json:1", "漢字"),
    ]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_separator_is_found_in_every_encoding(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes(encode("one\r\n\r\ntwo", encoding))
    assert [document.text for document in read(tmp_path, document_separator="\n\n")] == ["one", "two"]


def test_damaged_utf16_is_counted(tmp_path: Path) -> None:
    damaged = codecs.BOM_UTF16_LE + "a long enough text".encode("utf-16-le") + b"\x00\xd8" + " end".encode("utf-16-le")
    (tmp_path / "a.txt").write_bytes(damaged)
    assert read(tmp_path) == [Document("a.txt", "a long enough text\ufffd end", num_undecodable=1)]


ROWS = [{"text": 'one, "two"\nthree', "label": "x"}, {"text": "vier\té", "label": "y"}]
TEXTS = [row["text"] for row in ROWS]


@pytest.mark.parametrize("suffix", ["json", "JSON", "lines.json", "csv", "tsv", "csv.gz", "ndjson", "jsonlines"])
def test_tables_as_other_programs_write_them_give_their_texts(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"table.{suffix}"
    if suffix in ("json", "JSON"):
        content = json.dumps(ROWS, indent=2)
    elif suffix in ("lines.json", "ndjson", "jsonlines"):
        content = "\n".join(map(json.dumps, ROWS))
    else:
        stream = io.StringIO(newline="")
        writer = csv.DictWriter(stream, ["text", "label"], dialect="excel-tab" if suffix == "tsv" else "excel")
        writer.writeheader()
        writer.writerows(ROWS)
        content = stream.getvalue()
    path.write_bytes(gzip.compress(content.encode()) if suffix.endswith(".gz") else content.encode())
    assert [document.text for document in read(path)] == TEXTS
    assert [document.text for document in read(path, text_field="label")] == ["x", "y"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("package.json", '{"name": "left-pad", "version": "1.0.0"}'),
        ("numbers.json", "[1, 2, 3]"),
        ("broken.json", '{"a": '),
        ("comment.json", "// a comment\n{}"),
        ("empty.json", "[]"),
        ("settings.json", '{"text": "of a setting"}'),
    ],
)
def test_json_that_is_no_table_is_the_text_that_it_is(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert read(tmp_path) == [Document(name, content)]


@pytest.mark.parametrize(
    ("name", "content"), [("a.json", '[{"body": "x"}]'), ("a.csv", "body,label\nx,y\n"), ("a.json", '{"body": 1}\n{}')]
)
def test_a_table_without_the_field_is_reported_in_a_folder_and_refused_by_name(
    tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.warns(UserWarning, match=r"is read as plain text.*unknown text_field 'text'.*body"):
        assert read(tmp_path) == [Document(name, content)]
    with pytest.raises(DataError, match=r"unknown text_field 'text'.*body"):
        read(tmp_path / name)


def test_a_row_without_the_field_that_others_have_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": "x"}, {"texts": "y"}]')
    with pytest.raises(DataError, match=r"a\.json row 1: unknown text_field 'text'; did you mean 'texts'"):
        read(tmp_path)


def test_a_long_field_of_a_csv_is_read_and_the_limit_is_as_before(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text(f"text\n{'x' * 300_000}\n")
    assert [len(document.text) for document in read(tmp_path)] == [300_000]
    assert csv.field_size_limit() == before


def test_json_nested_too_deep_is_an_error_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("[" * 200_000)
    with pytest.raises(DataError, match=r"a\.jsonl"):
        read(tmp_path)


def test_json_objects_one_after_the_other_are_rows_whatever_their_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("\n".join(json.dumps(row, indent=1) for row in ROWS))
    assert [document.text for document in read(tmp_path)] == TEXTS


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"data": [{"text": "x"}]}', "lie inside others"),
        ('[{"row": {"text": "x"}}, 1]', "lie inside others"),
        ('["one", "two"]', "a list of texts"),
    ],
)
def test_json_that_hides_its_texts_is_reported_in_a_folder_and_refused_by_name(
    tmp_path: Path, content: str, problem: str
) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.warns(UserWarning, match=rf"a\.json is read as plain text.*{problem}"):
        assert read(tmp_path) == [Document("a.json", content)]
    with pytest.raises(DataError, match=problem):
        read(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("id,text\n1,a cut, text\n", "row 0 has 3 cells and the first line 2"),
        ("id,text\n1,whole\n2\n", "row 1 has 1 cells and the first line 2"),
        ("text,text\na,b\n", "2 columns 'text'"),
    ],
)
def test_no_cell_of_a_csv_is_lost(tmp_path: Path, content: str, problem: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError, match=rf"a\.csv .*{problem}"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["a.txt", "a.csv"])
@pytest.mark.parametrize(
    "content",
    [
        "text\n你好世界你好世界你好世界".encode("utf-16-le"),
        b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n1 0 obj\nstream\n\x01\x02\x03\x04\nendstream",
        bytes(range(1, 256)) * 20,
        b"text\na\x00b\n",
    ],
)
def test_bytes_that_are_no_text_are_left_out_whatever_their_name(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "b.txt").write_text("a bell \x07 and \x1b[31mred\x1b[0m")
    with pytest.warns(UserWarning, match=rf"no text is in .*{re.escape(name)}, which is left out"):
        assert [document.name for document in read(tmp_path)] == ["b.txt"]


def test_zstandard_is_read_and_a_zip_of_several_files_is_not(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    with arrow.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as stream:
        stream.write(b'{"text": "x"}\n{"text": "y"}\n')
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("one.txt", "one")
    assert [document.text for document in read(tmp_path)] == ["x", "y", "one"]
    with zipfile.ZipFile(tmp_path / "b.zip", "a") as archive:
        archive.writestr("two.txt", "two")
    with pytest.raises(DataError, match=r"b\.zip is an archive of 2 files; unpack it"):
        read(tmp_path / "b.zip")
    for name in ("a.jsonl.zst", "b.zip"):
        (tmp_path / name).write_bytes(b"neither")
        with pytest.raises(DataError, match=rf"{re.escape(name)} cannot be read"):
            read(tmp_path / name)
