from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from deepseek.core.errors import DataError
from deepseek.data import token_cache
from deepseek.data.documents import Document
from deepseek.data.token_cache import (
    CacheReady,
    TokenCache,
    TokenizingProgress,
    build_token_cache,
    find_damage,
    load_token_cache,
)
from deepseek.data.tokenizing import END_OF_TEXT, Tokenizer, train_tokenizer

DOCUMENTS = [Document(f"{number}.txt", f"text number {number}, é\n" * (number + 1)) for number in range(20)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([document.text for document in DOCUMENTS], vocab_size=270)


def _build(documents: list[Document], tokenizer: Tokenizer, folder: Path) -> tuple[CacheReady, TokenCache]:
    *_, last = build_token_cache(documents, tokenizer, folder)
    assert isinstance(last, CacheReady)
    return last, load_token_cache(folder)


def test_each_document_is_its_tokens_and_the_end_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    ready, cache = _build(DOCUMENTS, tokenizer, tmp_path / "cache")
    assert cache.num_documents == len(DOCUMENTS)
    for index, document in enumerate(DOCUMENTS):
        assert cache.document(index).tolist() == [*tokenizer.encode(document.text), tokenizer.eos_id]
    assert cache.tokens.dtype == np.uint16
    assert ready.num_tokens == len(cache.tokens) == cache.starts[-1]
    assert ready.num_text_bytes == sum(len(document.text.encode()) for document in DOCUMENTS)


def test_progress_grows_to_the_whole(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "_BATCH_CHARACTERS", 500)
    *progress, ready = build_token_cache(DOCUMENTS, tokenizer, tmp_path / "cache", total_bytes=123)
    assert len(progress) > 3
    assert all(isinstance(each, TokenizingProgress) and each.total_bytes == 123 for each in progress)
    tokens = [each.num_tokens for each in progress]
    assert tokens == sorted(tokens)
    assert tokens[-1] == ready.num_tokens


def test_replaced_bytes_are_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    documents = [replace(DOCUMENTS[0], num_undecodable=3), DOCUMENTS[1], replace(DOCUMENTS[2], num_undecodable=1)]
    ready, _ = _build(documents, tokenizer, tmp_path / "cache")
    assert (ready.num_undecodable, ready.num_undecodable_documents) == (4, 2)


def test_the_same_text_is_not_tokenized_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    first, cache = _build(DOCUMENTS, tokenizer, tmp_path / "cache")
    second, again = _build(DOCUMENTS, tokenizer, tmp_path / "cache")
    assert (first.is_reused, second.is_reused) == (False, True)
    assert replace(second, is_reused=False) == first
    assert cache.digest == again.digest


@pytest.mark.parametrize(
    "changed",
    [
        DOCUMENTS[:-1],
        DOCUMENTS[::-1],
        [replace(DOCUMENTS[0], text="other"), *DOCUMENTS[1:]],
        [replace(DOCUMENTS[0], name="other"), *DOCUMENTS[1:]],
    ],
)
def test_changed_documents_are_tokenized_again(tokenizer: Tokenizer, tmp_path: Path, changed: list[Document]) -> None:
    _build(DOCUMENTS, tokenizer, tmp_path / "cache")
    ready, cache = _build(changed, tokenizer, tmp_path / "cache")
    assert not ready.is_reused
    assert cache.document(0).tolist()[:-1] == tokenizer.encode(changed[0].text)


def test_another_tokenizer_tokenizes_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    _build(DOCUMENTS, tokenizer, tmp_path / "cache")
    ready, _ = _build(DOCUMENTS, train_tokenizer(["aabb"], vocab_size=258), tmp_path / "cache")
    assert not ready.is_reused


@pytest.mark.parametrize("name", ["tokens.bin", "starts.npy"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "removed"])
def test_damage_is_refused_when_loaded_and_mended_when_built(
    tokenizer: Tokenizer, tmp_path: Path, name: str, damage: str
) -> None:
    folder = tmp_path / "cache"
    _, whole = _build(DOCUMENTS, tokenizer, folder)
    expected = whole.tokens.tolist()
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).unlink()
    if damage != "removed":
        (folder / name).write_bytes(content if damage == "flipped" else content[:-1])
    with pytest.raises(DataError, match=f"{name}.*delete the folder and build it again"):
        load_token_cache(folder)
    with pytest.warns(UserWarning, match=f"cannot be used and is built again: {name}"):
        list(build_token_cache(DOCUMENTS, tokenizer, folder))
    assert load_token_cache(folder).tokens.tolist() == expected


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema_version": 1}', None])
def test_a_damaged_manifest_is_refused_when_loaded_and_mended_when_built(
    tokenizer: Tokenizer, tmp_path: Path, content: str | None
) -> None:
    folder = tmp_path / "cache"
    _build(DOCUMENTS, tokenizer, folder)
    (folder / "manifest.json").unlink()
    if content is not None:
        (folder / "manifest.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"manifest\.json"):
        load_token_cache(folder)
    with pytest.warns(UserWarning, match=r"built again: .*manifest\.json"):
        ready, _ = _build(DOCUMENTS, tokenizer, folder)
    assert not ready.is_reused


def test_starts_that_would_have_to_be_unpickled_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    _build(DOCUMENTS, tokenizer, folder)
    np.save(folder / "starts.npy", np.asarray([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        load_token_cache(folder, is_verified=True)


def test_a_cache_of_another_schema_is_built_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    _build(DOCUMENTS, tokenizer, tmp_path / "cache")
    path = tmp_path / "cache" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"schema_version": 99}), encoding="utf-8")
    with pytest.raises(DataError, match="schema_version=99"):
        load_token_cache(tmp_path / "cache")
    with pytest.warns(UserWarning, match="is built again"):
        ready, _ = _build(DOCUMENTS, tokenizer, tmp_path / "cache")
    assert not ready.is_reused


def test_a_folder_with_something_else_in_it_is_left_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(DataError, match=r"holds 'thesis\.txt', so it is no token cache"):
        list(build_token_cache(DOCUMENTS, tokenizer, tmp_path))
    assert (tmp_path / "thesis.txt").exists()


def test_a_file_in_the_way_is_left_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("years of work", encoding="utf-8")
    with pytest.raises(DataError, match="is a file, where a token cache is a folder"):
        list(build_token_cache(DOCUMENTS, tokenizer, tmp_path / "cache"))
    assert (tmp_path / "cache").read_text(encoding="utf-8") == "years of work"


def test_a_build_that_stops_leaves_the_older_cache_as_it_was(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "_BATCH_CHARACTERS", 500)
    _, older = _build(DOCUMENTS, tokenizer, tmp_path / "cache")
    expected = older.tokens.tolist()
    events = build_token_cache(DOCUMENTS[::-1], tokenizer, tmp_path / "cache")
    next(events)
    events.close()  # what Ctrl-C and a reader that goes away come to
    assert [each.name for each in tmp_path.iterdir()] == ["cache"]
    assert load_token_cache(tmp_path / "cache").tokens.tolist() == expected


def test_documents_that_can_be_read_only_once_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can be read only once"):
        list(build_token_cache(iter(DOCUMENTS), tokenizer, tmp_path / "cache"))


def test_no_documents_leave_no_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no document to tokenize"):
        list(build_token_cache([], tokenizer, tmp_path / "cache"))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_cache_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cache cannot be used: .*manifest\.json is missing"):
        load_token_cache(tmp_path / "cache")


def test_a_large_vocabulary_is_stored_in_four_bytes(tmp_path: Path) -> None:
    vocabulary = {END_OF_TEXT: 0} | {f"w{number}": number for number in range(1, 70_000)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=END_OF_TEXT))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    _, cache = _build([Document("a", "w1 w69999")], Tokenizer(backend, END_OF_TEXT), tmp_path / "cache")
    assert cache.tokens.tolist() == [1, 69_999, 0]


