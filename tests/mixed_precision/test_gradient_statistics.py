import math

import pytest
import torch
from torch import nn

from deepseek.mixed_precision.gradient_statistics import Watch, count_exponents, extreme, sample_gradient, stride_over
from deepseek.mixed_precision.policy import LOWEST_EXPONENT


def test_exponents_are_counted_as_python_counts_them():
    values = [0.0, 1.0, -1.5, 2.0, 1e-30, 3e38, 2.0**-149, math.inf, math.nan, -0.0]
    row = count_exponents(torch.tensor(values)).tolist()
    expected = [0] * 258
    for value in values:
        if value == 0:
            expected[256] += 1
        elif not math.isfinite(value):
            expected[257] += 1
        else:
            expected[max(math.floor(math.log2(abs(value))) - LOWEST_EXPONENT, 0)] += 1
    assert row == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_is_counted(dtype):
    row = count_exponents(torch.tensor([0.5, 1.0, 4.0], dtype=dtype))
    assert [row[exponent - LOWEST_EXPONENT].item() for exponent in (-1, 0, 2)] == [1, 1, 1]


@pytest.mark.parametrize("size", [1, 100, 4096, 4097, 100_000, 1 << 20])
def test_a_sample_is_small_even_and_the_same_each_time(size):
    values = torch.arange(size)
    sample = stride_over(values, 4096)
    assert 0 < len(sample) <= 4096 and torch.equal(sample, stride_over(values, 4096))
    assert len(set(sample.diff().tolist())) <= 1
    assert sample[-1] > 0.9 * size - 2


def test_columns_of_a_matrix_are_all_looked_at():
    columns = (torch.arange(1 << 20) % 256)[None]
    assert len(stride_over(columns, 4096).unique()) == 256


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_one_bad_value_among_many_is_seen(bad):
    values = torch.zeros(100_000)
    values[77_777] = bad
    assert not math.isfinite(extreme(values).item())
    assert extreme(torch.tensor([-3.0, 2.0])).item() == 3.0


def test_a_watch_sees_inputs_outputs_and_gradients_and_leaves_nothing_behind():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    watch = Watch({"first": model[0], "last": model[2]})
    (model(torch.full((3, 4), 8.0)) * 2.0**-20).sum().backward()
    first, last = watch.samples["first"], watch.samples["last"]
    assert first.input_shape == (3, 4) and first.input_extremes[0].item() == 8.0
    assert last.gradients[0][-20 - LOWEST_EXPONENT].item() == 6
    assert (last.gradient_order, first.gradient_order) == (0, 1)
    watch.close()
    assert not model[0]._forward_hooks and not model[2]._forward_hooks


def test_a_weight_without_a_gradient_has_no_sample():
    layer = nn.Linear(2, 2)
    assert sample_gradient(layer.weight) is None
    layer.weight.grad = torch.ones(2, 2, dtype=torch.float32)
    assert sample_gradient(layer.weight).tolist() == [1.0] * 4
