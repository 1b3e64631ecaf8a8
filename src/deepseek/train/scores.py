"""Scores of predictions, with the interval that the true value lies in with 95 % confidence.

    scores = score_classes(predicted_N, wanted_N)
    scores["accuracy"], scores["accuracy_low"], scores["accuracy_high"]

Every score is a float under its name, and its interval stands beside it under the same name with `_low` and `_high`.
Shares have Wilson's interval (1927), correlations that of Fisher's z (for ranks with the variance of Bonett and Wright,
2000); what has no formula is measured on resamples of the predictions, always the same ones. Tasks call this at the end
of an evaluation. Shapes: N samples, K classes.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Z_95 = 1.959963984540054
"""Standard deviations of a normal distribution on both sides that hold 95 % of it."""
NUM_RESAMPLES = 400
LEAST_RESAMPLED = 10
"""Units that are independent of each other, fewer than which say too little of how they vary."""
ENDS = (2.5, 97.5)
"""Percentiles of the resamples that 95 % lie between."""


def draw_weights(num_units: int) -> IntArray:
    """Draw how often each unit occurs in each resample, (R, N), always the same.

    >>> weights = draw_weights(5)
    >>> weights.shape, set(weights.sum(axis=1).tolist())
    ((400, 5), {5})
    """
    random = np.random.Generator(np.random.PCG64(0))
    return random.multinomial(num_units, np.full(num_units, 1 / num_units), size=NUM_RESAMPLES)


def score_classes(predicted_N: IntArray, wanted_N: IntArray) -> dict[str, float]:
    """Score predicted classes: accuracy, F1 as the mean over classes, and Matthews' correlation.

    >>> scores = score_classes(np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0]))
    >>> scores["accuracy"], round(scores["macro_f1"], 3), round(scores["matthews"], 3)
    (0.75, 0.733, 0.577)
    """
    num_classes = int(max(predicted_N.max(), wanted_N.max())) + 1
    cells, counts = np.unique(wanted_N * num_classes + predicted_N, return_counts=True)
    wanted, predicted = cells // num_classes, cells % num_classes
    is_right = wanted == predicted

    def rate(counts: FloatArray) -> FloatArray:
        """[macro F1, Matthews] of the (cells,) counts."""
        num_wanted = np.bincount(wanted, counts, minlength=num_classes)
        num_predicted = np.bincount(predicted, counts, minlength=num_classes)
        num_right = np.bincount(wanted[is_right], counts[is_right], minlength=num_classes)
        occurs = (num_wanted + num_predicted) > 0
        f1 = (2 * num_right[occurs] / (num_wanted + num_predicted)[occurs]).mean()
        total = counts.sum()
        covariance = num_right.sum() * total - num_wanted @ num_predicted
        spread = (total**2 - num_wanted @ num_wanted) * (total**2 - num_predicted @ num_predicted)
        return np.array([f1, covariance / math.sqrt(spread) if spread > 0 else 0.0])

    total = int(counts.sum())
    random = np.random.Generator(np.random.PCG64(0))
    resampled = random.multinomial(total, counts / total, size=NUM_RESAMPLES).astype(np.float64)
    low, high = np.percentile([rate(row) for row in resampled], ENDS, axis=0)
    found = rate(counts.astype(np.float64))
    scores = score_share("accuracy", int(counts[is_right].sum()), total)
    for name, value, least, most in zip(("macro_f1", "matthews"), found, low, high, strict=True):
        scores |= with_interval(name, float(value), float(least), float(most))
    return scores


def score_numbers(predicted_N: FloatArray, wanted_N: FloatArray) -> dict[str, float]:
    """Score predicted numbers: Pearson's and Spearman's correlations, 0 where all numbers of one side are alike."""
    num = len(wanted_N)
    pearson = correlate(predicted_N, wanted_N)
    spearman = correlate(rank(predicted_N), rank(wanted_N))
    return with_interval("pearson", pearson, *_fisher_interval(pearson, num, 1.0)) | with_interval(
        "spearman", spearman, *_fisher_interval(spearman, num, 1 + spearman**2 / 2)
    )


def score_spearman(predicted_N: FloatArray, wanted_N: FloatArray) -> dict[str, float]:
    """Score the order of predicted numbers alone."""
    return {name: value for name, value in score_numbers(predicted_N, wanted_N).items() if name.startswith("spearman")}


def score_share(name: str, num_right: int, total: int) -> dict[str, float]:
    """Score a share of successes, with Wilson's interval.

    >>> {key: round(value, 3) for key, value in score_share("accuracy", 45, 50).items()}
    {'accuracy': 0.9, 'accuracy_low': 0.786, 'accuracy_high': 0.957}
    """
    share, z2 = num_right / total, Z_95**2
    center = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z_95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    # Rounding may put the end of an interval a hair inside of a share of 0 or 1.
    return with_interval(name, share, min(share, max(0.0, center - half)), max(share, min(1.0, center + half)))


def score_mean(name: str, values_N: FloatArray) -> dict[str, float]:
    """Score a mean, with the interval that resampling gives."""
    random = np.random.Generator(np.random.PCG64(0))
    means = [values_N[random.integers(len(values_N), size=len(values_N))].mean() for _ in range(NUM_RESAMPLES)]
    low, high = np.percentile(means, ENDS)
    return with_interval(name, float(values_N.mean()), float(low), float(high))


def score_ratio(name: str, sums_B: FloatArray, counts_B: IntArray) -> dict[str, float]:
    """Score a mean over units that come in groups, of which `sums_B` and `counts_B` are known, by resampling groups.

    >>> scores = score_ratio("loss", np.array([2.0, 4.0, 6.0]), np.array([1, 2, 3]))
    >>> scores["loss"], scores["loss_low"], scores["loss_high"]
    (2.0, 2.0, 2.0)
    """
    weights = draw_weights(len(sums_B))
    weights = weights[weights @ counts_B > 0]
    low, high = np.percentile((weights @ sums_B) / (weights @ counts_B), ENDS)
    return with_interval(name, math.fsum(sums_B) / int(counts_B.sum()), float(low), float(high))


def correlate(left_N: FloatArray, right_N: FloatArray) -> float:
    """Return Pearson's correlation, 0 where one side is constant.

    >>> round(correlate(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0])), 6)
    1.0
    """
    left_N, right_N = left_N - left_N.mean(), right_N - right_N.mean()
    spread = math.sqrt(float(left_N @ left_N) * float(right_N @ right_N))
    return max(-1.0, min(1.0, float(left_N @ right_N) / spread)) if spread > 0 else 0.0


def rank(values_N: FloatArray) -> FloatArray:
    """Return the ranks of values from 1 on; equal values share the mean of theirs.

    >>> rank(np.array([10.0, 30.0, 10.0])).tolist()
    [1.5, 3.0, 1.5]
    """
    _, inverse_N, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse_N], dtype=np.float64)


def _fisher_interval(correlation: float, num: int, variance: float) -> tuple[float, float]:
    """Return both ends; all of [-1, 1] where there are too few samples for one."""
    if num <= 3:
        return -1.0, 1.0
    half = Z_95 * math.sqrt(variance / (num - 3))
    z = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, correlation)))
    return min(correlation, math.tanh(z - half)), max(correlation, math.tanh(z + half))


def with_interval(name: str, value: float, low: float, high: float) -> dict[str, float]:
    """Return a score under its name, and the ends of its interval beside it.

    >>> with_interval("map_50", 0.5, 0.4, 0.6)
    {'map_50': 0.5, 'map_50_low': 0.4, 'map_50_high': 0.6}
    """
    return {name: value, f"{name}_low": low, f"{name}_high": high}
