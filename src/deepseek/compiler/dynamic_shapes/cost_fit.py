"""What a piece costs, fitted to measured times: `buckets.Cost` by least squares, no coefficient below zero.

`length_policy.py` calls this once enough pieces have been timed. Errors are relative to the time measured, so that long
batches do not drown short ones, and times of more than twice what the rest says are left out: something else ran then.
With three coefficients the constraint is met by trying: of the fits over each subset of the terms, those without a
negative coefficient are candidates, and the best of them is the constrained optimum (Lawson and Hanson 1974, ch. 23).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from deepseek.compiler.dynamic_shapes.buckets import Cost

Sample = tuple[int, int, float]
"""Rows, their length, and the seconds they took."""

# Times that outliers are dropped and the rest is fitted again.
_NUM_TRIMS = 2
# Times above this multiple of the fit are outliers.
_OUTLIER_FACTOR = 2.0
_MIN_SIZES = 3


def fit_cost(samples: Sequence[Sample]) -> Cost | None:
    """Fit a `Cost` to `samples`; `None` where they show fewer than three sizes, or nothing that grows with size."""
    fit = _fit(samples)
    for _ in range(_NUM_TRIMS):
        if fit is not None:
            kept = [sample for sample in samples if sample[2] <= _OUTLIER_FACTOR * fit(sample[0], sample[1])]
            fit = _fit(kept) or fit
    return fit


def _fit(samples: Sequence[Sample]) -> Cost | None:
    timed = [sample for sample in samples if sample[2] > 0]
    if len({(rows, length) for rows, length, _ in timed}) < _MIN_SIZES:
        return None
    rows, lengths, seconds = np.array(timed, dtype=np.float64).T
    terms = np.stack([np.ones_like(rows), rows * lengths, rows * lengths**2], axis=1) / seconds[:, None]
    subsets = [kept for count in (3, 2, 1) for kept in itertools.combinations(range(3), count)]
    fits = [fit for kept in subsets if (fit := _solve(terms, list(kept))) is not None]
    valid = [fit for fit in fits if fit.min() >= 0 and fit[1] + fit[2] > 0]
    if not valid:
        return None
    best = min(valid, key=lambda fit: float(np.square(terms @ fit - 1).sum()))
    return Cost(*best.tolist())


def _solve(terms: NDArray[np.float64], kept: list[int]) -> NDArray[np.float64] | None:
    """Solve for the terms `kept`, with zeros for the rest; `None` where the samples do not tell them apart."""
    scale = np.linalg.norm(terms[:, kept], axis=0)
    solution, _, rank, _ = np.linalg.lstsq(terms[:, kept] / scale, np.ones(len(terms)), rcond=1e-6)
    if rank < len(kept):
        return None
    fit = np.zeros(3)
    fit[kept] = solution / scale
    return fit
