from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.core.errors import ConfigError, DataError
from deepseek.data.batching import IGNORED_TARGET, Batch, BatchLoader, evaluation_batches, fill_batches, warn_of_losses
from deepseek.data.config import ChatConfig, DataConfig
from deepseek.data.token_cache import CacheManifest, TokenCache

LENGTHS = st.lists(st.integers(2, 30), min_size=1, max_size=40)


def _cache(lengths: Iterable[int], name: str = "x") -> TokenCache:
    """Documents whose tokens are all different, so that each can be found again."""
    starts = np.concatenate([[0], np.cumsum(list(lengths))])
    manifest = CacheManifest(
        schema_version=1,
        documents_digest=name,
        tokenizer_digest="t",
        vocab_size=1 << 16,
        token_dtype="<u2",
        num_documents=len(starts) - 1,
        num_tokens=int(starts[-1]),
        num_text_bytes=0,
        num_undecodable=0,
        num_undecodable_documents=0,
        files={},
    )
    return TokenCache(np.arange(starts[-1], dtype=np.uint16), starts.astype(np.int64), manifest)


def _config(**settings: Any) -> DataConfig:
    return DataConfig(**{"sequence_length": 8, "batch_size": 2, "max_tokens": 64, "max_len": 20} | settings)


def _take(loader: BatchLoader, count: int) -> list[Batch]:
    return list(islice(loader, count))


def _values(batch: Batch) -> list[list[list[int]]]:
    return [batch.tokens_BT.tolist(), batch.targets_BT.tolist()]


def _pairs(batches: Iterable[Batch]) -> Counter[tuple[int, int]]:
    """Each (token, next token) that counts."""
    pairs: Counter[tuple[int, int]] = Counter()
    for batch in batches:
        shown = batch.targets_BT != -100
        assert batch.num_target_tokens == int(shown.sum())
        pairs.update(zip(batch.tokens_BT[shown].tolist(), batch.targets_BT[shown].tolist(), strict=True))
    return pairs


@settings(max_examples=50)
@given(LENGTHS, st.integers(0, 5))
def test_a_packed_epoch_predicts_the_text_once_but_for_less_than_a_row(lengths: list[int], seed: int) -> None:
    cache = _cache([*lengths, 9])
    num_rows = (len(cache.tokens) - 1) // 8
    loader = BatchLoader(cache, _config(batch_size=1, seed=seed))
    pairs = _pairs(_take(loader, num_rows))
    assert loader.state_dict()["epoch"] == 0
    assert pairs.total() == num_rows * 8
    assert max(Counter(target for _, target in pairs.elements()).values()) == 1
    inside = {(token, token + 1) for token in range(len(cache.tokens) - 1)}
    last_tokens = set((cache.starts[1:] - 1).tolist())
    first_tokens = set(cache.starts[:-1].tolist())
    assert all(pair in inside or (pair[0] in last_tokens and pair[1] in first_tokens) for pair in pairs)


def test_packed_rows_are_the_layout_of_shuffled_documents() -> None:
    cache = _cache([5, 9, 3, 12, 4])
    loader = BatchLoader(cache, _config(batch_size=4))
    following = dict(_pairs([loader.next_batch()]).keys())
    order, token = [], next(iter(set(following) - set(following.values())))
    while token in following:
        order.append(token)
        token = following[token]
    order.append(token)
    documents = [cache.document(index).tolist() for index in range(5)]
    met = sorted((document for document in documents if document[0] in order), key=lambda d: order.index(d[0]))
    assert list(chain(*met))[: len(order)] == order
    assert len(met) >= 4


