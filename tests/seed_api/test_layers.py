"""`deepseek.nn` offers all of `torch.nn` and our own layers."""

import math

import torch

import deepseek
import deepseek as ds


def test_a_network_of_deepseek_nn_layers_is_a_torch_network():
    net = deepseek.nn.Sequential(deepseek.nn.Linear(512, 256), deepseek.nn.ReLU(), deepseek.nn.LeakyReLU(0.1))
    x = torch.randn(3, 512)
    expected = (x @ net[0].weight.t() + net[0].bias).clamp(min=0)
    torch.testing.assert_close(net(x), expected)
    assert isinstance(net, torch.nn.Module)


def test_leaky_relu_leaks_a_tenth():
    assert deepseek.nn.LeakyReLU(0.1)(torch.tensor([-2.0, 3.0])).tolist() == [-0.20000000298023224, 3.0]


def test_clip_grad_norm_scales_the_gradient_to_the_norm():
    net = ds.nn.Linear(3, 1, bias=False)
    net.weight.grad = torch.tensor([[3.0, 0.0, 4.0]])
    norm = deepseek.nn.utils.clip_grad_norm_(net.parameters(), max_norm=1.0)
    assert norm.item() == 5.0
    assert math.isclose(net.weight.grad.norm().item(), 1.0, rel_tol=1e-5)
