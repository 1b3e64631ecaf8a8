from __future__ import annotations

import gzip
import json
import os
import sysconfig
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.core.errors import DataError
from deepseek.data.documents import Document
from deepseek.data.sources import HELDOUT, TRAIN, Corpus, is_heldout


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


def test_text_that_is_not_utf8_is_read_and_counted(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 \xef\xbf\xbd")
    assert list(Corpus((str(tmp_path),))) == [Document("latin.txt", "caf\ufffd \ufffd", num_undecodable=1)]


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
    with pytest.raises(DataError, match=r"\(0 trains on all of it\), cut long files with document_separator"):
        list(empty)


def test_the_parts_of_a_split_are_the_whole(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"line {number}"}) for number in range(500)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
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


def link(path: Path, target: str) -> Path:
    path.symlink_to(target)
    return path


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A folder of which nearly everything lies elsewhere, as in a cache of a model hub."""
    blobs, notes = tmp_path / "blobs", tmp_path / "notes"
    (blobs / "more" / "deep").mkdir(parents=True)
    notes.mkdir()
    (blobs / "one").write_text("one")
    (blobs / "more" / "two.md").write_text("two")
    (blobs / "more" / "deep" / "three.md").write_text("three")
    (notes / "zero.md").write_text("zero")
    link(notes / "one.md", "../blobs/one")
    link(notes / "more", "../blobs/more")
    return notes


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("", ["more/deep/three.md", "more/two.md", "one.md", "zero.md"]),
        ("/*.md", ["one.md", "zero.md"]),
        ("/**/*.md", ["more/deep/three.md", "more/two.md", "one.md", "zero.md"]),
        ("/*/*.md", ["more/two.md"]),
        ("/more/**", ["deep/three.md", "two.md"]),
        ("/one.md", ["one.md"]),
    ],
)
def test_links_are_followed_to_files_and_folders(linked: Path, source: str, names: list[str]) -> None:
    corpus = Corpus((f"{linked}{source}",))
    assert [file.name for file in corpus.list_files()] == names
    assert corpus.num_bytes() == sum(len(document.text) for document in corpus)


def test_a_file_with_several_names_is_read_once_and_lies_on_one_side(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"text{number}.txt").write_text(f"text {number}")
        link(tmp_path / f"link{number}.txt", f"text{number}.txt")
    train, heldout = Corpus((str(tmp_path),)).split(0.5)
    sides = [{document.text for document in part} for part in (train, heldout)]
    assert all(sides)
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == {f"text {number}" for number in range(40)}
    assert len(Corpus((str(tmp_path),)).list_files()) == 40


def test_what_is_no_file_is_named_and_never_opened(linked: Path) -> None:
    link(linked / "broken.md", "nowhere")
    link(linked / "back", "..")
    (linked.parent / "up").mkdir()
    os.mkfifo(linked / "pipe.md")
    with pytest.warns(UserWarning, match=r"neither a file nor a folder is .*broken\.md, .*pipe\.md"):
        documents = list(Corpus((f"{linked}/*.md",)))
    assert [document.text for document in documents] == ["one", "zero"]
    with pytest.raises(DataError, match=r"cannot be opened .*a link that leads to no file"):
        list(Corpus((f"{linked}/broken.md",)))
    with pytest.raises(DataError, match=r"cannot be opened .*a pipe, a device or a socket"):
        list(Corpus((f"{linked}/pipe.md",)))


def test_a_link_to_a_folder_above_is_no_endless_folder(linked: Path) -> None:
    link(linked / "back", "../notes")
    with pytest.warns(UserWarning, match=r"neither a file nor a folder is .*back, which is left out"):
        assert len(list(Corpus((str(linked),)))) == 4


def test_an_image_among_text_is_left_out_and_named_and_alone_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("text")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(range(256)) * 4)
    (tmp_path / "c").write_bytes("Съешь же ещё этих мягких французских булок".encode("cp1251"))
    with pytest.warns(UserWarning, match=r"no text is in .*b\.png, .*c, which is left out"):
        assert [document.text for document in Corpus((str(tmp_path),))] == ["text"]
    for name, seen in (("b.png", "NUL bytes"), ("c", "places that are not UTF-8")):
        with pytest.raises(DataError, match=rf"{name} is no text: it has \d+ {seen}"):
            list(Corpus((str(tmp_path / name),)))


def test_what_is_left_out_is_named_once_however_often_a_corpus_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\0\0")
    os.mkfifo(tmp_path / "pipe")
    corpus = Corpus((str(tmp_path),))
    with pytest.warns(UserWarning) as warned:
        assert [[document.name for document in corpus] for _ in range(3)] == [["a.txt"]] * 3
    assert len(warned) == 2


def test_hard_links_and_sources_that_overlap_are_read_once(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "a.txt").write_text("one")
    os.link(tmp_path / "part" / "a.txt", tmp_path / "b.txt")
    corpus = Corpus((str(tmp_path / "part"), str(tmp_path), str(tmp_path / "b.txt")))
    assert [(document.name, document.text) for document in corpus] == [("a.txt", "one")]


def test_links_in_a_circle_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    link(tmp_path / "x", "y")
    link(tmp_path / "y", "x")
    with pytest.warns(UserWarning, match=r"neither a file nor a folder is .*/x, .*/y, which is left out"):
        assert [document.text for document in Corpus((str(tmp_path),))] == ["one"]


def test_a_folder_with_brackets_in_its_name_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "notes[1]").mkdir()
    (tmp_path / "notes[1]" / "a.txt").write_text("one")
    assert [document.text for document in Corpus((f"{tmp_path}/notes[1]",))] == ["one"]


def test_an_empty_source_is_not_the_current_folder() -> None:
    with pytest.raises(DataError, match="a source is an empty text"):
        list(Corpus(("",)))
