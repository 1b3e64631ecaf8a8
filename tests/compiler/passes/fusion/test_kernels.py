"""Convolutions take the addition and the activation behind them along, where operators run one by one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.compiler.passes.fusion.fused_models import ACTIVATIONS, IMAGES, Residual, check

# torch warns about itself when it decomposes an exported graph.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_convolution_norm_and_activation_become_one_operator(activation):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), activation)
    fired = ["convolution + batch norm", "convolution + activation"]
    report = check(model, (torch.randn(IMAGES),), num_operators=1, fired=fired)
    assert report.num_operators_before == 3
    assert all(0 < each.max_error < 1e-5 for each in report.fusions)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_residual_block_is_one_operator(in_place):
    fired = ["convolution + batch norm", "convolution + add + activation"]
    check(Residual(nn.ReLU(), in_place=in_place), (torch.randn(IMAGES),), num_operators=1, fired=fired)


def test_an_activation_that_the_addition_kernel_lacks_stays():
    fired = ["convolution + batch norm", "convolution + add + activation"]
    check(Residual(nn.Hardswish()), (torch.randn(IMAGES),), num_operators=2, fired=fired)


def test_both_terms_of_a_residual_may_be_convolutions():
    class Downsampling(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)

        def forward(self, x):
            shortcut = self.two(x)
            shortcut += self.one(x)
            return F.relu(shortcut)

    fired = ["convolution + add + activation", "convolution, weights laid out"]
    check(Downsampling(), (torch.randn(IMAGES),), num_operators=2, fired=fired)


def test_what_a_code_generator_fuses_is_left_to_it_and_said():
    fired = ["convolution + batch norm"]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    report = check(model, (torch.randn(IMAGES),), num_operators=2, fired=fired, kernels="inductor")
    (rejection,) = report.rejections
    assert rejection.rule == "convolution + activation"
    assert "code generator" in rejection.reason
