"""From files of chats to caches, and what is said of those that cannot be used."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from deepseek.core.errors import ConfigError, DataError
from deepseek.data.chat_corpus import load_chats, prepare_chats
from deepseek.data.config import ChatConfig
from deepseek.data.corpus import PreparedData
from deepseek.data.token_cache import CacheReady
from deepseek.data.tokenizing import load_tokenizer, save_tokenizer
from tests.data.chat_examples import CHATML, CHATS, LLAMA_3, make_tokenizer, without_marks

ROWS = [{"messages": messages} for name, messages in CHATS.items() if name != "tools"] * 4


def write_lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_model(folder: Path, template: str | None = CHATML) -> str:
    folder.mkdir()
    save_tokenizer(make_tokenizer(template), folder)
    return str(folder)


def configure(tmp_path: Path, sources: str, **changes: Any) -> ChatConfig:
    values: dict[str, Any] = {"sources": [sources], "heldout_fraction": 0.3, "sequence_length": 128}
    if "tokenizer" not in changes:
        values["tokenizer"] = write_model(tmp_path / "model")
    return ChatConfig(**values | changes)


def prepare(config: ChatConfig, folder: Path) -> tuple[PreparedData, list[CacheReady]]:
    events = list(prepare_chats(config, folder))
    return load_chats(config, folder), [event for event in events if isinstance(event, CacheReady)]


def texts_of(data: PreparedData) -> list[str]:
    assert data.heldout is not None
    caches = (data.train, data.heldout)
    return sorted(
        data.tokenizer.decode(cache.document(index).tolist(), skip_special_tokens=False)
        for cache in caches
        for index in range(cache.num_documents)
    )


def test_all_chats_are_there_once_with_what_is_learned_and_a_second_run_uses_them_again(tmp_path: Path) -> None:
    config = configure(tmp_path, write_lines(tmp_path / "chats.jsonl", ROWS))
    data, ready = prepare(config, tmp_path / "data")
    assert [event.is_reused for event in ready] == [False, False]
    texts = texts_of(data)
    assert len(texts) == len(ROWS)
    assert sum("Hello, friend.<|im_end|>" in text for text in texts) == 4
    learned = data.tokenizer.decode(np.asarray(data.train.tokens)[data.train.learned].tolist())
    assert "Hello, friend." in learned
    assert "Hi there" not in learned
    _, again = prepare(config, tmp_path / "data")
    assert [event.is_reused for event in again] == [True, True]
    _, others = prepare(config.override({"train_on": "last"}), tmp_path / "data")
    assert [event.is_reused for event in others] == [False, False]


def test_files_of_every_kind_hold_the_same_chats(tmp_path: Path) -> None:
    tokenizer = write_model(tmp_path / "model")
    lines = write_lines(tmp_path / "chats.jsonl", ROWS)
    (tmp_path / "chats.json").write_text(json.dumps(ROWS), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "chats.parquet")
    found = []
    for source in (lines, str(tmp_path / "chats.json"), str(tmp_path / "chats.parquet")):
        config = configure(tmp_path, source, tokenizer=tokenizer)
        found.append(texts_of(prepare(config, tmp_path / Path(source).suffix)[0]))
    assert found[0] == found[1] == found[2]


@pytest.mark.filterwarnings("ignore:left out")
def test_broken_rows_are_named_counted_and_said_again_where_the_cache_is_used_again(tmp_path: Path) -> None:
    rows = [
        *ROWS,
        {"text": "no chat"},
        {"messages": [{"role": "bot", "content": "Hi"}]},
        {"messages": ROWS[0]["messages"][:1]},
    ]
    config = configure(tmp_path, write_lines(tmp_path / "chats.jsonl", rows), heldout_fraction=0)
    for _ in range(2):
        with pytest.warns(UserWarning) as warned:
            prepare(config, tmp_path / "data")
        messages = " ".join(str(warning.message) for warning in warned)
        assert f"left out: chats.jsonl:{len(ROWS)} holds no chat" in messages
        assert f"message 0 of chats.jsonl:{len(ROWS) + 1} has the role 'bot'" in messages
        assert "1 chats have no answer to learn and are left out" in messages


@pytest.mark.filterwarnings("ignore:left out")
@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([json.dumps(ROWS[0]), "{broken"], r"chats.jsonl line 2 is not JSON"),
        (
            ['{"text": "a"}', '{"text": "b"}'],
            r"none of the 2 rows can be used; .* chats.jsonl:0 holds no chat",
        ),
        (['{"messages": [{"role": "user", "content": "Hi"}]}'], "there is no chat to learn from: 1 chats have no"),
    ],
)
def test_what_cannot_be_used_is_refused_and_nothing_is_written(tmp_path: Path, lines: list[str], message: str) -> None:
    (tmp_path / "chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = configure(tmp_path, str(tmp_path / "chats.jsonl"), heldout_fraction=0)
    with pytest.raises(DataError, match=message):
        prepare(config, tmp_path / "data")
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["tokenizer"]


def test_a_chat_longer_than_a_row_is_counted(tmp_path: Path) -> None:
    config = configure(tmp_path, write_lines(tmp_path / "chats.jsonl", ROWS), sequence_length=40, too_long="drop")
    with pytest.warns(UserWarning, match=r"documents are longer than a row of 40 tokens and are left out"):
        prepare(config, tmp_path / "data")


def test_the_template_is_the_tokenizers_a_files_or_chatml(tmp_path: Path) -> None:
    plain = write_model(tmp_path / "plain", template=None)
    source = write_lines(tmp_path / "chats.jsonl", ROWS)
    with pytest.raises(ConfigError, match=r"has no chat template; set data\.chat_template=chatml"):
        prepare(configure(tmp_path, source, tokenizer=plain), tmp_path / "data")
    (tmp_path / "llama.jinja").write_text(LLAMA_3, encoding="utf-8")
    for template, sign in ((str(tmp_path / "llama.jinja"), "<|start_header_id|>"), ("chatml", "<|im_start|>")):
        config = configure(tmp_path, source, tokenizer=plain, chat_template=template)
        data, _ = prepare(config, tmp_path / "data")
        assert all(sign in text for text in texts_of(data))
        assert sign in (data.tokenizer.chat_template or "")
    for template, message in (
        ("nowhere.jinja", "cannot be read"),
        (str(tmp_path / "broken.jinja"), "broken at line 1"),
    ):
        (tmp_path / "broken.jinja").write_text("{% if %}", encoding="utf-8")
        with pytest.raises(DataError, match=message):
            prepare(configure(tmp_path, source, tokenizer=plain, chat_template=template), tmp_path / "data")


def test_without_a_tokenizer_there_is_a_sentence(tmp_path: Path) -> None:
    config = configure(tmp_path, write_lines(tmp_path / "chats.jsonl", ROWS), tokenizer=None)
    with pytest.raises(ConfigError, match="chats need the tokenizer of a model"):
        prepare(config, tmp_path / "data")


def test_what_ends_a_turn_ends_an_answer_of_the_finished_model(tmp_path: Path) -> None:
    config = configure(tmp_path, write_lines(tmp_path / "chats.jsonl", ROWS))
    data, _ = prepare(config, tmp_path / "data")
    backend = data.tokenizer.backend
    assert data.tokenizer.end_ids == {backend.token_to_id("</s>"), backend.token_to_id("<|im_end|>")}
    (tmp_path / "saved").mkdir()
    save_tokenizer(data.tokenizer, tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").end_ids == data.tokenizer.end_ids


def test_answers_that_end_with_plain_text_are_warned_of(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = write_model(tmp_path / "plain", template=template)
    config = configure(tmp_path, write_lines(tmp_path / "chats.jsonl", ROWS[:1] * 8), tokenizer=tokenizer)
    with pytest.warns(UserWarning, match="will not know where they end"):
        prepare(config, tmp_path / "data")


def test_a_template_with_marks_and_one_without_give_the_same_caches(tmp_path: Path) -> None:
    source, found = write_lines(tmp_path / "chats.jsonl", ROWS), []
    for name, template in (("marks", CHATML), ("beginnings", without_marks(CHATML))):
        tokenizer = write_model(tmp_path / name, template=template)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            data, _ = prepare(configure(tmp_path, source, tokenizer=tokenizer), tmp_path / f"data {name}")
        assert data.train.learned is not None
        found.append((data.train.tokens.tolist(), data.train.learned.tolist()))
    assert found[0] == found[1]