@pytest.mark.parametrize("batching", ["packed", "token_budget"])
def test_order_depends_on_seed_and_epoch_alone(batching: str) -> None:
    cache = _cache([7, 3, 20, 11, 30, 2, 9] * 5)
    runs = [
        [_values(batch) for batch in _take(BatchLoader(cache, _config(batching=batching, seed=seed)), 40)]
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    loader = BatchLoader(cache, _config(batching=batching, seed=1, batch_size=1))
    epochs: dict[int, list[Any]] = {}
    while loader.state_dict()["epoch"] < 2:
        values = _values(loader.next_batch())
        epochs.setdefault(loader.state_dict()["epoch"], []).append(values)
    assert epochs[0] != epochs[1]


@settings(max_examples=30, deadline=None)
@given(LENGTHS, st.sampled_from([2, 3, 5]))
def test_ranks_share_the_rows_of_a_single_process(lengths: list[int], world_size: int) -> None:
    cache = _cache([*lengths, 9])
    alone = BatchLoader(cache, _config(batch_size=2 * world_size))
    ranks = [BatchLoader(cache, _config(batch_size=2), rank=rank, world_size=world_size) for rank in range(world_size)]
    for _ in range(6):
        whole = alone.next_batch()
        for rank, loader in enumerate(ranks):
            part = loader.next_batch()
            assert sorted(part.tokens_BT.tolist()) == sorted(whole.tokens_BT[rank::world_size].tolist())
        assert {json.dumps(loader.state_dict()) for loader in ranks} == {json.dumps(alone.state_dict())}


def test_ranks_take_turns_at_token_budget_batches() -> None:
    cache = _cache(range(2, 60))
    config = _config(batching="token_budget")
    alone = [_values(batch) for batch in _take(BatchLoader(cache, config), 30)]
    for rank in range(3):
        loader = BatchLoader(cache, config, rank=rank, world_size=3)
        assert [_values(batch) for batch in _take(loader, 10)] == alone[rank::3]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 60), st.sampled_from(["packed", "token_budget", "packed_documents"]), st.integers(0, 1))
def test_a_restored_position_goes_on_exactly(num_before: int, batching: str, rank: int) -> None:
    cache, config = _cache([7, 3, 20, 11, 30, 2, 9]), _config(batching=batching)
    loader = BatchLoader(cache, config, rank=rank, world_size=2)
    _take(loader, num_before)
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = BatchLoader(cache, config, rank=rank, world_size=2)
    resumed.load_state_dict(state)
    assert [_values(each) for each in _take(resumed, 20)] == [_values(each) for each in _take(loader, 20)]


def test_a_position_is_resumed_with_another_number_of_ranks() -> None:
    cache = _cache([7, 3, 20, 11, 30, 2, 9] * 4)
    four = [BatchLoader(cache, _config(batch_size=1), rank=rank, world_size=4) for rank in range(4)]
    expected = BatchLoader(cache, _config(batch_size=4))
    for _ in range(13):
        expected.next_batch()
        for loader in four:
            loader.next_batch()
    one = BatchLoader(cache, _config(batch_size=4))
    one.load_state_dict(four[2].state_dict())
    assert [_values(each) for each in _take(one, 9)] == [_values(each) for each in _take(expected, 9)]


@settings(max_examples=50)
@given(LENGTHS, st.integers(20, 100), st.integers(0, 5))
def test_a_token_budget_epoch_holds_each_document_once_within_the_budget(
    lengths: list[int], max_tokens: int, seed: int
) -> None:
    cache = _cache(lengths)
    loader = BatchLoader(cache, _config(batching="token_budget", max_tokens=max_tokens, seed=seed))
    batches = [loader.next_batch()]
    while loader.state_dict()["index"] < loader._plan.num_items:
        batches.append(loader.next_batch())
    assert all(batch.tokens_BT.numel() <= max_tokens for batch in batches)
    expected = [
        (token, token + 1)
        for start, length in zip(cache.starts[:-1].tolist(), lengths, strict=True)
        for token in range(start, start + min(length - 1, 20))
    ]
    assert _pairs(batches) == Counter(expected)


@given(st.lists(st.integers(1, 50), min_size=1), st.integers(50, 200))
def test_batches_are_filled_as_far_as_they_go(lengths: list[int], max_tokens: int) -> None:
    documents = np.argsort(-np.asarray(lengths), kind="stable")
    batches = fill_batches(documents, np.asarray(lengths), max_tokens)
    assert np.concatenate(batches).tolist() == documents.tolist()
    for batch in batches[:-1]:
        assert len(batch) * lengths[batch[0]] <= max_tokens < (len(batch) + 1) * lengths[batch[0]]


def test_documents_of_similar_length_share_a_batch() -> None:
    random = np.random.default_rng(0)
    cache = _cache(random.integers(2, 200, size=600))
    loader = BatchLoader(cache, _config(batching="token_budget", max_tokens=1024, max_len=512))
    batches = _take(loader, loader._plan.num_items)
    filled = sum(batch.num_target_tokens for batch in batches) / sum(batch.tokens_BT.numel() for batch in batches)
    assert filled > 0.95  # documents in random order would fill about half


