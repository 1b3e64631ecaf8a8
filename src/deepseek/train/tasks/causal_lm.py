"""Predict each next token of a text, or of what the assistant says: a decoder with first weights or those of `init`.

    text -> tokenizer -> token caches -> rows of tokens -> logits -> cross-entropy with the tokens that follow
    chats -> template -> token caches with the tokens that are learned -> the same

The loss is in nats per token that is learned. Documents that share a row do not see each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.core.caller_warnings import warn_caller
from deepseek.core.errors import ConfigError
from deepseek.core.events import Event
from deepseek.data.batching import IGNORED_TARGET, Batch, BatchLoader, TextSettings, evaluation_batches
from deepseek.data.chat_corpus import load_chats, prepare_chats
from deepseek.data.config import ChatConfig, DataConfig
from deepseek.data.corpus import load_data, prepare_data
from deepseek.data.tokenizing import Tokenizer
from deepseek.distributed.parallel.sequence_ring import SequenceRing
from deepseek.mixed_precision.layer_precision import has_compute
from deepseek.models.decoder.keymap import FAMILIES
from deepseek.models.decoder.model import Decoder
from deepseek.models.starting_weights import CAUSAL_LM
from deepseek.nn.losses import sum_cross_entropy, sum_linear_cross_entropy
from deepseek.nn.plain_linear import has_hooks, is_plain_linear
from deepseek.train.task import Task, TaskData, UnitLosses


class CausalLM(Task):
    """A decoder on plain text or on chats."""

    unit: ClassVar[str] = "tokens"

    def prepare(self, folder: Path) -> Iterator[Event]:
        """Train or load the tokenizer, and tokenize the text or the chats."""
        settings = self.data_settings
        return prepare_chats(settings, folder) if isinstance(settings, ChatConfig) else prepare_data(settings, folder)

    @property
    def data_settings(self) -> TextSettings:
        """The settings of the data, with the tokenizer of the model that training begins with unless they name one."""
        data = self.config.data
        if isinstance(data, ChatConfig):
            return self.with_tokenizer_of_init(data)
        return self.with_tokenizer_of_init(self.config.data_of(DataConfig))

    def open_data(self, folder: Path) -> TaskData:
        """Open the token caches."""
        settings = self.data_settings
        if isinstance(settings, ChatConfig):
            data = load_chats(settings, folder, is_verified=True)
        else:
            data = load_data(settings, folder, is_verified=True)
        train, heldout = data.train, data.heldout
        return TaskData(
            loader=BatchLoader(train, settings),
            num_train_units=len(train.tokens) if train.learned is None else int(train.learned.sum()),
            heldout=None if heldout is None else lambda: evaluation_batches(heldout, settings),
            tokenizer=data.tokenizer,
        )

    def build_model(self, data: TaskData) -> nn.Module:
        """Build the decoder of the config, or open that of `init`; raises `ConfigError` where the data do not fit it.

        The tokenizer may not have more tokens than the model, nor a row be longer than it takes.
        """
        assert data.tokenizer is not None
        if self.config.init is not None:
            return self._open_decoder(data.tokenizer)
        if data.tokenizer.vocab_size > self.config.model.vocab_size:
            raise ConfigError(
                f"the tokenizer has {data.tokenizer.vocab_size} tokens and model.vocab_size is "
                f"{self.config.model.vocab_size}; make model.vocab_size at least as large"
            )
        return Decoder(self.config.model)

    def _open_decoder(self, tokenizer: Tokenizer) -> nn.Module:
        model = self.open_init(CAUSAL_LM)
        source = self.config.init
        if not isinstance(model, Decoder):
            raise ConfigError(
                f"init={source} is no decoder of ours nor of the Hugging Face families {', '.join(FAMILIES)}, which "
                "causal_lm trains; give one of them"
            )
        config = model.config
        if tokenizer.vocab_size > config.vocab_size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model of init={source} {config.vocab_size}; "
                "take the tokenizer that the model was made with"
            )
        if tokenizer.vocab_size < config.vocab_size:
            warn_caller(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model of init={source} {config.vocab_size}, "
                "of which the others are never learned"
            )
        self.config.check_lengths(config.max_length, f"the model of init={source} takes")
        return model

    def on_step(self, model: nn.Module, step: int, *, is_evaluating: bool = False) -> None:
        """Open the mask; evaluations see it wholly in force, however few of its opening steps are done."""
        if isinstance(model, Decoder):
            mask = model.config.mask
            model.set_step(max(step, mask.opening_steps if mask and is_evaluating else 0))

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """(B, T) tokens, to which the model answers with (B, T, V) logits."""
        return (batch.tokens_BT,)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return (B, T, V) logits, in which documents of one row know nothing of each other."""
        logits_BTV: Tensor = model(*self.inputs(batch), **_documents(batch))
        return logits_BTV

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """() sum of the cross-entropy over the targets, in nats."""
        return sum_cross_entropy(outputs, batch.targets_BT, ignored_target=IGNORED_TARGET)

    def loss_without_outputs(self, model: nn.Module, batch: Batch) -> Tensor | None:
        """Return the loss of the head's inputs, whose logits are never held all at once.

        `None` where something else wants them: a head that is not plain, hooks, a class of one's own.
        """
        if not isinstance(model, Decoder) or not self._has_own_loss:
            return None
        is_usual = type(model).forward is Decoder.forward and not has_hooks(model) and not has_compute(model)
        has_bias = any(name == "bias" for name, _ in model.head.named_parameters())
        if not is_usual or not is_plain_linear(model.head) or has_bias:
            return None
        hidden_BTD: Tensor = model(*self.inputs(batch), **_documents(batch), without_head=True)
        return sum_linear_cross_entropy(
            hidden_BTD,
            model.head.weight,
            batch.targets_BT,
            ignored_target=IGNORED_TARGET,
            softcap=model.config.logits_softcap,
        )

    @property
    def _has_own_loss(self) -> bool:
        """Whether no class derived from this one computes outputs or loss in another way."""
        return all(getattr(type(self), name) is getattr(CausalLM, name) for name in ("inputs", "forward", "loss"))

    def cut_sequence(self, batch: Batch, ring: SequenceRing) -> Batch:
        """Return the tokens of `batch` that lie on this rank of a plan with `cp`, and their targets."""
        cut = {
            name: None if whole is None else ring.cut(whole)
            for name, whole in (("documents_BT", batch.documents_BT), ("sources_BT", batch.sources_BT))
        }
        targets_BT = ring.cut(batch.targets_BT)
        return Batch(ring.cut(batch.tokens_BT), targets_BT, int((targets_BT != IGNORED_TARGET).sum()), **cut)

    def class_logits(self, outputs: Tensor, batch: Batch) -> Tensor:
        """(N, V) logits for the targets that count."""
        return outputs[batch.targets_BT != IGNORED_TARGET]

    def unit_losses(self, outputs: Tensor, batch: Batch) -> UnitLosses:
        """Return the loss of each target; those of a document or chat depend on each other."""
        counts_BT = batch.targets_BT != IGNORED_TARGET
        losses_N = F.cross_entropy(
            self.class_logits(outputs, batch).float(), batch.targets_BT[counts_BT], reduction="none"
        )
        return UnitLosses(losses_N, None if batch.sources_BT is None else batch.sources_BT[counts_BT])

    def count_units(self, batch: Batch) -> int:
        """Targets that count."""
        return batch.num_target_tokens


def _documents(batch: Batch) -> dict[str, Tensor]:
    return {} if batch.documents_BT is None else {"documents_BT": batch.documents_BT}
