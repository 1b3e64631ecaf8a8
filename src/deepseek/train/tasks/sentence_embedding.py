"""Give texts that belong together vectors that lie together: pairs against all other pairs of their batch.

    text, its pair -> encoder, pooling, length one -> similarities of all texts with all pairs, over a temperature
                                                   -> cross-entropy with the text's own pair

This is InfoNCE with in-batch negatives (van den Oord et al. 2018; for sentences Henderson et al. 2017, and
`MultipleNegativesRankingLoss` of sentence-transformers), in one direction or, `symmetric`, as the mean of both. A text
that occurs twice in a batch is no negative of its own pair. What a pair is compared with is its micro-batch, so that
`accum_steps` adds up gradients but does not add negatives: a larger `data.batch_size` does.

Evaluations find, for each held-out text, the nearest of all held-out pairs (`retrieval_accuracy`), and compare the
similarities with the column of scores where there is one (`spearman`). The model is saved with the files by which
`load_model(...).embed` and sentence-transformers know how it pools.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.artifact.format import Manifest
from deepseek.core.errors import DataError
from deepseek.data.table_rows import TableColumns, TableRow, leave_out_broken
from deepseek.data.text_collate import TextBatch, TextEncoder, TextSample, collate_texts
from deepseek.data.tokenizing import Tokenizer
from deepseek.models.starting_weights import HeadSpec
from deepseek.models.transformers_models.model import TransformersModel
from deepseek.models.transformers_models.pooling import POOLINGS
from deepseek.train.scores import score_share, score_spearman
from deepseek.train.task import Measurements, TaskData
from deepseek.train.task_settings import SentenceEmbeddingSettings
from deepseek.train.text_task import TableTask, find_pad_id

_ROWS_TOGETHER = 1024


@dataclass(frozen=True, eq=False)
class TextPair:
    """Two texts that belong together, or a score that says how much."""

    left: TextSample
    right: TextSample
    score: float = float("nan")
    """NaN where there is none."""
    is_positive: bool = True
    """Whether they belong together."""


@dataclass(frozen=True, eq=False)
class TextPairs(TextBatch):
    """A batch of pairs; `inputs` are those of the left texts."""

    right: TextBatch
    scores_B: Tensor
    """float64; NaN where there is none."""
    is_positive_B: Tensor
    left_ids_B: Tensor
    """int64; equal for equal texts."""
    right_ids_B: Tensor


class SentenceEmbedding(TableTask[TextPair, TextPairs]):
    """Pairs of texts from a table."""

    unit: ClassVar[str] = "pairs"

    @property
    def settings(self) -> SentenceEmbeddingSettings:
        """The settings of the task."""
        settings = self.config.task
        assert isinstance(settings, SentenceEmbeddingSettings)
        return settings

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Both texts."""
        return self.settings.text, self.settings.text_pair

    @property
    def columns(self) -> TableColumns:
        """The texts, and the scores if there are any."""
        score = self.settings.score
        return TableColumns(self.text_columns if score is None else (*self.text_columns, score))

    def encode(self, rows: Sequence[TableRow], tokenizer: Tokenizer, *, is_heldout: bool) -> list[TextPair]:
        """Tokenize both texts; pairs that do not belong together are held out, but not trained on."""
        read = leave_out_broken(rows, self._read, max_broken=self.data_settings.max_broken)
        if not is_heldout:
            read = [pair for pair in read if self._is_positive(pair[2])]
        if not any(self._is_positive(score) for _, _, score in read):
            raise DataError(
                f"none of the {len(rows)} pairs has a score of task.min_score={self.settings.min_score} or more; lower "
                "it, or check the column"
            )
        encoder = TextEncoder(tokenizer, max_len=self.data_settings.max_len)
        lefts, rights = (encoder.encode([pair[side] for pair in read]) for side in (0, 1))
        return [
            TextPair(left, right, score, self._is_positive(score))
            for left, right, (_, _, score) in zip(lefts, rights, read, strict=True)
        ]

    def _read(self, row: TableRow) -> tuple[str, str, float]:
        left, right = (row.text(column) for column in self.text_columns)
        return left, right, float("nan") if self.settings.score is None else row.number(self.settings.score)

    def _is_positive(self, score: float) -> bool:
        return self.settings.min_score is None or score >= self.settings.min_score

    def build_model(self, data: TaskData) -> nn.Module:
        """Open the encoder of `init` without a head."""
        assert data.tokenizer is not None
        return self.open_encoder(data.tokenizer, HeadSpec("hidden_states"), max_len=self.data_settings.max_len)

    def collate(self, samples: list[TextPair]) -> TextPairs:
        """Put pairs together."""
        pad_id = find_pad_id(self.tokenizer)
        left, right = (
            collate_texts(texts, pad_id=pad_id)
            for texts in ([sample.left for sample in samples], [sample.right for sample in samples])
        )
        return TextPairs(
            left.inputs,
            right,
            torch.tensor([sample.score for sample in samples], dtype=torch.float64),
            torch.tensor([sample.is_positive for sample in samples]),
            torch.tensor([_identify(sample.left) for sample in samples]),
            torch.tensor([_identify(sample.right) for sample in samples]),
        )

    def forward(self, model: nn.Module, batch: TextPairs) -> tuple[Tensor, Tensor]:
        """(B, D) vectors of length one of the left texts, and of the right ones."""
        assert isinstance(model, TransformersModel)
        return self._embed(model, batch), self._embed(model, batch.right)

    def _embed(self, model: TransformersModel, texts: TextBatch) -> Tensor:
        named = {name: tensor for name, tensor in texts.inputs.items() if name in model.input_names}
        hidden_BTD = model(**named)
        mask_BT = texts.inputs.get("attention_mask", torch.ones_like(texts.inputs["input_ids"]))
        return F.normalize(POOLINGS[self.settings.pooling](hidden_BTD.float(), mask_BT), dim=-1)

    def loss(self, outputs: tuple[Tensor, Tensor], batch: TextPairs) -> Tensor:
        """() sum over pairs of the cross-entropy with the own pair, among all of the batch."""
        similarities_BB = outputs[0] @ outputs[1].T / self.settings.temperature
        is_same_BB = (batch.left_ids_B[:, None] == batch.left_ids_B) | (batch.right_ids_B[:, None] == batch.right_ids_B)
        own_B = torch.arange(len(similarities_BB), device=similarities_BB.device)
        is_same_BB[own_B, own_B] = False
        similarities_BB = similarities_BB.masked_fill(is_same_BB, float("-inf"))
        losses_B = F.cross_entropy(similarities_BB, own_B, reduction="none")
        if self.settings.symmetric:
            losses_B = (losses_B + F.cross_entropy(similarities_BB.T, own_B, reduction="none")) / 2
        return losses_B[batch.is_positive_B].sum()

    def count_units(self, batch: TextPairs) -> int:
        """Pairs that belong together."""
        return int(batch.is_positive_B.sum())

    def new_metrics(self) -> Measurements:
        """Accuracy of retrieval, and the order of the similarities."""
        return RetrievalScores()

    def save(self, model: nn.Module, data: Any, folder: Path, **record: Any) -> Manifest:
        """Write the encoder with the files of sentence-transformers beside it."""
        assert isinstance(model, TransformersModel)
        settings = self.settings
        files = describe_pooling(settings.pooling, int(model.config["hidden_size"]), self.data_settings.max_len)
        return super().save(model, data, folder, files=files, **record)