def test_padding_does_not_count_in_a_loss() -> None:
    cache = _cache([3, 9])
    batch = BatchLoader(cache, _config(batching="token_budget")).next_batch()
    assert batch.tokens_BT.dtype == batch.targets_BT.dtype == torch.int64
    logits = torch.zeros(*batch.targets_BT.shape, 12)
    total = F.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten(), reduction="sum")
    assert batch.num_target_tokens == 2 + 8
    assert total.item() == pytest.approx(10 * np.log(12), rel=1e-6)


@settings(max_examples=50)
@given(LENGTHS, st.integers(1, 4), st.integers(1, 12))
def test_evaluation_predicts_every_token_but_the_first_once(
    lengths: list[int], world_size: int, sequence_length: int
) -> None:
    cache = _cache(lengths)
    config = _config(sequence_length=sequence_length)
    batches = [
        b for rank in range(world_size) for b in evaluation_batches(cache, config, rank=rank, world_size=world_size)
    ]
    assert _pairs(batches) == Counter((token, token + 1) for token in range(len(cache.tokens) - 1))
    assert all(batch.tokens_BT.shape[1] == sequence_length and len(batch.tokens_BT) <= 2 for batch in batches)


def test_a_position_in_another_text_or_order_is_refused() -> None:
    cache = _cache([50])
    state = BatchLoader(cache, _config()).state_dict()
    for other in (
        BatchLoader(_cache([50], name="y"), _config()),
        BatchLoader(cache, _config(seed=1)),
        BatchLoader(cache, _config(sequence_length=9)),
        BatchLoader(cache, _config(batching="token_budget")),
        BatchLoader(cache, _config(batching="packed_documents")),
    ):
        with pytest.raises(DataError, match="belongs to another corpus"):
            other.load_state_dict(state)
    BatchLoader(cache, _config(batch_size=3)).load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "seen"), [({"index": 99}, "outside its epoch"), ({"extra": 1}, "epoch, index and order")]
)
def test_a_malformed_position_is_refused(change: dict[str, Any], seen: str) -> None:
    loader = BatchLoader(_cache([50]), _config())
    with pytest.raises(DataError, match=seen):
        loader.load_state_dict(loader.state_dict() | change)


def test_too_little_text_is_refused() -> None:
    with pytest.raises(DataError, match=r"8 tokens, too few for one row of sequence_length=8"):
        BatchLoader(_cache([8]), _config())
    with pytest.raises(DataError, match="no document has two tokens"):
        BatchLoader(_cache([1, 1]), _config(batching="token_budget"))
    with pytest.raises(DataError, match="nothing to predict"):
        list(evaluation_batches(_cache([1]), _config()))


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_outside_the_world_is_refused(rank: int, world_size: int) -> None:
    with pytest.raises(ConfigError, match="is not below world_size"):
        BatchLoader(_cache([50]), _config(), rank=rank, world_size=world_size)


def _learned(cache: TokenCache) -> TokenCache:
    """Every third token is not learned."""
    return replace(cache, learned=np.arange(len(cache.tokens)) % 3 != 0)


def _epoch(loader: BatchLoader) -> list[Batch]:
    """The rows of one epoch, each a batch."""
    return _take(loader, loader._plan.num_items)


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.integers(0, 3), st.booleans())
def test_an_epoch_of_packed_documents_predicts_each_token_once_inside_its_document(
    lengths: list[int], seed: int, has_mask: bool
) -> None:
    cache = _learned(_cache([*lengths, 9])) if has_mask else _cache([*lengths, 9])
    batches = _epoch(BatchLoader(cache, _config(batching="packed_documents", batch_size=1, seed=seed)))
    firsts = set(cache.starts.tolist())
    expected = [
        (token, token + 1)
        for token in range(len(cache.tokens) - 1)
        if token + 1 not in firsts and (cache.learned is None or cache.learned[token + 1])
    ]
    assert _pairs(batches) == Counter(expected)


