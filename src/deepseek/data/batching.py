"""Tokens of a cache cut into batches, in an order that depends on the seed alone and can be taken up anywhere.

Three ways of cutting, chosen by `batching` in the settings:

    packed         documents are shuffled and laid end to end; rows of `sequence_length` tokens are cut from that and
                   shuffled again. No padding; a row may hold the end of one document and the start of the next.
    token_budget   each document is one row, cut off at `max_len`; documents of similar length share a batch, padded to
                   the longest, with at most `max_tokens` tokens in it.
    packed_documents  whole documents share rows of `sequence_length` tokens, filled by best fit, and do not see each
                   other (`Batch.documents_BT`); `packing.py` has what becomes of those that are longer than a row.
                   Chats are always cut this way.

Each epoch is an endless supply's next list of items (rows, or whole batches), ordered by (seed, epoch). The position
is (epoch, index in it) over all ranks together: of the next items rank r of W takes r, r + W, ..., so the order of the
text is the same for any number of ranks, and a position saved under one number is resumed under another.

    loader = BatchLoader(cache, config, rank=0, world_size=1)
    for batch in loader: ...                # never ends
    state = loader.state_dict()             # plain JSON values; after a batch, it points to the next one

Everything but `_to_batch` is numpy. Shapes: B rows, T tokens.
Cost: 0.05 ms for a batch of 16 x 256; an epoch's order takes 8 bytes a document and a row. On Python's library,
token-budget batches of 16,384 tokens are 2 % padding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deepseek.core.caller_warnings import warn_caller
from deepseek.core.errors import ConfigError, DataError
from deepseek.data.config import ChatConfig, DataConfig
from deepseek.data.one_pass import OnePass
from deepseek.data.packing import Pieces, cut_documents, fill_rows, lay_out
from deepseek.data.token_cache import TokenCache

if TYPE_CHECKING:
    from torch import Tensor

IGNORED_TARGET = -100
"""The target that `torch.nn.functional.cross_entropy` leaves out."""

_NOTHING = -1
# Documents sorted by length together: many enough to find similar ones, few enough that their order stays random. A
# corpus of fewer is sorted whole, so its batches hold much the same documents in each epoch; their order changes.
_SORTED_TOGETHER = 4096

IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Batch:
    """Inputs and what should follow them."""

    tokens_BT: Tensor
    """int64; padding is token 0."""
    targets_BT: Tensor
    """int64; the next token, or -100 where there is none."""
    num_target_tokens: int
    """Targets that count, which is what a loss is weighted with."""
    documents_BT: Tensor | None = None
    """int64; number of each token's document in its row, which tokens of others do not see. `None`: all see all."""
    sources_BT: Tensor | None = None
    """int64; of evaluations, the number of the document in the cache that each target comes from."""


@dataclass(frozen=True, eq=False)
class Rows:
    """What becomes a batch, in numpy."""

    tokens_BT: IntArray
    """-1 where there is none."""
    targets_BT: IntArray
    """The next token, or -1 where nothing is learned."""
    documents_BT: IntArray | None = None
    sources_BT: IntArray | None = None


TextSettings = DataConfig | ChatConfig
"""Settings of data that are tokens."""


class Epoch(Protocol):
    """One pass over the cache: `num_items` items in a fixed order."""

    @property
    def num_items(self) -> int:
        """Rows, or whole batches."""

    def rows(self, items: IntArray) -> Rows:
        """Return the rows of the items."""


