"""Find the answer to a question in a text: two scores for each token, for the answer to begin and to end there.

    question, context -> windows -> encoder -> start and end scores -> cross-entropy with where the answer is
                                            -> best span of all windows -> exact match, F1

The unit is a window, since a long context is cut into several. The loss is that of the model in `transformers` for
these targets, summed over windows. Exact match and F1 compare answers without case, punctuation and articles, with
the one of the right answers that fits best, as SQuAD does (Rajpurkar et al. 2016, 2018). With `no_answer`, a question
may have no answer, and "no answer" may be the answer.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.data.answer_windows import (
    AnswerWindow,
    ContextQuestion,
    Span,
    WindowEncoder,
    find_best_span,
    read_answers,
)
from deepseek.data.samples import BrokenSampleError
from deepseek.data.table_rows import TableColumns, TableRow, leave_out_broken
from deepseek.data.text_collate import TextBatch, collate_texts
from deepseek.data.tokenizing import Tokenizer
from deepseek.models.starting_weights import HeadSpec
from deepseek.models.transformers_models.model import TransformersModel
from deepseek.train.scores import score_mean, score_share
from deepseek.train.task import Measurements, TaskData, UnitLosses
from deepseek.train.task_settings import QuestionAnsweringSettings
from deepseek.train.text_task import TableTask, find_pad_id

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, eq=False)
class Windows(TextBatch):
    """A batch of windows."""

    targets_B2: Tensor
    """int64; the first and the last token of the answer."""
    samples: tuple[AnswerWindow, ...]
    """What the rows are."""


class QuestionAnswering(TableTask[AnswerWindow, Windows]):
    """Questions with contexts and answers from a table."""

    unit: ClassVar[str] = "windows"
    heldout: Sequence[ContextQuestion] = ()
    """The held-out questions, once the data are open."""

    @property
    def settings(self) -> QuestionAnsweringSettings:
        """The settings of the task."""
        settings = self.config.task
        assert isinstance(settings, QuestionAnsweringSettings)
        return settings

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The question and its context."""
        return self.settings.question, self.settings.context

    @property
    def columns(self) -> TableColumns:
        """The texts, the answers, and where one begins if that is a column of its own."""
        return TableColumns((*self.text_columns, self.settings.answers), (self.settings.answer_start,))

    def encode(self, rows: Sequence[TableRow], tokenizer: Tokenizer, *, is_heldout: bool) -> list[AnswerWindow]:
        """Cut the contexts into windows."""
        settings = self.data_settings
        questions = leave_out_broken(rows, self._read, max_broken=settings.max_broken)
        if is_heldout:
            self.heldout = questions
        encoder = WindowEncoder(tokenizer, max_len=settings.max_len, stride=self.settings.stride)
        return [window for windows in encoder.encode(questions) for window in windows]

    def _read(self, row: TableRow) -> ContextQuestion:
        settings = self.settings
        question, context = (row.text(column) for column in self.text_columns)
        answers = read_answers(
            row.name, context, row.values.get(settings.answers), row.values.get(settings.answer_start)
        )
        if not answers and not settings.no_answer:
            raise BrokenSampleError(
                f"{row.name} has no answer in {settings.answers!r}; set task.no_answer=true where that may be"
            )
        return ContextQuestion(row.name, question, context, answers)

    def build_model(self, data: TaskData) -> nn.Module:
        """Open the encoder of `init` with two scores for each token."""
        assert data.tokenizer is not None
        return self.open_encoder(data.tokenizer, HeadSpec("question_answering"), max_len=self.data_settings.max_len)

    def collate(self, samples: list[AnswerWindow]) -> Windows:
        """Put windows together."""
        texts = collate_texts([sample.text for sample in samples], pad_id=find_pad_id(self.tokenizer))
        return Windows(texts.inputs, torch.tensor([sample.target for sample in samples]), tuple(samples))

    def forward(self, model: nn.Module, batch: Windows) -> tuple[Tensor, Tensor]:
        """(B, T) scores of starts and of ends."""
        assert isinstance(model, TransformersModel)
        answer = model.model(**self.named_inputs(model, batch))
        return answer.start_logits, answer.end_logits

    def loss(self, outputs: tuple[Tensor, Tensor], batch: Windows) -> Tensor:
        """() sum over windows of the mean of both cross-entropies."""
        return self._losses(outputs, batch, "sum")

    def unit_losses(self, outputs: tuple[Tensor, Tensor], batch: Windows) -> UnitLosses:
        """Return the loss of each window; those of one question depend on each other."""
        questions_B = torch.tensor([window.question for window in batch.samples])
        return UnitLosses(self._losses(outputs, batch, "none"), questions_B)

    def _losses(self, outputs: tuple[Tensor, Tensor], batch: Windows, reduction: str) -> Tensor:
        begins, ends = (
            F.cross_entropy(scores_BT.float(), targets_B, reduction=reduction)
            for scores_BT, targets_B in zip(outputs, batch.targets_B2.unbind(1), strict=True)
        )
        return (begins + ends) / 2

    def count_units(self, batch: Windows) -> int:
        """Windows."""
        return batch.num_rows

    def new_metrics(self) -> Measurements:
        """Exact match and F1 over the held-out questions."""
        return AnswerScores(self.heldout, self.settings.max_answer_tokens, no_answer=self.settings.no_answer)


