from __future__ import annotations

import gzip
import json
import sysconfig
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from deepseek.core.errors import DataError
from deepseek.data.sources import HELDOUT, TRAIN, Corpus, Document, is_heldout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "corpus"
    (root / "deep").mkdir(parents=True)
    (root / "b.txt").write_text("second", encoding="utf-8")
    (root / "a.md").write_text("first é", encoding="utf-8")
    (root / "deep" / "c.txt").write_text("third", encoding="utf-8")
    (root / "empty.txt").write_text(" \n", encoding="utf-8")
    (root / ".hidden").write_text("not read", encoding="utf-8")
    return root


def _write_jsonl(path: Path, lines: list[object]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_a_folder_gives_its_files_sorted_without_hidden_and_empty_ones(folder: Path) -> None:
    assert list(Corpus((str(folder),))) == [
        Document("a.md", "first é"),
        Document("b.txt", "second"),
        Document("deep/c.txt", "third"),
    ]


def test_a_glob_names_its_files_from_where_the_pattern_starts(folder: Path) -> None:
    assert [each.name for each in Corpus((f"{folder}/**/*.txt",))] == ["b.txt", "deep/c.txt"]


def test_sources_are_read_in_the_order_given(folder: Path) -> None:
    corpus = Corpus((str(folder / "b.txt"), str(folder / "a.md")))
    assert [each.text for each in corpus] == ["second", "first é"]


def test_a_file_whose_name_looks_like_a_pattern_is_read(tmp_path: Path) -> None:
    (tmp_path / "notes[1].txt").write_text("text", encoding="utf-8")
    assert list(Corpus((str(tmp_path / "notes[1].txt"),))) == [Document("notes[1].txt", "text")]


def test_a_separator_cuts_a_file_into_documents(tmp_path: Path) -> None:
    (tmp_path / "stories.txt").write_text("one<|endoftext|>two<|endoftext|>\n", encoding="utf-8")
    corpus = Corpus((str(tmp_path),), document_separator="<|endoftext|>")
    assert list(corpus) == [Document("stories.txt:0", "one"), Document("stories.txt:1", "two")]


def test_compressed_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"plain"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "line"}\n'))
    assert [each.text for each in Corpus((str(tmp_path),))] == ["plain", "line"]


def test_a_url_is_read_like_a_folder() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/shelf/b.txt", b"second")
    memory.pipe("/shelf/a.jsonl", b'{"text": "first"}\n')
    try:
        assert list(Corpus(("memory://shelf",))) == [Document("a.jsonl:1", "first"), Document("b.txt", "second")]
    finally:
        memory.rm("/shelf", recursive=True)


@given(st.binary(max_size=200))
def test_replaced_places_are_those_that_the_codec_reports(content: bytes) -> None:
    import codecs

    from deepseek.data.sources import _decode

    reported = []
    codecs.register_error("counting", lambda error: (reported.append(error) or "\ufffd", error.end))
    text = content.decode("utf-8", errors="counting")
    assert _decode("x", content) == Document("x", text, len(reported))


def test_text_that_is_not_utf8_is_read_and_counted(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 \xef\xbf\xbd")
    assert list(Corpus((str(tmp_path),))) == [Document("latin.txt", "caf\ufffd \ufffd", num_undecodable=1)]


def test_jsonl_takes_the_chosen_field_and_skips_blank_lines_and_nulls(tmp_path: Path) -> None:
    path = _write_jsonl(tmp_path / "a.jsonl", [{"body": "one", "text": "no"}, {"body": None}, {"body": "two"}])
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert list(Corpus((str(path),), text_field="body")) == [Document("a.jsonl:1", "one"), Document("a.jsonl:3", "two")]


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
    assert list(Corpus((str(tmp_path),))) == [Document("a.parquet:0", "one"), Document("a.parquet:2", "three")]


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


@pytest.mark.parametrize("source", ["missing", "missing/*.txt", "missing.jsonl"])
def test_a_missing_source_is_said_before_anything_is_read(folder: Path, source: str) -> None:
    corpus = Corpus((str(folder), str(folder / source)))
    with pytest.raises(DataError, match=r"missing.*holds no file; check the path"):
        next(iter(corpus))


def test_an_unknown_protocol_is_one_sentence() -> None:
    with pytest.raises(DataError, match="nosuch://bucket"):
        list(Corpus(("nosuch://bucket/file",)))


def test_a_corpus_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match="there is no text in"):
        list(Corpus((str(tmp_path),)))


def test_one_document_cannot_be_split(tmp_path: Path) -> None:
    (tmp_path / "only.txt").write_text("text", encoding="utf-8")
    parts = Corpus((str(tmp_path),)).split(0.05)
    empty = next(part for part in parts if part.part == (TRAIN if is_heldout("only.txt", 0.05) else HELDOUT))
    with pytest.raises(DataError, match="document_separator"):
        list(empty)


def test_the_parts_of_a_split_are_the_whole(tmp_path: Path) -> None:
    _write_jsonl(tmp_path / "a.jsonl", [{"text": f"line {number}"} for number in range(500)])
    for number in range(100):
        (tmp_path / f"{number}.txt").write_text(f"file {number}", encoding="utf-8")
    corpus = Corpus((str(tmp_path),))
    train, heldout = (list(part) for part in corpus.split(0.2))
    assert sorted(train + heldout, key=lambda each: each.name) == sorted(corpus, key=lambda each: each.name)
    assert 60 < len(heldout) < 180


def test_size_counts_the_files_of_the_part(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"{number}.txt").write_text("x" * (number + 1), encoding="utf-8")
    for part in Corpus((str(tmp_path),)).split(0.3):
        assert part.num_bytes() == sum(len(document.text) for document in part)


@given(st.text(max_size=20), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_fraction_holds_out_the_same_documents_and_more(name: str, one: float, other: float) -> None:
    assert is_heldout(name, min(one, other)) <= is_heldout(name, max(one, other))


def test_the_standard_library_is_over_8_mb_of_its_own_source_files() -> None:
    documents = list(Corpus(("stdlib",)))
    root = Path(sysconfig.get_paths()["stdlib"])
    assert sum(len(document.text.encode()) for document in documents) > 8e6
    assert documents[0].text == (root / documents[0].name).read_bytes().decode()
    assert [each.name for each in documents] == sorted(each.name for each in documents)
    assert {"json/decoder.py", "argparse.py"} <= {each.name for each in documents}
    assert not [each.name for each in documents if "/test/" in each.name or "site-packages" in each.name]