class BatchLoader:
    """Batches without end, with a position that can be saved and restored."""

    def __init__(self, cache: TokenCache, config: TextSettings, *, rank: int = 0, world_size: int = 1) -> None:
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank={rank} is not below world_size={world_size}; ranks count from 0")
        self.cache = cache
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self._epoch = 0
        self._index = 0
        self._plan = plan_epoch(cache, config, epoch=0)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.next_batch()

    def next_batch(self) -> Batch:
        """Return the batch at the position, and move the position on."""
        return _to_batch(list(self._take_rows()))

    def state_dict(self) -> dict[str, Any]:
        """Return the position, as JSON values."""
        return {"epoch": self._epoch, "index": self._index, "order": order_digest(self.cache, self.config)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position; raises `DataError` when it was saved in another text or another order."""
        if set(state) != {"epoch", "index", "order"}:
            raise DataError(f"a data position has epoch, index and order; this one has {', '.join(state) or 'nothing'}")
        if state["order"] != order_digest(self.cache, self.config):
            raise DataError(
                "the saved data position belongs to another corpus, tokenizer, seed or row length; resume with the "
                "data settings it was saved with, or start a new run"
            )
        plan = plan_epoch(self.cache, self.config, epoch=int(state["epoch"]))
        if not 0 <= state["index"] <= plan.num_items:
            raise DataError(f"data position index={state['index']} is outside its epoch's {plan.num_items} items")
        self._epoch, self._index, self._plan = int(state["epoch"]), int(state["index"]), plan

    def _take_rows(self) -> Iterator[Rows]:
        """This rank's rows among the next items of all ranks, which may reach into further epochs."""
        num_wanted = self.world_size * (1 if self.config.batching == "token_budget" else self.config.batch_size)
        num_taken = 0
        while num_taken < num_wanted:
            if self._index == self._plan.num_items:
                self._epoch, self._index = self._epoch + 1, 0
                self._plan = plan_epoch(self.cache, self.config, epoch=self._epoch)
            count = min(num_wanted - num_taken, self._plan.num_items - self._index)
            first = (self.rank - num_taken) % self.world_size
            items = np.arange(self._index + first, self._index + count, self.world_size)
            self._index += count
            num_taken += count
            if len(items):
                yield self._plan.rows(items)


def evaluation_batches(
    cache: TokenCache, config: TextSettings, *, rank: int = 0, world_size: int = 1
) -> OnePass[Batch]:
    """One pass over a cache in which every token but the first is a target exactly once, over all ranks together.

    Text is read in packed rows in its own order whatever `config.batching` says, so losses of two models can be
    compared; the last row is padded. Raises `DataError` for a cache with a single token. Of chats every token that is
    learned is a target once, in the rows that its settings pack.
    """
    if isinstance(config, ChatConfig):
        return _chat_pass(cache, config, rank, world_size)
    length, num_tokens = config.sequence_length, len(cache.tokens)
    if num_tokens < 2:
        raise DataError(f"there is nothing to predict in {num_tokens} token; hold out more text")
    mine = np.arange(rank, -(-(num_tokens - 1) // length), world_size)

    def begin() -> Iterator[Batch]:
        for first in range(0, len(mine), config.batch_size):
            places_BT = mine[first : first + config.batch_size, None] * length + np.arange(length + 1)
            rows = _shift(_gather(cache.tokens, places_BT, places_BT < num_tokens))
            yield _to_batch([replace(rows, sources_BT=_find_documents(cache, places_BT[:, 1:]))])

    return OnePass(-(-len(mine) // config.batch_size), begin)


def _chat_pass(cache: TokenCache, config: ChatConfig, rank: int, world_size: int) -> OnePass[Batch]:
    pieces = cut_to_rows(cache, config)
    all_rows = _fill_sorted(np.arange(len(pieces.lengths)), pieces, config.sequence_length)[rank::world_size]

    def begin() -> Iterator[Batch]:
        for first in range(0, len(all_rows), config.batch_size):
            some = all_rows[first : first + config.batch_size]
            rows = Rows(*lay_out(some, pieces, cache.tokens, cache.learned, width=config.sequence_length))
            assert rows.documents_BT is not None
            # What is left over at the end of a row has no target, and counts as its last document.
            members = [pieces.starts[np.append(row, row[-1])] for row in some]
            places_BT = np.stack([own[numbers] for own, numbers in zip(members, rows.documents_BT, strict=True)])
            yield _to_batch([replace(rows, sources_BT=_find_documents(cache, places_BT))])

    return OnePass(-(-len(all_rows) // config.batch_size), begin)


def _find_documents(cache: TokenCache, places_BT: IntArray) -> IntArray:
    """Return the number of the document that each place in the cache belongs to."""
    return np.searchsorted(cache.starts[1:], places_BT, side="right")


def plan_epoch(cache: TokenCache, config: TextSettings, *, epoch: int) -> Epoch:
    """Plan the order of one epoch, from the seed and the epoch's number alone."""
    random = np.random.PCG64([config.seed, epoch])
    return _PLANNERS[config.batching](cache, config, random)


def order_digest(cache: TokenCache, config: TextSettings) -> str:
    """SHA-256 that two loaders share exactly when their items come in the same order."""
    fields = {
        "packed": ("sequence_length",),
        "token_budget": ("max_tokens", "max_len"),
        "packed_documents": ("sequence_length", "too_long"),
    }[config.batching]
    settings = {name: getattr(config, name) for name in ("batching", "seed", *fields)}
    return hashlib.sha256(json.dumps([cache.digest, settings]).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class PackedEpoch:
    """Rows cut from documents laid end to end in a shuffled order."""

    tokens: NDArray[Any]
    ends: IntArray
    """Where each document ends when laid out."""
    shifts: IntArray
    """Offset from a position in the layout to its position in the cache, for each document."""
    row_order: IntArray
    length: int

    @property
    def num_items(self) -> int:
        """Rows; what is left over at the end of the layout, less than a row, waits for another epoch's order."""
        return len(self.row_order)

    def rows(self, items: IntArray) -> Rows:
        """Rows share one token with the next row of the layout, so that each token is predicted once."""
        places_BT = self.row_order[items][:, None] * self.length + np.arange(self.length + 1)
        documents_BT = np.searchsorted(self.ends, places_BT, side="right")
        return _shift(np.asarray(self.tokens[places_BT + self.shifts[documents_BT]], dtype=np.int64))


def plan_packed(cache: TokenCache, config: DataConfig, random: np.random.PCG64) -> PackedEpoch:
    """Shuffle documents, lay them end to end, and shuffle the rows; raises `DataError` when there is not one row."""
    num_rows = (len(cache.tokens) - 1) // config.sequence_length
    if num_rows == 0:
        raise DataError(
            f"the text has {len(cache.tokens)} tokens, too few for one row of sequence_length={config.sequence_length} "
            "and the token after it; add text or shorten the rows"
        )
    order = _shuffled(cache.num_documents, random)
    starts, lengths = cache.starts[:-1][order], np.diff(cache.starts)[order]
    ends = np.cumsum(lengths)
    return PackedEpoch(
        cache.tokens, ends, starts - (ends - lengths), _shuffled(num_rows, random), config.sequence_length
    )


@dataclass(frozen=True, eq=False)
class TokenBudgetEpoch:
    """Batches of whole documents of similar lengths."""

    tokens: NDArray[Any]
    starts: IntArray
    lengths: IntArray
    """Tokens to predict in each document of the cache: one less than it has, at most `max_len`."""
    batches: list[IntArray]
    """Documents of each batch, longest first."""

    @property
    def num_items(self) -> int:
        """Batches."""
        return len(self.batches)

    def rows(self, items: IntArray) -> Rows:
        """Return the rows of one batch; its width is its longest document's, so batches are not joined."""
        documents_B = self.batches[int(items[0])]
        steps_T = np.arange(self.lengths[documents_B].max() + 1)
        is_text_BT = steps_T <= self.lengths[documents_B][:, None]
        return _shift(_gather(self.tokens, self.starts[documents_B][:, None] + steps_T, is_text_BT))


def plan_token_budget(cache: TokenCache, config: DataConfig, random: np.random.PCG64) -> TokenBudgetEpoch:
    """Shuffle documents, sort stretches of them by length, fill batches to the budget, and shuffle the batches."""
    lengths = np.minimum(np.diff(cache.starts) - 1, config.max_len)
    order = _shuffled(cache.num_documents, random)
    order = order[lengths[order] > 0]
    if len(order) == 0:
        raise DataError("no document has two tokens, so there is nothing to predict; check the source's text")
    batches = []
    for begin in range(0, len(order), _SORTED_TOGETHER):
        stretch = order[begin : begin + _SORTED_TOGETHER]
        batches += fill_batches(stretch[np.argsort(-lengths[stretch], kind="stable")], lengths, config.max_tokens)
    return TokenBudgetEpoch(
        cache.tokens, cache.starts, lengths, [batches[index] for index in _shuffled(len(batches), random)]
    )


def fill_batches(documents: IntArray, lengths: IntArray, max_tokens: int) -> list[IntArray]:
    """Cut `documents`, longest first, into batches whose rows times longest row stay within `max_tokens`.

    >>> [batch.tolist() for batch in fill_batches(np.array([2, 0, 1]), np.array([3, 2, 6]), max_tokens=6)]
    [[2], [0, 1]]
    """
    batches, begin = [], 0
    while begin < len(documents):
        end = begin + int(max_tokens // lengths[documents[begin]])
        batches.append(documents[begin:end])
        begin = end
    return batches


@dataclass(frozen=True, eq=False)
class PackedDocumentsEpoch:
    """Rows that whole documents share."""

    cache: TokenCache
    pieces: Pieces
    packed: list[IntArray]
    """Pieces of each row."""
    length: int

    @property
    def num_items(self) -> int:
        """Rows."""
        return len(self.packed)

    def rows(self, items: IntArray) -> Rows:
        """Lay the documents of the rows side by side."""
        members = [self.packed[int(item)] for item in items]
        return Rows(*lay_out(members, self.pieces, self.cache.tokens, self.cache.learned, width=self.length))


def plan_packed_documents(cache: TokenCache, config: TextSettings, random: np.random.PCG64) -> PackedDocumentsEpoch:
    """Shuffle documents, pack stretches of them into rows, and shuffle the rows."""
    pieces = cut_to_rows(cache, config)
    order = _shuffled(len(pieces.lengths), random)
    packed = []
    for begin in range(0, len(order), _SORTED_TOGETHER):
        packed += _fill_sorted(order[begin : begin + _SORTED_TOGETHER], pieces, config.sequence_length)
    rows = [packed[index] for index in _shuffled(len(packed), random)]
    return PackedDocumentsEpoch(cache, pieces, rows, config.sequence_length)


def cut_to_rows(cache: TokenCache, config: TextSettings) -> Pieces:
    """Cut documents to the rows of `config`; raises `DataError` where nothing is left."""
    pieces = cut_documents(
        cache.starts, cache.learned, sequence_length=config.sequence_length, too_long=config.too_long
    )
    if len(pieces.lengths) == 0:
        raise DataError(
            f"none of {cache.num_documents} documents has a token to learn in rows of "
            f"sequence_length={config.sequence_length} with too_long={config.too_long}; lengthen the rows or check the "
            "source"
        )
    return pieces


def warn_of_losses(cache: TokenCache, config: TextSettings) -> None:
    """Warn of documents that do not fit into a row of packed documents, and of what becomes of them."""
    pieces = cut_to_rows(cache, config)
    if pieces.num_too_long:
        fate = {"truncate": "cut off", "drop": "left out", "split": "cut into pieces"}[config.too_long]
        warn_caller(
            f"{pieces.num_too_long} of {cache.num_documents} documents are longer than a row of "
            f"{config.sequence_length} tokens and are {fate}; data.sequence_length and data.too_long decide that"
        )
    if pieces.num_without_targets:
        warn_caller(
            f"{pieces.num_without_targets} of {cache.num_documents} documents have nothing to learn and are left out"
        )


def _fill_sorted(members: IntArray, pieces: Pieces, capacity: int) -> list[IntArray]:
    """Pack pieces, longest first."""
    return fill_rows(members[np.argsort(-pieces.lengths[members], kind="stable")], pieces.lengths, capacity)


def _shuffled(count: int, random: np.random.PCG64) -> IntArray:
    """0 ... count-1 in random order, by sorting raw bits: numpy keeps those alike in all versions, unlike shuffles."""
    return np.argsort(random.random_raw(count), kind="stable")


def _gather(tokens: NDArray[Any], places_BT: IntArray, is_text_BT: NDArray[np.bool_]) -> IntArray:
    """Return the tokens at the positions, -1 where there is no text."""
    return np.where(is_text_BT, tokens[np.minimum(places_BT, len(tokens) - 1)].astype(np.int64), _NOTHING)


def _shift(rows_BT: IntArray) -> Rows:
    """Tell (B, T + 1) tokens apart into inputs and the tokens that follow them."""
    return Rows(rows_BT[:, :-1], rows_BT[:, 1:])


def _to_batch(parts: list[Rows]) -> Batch:
    """Hand rows over to torch."""
    import torch

    tokens_BT, targets_BT = (
        np.concatenate([part.tokens_BT for part in parts]),
        np.concatenate([part.targets_BT for part in parts]),
    )
    documents, sources = (
        [array for part in parts if (array := getattr(part, name)) is not None]
        for name in ("documents_BT", "sources_BT")
    )
    is_target_BT = targets_BT != _NOTHING
    return Batch(
        tokens_BT=torch.from_numpy(np.maximum(tokens_BT, 0)),
        targets_BT=torch.from_numpy(np.where(is_target_BT, targets_BT, IGNORED_TARGET)),
        num_target_tokens=int(is_target_BT.sum()),
        documents_BT=torch.from_numpy(np.concatenate(documents)) if documents else None,
        sources_BT=torch.from_numpy(np.concatenate(sources)) if sources else None,
    )


_PLANNERS: dict[str, Callable[[TokenCache, Any, np.random.PCG64], Epoch]] = {
    "packed": plan_packed,
    "token_budget": plan_token_budget,
    "packed_documents": plan_packed_documents,
}
