"""How near answers are: compared with formulas in NumPy, over every output and batch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.compiler.runtimes.accuracy import compare
from deepseek.compiler.runtimes.backends.interface import BackendError
from deepseek.compiler.runtimes.selection_policy import Tolerance

TOLERANCE = Tolerance(relative_error=0.1, cosine=0.9, agreement=1.0)


@settings(deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0.01, 3.0))
def test_error_and_cosine_are_those_of_the_formulas(seed, scale):
    random = np.random.default_rng(seed)
    expected, noise = random.standard_normal((4, 5, 2)), random.standard_normal((4, 5, 2))
    given_ = expected + scale * noise
    numbers = compare([torch.from_numpy(expected)], [torch.from_numpy(given_)], TOLERANCE)
    assert numbers.relative_error == pytest.approx(np.linalg.norm(scale * noise) / np.linalg.norm(expected))
    cosine = (expected * given_).sum() / np.linalg.norm(expected) / np.linalg.norm(given_)
    assert numbers.cosine == pytest.approx(cosine)
    assert numbers.agreement is None  # these are no rows of scores


def test_the_worst_output_counts():
    right, wrong = torch.ones(2, 3, 1), torch.full((2, 3, 1), 1.5)
    numbers = compare([right, right], [right, wrong], TOLERANCE)
    assert numbers.relative_error == pytest.approx(0.5)


def test_rows_that_an_allowed_error_could_flip_do_not_count_in_the_agreement():
    expected = torch.tensor([[1.0, 0.0, -1.0], [0.01, 0.0, -1.0]])
    flipped = torch.tensor([[1.0, 0.0, -1.0], [0.0, 0.01, -1.0]])
    numbers = compare([expected], [flipped], TOLERANCE)
    assert numbers.agreement == 1.0 and numbers.raw_agreement == 0.5


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_an_answer_that_is_no_number_is_not_finite(odd):
    numbers = compare([torch.ones(2, 2)], [torch.tensor([[1.0, odd], [1.0, 1.0]])], TOLERANCE)
    assert not numbers.is_finite and numbers.relative_error == math.inf


def test_answers_of_another_shape_are_refused_with_both():
    with pytest.raises(BackendError, match=r"shapes \[\(3, 2\)\] instead of \[\(2, 3\)\]"):
        compare([torch.ones(2, 3)], [torch.ones(3, 2)], TOLERANCE)
