from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deepseek.core.errors import DataError
from deepseek.core.events import Event
from deepseek.data.config import DataConfig
from deepseek.data.corpus import TokenizerReady, load_data, open_corpora, prepare_data
from deepseek.data.sources import Corpus
from deepseek.data.token_cache import CacheReady
from deepseek.data.tokenizing import save_tokenizer, train_tokenizer


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number}.txt").write_text(f"file number {number} of sixty\n" * 5, encoding="utf-8")
    return folder


def _config(text: Path, **settings: Any) -> DataConfig:
    return DataConfig(**{"sources": (str(text),), "vocab_size": 270, "heldout_fraction": 0.2} | settings)


def _reused(events: list[Event]) -> list[bool]:
    return [event.is_reused for event in events if isinstance(event, TokenizerReady | CacheReady)]


def test_both_parts_are_tokenized_with_a_tokenizer_of_the_training_part(text: Path, tmp_path: Path) -> None:
    config = _config(text)
    events = list(prepare_data(config, tmp_path / "data"))
    data = load_data(config, tmp_path / "data")
    train, heldout = Corpus((str(text),)).split(0.2)
    expected = train_tokenizer([document.text for document in train], vocab_size=270)
    assert data.tokenizer.digest == expected.digest
    assert data.heldout is not None
    assert data.train.document(0).tolist()[:-1] == expected.encode(next(iter(train)).text)
    assert data.heldout.document(0).tolist()[:-1] == expected.encode(next(iter(heldout)).text)
    assert data.train.num_documents + data.heldout.num_documents == 60
    assert _reused(events) == [False, False, False]


def test_the_second_time_everything_is_there(text: Path, tmp_path: Path) -> None:
    list(prepare_data(_config(text), tmp_path / "data"))
    assert _reused(list(prepare_data(_config(text), tmp_path / "data"))) == [True, True, True]


def test_changed_training_text_changes_everything(text: Path, tmp_path: Path) -> None:
    list(prepare_data(_config(text), tmp_path / "data"))
    for number in range(60):
        (text / f"{number}.txt").write_text(f"other words {number}\n" * 9, encoding="utf-8")
    assert _reused(list(prepare_data(_config(text), tmp_path / "data"))) == [False, False, False]


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer.json", b"{"), ("trained_on.json", b""), ("tokenizer.json", None), ("tokenizer.json", "other")],
)
def test_a_damaged_tokenizer_is_trained_again_with_a_warning(
    text: Path, tmp_path: Path, name: str, content: bytes | str | None
) -> None:
    config, folder = _config(text), tmp_path / "data" / "tokenizer"
    list(prepare_data(config, tmp_path / "data"))
    expected = load_data(config, tmp_path / "data").tokenizer.digest
    if content is None:
        (folder / name).unlink()
    elif isinstance(content, str):
        save_tokenizer(train_tokenizer(["zz zz"], vocab_size=258), folder)
    else:
        (folder / name).write_bytes(content)
    with pytest.warns(UserWarning, match="trained again"):
        list(prepare_data(config, tmp_path / "data"))
    assert load_data(config, tmp_path / "data").tokenizer.digest == expected


def test_a_given_tokenizer_is_used_and_does_not_pass_for_a_trained_one(text: Path, tmp_path: Path) -> None:
    given = train_tokenizer(["given given"], vocab_size=260)
    save_tokenizer(given, tmp_path / "given")
    config = _config(text, tokenizer=str(tmp_path / "given"))
    list(prepare_data(config, tmp_path / "data"))
    assert load_data(config, tmp_path / "data").tokenizer.digest == given.digest
    list(prepare_data(_config(text), tmp_path / "data"))
    assert load_data(_config(text), tmp_path / "data").tokenizer.digest != given.digest


