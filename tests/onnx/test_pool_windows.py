"""Windows of a pooling by hand, and against torch where torch pools the same way."""

import pytest
import torch
import torch.nn.functional as F

from deepseek.onnx.pool_windows import PoolWindow, average_pool, lp_norm, lp_pool, max_pool


def window(kernel, *, strides=None, dilations=None, before=0, after=0, same="", is_ceil=False):
    ones = (1,) * len(kernel)
    pads = [(pad,) * len(kernel) if isinstance(pad, int) else pad for pad in (before, after)]
    return PoolWindow(kernel, strides or ones, dilations or ones, *pads, same, is_ceil)


def test_no_window_lies_in_the_padding_alone():
    """3 x 3 windows at stride 3 over 6 x 6 with one more row and column at the end: two windows, not three."""
    x = torch.arange(36.0).reshape(1, 1, 6, 6)
    windows = window((3, 3), strides=(3, 3), after=1, is_ceil=True)
    assert max_pool(x, windows)[0, 0].tolist() == [[14, 17], [32, 35]]
    assert average_pool(x, windows, False)[0, 0].tolist() == [[7, 10], [25, 28]]


def test_what_ceil_mode_adds_is_never_counted_and_padding_is_where_asked_for():
    x = torch.ones(1, 1, 5)
    windows = window((3,), strides=(2,), before=1, after=1, is_ceil=False)
    assert average_pool(x, windows, False).tolist() == [[[1, 1, 1]]]
    torch.testing.assert_close(average_pool(x, windows, True), torch.tensor([[[2 / 3, 1, 2 / 3]]]))
    wide = window((3,), strides=(3,), is_ceil=True)
    assert average_pool(x, wide, True).tolist() == [[[1, 1]]]  # the second window holds two numbers


@pytest.mark.parametrize("is_ceil", [False, True])
@pytest.mark.parametrize("length", [6, 7, 8])
def test_windows_that_torch_has_are_pooled_as_torch_does(length, is_ceil):
    x = torch.randn(2, 3, length, length + 1, generator=torch.Generator().manual_seed(length))
    windows = window((3, 2), strides=(2, 2), before=1, after=1, is_ceil=is_ceil)
    ours, theirs = max_pool(x, windows), F.max_pool2d(x, (3, 2), 2, 1, ceil_mode=is_ceil)
    assert torch.equal(ours, theirs)
    for counts in (False, True):
        ours = average_pool(x, windows, counts)
        torch.testing.assert_close(ours, F.avg_pool2d(x, (3, 2), 2, 1, is_ceil, counts))


def test_same_padding_puts_the_odd_one_where_the_name_says():
    x = torch.arange(1.0, 5.0).reshape(1, 1, 4)
    assert max_pool(x, window((2,), strides=(1,), same="SAME_UPPER")).tolist() == [[[2, 3, 4, 4]]]
    assert max_pool(x, window((2,), strides=(1,), same="SAME_LOWER")).tolist() == [[[1, 2, 3, 4]]]


@pytest.mark.parametrize(("same", "even"), [("SAME_UPPER", [2, 5]), ("SAME_LOWER", [1, 4])])
def test_strides_beyond_the_window_leave_values_out_at_the_ends(same, even):
    """Padding is (ceil(length / stride) - 1) * stride + kernel - length, here -2 and -1."""
    windows = window((1,), strides=(3,), same=same)
    for pool in (
        max_pool,
        lambda x, windows: average_pool(x, windows, False),
        lambda x, windows: lp_pool(x, windows, 2),
    ):
        assert pool(torch.arange(1.0, 7.0).reshape(1, 1, 6), windows).tolist() == [[even]]
        assert pool(torch.arange(1.0, 6.0).reshape(1, 1, 5), windows).tolist() == [[[1, 4]]]


def test_gaps_in_windows_are_left_out():
    x = torch.arange(5.0).reshape(1, 1, 5)
    windows = window((2,), dilations=(3,))
    assert max_pool(x, windows).tolist() == [[[3, 4]]]
    assert average_pool(x, windows, False).tolist() == [[[1.5, 2.5]]]


def test_norms_of_windows():
    x = torch.tensor([[[3.0, -4.0, 0.0, 1.0]]])
    assert lp_pool(x, window((2,), strides=(2,)), 2).tolist() == [[[5, 1]]]
    assert lp_norm(x, [2], 1).tolist() == [[[8]]]


def test_whole_numbers_are_pooled_as_such():
    x = torch.tensor([[[-3, -7, -5]]], dtype=torch.int8)
    assert max_pool(x, window((2,), before=(1,), after=(0,))).tolist() == [[[-3, -3, -5]]]
