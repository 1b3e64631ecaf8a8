"""Windows are those of transformers, answers come back from them, and the best span is that of brute force."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from deepseek.core.errors import ConfigError
from deepseek.data.answer_windows import (
    NO_ANSWER,
    AnswerWindow,
    ContextQuestion,
    WindowEncoder,
    find_best_span,
    locate,
    read_answers,
)
from deepseek.data.samples import BrokenSampleError
from deepseek.data.text_collate import TextSample
from deepseek.data.tokenizing import Tokenizer, save_tokenizer, train_encoder_tokenizer

CONTEXT = "the old house by the river has a small garden where a dog sleeps all day and a cat waits for the night " * 3
QUESTION = "who sleeps all day in the garden?"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_encoder_tokenizer([CONTEXT, QUESTION] * 3, vocab_size=80)


def test_windows_are_those_of_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)(
        QUESTION,
        CONTEXT,
        max_length=48,
        stride=10,
        truncation="only_second",
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    (windows,) = WindowEncoder(tokenizer, max_len=48, stride=10).encode([ContextQuestion("q", QUESTION, CONTEXT)])
    assert len(windows) > 2
    assert [window.text.tokens_T.tolist() for window in windows] == theirs["input_ids"]
    for window, offsets in zip(windows, theirs["offset_mapping"], strict=True):
        is_context = window.offsets_T2[:, 0] >= 0
        assert np.array_equal(window.offsets_T2[is_context], np.array(offsets)[is_context])
        assert window.text.segments_T is not None
        assert np.array_equal(window.text.segments_T[is_context], np.ones(is_context.sum()))
        assert window.target == NO_ANSWER


@pytest.mark.parametrize("answer", ["the old house", "a dog", "day", "waits for the night"])
def test_every_window_with_the_whole_answer_leads_back_to_it(answer: str, tokenizer: Tokenizer) -> None:
    begin = CONTEXT.index(answer, 60)
    question = ContextQuestion("q", QUESTION, CONTEXT, ((answer, begin),))
    (windows,) = WindowEncoder(tokenizer, max_len=48, stride=20).encode([question])
    found = [window for window in windows if window.target != NO_ANSWER]
    assert found
    for window in found:
        first, last = window.target
        assert CONTEXT[window.offsets_T2[first, 0] : window.offsets_T2[last, 1]] == answer
    for window in set(windows) - set(found):
        offsets = window.offsets_T2[window.offsets_T2[:, 0] >= 0]
        assert offsets[0, 0] > begin or offsets[-1, 1] < begin + len(answer)


def test_a_long_question_leaves_room_for_the_context(tokenizer: Tokenizer) -> None:
    (windows,) = WindowEncoder(tokenizer, max_len=40, stride=8).encode([ContextQuestion("q", CONTEXT, CONTEXT)])
    assert max(len(window.text.tokens_T) for window in windows) <= 40
    covered = np.unique(np.concatenate([window.offsets_T2[window.offsets_T2[:, 0] >= 0, 0] for window in windows]))
    (whole,) = WindowEncoder(tokenizer, max_len=2000, stride=8).encode([ContextQuestion("q", "who", CONTEXT)])
    assert np.array_equal(covered, whole[0].offsets_T2[whole[0].offsets_T2[:, 0] >= 0, 0])


def test_rows_without_room_for_a_question_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"max_len=40.*stride=26.*lower task\.stride"):
        WindowEncoder(tokenizer, max_len=40, stride=26)


def test_an_answer_that_is_cut_off_is_none() -> None:
    offsets = np.array([[-1, -1], [0, 3], [4, 9], [9, 10]])
    assert locate(offsets, 4, 12) == NO_ANSWER
    assert locate(offsets[2:], 0, 9) == NO_ANSWER
    assert locate(offsets, 1, 2) == (1, 1)


@given(st.integers(1, 12), st.integers(0, 4), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_the_best_span_is_that_of_brute_force(num: int, before: int, max_tokens: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    starts, ends = random.normal(size=(2, before + num + 1))
    offsets = np.full((before + num + 1, 2), -1)
    offsets[before : before + num] = [[3 * place, 3 * place + 2] for place in range(num)]
    span = find_best_span(starts, ends, AnswerWindow(TextSample(np.zeros(0)), 0, offsets), max_tokens=max_tokens)
    assert span is not None
    pairs = [(a, b) for a, b in product(range(num), repeat=2) if a <= b < a + max_tokens]
    best = max(pairs, key=lambda pair: starts[before + pair[0]] + ends[before + pair[1]])
    assert (span.begin, span.end) == (3 * best[0], 3 * best[1] + 2)
    assert span.score == pytest.approx(starts[before + best[0]] + ends[before + best[1]])


def test_a_window_without_context_has_no_span() -> None:
    window = AnswerWindow(TextSample(np.zeros(0)), 0, np.full((3, 2), -1))
    assert find_best_span(np.zeros(3), np.zeros(3), window, max_tokens=3) is None


@pytest.mark.parametrize(
    ("value", "start", "expected"),
    [
        ({"text": ["dog", "a dog"], "answer_start": [6, 4]}, None, (("dog", 6), ("a dog", 4))),
        ([{"text": "dog", "answer_start": 6}], None, (("dog", 6),)),
        ({"text": "dog", "answer_start": 6}, None, (("dog", 6),)),
        ("dog", "6", (("dog", 6),)),
        ({"text": [], "answer_start": []}, None, ()),
        ([], None, ()),
        ("", "", ()),
        (None, None, ()),
    ],
)
def test_answers_are_read_in_the_forms_there_are(value: object, start: object, expected: object) -> None:
    assert read_answers("a:0", "see a dog", value, start) == expected


@pytest.mark.parametrize(
    ("value", "start", "expected"),
    [
        ("dog", 5, "has the answer 'dog' at character 5, where its context has ' do'"),
        ("dog", -3, "at character -3"),
        ("dog", 90, "where its context has ''"),
        ("dog", None, "expected a text and answer_start"),
        ({"text": ["dog"], "answer_start": []}, None, "1 answers and not as many answer_start"),
        ([{"text": 3, "answer_start": 3}], None, "expected a text"),
        (7, None, "expected a text"),
    ],
)
def test_an_answer_that_is_not_there_is_broken(value: object, start: object, expected: str) -> None:
    with pytest.raises(BrokenSampleError, match=rf"a:0 .*{expected}"):
        read_answers("a:0", "see a dog", value, start)
