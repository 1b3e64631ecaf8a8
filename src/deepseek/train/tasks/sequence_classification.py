"""Choose the class of a text or a pair of texts, or estimate a number for it.

    text [, its pair] -> encoder -> one score for each class -> cross-entropy with the class
                                 -> one number               -> squared distance from the number

Classes are those of `task.labels`, or those that occur in the training rows: in the order of the model that training
begins with where it has the same ones, else sorted, as numbers where all of them are. Their names go into the
`config.json` of the model, so that `deepseek predict` answers with them, and so does whether it takes pairs. The loss
is that of the model in `transformers` for these labels, summed over texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import JsonValue
from torch import Tensor, nn

from deepseek.core.caller_warnings import warn_caller
from deepseek.core.errors import DataError
from deepseek.core.model_folder import ModelFolder
from deepseek.data.samples import BrokenSampleError
from deepseek.data.table_rows import TableColumns, TableRow, leave_out_broken
from deepseek.data.text_collate import TextBatch, TextEncoder, TextSample, collate_texts
from deepseek.data.tokenizing import Tokenizer
from deepseek.models.predictions import TEXT_PAIR
from deepseek.models.starting_weights import HeadSpec
from deepseek.train.scores import score_classes, score_numbers
from deepseek.train.task import Measurements, TaskData, UnitLosses
from deepseek.train.task_settings import SequenceClassificationSettings
from deepseek.train.text_task import TableTask, find_pad_id

_NUM_NAMED = 5


@dataclass(frozen=True, eq=False)
class LabelledText:
    """A text with its label."""

    text: TextSample
    label: float
    """Number of the class, or the number that is to be estimated."""


@dataclass(frozen=True, eq=False)
class LabelledTexts(TextBatch):
    """A batch of texts with their labels."""

    labels_B: Tensor
    """int64 classes, or float32 numbers."""


class SequenceClassification(TableTask[LabelledText, LabelledTexts]):
    """Texts from a table, with labels."""

    unit: ClassVar[str] = "texts"
    labels: tuple[str, ...] = ()
    """The names of the classes, once the data are open; none for numbers."""

    @property
    def settings(self) -> SequenceClassificationSettings:
        """The settings of the task."""
        settings = self.config.task
        assert isinstance(settings, SequenceClassificationSettings)
        return settings

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The text, and its pair if there is one."""
        settings = self.settings
        return (settings.text, settings.text_pair) if settings.text_pair is not None else (settings.text,)

    @property
    def columns(self) -> TableColumns:
        """The texts and the label."""
        return TableColumns((*self.text_columns, self.settings.label))

    def encode(self, rows: Sequence[TableRow], tokenizer: Tokenizer, *, is_heldout: bool) -> list[LabelledText]:
        """Tokenize the texts and number their labels; raises `DataError` for a label that is no class."""
        settings = self.settings
        read = leave_out_broken(rows, self._read, max_broken=self.data_settings.max_broken)
        if not is_heldout and not settings.is_regression:
            self._warn_of_two_kinds(rows)
            self.labels = self._find_labels({str(label) for _, _, label in read})
        numbers = {name: float(number) for number, name in enumerate(self.labels)}
        for name, _, label in read:
            if not settings.is_regression and label not in numbers:
                more = f" and {len(self.labels) - _NUM_NAMED} more" * (len(self.labels) > _NUM_NAMED)
                raise DataError(
                    f"{name} has the label {label!r}, and the classes are {', '.join(self.labels[:_NUM_NAMED])}{more}; "
                    "mend the label, or list all classes in task.labels"
                )
        texts = [texts[0] for _, texts, _ in read]
        pairs = [texts[1] for _, texts, _ in read] if settings.text_pair is not None else None
        encoder = TextEncoder(tokenizer, max_len=self.data_settings.max_len)
        values = [numbers[label] if isinstance(label, str) else label for _, _, label in read]
        return [LabelledText(sample, value) for sample, value in zip(encoder.encode(texts, pairs), values, strict=True)]

    def _read(self, row: TableRow) -> tuple[str, tuple[str, ...], str | float]:
        texts = tuple(row.text(column) for column in self.text_columns)
        return row.name, texts, row.number(self.settings.label) if self.settings.is_regression else self._label_of(row)

    def _label_of(self, row: TableRow) -> str:
        value = row.values.get(self.settings.label)
        is_label = isinstance(value, str | int) or (isinstance(value, float) and value.is_integer())
        if not is_label or value == "":
            raise BrokenSampleError(
                f"{row.name} has {value!r} in {self.settings.label!r}; expected the name or number of a class"
            )
        return str(int(value)) if isinstance(value, float) else str(value)

    def _warn_of_two_kinds(self, rows: Sequence[TableRow]) -> None:
        """Warn where some labels are names and others numbers, as where two files were put together."""
        values = [row.values.get(self.settings.label) for row in rows]
        numbers = next((value for value in values if isinstance(value, int)), None)
        names = next((value for value in values if isinstance(value, str) and value and not _is_number(value)), None)
        if numbers is not None and names is not None:
            warn_caller(
                f"the column {self.settings.label!r} has names, such as {names!r}, and numbers, such as {numbers}, "
                "each of which is a class of its own; write all labels in one way if that is not meant"
            )

    def _find_labels(self, found: set[str]) -> tuple[str, ...]:
        if self.settings.labels:
            return self._check_labels(self.settings.labels)
        if len(found) < 2:
            raise DataError(
                f"all texts have the label {min(found)}; expected two classes or more, check the column "
                f"{self.settings.label!r}"
            )
        known = self._labels_of_init()
        if set(known) == found:
            return known
        are_numbers = all(_is_number(label) for label in found)
        return tuple(sorted(found, key=int) if are_numbers else sorted(found))

    def _check_labels(self, listed: tuple[str, ...]) -> tuple[str, ...]:
        """Return the classes that are listed; raises `DataError` for one that is listed twice."""
        twice = [label for label in dict.fromkeys(listed) if listed.count(label) > 1]
        if twice:
            raise DataError(f"task.labels lists {', '.join(twice[:_NUM_NAMED])} twice; list each class once")
        return listed

    def _labels_of_init(self) -> tuple[str, ...]:
        """Return the classes of the folder that training begins with, if it has any."""
        folder = self.init_folder
        names = ModelFolder(folder).config.get("id2label") if folder is not None else None
        return tuple(str(names[number]) for number in sorted(names, key=int)) if isinstance(names, dict) else ()

    def build_model(self, data: TaskData) -> nn.Module:
        """Open the encoder of `init` with a score for each class, or one for a number."""
        assert data.tokenizer is not None
        num_outputs = 1 if self.settings.is_regression else len(self.labels)
        entries: dict[str, JsonValue] = {
            "problem_type": "regression" if self.settings.is_regression else "single_label_classification",
            TEXT_PAIR: self.settings.text_pair is not None,
        }
        head = HeadSpec("sequence_classification", num_outputs, self.labels, entries=entries)
        return self.open_encoder(data.tokenizer, head, max_len=self.data_settings.max_len)

    def collate(self, samples: list[LabelledText]) -> LabelledTexts:
        """Put texts and labels together."""
        texts = collate_texts([sample.text for sample in samples], pad_id=find_pad_id(self.tokenizer))
        kind = torch.float32 if self.settings.is_regression else torch.int64
        return LabelledTexts(texts.inputs, torch.tensor([sample.label for sample in samples], dtype=kind))

    def loss(self, outputs: Tensor, batch: LabelledTexts) -> Tensor:
        """() sum of the cross-entropy, or of the squared distances."""
        scores_BK = outputs.float()
        if self.settings.is_regression:
            return F.mse_loss(scores_BK[:, 0], batch.labels_B, reduction="sum")
        return F.cross_entropy(scores_BK, batch.labels_B, reduction="sum")

    def unit_losses(self, outputs: Tensor, batch: LabelledTexts) -> UnitLosses:
        """Return the loss of each text."""
        scores_BK = outputs.float()
        if self.settings.is_regression:
            return UnitLosses(F.mse_loss(scores_BK[:, 0], batch.labels_B, reduction="none"))
        return UnitLosses(F.cross_entropy(scores_BK, batch.labels_B, reduction="none"))

    def count_units(self, batch: LabelledTexts) -> int:
        """Texts."""
        return batch.num_rows

    def class_logits(self, outputs: Tensor, batch: LabelledTexts) -> Tensor:
        """(N, K) scores of the classes for each unit, which a distillation compares."""
        return outputs

    def new_metrics(self) -> Measurements:
        """Accuracy, F1 and Matthews' correlation, or correlations of the numbers."""
        return LabelScores(is_regression=self.settings.is_regression)


def _is_number(label: str) -> bool:
    return label.removeprefix("-").isdecimal()


class LabelScores:
    """Predictions of an evaluation beside the labels."""

    def __init__(self, *, is_regression: bool) -> None:
        self._is_regression = is_regression
        self._predicted: list[Tensor] = []
        self._wanted: list[Tensor] = []

    def update(self, outputs: Tensor, batch: LabelledTexts) -> None:
        """Take in the scores (B, K) of one batch."""
        predicted_B = outputs[:, 0].float() if self._is_regression else outputs.argmax(dim=1)
        self._predicted.append(predicted_B.cpu())
        self._wanted.append(batch.labels_B.cpu())

    def compute(self) -> dict[str, float]:
        """Return the scores over all batches."""
        predicted_N, wanted_N = torch.cat(self._predicted).numpy(), torch.cat(self._wanted).numpy()
        if self._is_regression:
            return score_numbers(predicted_N.astype(np.float64), wanted_N.astype(np.float64))
        return score_classes(predicted_N, wanted_N)
