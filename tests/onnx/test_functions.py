"""Functions of ONNX where torch means something else: types of sums, ties, ends of slices."""

import math

import pytest
import torch

from deepseek.onnx import functions

# Of 1, 2, 3 and 4.
TOTALS = {
    "total": 10,
    "mean": 2.5,
    "product": 24,
    "norm_1": 10,
    "norm_2": 30**0.5,
    "sum_of_squares": 30,
    "largest": 4,
    "smallest": 1,
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32])
@pytest.mark.parametrize("name", TOTALS)
def test_a_reduction_stays_in_the_type_of_its_input(name, dtype):
    x = torch.tensor([[1, 2], [3, 4]], dtype=dtype)
    answer = getattr(functions, name)(x, [0, 1], False)
    exact = TOTALS[name] if dtype.is_floating_point else math.trunc(TOTALS[name])
    assert answer.dtype is dtype
    assert float(answer) == pytest.approx(exact)


def test_extremes_over_nothing_are_the_ends_of_the_type():
    assert functions.largest(torch.zeros(2, 0), [1], False).tolist() == [-math.inf, -math.inf]
    assert functions.smallest(torch.zeros(0, dtype=torch.int8), [0], False).item() == 127
    assert functions.largest(torch.zeros(0, dtype=torch.bool), [0], False).item() is False


def test_exclusive_sums_keep_what_a_subtraction_would_lose():
    assert functions.cumsum(torch.tensor([1.0, math.inf, 2.0]), 0, True, False).tolist() == [0, 1, math.inf]
    small = functions.cumsum(torch.tensor([1.0, 1e9]), 0, True, False)
    assert small.tolist() == [0, 1]  # 1e9 + 1 - 1e9 is 0 in FP32
    assert functions.cumsum(torch.tensor([1, 2, 3]), 0, True, True).tolist() == [5, 3, 0]
    assert functions.cumprod(torch.tensor([2, 3, 4]), 0, True, False).tolist() == [1, 2, 6]


def test_of_equal_values_the_first_come_first():
    values, indices = functions.top_k(torch.tensor([1.0, 3, 3, 1, 3]), 4, 0, True)
    assert (values.tolist(), indices.tolist()) == ([3, 3, 3, 1], [1, 2, 4, 0])
    assert functions.top_k(torch.tensor([1, 3, 1]), 2, 0, False)[1].tolist() == [0, 2]
    ties = torch.tensor([2, 2, 1, 1])
    assert functions.arg_extreme(ties, 0, False, True, False).item() == 0
    assert functions.arg_extreme(ties, 0, False, True, True).item() == 1
    assert functions.arg_extreme(ties, 0, False, False, True).item() == 3


def test_slices_backwards_clip_both_ends():
    x = torch.arange(4)
    assert functions.cut_backwards(x, 0, -1, -(2**62), -1).tolist() == [3, 2, 1, 0]
    assert functions.cut_backwards(x, 0, -5, -8, -2).tolist() == [0]
    assert functions.cut_backwards(x, 0, 9, 1, -1).tolist() == [3, 2]


def test_a_line_of_numbers_that_leads_away_from_its_end_is_empty():
    assert functions.number_line(3, 0, 1).tolist() == []
    assert functions.number_line(3, 0, -2).tolist() == [3, 1]


@pytest.mark.parametrize("reduction", ["none", "add", "mul", "max", "min"])
def test_scattered_slices_are_combined(reduction):
    x = torch.tensor([[1.0, 2], [3, 4]])
    answer = functions.scatter_nd(x, torch.tensor([[-1]]), torch.tensor([[2.0, 5]]), reduction)
    expected = {"none": [2, 5], "add": [5, 9], "mul": [6, 20], "max": [3, 5], "min": [2, 4]}[reduction]
    assert answer.tolist() == [[1, 2], expected]


def test_blocks_of_pixels_come_back():
    x = torch.arange(2 * 8 * 2 * 3.0).reshape(2, 8, 2, 3)
    for mode in ("DCR", "CRD"):
        assert torch.equal(functions.space_to_depth(functions.depth_to_space(x, 2, mode), 2, mode), x)