@settings(max_examples=30, deadline=None)
@given(LENGTHS, st.integers(0, 3))
def test_neighbors_in_a_packed_document_are_neighbors_in_the_text_and_no_others(lengths: list[int], seed: int) -> None:
    cache = _cache([*lengths, 9])
    loader = BatchLoader(cache, _config(batching="packed_documents", sequence_length=40, seed=seed))
    for batch in _take(loader, 4):
        assert batch.documents_BT is not None
        for tokens, documents in zip(batch.tokens_BT.tolist(), batch.documents_BT.tolist(), strict=True):
            assert documents == sorted(documents)
            for place in range(1, len(tokens)):
                if tokens[place]:  # not padding, nor the very first token
                    follows = tokens[place] == tokens[place - 1] + 1 and tokens[place] not in cache.starts
                    assert follows == (documents[place] == documents[place - 1])


def test_packed_documents_come_in_another_order_and_company_in_each_epoch() -> None:
    lengths = [5, 6, 7] * 12
    loader = BatchLoader(_cache(lengths), _config(batching="packed_documents", sequence_length=64, batch_size=1))
    first, second = ([_values(batch) for batch in _epoch(loader)] for _ in range(2))
    assert sorted(first) != sorted(second)


def test_ranks_share_the_rows_of_packed_documents() -> None:
    cache, config = _cache(range(2, 60)), {"batching": "packed_documents", "sequence_length": 64}
    alone = BatchLoader(cache, _config(**config, batch_size=6))
    ranks = [BatchLoader(cache, _config(**config, batch_size=2), rank=rank, world_size=3) for rank in range(3)]
    for _ in range(9):
        whole = alone.next_batch()
        for rank, loader in enumerate(ranks):
            assert loader.next_batch().tokens_BT.tolist() == whole.tokens_BT[rank::3].tolist()


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_of_chats_reads_each_learned_token_once(world_size: int) -> None:
    cache = _learned(_cache(range(2, 30)))
    config = ChatConfig(sources=("x",), sequence_length=32, batch_size=2)
    batches = [
        b for rank in range(world_size) for b in evaluation_batches(cache, config, rank=rank, world_size=world_size)
    ]
    firsts = set(cache.starts.tolist())
    assert _pairs(batches) == Counter(
        (token, token + 1) for token in range(len(cache.tokens) - 1) if (token + 1) % 3 and token + 1 not in firsts
    )
    assert all(batch.documents_BT is not None for batch in batches)


@pytest.mark.parametrize(
    "config", [_config(), ChatConfig(sources=("x",), sequence_length=8, batch_size=2, too_long="split")]
)
def test_evaluations_say_which_document_each_target_is_from(config: DataConfig | ChatConfig) -> None:
    cache = _learned(_cache([5, 20, 1, 9, 30]))
    document_of = [number for number in range(5) for _ in cache.document(number)]
    batches = evaluation_batches(cache, config)
    assert len(batches) == len(list(batches)) > 2  # counted, and read again from the beginning
    for batch in batches:
        assert batch.sources_BT is not None
        is_target = batch.targets_BT != IGNORED_TARGET
        expected = [document_of[target] for target in batch.targets_BT[is_target].tolist()]  # a token is its own place
        assert batch.sources_BT[is_target].tolist() == expected


@pytest.mark.parametrize(
    ("too_long", "fate"), [("truncate", "cut off"), ("drop", "left out"), ("split", "cut into pieces")]
)
def test_what_does_not_fit_is_counted_and_said(too_long: str, fate: str) -> None:
    cache = replace(_cache([20, 5, 30, 4]), learned=np.arange(59) < 57)
    config = _config(batching="packed_documents", too_long=too_long)
    with pytest.warns(UserWarning) as warned:
        warn_of_losses(cache, config)
    messages = [str(warning.message) for warning in warned]
    assert messages[0].startswith(f"2 of 4 documents are longer than a row of 8 tokens and are {fate}")
    assert len(messages) == 1


def test_documents_that_have_nothing_to_learn_in_what_is_kept_are_counted_and_all_of_them_refused() -> None:
    cache = replace(_cache([20, 5, 30]), learned=np.arange(55) == 19)
    config = _config(batching="packed_documents", too_long="split")
    with pytest.warns(UserWarning) as warned:
        warn_of_losses(cache, config)
    assert str(warned[-1].message) == "2 of 3 documents have nothing to learn and are left out"
    with pytest.raises(DataError, match="none of 3 documents has a token to learn in rows of sequence_length=8"):
        BatchLoader(cache, config.override({"too_long": "truncate"}))
