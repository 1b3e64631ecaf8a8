from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.core.errors import DataError
from deepseek.data.ngrams import (
    bigram_probability,
    count_ngrams,
    discounted_bigram_probability,
    measure_ngrams,
    unigram_probability,
)

V = 7
TOKENS = st.lists(st.integers(0, V - 1), min_size=2, max_size=60)


def _naive(train: list[int], heldout: list[int]) -> tuple[float, float, float]:
    """The three formulas, one token at a time."""
    words, pairs = Counter(train), Counter(pairwise(train))
    contexts = Counter(train[:-1])
    losses = [0.0, 0.0, 0.0]
    for previous, token in pairwise(heldout):
        unigram = (words[token] + 1) / (len(train) + V)
        bigram = (pairs[previous, token] + 1) / (contexts[previous] + V)
        discounted = unigram
        if contexts[previous]:
            followers = len({b for a, b in pairs if a == previous})
            kept = max(pairs[previous, token] - 0.75, 0) / contexts[previous]
            discounted = kept + 0.75 * followers / contexts[previous] * unigram
        for index, probability in enumerate((unigram, bigram, discounted)):
            losses[index] -= math.log(probability) / (len(heldout) - 1)
    return losses[0], losses[1], losses[2]


@given(TOKENS, TOKENS)
def test_losses_are_those_of_the_formulas(train: list[int], heldout: list[int]) -> None:
    losses = measure_ngrams(train, heldout, V)
    assert (losses.unigram, losses.bigram, losses.bigram_discounted) == pytest.approx(_naive(train, heldout), rel=1e-12)


@given(TOKENS)
def test_each_distribution_sums_to_one(train: list[int]) -> None:
    counts = count_ngrams(train, V)
    previous, following = (each.ravel() for each in np.meshgrid(np.arange(V), np.arange(V), indexing="ij"))
    assert unigram_probability(counts, np.arange(V)).sum() == pytest.approx(1)
    for probability in (bigram_probability, discounted_bigram_probability):
        np.testing.assert_allclose(probability(counts, previous, following).reshape(V, V).sum(axis=1), 1)


def test_stored_token_types_do_not_overflow() -> None:
    tokens = np.asarray([60_000, 1, 60_000, 2] * 5, dtype=np.uint16)
    losses = measure_ngrams(tokens, tokens, 65_536)
    assert losses == measure_ngrams(tokens.astype(np.int64), tokens.astype(np.int64), 65_536)
    assert losses.bigram_discounted < losses.unigram


@pytest.mark.parametrize("tokens", [[0, V], [-1, 0]])
def test_tokens_outside_the_vocabulary_are_refused(tokens: list[int]) -> None:
    with pytest.raises(DataError, match="do not lie below vocab_size=7"):
        measure_ngrams([0, 1], tokens, V)


def test_a_single_token_has_no_pairs() -> None:
    with pytest.raises(DataError, match="at least two"):
        measure_ngrams([1], [1, 2], V)
