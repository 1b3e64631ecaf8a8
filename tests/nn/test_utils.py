"""Clipping in one process, against torch's. That of models in pieces is in tests/distributed/parallel."""

import pytest
import torch
from torch import nn as torch_nn

import deepseek.nn.utils
from deepseek import nn


def build_parameters():
    generator = torch.Generator().manual_seed(0)
    parameters = [torch_nn.Parameter(torch.zeros(shape)) for shape in ((3, 2), (4,), (1,))]
    for parameter in parameters[:2]:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return parameters


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, torch.inf])
@pytest.mark.parametrize("max_norm", [0.1, 100.0])
def test_gradients_are_clipped_as_torch_clips_them(order, max_norm):
    ours, theirs = build_parameters(), build_parameters()
    norm = nn.utils.clip_grad_norm_(ours, max_norm, order)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, max_norm, order))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_one_tensor_and_none_at_all_are_taken():
    (first, *_) = build_parameters()
    assert nn.utils.clip_grad_norm_(first, 1.0) > 0
    assert nn.utils.clip_grad_norm_([], 1.0) == 0


def test_a_norm_that_is_no_number_is_an_error_where_that_is_asked_for():
    (first, *_) = build_parameters()
    first.grad.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="expected a finite number"):
        nn.utils.clip_grad_norm_(first, 1.0, error_if_nonfinite=True)
    assert nn.utils.clip_grad_norm_(first, 1.0).isnan()


def test_everything_else_is_torch():
    assert deepseek.nn.utils.parameters_to_vector is torch.nn.utils.parameters_to_vector
    assert nn.utils is deepseek.nn.utils
    with pytest.raises(AttributeError):
        _ = deepseek.nn.utils.no_such_name