def test_a_long_text_is_tokenized_in_pieces_and_stays_one_document(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(f"line {number} of a long text\n" for number in range(200)) + "x" * 300
    _, whole = _build([Document("a", text)], tokenizer, tmp_path / "whole")
    monkeypatch.setattr(token_cache, "_PIECE_CHARACTERS", 100)
    _, pieces = _build([Document("a", text)], tokenizer, tmp_path / "pieces")
    assert pieces.num_documents == 1
    assert tokenizer.decode(pieces.tokens.tolist()) == text
    lines = len(tokenizer.encode(text[: text.rindex("\n") + 1]))
    assert pieces.tokens[:lines].tolist() == whole.tokens[:lines].tolist()


@given(st.lists(st.text(alphabet="ab\n"), min_size=1))
def test_cutting_loses_nothing(texts: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_cache, "_PIECE_CHARACTERS", 5)
        pieces = list(token_cache._cut([Document(str(index), text) for index, text in enumerate(texts)]))
    assert all(len(text) <= 5 for text, _ in pieces)
    whole = "".join(text + "|" * is_last for text, is_last in pieces)
    assert whole == "".join(text + "|" for text in texts)


def test_a_whole_cache_shows_no_damage(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _build(DOCUMENTS, tokenizer, tmp_path / "cache")
    shutil.copytree(tmp_path / "cache", tmp_path / "moved")
    assert find_damage(tmp_path / "moved") is None
