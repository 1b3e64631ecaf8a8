"""Texts as an encoder takes them: token numbers, padded to the longest of a batch, and which of them are text.

    encoder = TextEncoder(tokenizer, max_len=128)
    samples = encoder.encode(["one text", "another"], ["its pair", "and its"])
    batch = collate_texts(samples)
    batch.inputs     {"input_ids": (B, T), "attention_mask": (B, T), "token_type_ids": (B, T)}

A batch whose rows are all full has no mask, and one of single texts no segments: models take both as given, and compute
faster without. Texts over `max_len` tokens are cut off at their end, pairs at the end of the longer text, as
`transformers` does (`longest_first`). Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepseek.data.batching import IntArray
from deepseek.data.tokenizing import Tokenizer

INPUT_NAMES = ("input_ids", "attention_mask", "token_type_ids")
"""The inputs of text models, in the order in which they take them."""


@dataclass(frozen=True, eq=False)
class TextSample:
    """The tokens of one text or pair, special tokens included."""

    tokens_T: IntArray
    segments_T: NDArray[np.int8] | None = None
    """0 for tokens of the first text of a pair and 1 for those of the second; `None` for a single text."""


@dataclass(frozen=True, eq=False)
class TextBatch:
    """Rows of tokens as a model takes them."""

    inputs: dict[str, Tensor]
    """By name, in the order of `INPUT_NAMES`."""

    @property
    def num_rows(self) -> int:
        """Number of texts or pairs."""
        return len(self.inputs["input_ids"])


class TextEncoder:
    """Turns texts into samples; a tokenizer of its own, so that nobody else's truncation is changed."""

    def __init__(self, tokenizer: Tokenizer, *, max_len: int) -> None:
        self._backend = type(tokenizer.backend).from_str(tokenizer.backend.to_str())
        self._backend.no_padding()
        self._backend.enable_truncation(max_len, strategy="longest_first")

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[TextSample]:
        """Encode texts, or pairs of a text and the one of `pairs` in the same place."""
        items = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        return [
            TextSample(
                np.array(encoding.ids, dtype=np.int64),
                None if pairs is None else np.array(encoding.type_ids, dtype=np.int8),
            )
            for encoding in self._backend.encode_batch(items, add_special_tokens=True)
        ]


def collate_texts(samples: Sequence[TextSample], *, pad_id: int = 0) -> TextBatch:
    """Put samples together, filled up with `pad_id` to the longest of them.

    >>> batch = collate_texts([TextSample(np.array([5, 6])), TextSample(np.array([7]))])
    >>> batch.inputs["input_ids"].tolist(), batch.inputs["attention_mask"].tolist()
    ([[5, 6], [7, 0]], [[1, 1], [1, 0]])
    """
    lengths = [len(sample.tokens_T) for sample in samples]
    inputs = {"input_ids": pad_rows([sample.tokens_T for sample in samples], pad_id)}
    if min(lengths) < max(lengths):
        inputs["attention_mask"] = pad_rows([np.ones(length, dtype=np.int64) for length in lengths], 0)
    segments = [sample.segments_T for sample in samples if sample.segments_T is not None]
    if segments:
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        inputs["token_type_ids"] = pad_rows([row.astype(np.int64) for row in segments], 0)
    return TextBatch(inputs)


def pad_rows(rows_T: Sequence[IntArray], value: int) -> Tensor:
    """Return (B, T) rows, filled up with `value` to the longest."""
    padded_BT = np.full((len(rows_T), max(len(row) for row in rows_T)), value, dtype=np.int64)
    for row, numbers_T in enumerate(rows_T):
        padded_BT[row, : len(numbers_T)] = numbers_T
    return torch.from_numpy(padded_BT)
