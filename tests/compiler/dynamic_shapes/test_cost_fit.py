"""Fits against known coefficients, and against the conditions that the best fit without negative coefficients meets."""

import math
import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.compiler.dynamic_shapes.buckets import Cost
from deepseek.compiler.dynamic_shapes.cost_fit import fit_cost


def test_a_fit_finds_the_coefficients_that_made_the_times():
    true = Cost(overhead=2e-3, token=3e-6, pair=4e-9)
    generator = random.Random(0)
    samples = []
    for _ in range(200):
        rows, length = generator.randint(1, 16), generator.randint(4, 512)
        samples.append((rows, length, true(rows, length) * generator.uniform(0.99, 1.01)))
    fit = fit_cost(samples)
    assert math.isclose(fit.overhead, true.overhead, rel_tol=0.05)
    assert math.isclose(fit.token, true.token, rel_tol=0.05)
    assert math.isclose(fit.pair, true.pair, rel_tol=0.2)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 99), st.floats(1e-6, 1)), min_size=3, max_size=12))
def test_a_fit_never_falls_with_size(samples):
    fit = fit_cost(samples)
    assert fit is None or min(fit.overhead, fit.token, fit.pair) >= 0


def test_one_size_fits_nothing():
    assert fit_cost([(4, 8, 1.0)] * 50) is None


def test_times_of_zero_fit_nothing():
    assert fit_cost([(1, 8, 0.0), (2, 8, 0.0), (1, 16, 0.0)]) is None


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(1, 99), st.floats(0.8, 1.25)), min_size=4, max_size=12),
    st.sampled_from([(1e-3, 1e-6, 0.0), (0.0, 2e-6, 1e-8), (5e-4, 0.0, 3e-8)]),
)
def test_no_fit_without_negative_coefficients_is_better(sizes, coefficients):
    """The conditions of Karush, Kuhn and Tucker: the error is flat along each coefficient, and rises off the bound."""
    true = Cost(*coefficients)
    samples = [(rows, length, true(rows, length) * noise) for rows, length, noise in sizes]
    fit = fit_cost(samples)
    if fit is None or any(seconds > 2 * fit(rows, length) for rows, length, seconds in samples):
        return
    terms = np.array([[1 / s, rows * length / s, rows * length**2 / s] for rows, length, s in samples])
    solution = np.array([fit.overhead, fit.token, fit.pair])
    if not np.all(np.linalg.svd(terms / np.linalg.norm(terms, axis=0), compute_uv=False) > 1e-3):
        return
    slope = terms.T @ (terms @ solution - 1) / np.linalg.norm(terms, axis=0)
    assert np.all(slope > -1e-6)
    assert np.all(np.abs(slope[solution > 0]) < 1e-6)


def test_times_that_something_else_lengthened_do_not_count():
    true = Cost(overhead=1e-3, token=1e-6, pair=0.0)
    sizes = [(rows, length) for rows in (1, 2, 4, 8) for length in (16, 64, 256)]
    samples = [(rows, length, true(rows, length)) for rows, length in sizes]
    samples += [(2, 64, 30 * true(2, 64)), (8, 16, 50 * true(8, 16))]
    fit = fit_cost(samples)
    assert math.isclose(fit.overhead, true.overhead, rel_tol=1e-3)
    assert math.isclose(fit.token, true.token, rel_tol=1e-2)
