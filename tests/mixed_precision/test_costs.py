import pytest
import torch
from torch import nn

from deepseek.mixed_precision import costs
from deepseek.mixed_precision.costs import assume_saving, measure_saving

BF16 = torch.bfloat16


def test_bytes_are_those_of_the_input_and_the_result_less_the_narrow_weight():
    saving = measure_saving(nn.Linear(64, 32), (128, 64), BF16)
    assert saving.num_bytes == (128 * 64 + 128 * 32) * (4 - 2) - 64 * 32 * 2 and saving.is_measured
    picture = measure_saving(nn.Conv2d(3, 8, 3), (2, 3, 10, 10), BF16)
    assert picture.num_bytes == (2 * 3 * 100 + 2 * 8 * 64) * (4 - 2) - 8 * 3 * 9 * 2


@pytest.mark.parametrize(
    ("wide_s", "low_s", "expected_s"),
    [
        (4.0, 1.0, 3.0),
        (1.0, 4.0, -3.0),  # 16 bits may cost
        (4.0, 3.9, 0.0),  # within the noise
    ],
)
def test_seconds_are_those_that_the_layer_takes_in_one_precision_and_the_other(monkeypatch, wide_s, low_s, expected_s):
    """The layer itself moves the clock, by what its matmul ran in."""
    now_s = 0.0

    class Timed(nn.Linear):
        def forward(self, x):
            nonlocal now_s
            y = super().forward(x)
            now_s += {torch.float32: wide_s, BF16: low_s}[y.dtype]
            return y

    monkeypatch.setattr(costs.time, "perf_counter", lambda: now_s)
    assert measure_saving(Timed(8, 8), (4, 8), BF16).seconds == pytest.approx(expected_s)


def test_measuring_leaves_no_trace():
    layer = nn.Linear(8, 8)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    measure_saving(layer, (4, 8), BF16)
    assert torch.equal(torch.rand(1), expected)
    assert layer.weight.grad is None and layer.weight.dtype == torch.float32


def test_a_layer_that_takes_more_than_one_tensor_is_assumed_and_says_so():
    layer = nn.Bilinear(4, 4, 2)
    assert measure_saving(layer, (3, 4), BF16) is None
    saving = assume_saving(layer, (3, 4))
    assert saving.seconds > 0 and saving.num_bytes == 2 * 12 and not saving.is_measured