class AnswerScores:
    """The best answers of an evaluation beside the right ones."""

    def __init__(self, questions: Sequence[ContextQuestion], max_tokens: int, *, no_answer: bool) -> None:
        self._questions, self._max_tokens, self._no_answer = questions, max_tokens, no_answer
        self._best: dict[int, Span] = {}
        self._none: dict[int, float] = {}

    def update(self, outputs: tuple[Tensor, Tensor], batch: Windows) -> None:
        """Take in the start and end scores (B, T) of one batch."""
        starts_BT, ends_BT = (scores_BT.float().cpu().numpy() for scores_BT in outputs)
        for window, starts_T, ends_T in zip(batch.samples, starts_BT, ends_BT, strict=True):
            number, length = window.question, len(window.text.tokens_T)
            none = float(starts_T[0]) + float(ends_T[0])
            self._none[number] = min(none, self._none.get(number, none))
            span = find_best_span(starts_T[:length], ends_T[:length], window, max_tokens=self._max_tokens)
            if span is not None and (number not in self._best or span.score > self._best[number].score):
                self._best[number] = span

    def compute(self) -> dict[str, float]:
        """Return the scores over all questions of which a window was seen."""
        pairs = [(self.answer(number), self._questions[number]) for number in sorted(self._none)]
        wanted = [[text for text, _ in question.answers] or [""] for _, question in pairs]
        matches = [
            max(normalize(found) == normalize(text) for text in texts)
            for (found, _), texts in zip(pairs, wanted, strict=True)
        ]
        overlaps = [
            max(overlap(found, text) for text in texts) for (found, _), texts in zip(pairs, wanted, strict=True)
        ]
        return score_share("exact_match", sum(matches), len(matches)) | score_mean("f1", np.array(overlaps))

    def answer(self, number: int) -> str:
        """Return the best answer to a question, empty for none."""
        span = self._best.get(number)
        if span is None or (self._no_answer and self._none[number] > span.score):
            return ""
        return self._questions[number].context[span.begin : span.end]


def normalize(answer: str) -> str:
    """Return an answer as SQuAD compares it: without case, punctuation, articles and doubled spaces.

    >>> normalize("The Eiffel  Tower.")
    'eiffel tower'
    """
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def overlap(found: str, wanted: str) -> float:
    """Return SQuAD's F1 of the words of two answers; without words on one side, whether both have none.

    >>> overlap("the big tower", "a tower")
    0.6666666666666666
    """
    found_words, wanted_words = normalize(found).split(), normalize(wanted).split()
    if not found_words or not wanted_words:
        return float(found_words == wanted_words)
    num_shared = sum((Counter(found_words) & Counter(wanted_words)).values())
    return 2 * num_shared / (len(found_words) + len(wanted_words))
