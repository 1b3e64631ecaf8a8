"""Predict the tokens that are hidden in a text: BERT's pretraining (Devlin et al. 2018), without sentence pairs.

    text -> tokenizer -> token caches -> rows [CLS] ... [SEP] -> 15 % of the tokens hidden -> encoder
         -> hidden states of the hidden tokens alone -> head -> cross-entropy with the tokens that were there

The rows are stretches of one length cut from all text (`data.batching=packed`), without padding, or whole documents
(`token_budget`), padded to the longest of a batch. What is hidden is drawn by a generator for each row and epoch, so
that it depends neither on the batch nor on how often a run was stopped; an evaluation always hides the same tokens.

The head, which multiplies with the whole vocabulary, sees only the tokens that are to be predicted: a seventh of them.
For a model of 4 layers and 512 channels with 8,192 tokens that takes a fifth of the work of a step away. The loss is in
nats per predicted token, and the same as that of the model in `transformers` for these labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from deepseek.core.errors import ConfigError, DataError
from deepseek.core.events import Event
from deepseek.data.batching import IGNORED_TARGET, IntArray
from deepseek.data.config import DataConfig
from deepseek.data.corpus import load_data, prepare_data
from deepseek.data.masking import MaskingRule, Vocabulary, mask_tokens, read_vocabulary
from deepseek.data.samples import SampleLoader, evaluation_batches
from deepseek.data.text_collate import TextBatch, TextSample, collate_texts, pad_rows
from deepseek.data.token_cache import TokenCache
from deepseek.data.tokenizing import Tokenizer
from deepseek.models.starting_weights import HeadSpec
from deepseek.models.transformers_models.model import TransformersModel
from deepseek.nn.losses import sum_cross_entropy
from deepseek.train.task import TaskData
from deepseek.train.task_settings import MaskedLMSettings
from deepseek.train.text_task import TextTask, find_pad_id

# The parts of a model of `transformers` that lead from hidden states to logits, in the order in which they run: those
# of BERT, RoBERTa, ALBERT, DistilBERT, ELECTRA and ModernBERT, and of their relatives.
_HEADS = (
    ("cls",),
    ("lm_head",),
    ("predictions",),
    ("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector"),
    ("generator_predictions", "generator_lm_head"),
    ("head", "decoder"),
)


@dataclass(frozen=True, eq=False)
class MaskedText:
    """A row with some of its tokens hidden."""

    text: TextSample
    targets_T: IntArray
    """The tokens that were there, -100 where nothing is to be predicted."""


@dataclass(frozen=True, eq=False)
class MaskedTexts(TextBatch):
    """A batch of rows."""

    places_M: Tensor
    """int64; where the tokens to predict are in the rows laid end to end."""
    targets_M: Tensor
    """int64; the tokens that were there."""


class MaskedLM(TextTask[MaskedTexts]):
    """An encoder on plain text."""

    unit: ClassVar[str] = "tokens"

    @property
    def settings(self) -> MaskedLMSettings:
        """The settings of the task."""
        settings = self.config.task
        assert isinstance(settings, MaskedLMSettings)
        return settings

    @property
    def data_settings(self) -> DataConfig:
        """The settings of the data, with the tokenizer of the model that training begins with unless they name one."""
        return self.with_tokenizer_of_init(self.config.data_of(DataConfig))

    def prepare(self, folder: Path) -> Iterator[Event]:
        """Train or load the tokenizer, and tokenize the text."""
        return prepare_data(self.data_settings, folder)

    def open_data(self, folder: Path) -> TaskData:
        """Open the token caches; raises `DataError` for a tokenizer without a mask token."""
        settings, rule = self.data_settings, MaskingRule(self.settings.mask_share, self.settings.whole_words)
        data = load_data(settings, folder, is_verified=True)
        vocabulary = read_vocabulary(data.tokenizer)
        self._pad_id = find_pad_id(data.tokenizer)
        train, heldout = (
            None if cache is None else MaskedRows(cache, data.tokenizer, settings, vocabulary, rule)
            for cache in (data.train, data.heldout)
        )
        assert train is not None
        loader = SampleLoader(train, batch_size=settings.rows_per_batch, collate=self.collate, seed=settings.seed)
        return TaskData(
            loader=loader,
            num_train_units=round(rule.share * len(data.train.tokens)),
            heldout=None
            if heldout is None
            else lambda: evaluation_batches(heldout, settings.rows_per_batch, self.collate),
            tokenizer=data.tokenizer,
        )

    def build_model(self, data: TaskData) -> nn.Module:
        """Open the encoder of `init` with the head that predicts tokens."""
        assert data.tokenizer is not None
        return self.open_encoder(data.tokenizer, HeadSpec("masked_lm"), max_len=max_row_length(self.data_settings))

    def collate(self, samples: list[MaskedText]) -> MaskedTexts:
        """Put rows together, and the tokens to predict of all of them."""
        texts = collate_texts([sample.text for sample in samples], pad_id=self._pad_id)
        targets_BT = pad_rows([sample.targets_T for sample in samples], IGNORED_TARGET)
        targets_N = targets_BT.flatten()
        places_M = torch.nonzero(targets_N != IGNORED_TARGET).flatten()
        return MaskedTexts(texts.inputs, places_M, targets_N[places_M])

    def forward(self, model: nn.Module, batch: MaskedTexts) -> Tensor:
        """(M, V) logits for the tokens that are to be predicted."""
        assert isinstance(model, TransformersModel)
        parts = find_head(model)
        if parts is None:
            logits_BTV: Tensor = model(**self.named_inputs(model, batch))
            return logits_BTV.flatten(0, 1)[batch.places_M]
        encoder: Any = model.model.base_model
        hidden_BTD: Tensor = encoder(**self.named_inputs(model, batch)).last_hidden_state
        found_MD = hidden_BTD.flatten(0, 1)[batch.places_M]
        for part in parts:
            found_MD = part(found_MD)
        return found_MD

    def loss(self, outputs: Tensor, batch: MaskedTexts) -> Tensor:
        """() sum of the cross-entropy over the tokens to predict, in nats."""
        return sum_cross_entropy(outputs[None], batch.targets_M[None], ignored_target=IGNORED_TARGET)

    def count_units(self, batch: MaskedTexts) -> int:
        """Tokens to predict."""
        return len(batch.targets_M)

    def class_logits(self, outputs: Tensor, batch: MaskedTexts) -> Tensor:
        """(N, V) logits for each unit, which a distillation compares."""
        return outputs


class MaskedRows:
    """Rows of a token cache with tokens hidden: stretches of one length, or whole documents."""

    def __init__(
        self, cache: TokenCache, tokenizer: Tokenizer, config: DataConfig, vocabulary: Vocabulary, rule: MaskingRule
    ) -> None:
        if config.batching == "packed_documents":
            raise ConfigError(
                "encoders have no document masks, and data.batching is packed_documents; choose packed or token_budget"
            )
        backend = tokenizer.backend
        begin = backend.token_to_id(tokenizer.special_tokens.get("cls_token", tokenizer.bos_token or ""))
        self._begin: IntArray = np.array([] if begin is None else [begin], dtype=np.int64)
        self._end: IntArray = np.array([tokenizer.eos_id], dtype=np.int64)
        self._cache, self._vocabulary, self._rule = cache, vocabulary, rule
        room = max_row_length(config) - len(self._begin) - len(self._end)
        if room < 1:
            raise DataError("a row has no room beside its special tokens; raise sequence_length or max_len of the data")
        if config.batching == "packed":
            # The last row reaches back, so that all rows are of one length.
            self._starts = np.minimum(np.arange(0, len(cache.tokens), room), max(0, len(cache.tokens) - room))
            self._stops = np.minimum(self._starts + room, len(cache.tokens))
        else:
            self._starts = cache.starts[:-1]
            self._stops = np.minimum(cache.starts[1:] - 1, self._starts + room)  # without the end of the document
        is_text = self._stops > self._starts
        self._starts, self._stops = self._starts[is_text], self._stops[is_text]
        self.digest = f"{cache.digest}-{config.batching}-{room}-{rule.share}-{rule.whole_words}"

    def __len__(self) -> int:
        return len(self._starts)

    def load(self, index: int, random: np.random.Generator | None) -> MaskedText:
        """Return the row with tokens hidden by `random`, or always the same ones."""
        inner_T = np.asarray(self._cache.tokens[self._starts[index] : self._stops[index]], dtype=np.int64)
        tokens_T = np.concatenate((self._begin, inner_T, self._end))
        draws = np.random.Generator(np.random.PCG64(index)) if random is None else random
        inputs_T, targets_T = mask_tokens(tokens_T, self._vocabulary, self._rule, draws)
        return MaskedText(TextSample(inputs_T), targets_T)


def max_row_length(config: DataConfig) -> int:
    """Return the most tokens of a row, special ones included."""
    return config.sequence_length if config.batching == "packed" else config.max_len


def find_head(model: TransformersModel) -> list[nn.Module] | None:
    """Return the modules that lead from hidden states to logits; `None` for a model whose head is not known."""
    for names in _HEADS:
        if all(isinstance(getattr(model.model, name, None), nn.Module) for name in names):
            return [getattr(model.model, name) for name in names]
    return None
