"""The answer to a question in a text, by a model that was trained for it: `LoadedModel.answer`, `deepseek predict`.

    load_model("runs/questions/model").answer("who lives in the barn?", context)
    FoundAnswer(text='frog', begin=42, end=46, score=7.3)

Long contexts are read in windows, as in training (`data/answer_windows.py`), and the best span of all of them is the
answer. `score` is how far its scores are above those of "no answer": a model that was trained with questions that have
none (`no_answer`) says so by a score below zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from deepseek.core.errors import ConfigError
from deepseek.data.answer_windows import AnswerWindow, ContextQuestion, Span, WindowEncoder, find_best_span
from deepseek.data.text_collate import collate_texts
from deepseek.data.tokenizing import load_tokenizer
from deepseek.models.transformers_models.model import TransformersModel

MAX_ANSWER_TOKENS = 30
_MAX_ROW = 384  # tokens of a window, where the model takes more: what models for SQuAD are trained with
_BATCH_SIZE = 16


@dataclass(frozen=True)
class FoundAnswer:
    """A span of a context."""

    text: str
    """The answer."""
    begin: int
    """Its first character in the context."""
    end: int
    """The character after its last."""
    score: float
    """How much more likely it is than no answer, as a difference of logits."""


def answers_questions(module: nn.Module | None) -> bool:
    """Return whether a model finds answers in texts."""
    return isinstance(module, TransformersModel) and type(module.model).__name__.endswith("ForQuestionAnswering")


@torch.inference_mode()
def find_answer(model: nn.Module | None, folder: Path | None, question: str, context: str) -> FoundAnswer:
    """Find the answer to `question` in `context`; raises `ConfigError` for another kind of model and empty texts."""
    if not isinstance(model, TransformersModel) or not answers_questions(model) or folder is None:
        kind = "file that only a runtime can run" if model is None else type(model).__name__
        raise ConfigError(f"this is a {kind} that answers no questions; load the folder of a model trained for it")
    for name, text in (("question", question), ("context", context)):
        if not text.strip():
            raise ConfigError(f"the {name} is empty; give a text")
    max_len = min(model.max_length or _MAX_ROW, _MAX_ROW)
    encoder = WindowEncoder(load_tokenizer(folder), max_len=max_len, stride=max_len // 4)
    (windows,) = encoder.encode([ContextQuestion("the question", question, context)])
    spans: list[Span] = []
    scores_of_none: list[float] = []
    for start in range(0, len(windows), _BATCH_SIZE):
        _score_windows(model, windows[start : start + _BATCH_SIZE], spans, scores_of_none)
    if not spans:
        raise ConfigError("the context has no token that the model knows; give another text")
    best = max(spans, key=lambda span: span.score)
    return FoundAnswer(context[best.begin : best.end], best.begin, best.end, best.score - min(scores_of_none))


def _score_windows(
    model: TransformersModel, windows: list[AnswerWindow], spans: list[Span], scores_of_none: list[float]
) -> None:
    """Add the best span of each window, and the score of no answer in it."""
    batch = collate_texts([window.text for window in windows], pad_id=model.pad_id)
    named = {name: tensor for name, tensor in batch.inputs.items() if name in model.input_names}
    answer = model.model(**named)
    starts_BT: np.ndarray = answer.start_logits.float().numpy()
    ends_BT: np.ndarray = answer.end_logits.float().numpy()
    for window, starts_T, ends_T in zip(windows, starts_BT, ends_BT, strict=True):
        scores_of_none.append(float(starts_T[0] + ends_T[0]))
        length = len(window.text.tokens_T)
        span = find_best_span(starts_T[:length], ends_T[:length], window, max_tokens=MAX_ANSWER_TOKENS)
        if span is not None:
            spans.append(span)