def test_heldout_sources_leave_the_training_text_whole(text: Path, tmp_path: Path) -> None:
    (tmp_path / "exam.txt").write_text("questions", encoding="utf-8")
    config = _config(text, heldout_sources=(str(tmp_path / "exam.txt"),))
    list(prepare_data(config, tmp_path / "data"))
    data = load_data(config, tmp_path / "data")
    assert data.heldout is not None
    assert (data.train.num_documents, data.heldout.num_documents) == (60, 1)


def test_a_text_that_is_held_out_from_itself_is_both_parts(text: Path, tmp_path: Path) -> None:
    config = _config(text, heldout_sources=(str(text),))
    list(prepare_data(config, tmp_path / "data"))
    data = load_data(config, tmp_path / "data")
    assert data.heldout is not None
    assert data.train.tokens.tolist() == data.heldout.tokens.tolist()
    assert data.train.num_documents == 60


def test_nothing_needs_to_be_held_out(text: Path, tmp_path: Path) -> None:
    list(prepare_data(_config(text), tmp_path / "data"))
    config = _config(text, heldout_fraction=0)
    list(prepare_data(config, tmp_path / "data"))
    data = load_data(config, tmp_path / "data")
    assert data.heldout is None
    assert data.train.num_documents == 60


def test_a_single_file_says_how_it_can_be_split(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("".join(f"a b c {number}\n" for number in range(50)), encoding="utf-8")
    config = _config(tmp_path / "book.txt", vocab_size=260)
    with pytest.raises(DataError, match="cut long files with document_separator"):
        list(prepare_data(config, tmp_path / "data"))
    list(prepare_data(config.override({"document_separator": "\n"}), tmp_path / "data"))


def test_a_missing_corpus_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no file"):
        list(prepare_data(_config(tmp_path / "nowhere"), tmp_path / "data"))
    assert list(tmp_path.iterdir()) == []


def test_somebody_elses_tokenizer_folder_is_left_alone(text: Path, tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(["mine"], vocab_size=257), tmp_path / "data" / "tokenizer")
    (tmp_path / "data" / "tokenizer" / "vocab.json").write_text("{}", encoding="utf-8")
    config = _config(text, tokenizer=str(tmp_path / "data" / "tokenizer"))
    with pytest.raises(DataError, match=r"holds 'vocab\.json', which is not ours"):
        list(prepare_data(config, tmp_path / "data"))


def test_a_file_that_is_held_out_by_name_is_not_trained_on(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
    (tmp_path.parent / "elsewhere.txt").symlink_to(tmp_path / "2.txt")
    heldout_sources = (f"{tmp_path}/1.txt", f"{tmp_path.parent}/elsewhere.txt")
    with pytest.warns(
        UserWarning, match=r"held out by data\.heldout_sources and so not trained on: .*1\.txt, .*2\.txt$"
    ):
        train, heldout = open_corpora(DataConfig(sources=(str(tmp_path),), heldout_sources=heldout_sources))
    assert heldout is not None
    assert [document.text for document in train] == ["text 0"]
    assert [document.text for document in heldout] == ["text 1", "text 2"]


def test_held_out_files_that_lie_elsewhere_change_nothing(tmp_path: Path) -> None:
    for folder in ("train", "heldout"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(folder)
    train, _ = open_corpora(DataConfig(sources=(f"{tmp_path}/train",), heldout_sources=(f"{tmp_path}/heldout",)))
    assert [document.text for document in train] == ["train"]


def test_copies_of_held_out_texts_among_the_training_text_are_named(tmp_path: Path) -> None:
    for folder, texts in (("train", ("one", "two", "three")), ("heldout", ("two", "four"))):
        (tmp_path / folder).mkdir()
        for number, text in enumerate(texts):
            (tmp_path / folder / f"{number}.txt").write_text(text)
    config = _config(tmp_path / "train", vocab_size=260, heldout_sources=(f"{tmp_path}/heldout",))
    for _ in range(2):  # also where the caches are found made
        with pytest.warns(UserWarning, match=r"1 are held out under another name.*: 1\.txt; take the copies away"):
            list(prepare_data(config, tmp_path / "data"))
