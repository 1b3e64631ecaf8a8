"""Yardsticks for a language model: how well counting one or two tokens predicts held-out text.

The quickstart counts all training tokens and asks each model for the probability of every held-out token but the
first. A trained decoder that does not beat these has learnt nothing that counting would not give. With counts c,
N training tokens, V words of vocabulary, u the previous token and v the next:

    unigram              p(v)   = (c(v) + 1) / (N + V)
    add-one bigram       p(v|u) = (c(uv) + 1) / (c(u) + V)
    discounted bigram    p(v|u) = max(c(uv) - d, 0) / c(u)  +  d * f(u) / c(u) * p(v)

where c(u) counts u as a previous token, f(u) is the number of different tokens seen after u, and p(v) is the unigram
above; after a token never seen before, the discounted bigram is the unigram. Sources: add-one (Laplace) and absolute
discounting, interpolated with the lower order, as in Ney, Essen and Kneser 1994, "On structuring probabilistic
dependences in stochastic language modelling", and Chen and Goodman 1999, "An empirical study of smoothing techniques".

Shapes: V vocabulary, P different pairs, N positions. Cost: one sort of the training tokens; 3 M tokens take 0.2 s.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deepseek.core.errors import DataError

DISCOUNT = 0.75

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class NgramLosses:
    """Cross-entropies on held-out text, nats a token."""

    unigram: float
    bigram: float
    bigram_discounted: float


@dataclass(frozen=True, eq=False)
class NgramCounts:
    """How often tokens and pairs of tokens occur."""

    vocab_size: int
    unigrams_V: IntArray
    contexts_V: IntArray
    """How often each token is the previous one of a pair."""
    followers_V: IntArray
    """How many different tokens come after each token."""
    pair_codes_P: IntArray
    """Pairs that occur, as previous * vocab_size + next, ascending."""
    pair_counts_P: IntArray


def measure_ngrams(train: ArrayLike, heldout: ArrayLike, vocab_size: int) -> NgramLosses:
    """Losses on `heldout` of the three models counted on `train`; raises `DataError` below two tokens.

    >>> losses = measure_ngrams([0, 1] * 50, [0, 1] * 50, vocab_size=2)
    >>> round(losses.unigram, 2), round(losses.bigram_discounted, 2)
    (0.69, 0.01)
    """
    counts = count_ngrams(train, vocab_size)
    heldout_N = _as_tokens(heldout, vocab_size)
    previous_N, next_N = heldout_N[:-1], heldout_N[1:]
    return NgramLosses(
        unigram=_cross_entropy(unigram_probability(counts, next_N)),
        bigram=_cross_entropy(bigram_probability(counts, previous_N, next_N)),
        bigram_discounted=_cross_entropy(discounted_bigram_probability(counts, previous_N, next_N)),
    )


def count_ngrams(tokens: ArrayLike, vocab_size: int) -> NgramCounts:
    """Count every token and every pair of neighbours; raises `DataError` below two tokens."""
    tokens_N = _as_tokens(tokens, vocab_size)
    pair_codes_P, pair_counts_P = np.unique(tokens_N[:-1] * vocab_size + tokens_N[1:], return_counts=True)
    return NgramCounts(
        vocab_size=vocab_size,
        unigrams_V=np.bincount(tokens_N, minlength=vocab_size),
        contexts_V=np.bincount(tokens_N[:-1], minlength=vocab_size),
        followers_V=np.bincount(pair_codes_P // vocab_size, minlength=vocab_size),
        pair_codes_P=pair_codes_P,
        pair_counts_P=pair_counts_P,
    )


def unigram_probability(counts: NgramCounts, next_N: IntArray) -> FloatArray:
    """p(next) with add-one smoothing."""
    return np.asarray((counts.unigrams_V[next_N] + 1) / (counts.unigrams_V.sum() + counts.vocab_size))


def bigram_probability(counts: NgramCounts, previous_N: IntArray, next_N: IntArray) -> FloatArray:
    """p(next | previous) with add-one smoothing."""
    pairs_N = _count_pairs(counts, previous_N, next_N)
    return np.asarray((pairs_N + 1) / (counts.contexts_V[previous_N] + counts.vocab_size))


def discounted_bigram_probability(
    counts: NgramCounts, previous_N: IntArray, next_N: IntArray, discount: float = DISCOUNT
) -> FloatArray:
    """p(next | previous) with absolute discounting; what is taken off goes to the unigram."""
    unigram_N = unigram_probability(counts, next_N)
    pairs_N = _count_pairs(counts, previous_N, next_N)
    contexts_N = counts.contexts_V[previous_N]
    seen_N = np.maximum(contexts_N, 1)
    share_N = np.where(contexts_N > 0, discount * counts.followers_V[previous_N] / seen_N, 1.0)
    return np.asarray(np.maximum(pairs_N - discount, 0) / seen_N + share_N * unigram_N)


def _count_pairs(counts: NgramCounts, previous_N: IntArray, next_N: IntArray) -> IntArray:
    codes_N = previous_N * counts.vocab_size + next_N
    places_N = np.minimum(np.searchsorted(counts.pair_codes_P, codes_N), len(counts.pair_codes_P) - 1)
    return np.where(counts.pair_codes_P[places_N] == codes_N, counts.pair_counts_P[places_N], 0)


def _as_tokens(tokens: ArrayLike, vocab_size: int) -> IntArray:
    tokens_N = np.asarray(tokens).astype(np.int64)
    if tokens_N.ndim != 1 or len(tokens_N) < 2:
        raise DataError(f"n-grams were asked of tokens of shape {tokens_N.shape}; expected at least two in one row")
    if tokens_N.min() < 0 or tokens_N.max() >= vocab_size:
        raise DataError(
            f"tokens from {tokens_N.min()} to {tokens_N.max()} do not lie below vocab_size={vocab_size}; "
            "give the vocab_size of the tokenizer that made them"
        )
    return tokens_N


def _cross_entropy(probability_N: FloatArray) -> float:
    return float(-np.log(probability_N).mean())
