"""Scores are those of scikit-learn and SciPy, and intervals hold the true value as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from deepseek.train.scores import score_classes, score_mean, score_numbers, score_share

sklearn_metrics = pytest.importorskip("sklearn.metrics")
stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize(("num", "num_classes"), [(12, 2), (40, 2), (200, 3), (150, 12), (30, 30)])
def test_scores_of_classes_are_those_of_scikit_learn(num: int, num_classes: int) -> None:
    random = np.random.default_rng(num)
    wanted = random.integers(num_classes, size=num)
    predicted = np.where(random.random(num) < 0.6, wanted, random.integers(num_classes, size=num))
    scores = score_classes(predicted, wanted)
    assert scores["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(wanted, predicted))
    assert scores["macro_f1"] == pytest.approx(sklearn_metrics.f1_score(wanted, predicted, average="macro"))
    assert scores["matthews"] == pytest.approx(sklearn_metrics.matthews_corrcoef(wanted, predicted))
    for name in ("accuracy", "macro_f1", "matthews"):
        assert scores[f"{name}_low"] <= scores[name] <= scores[f"{name}_high"]


def test_one_class_alone_has_no_correlation_and_all_right() -> None:
    scores = score_classes(np.zeros(5, dtype=np.int64), np.zeros(5, dtype=np.int64))
    assert (scores["accuracy"], scores["macro_f1"], scores["matthews"]) == (1.0, 1.0, 0.0)


@pytest.mark.parametrize("num", [4, 30, 500])
def test_correlations_are_those_of_scipy_with_ties(num: int) -> None:
    random = np.random.default_rng(num)
    wanted = random.integers(5, size=num).astype(float)
    predicted = wanted + random.integers(4, size=num)
    scores = score_numbers(predicted, wanted)
    assert scores["pearson"] == pytest.approx(stats.pearsonr(predicted, wanted).statistic)
    assert scores["spearman"] == pytest.approx(stats.spearmanr(predicted, wanted).statistic)
    expected = stats.pearsonr(predicted, wanted).confidence_interval(0.95)
    assert (scores["pearson_low"], scores["pearson_high"]) == pytest.approx((expected.low, expected.high))


def test_numbers_that_are_all_alike_correlate_with_nothing() -> None:
    assert score_numbers(np.ones(6), np.arange(6.0))["pearson"] == 0.0


@pytest.mark.parametrize(("num_right", "total"), [(0, 7), (3, 7), (45, 50), (50, 50)])
def test_the_interval_of_a_share_is_wilsons(num_right: int, total: int) -> None:
    scores = score_share("accuracy", num_right, total)
    expected = stats.binomtest(num_right, total).proportion_ci(0.95, method="wilson")
    assert (scores["accuracy_low"], scores["accuracy_high"]) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_the_interval_of_a_mean_is_about_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(0).normal(size=400)
    scores = score_mean("f1", values)
    half = 1.96 * values.std() / 20
    assert scores["f1_low"] == pytest.approx(values.mean() - half, abs=half / 4)
    assert scores["f1_high"] == pytest.approx(values.mean() + half, abs=half / 4)
