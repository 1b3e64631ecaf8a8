"""Questions on long texts: windows that a model can take, where the answer is in them, and which answer is the best.

    windows = WindowEncoder(tokenizer, max_len=384, stride=128).encode([question])[0]
    windows[1].target                       (17, 19): the tokens of the window that hold the answer
    find_best_span(starts_T, ends_T, windows[1], max_tokens=30)

A context that does not fit beside its question is cut into windows that overlap by `stride` tokens. A window without
the whole answer has the first token (`[CLS]`) as its target, and so has a question without an answer (Devlin et al.
2018, section 4.3). The best answer is the span of the highest sum of a start's and an end's score over all windows;
there is none where the first token's sum, in the window where that is lowest, is higher. Offsets count characters.
Shapes: T tokens of a window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek.core.errors import ConfigError
from deepseek.data.batching import IntArray
from deepseek.data.samples import BrokenSampleError
from deepseek.data.text_collate import TextSample
from deepseek.data.tokenizing import Tokenizer

FloatArray = NDArray[np.floating[Any]]
NO_ANSWER = (0, 0)
"""The target of a window without an answer: its first token."""
_FEWEST_NEW = 8  # tokens of the context that a window has beside those it shares with the one before
_FEWEST_QUESTION = 4
_NUM_SHOWN = 40


@dataclass(frozen=True)
class ContextQuestion:
    """A question on a context, with the answers that count as right."""

    name: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...] = ()
    """Text, and the character of the context where it begins; none for a question without an answer."""


@dataclass(frozen=True, eq=False)
class AnswerWindow:
    """A question with a stretch of its context."""

    text: TextSample
    question: int
    """Number of the question."""
    offsets_T2: IntArray
    """First character of each token in the context and the one after its last; -1 for tokens of no context."""
    target: tuple[int, int] = NO_ANSWER
    """First and last token of the first answer."""


@dataclass(frozen=True)
class Span:
    """An answer in a context."""

    score: float
    begin: int
    """Its first character."""
    end: int
    """The character after its last."""


class WindowEncoder:
    """Cuts questions with their contexts into windows, by a tokenizer of its own."""

    def __init__(self, tokenizer: Tokenizer, *, max_len: int, stride: int) -> None:
        self._backend = type(tokenizer.backend).from_str(tokenizer.backend.to_str())
        self._backend.no_padding()
        self._plain = type(tokenizer.backend).from_str(tokenizer.backend.to_str())
        self._plain.no_truncation()
        self._max_question = max_len - stride - _FEWEST_NEW - self._backend.num_special_tokens_to_add(True)
        if self._max_question < _FEWEST_QUESTION:
            raise ConfigError(
                f"rows of max_len={max_len} tokens have no room for a question beside stride={stride} tokens that they "
                "share; lower task.stride or raise data.max_len"
            )
        self._backend.enable_truncation(max_len, stride=stride, strategy="only_second")

    def encode(self, questions: Sequence[ContextQuestion]) -> list[list[AnswerWindow]]:
        """Return the windows of each question; its number is its place among `questions`."""
        pairs = [(self._shorten(question.question), question.context) for question in questions]
        found = []
        for number, (question, encoding) in enumerate(
            zip(questions, self._backend.encode_batch(pairs, add_special_tokens=True), strict=True)
        ):
            parts = [encoding, *encoding.overflowing]
            found.append([_make_window(number, question, part) for part in parts])
        return found

    def _shorten(self, question: str) -> str:
        """Cut off what is too long of a question, of which a context has to be left beside it."""
        offsets = self._plain.encode(question, add_special_tokens=False).offsets
        return question if len(offsets) <= self._max_question else question[: offsets[self._max_question - 1][1]]


def _make_window(number: int, question: ContextQuestion, encoding: Any) -> AnswerWindow:
    is_context_T = np.array([sequence == 1 for sequence in encoding.sequence_ids])
    offsets_T2 = np.where(is_context_T[:, None], np.array(encoding.offsets), -1)
    text = TextSample(np.array(encoding.ids, dtype=np.int64), np.array(encoding.type_ids, dtype=np.int8))
    target = NO_ANSWER
    if question.answers:
        answer, begin = question.answers[0]
        target = locate(offsets_T2, begin, begin + len(answer))
    return AnswerWindow(text, number, offsets_T2, target)


def locate(offsets_T2: IntArray, begin: int, end: int) -> tuple[int, int]:
    """Return the first and the last token of the characters from `begin` to `end`; `NO_ANSWER` where some are missing.

    >>> locate(np.array([[-1, -1], [0, 3], [4, 9], [9, 10]]), 5, 10)
    (2, 3)
    """
    has_begin_T = (offsets_T2[:, 0] <= begin) & (offsets_T2[:, 1] > begin)
    has_end_T = (offsets_T2[:, 0] < end) & (offsets_T2[:, 1] >= end)
    if not (has_begin_T.any() and has_end_T.any()):
        return NO_ANSWER
    return int(has_begin_T.argmax()), int(len(has_end_T) - 1 - has_end_T[::-1].argmax())


def find_best_span(starts_T: FloatArray, ends_T: FloatArray, window: AnswerWindow, *, max_tokens: int) -> Span | None:
    """Return the best answer of at most `max_tokens` tokens in a window; `None` where it has no context."""
    places = np.flatnonzero(window.offsets_T2[:, 0] >= 0)
    if not len(places):
        return None
    starts, ends = starts_T[places].astype(np.float64), ends_T[places].astype(np.float64)
    width = min(max_tokens, len(places))
    padded = np.concatenate((ends, np.full(width, -np.inf)))
    scores = starts[:, None] + np.lib.stride_tricks.sliding_window_view(padded, width)[: len(starts)]
    first, length = np.unravel_index(int(scores.argmax()), scores.shape)
    begin, end = window.offsets_T2[places[first], 0], window.offsets_T2[places[first + length], 1]
    return Span(float(scores[first, length]), int(begin), int(end))


def read_answers(name: str, context: str, value: Any, start: Any) -> tuple[tuple[str, int], ...]:
    """Read the answers of a row: SQuAD's, {"text": [...], "answer_start": [...]}, a list of such pairs, or one text.

    `start` is where one text begins. Raises `BrokenSampleError` for anything else, and for an answer that the context
    does not have there.
    """
    if value is None or (isinstance(value, str | list) and not value):
        return ()
    if isinstance(value, str):
        value = [{"text": value, "answer_start": start}]
    elif isinstance(value, Mapping) and isinstance(value.get("text"), list):
        texts, starts = value["text"], value.get("answer_start")
        if not isinstance(starts, list) or len(starts) != len(texts):
            raise BrokenSampleError(f"{name} has {len(texts)} answers and not as many answer_start; give one for each")
        value = [{"text": text, "answer_start": begin} for text, begin in zip(texts, starts, strict=True)]
    if not isinstance(value, list):
        value = [value]
    return tuple(_read_answer(name, context, answer) for answer in value)


def _read_answer(name: str, context: str, answer: Any) -> tuple[str, int]:
    text = answer.get("text") if isinstance(answer, Mapping) else None
    start = answer.get("answer_start") if isinstance(answer, Mapping) else None
    if isinstance(start, str) and start.isdecimal():
        start = int(start)
    if not isinstance(text, str) or not text or not isinstance(start, int):
        raise BrokenSampleError(
            f"{name} has the answer {answer!r}; expected a text and answer_start, the character where it begins"
        )
    if start < 0 or context[start : start + len(text)] != text:
        seen = context[max(0, start) : max(0, start) + len(text)][:_NUM_SHOWN]
        raise BrokenSampleError(
            f"{name} has the answer {text[:_NUM_SHOWN]!r} at character {start}, where its context has {seen!r}; "
            "mend answer_start, which counts characters from 0"
        )
    return text, start