class RetrievalScores:
    """Vectors of all held-out pairs."""

    def __init__(self) -> None:
        self._lefts: list[Tensor] = []
        self._rights: list[Tensor] = []
        self._batches: list[TextPairs] = []

    def update(self, outputs: tuple[Tensor, Tensor], batch: TextPairs) -> None:
        """Take in the vectors of one batch."""
        self._lefts.append(outputs[0].cpu())
        self._rights.append(outputs[1].cpu())
        self._batches.append(batch)

    def compute(self) -> dict[str, float]:
        """Return the share of texts whose own pair is the nearest, and Spearman's correlation with the scores."""
        left_ND, right_ND = torch.cat(self._lefts), torch.cat(self._rights)
        is_positive_N = torch.cat([batch.is_positive_B.cpu() for batch in self._batches])
        ids_N = torch.cat([batch.right_ids_B.cpu() for batch in self._batches])
        nearest_N = torch.cat([(part @ right_ND.T).argmax(dim=1) for part in left_ND.split(_ROWS_TOGETHER)])
        is_right_N = (ids_N[nearest_N] == ids_N)[is_positive_N]
        scores = score_share("retrieval_accuracy", int(is_right_N.sum()), len(is_right_N))
        wanted_N = torch.cat([batch.scores_B.cpu() for batch in self._batches]).numpy()
        if np.isnan(wanted_N).any():
            return scores
        return scores | score_spearman((left_ND * right_ND).sum(dim=1).double().numpy(), wanted_N)


def describe_pooling(pooling: str, hidden_size: int, max_len: int) -> dict[str, bytes]:
    """Return the files by which sentence-transformers knows an encoder, by their names."""
    library = "sentence_transformers.models"
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{library}.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{library}.Pooling"},
    ]
    modes = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "max": "pooling_mode_max_tokens"}
    values: dict[str, Any] = {
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": hidden_size}
        | {mode: name == pooling for name, mode in modes.items()},
        "sentence_bert_config.json": {"max_seq_length": max_len, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    }
    return {name: json.dumps(value, indent=1).encode() for name, value in values.items()}


def _identify(text: TextSample) -> int:
    """Return a number that equal texts share."""
    return int.from_bytes(hashlib.blake2b(text.tokens_T.tobytes(), digest_size=8).digest(), "big", signed=True)
