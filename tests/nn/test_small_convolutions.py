"""Results and gradients are those of torch's layers in float64, and nothing else of a model changes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.models import zoo
from deepseek.nn.small_convolutions import (
    DepthwiseConv2d,
    GatheredConv2d,
    PointwiseConv2d,
    _Depthwise,
    speed_up_convolutions_,
)

LAYERS = {
    "1x1": (lambda: nn.Conv2d(6, 10, 1), 6, PointwiseConv2d),
    "1x1 without bias": (lambda: nn.Conv2d(6, 10, 1, bias=False), 6, PointwiseConv2d),
    "1x1, stride 2": (lambda: nn.Conv2d(4, 8, 1, 2, bias=False), 4, PointwiseConv2d),
    "3x3": (lambda: nn.Conv2d(6, 10, 3, padding=1), 6, GatheredConv2d),
    "3x3, stride 2": (lambda: nn.Conv2d(6, 10, 3, 2, padding=1, bias=False), 6, GatheredConv2d),
    "5x5, padding 3": (lambda: nn.Conv2d(6, 10, 5, 2, padding=3), 6, GatheredConv2d),
    "depthwise": (lambda: nn.Conv2d(6, 6, 5, padding=2, groups=6), 6, DepthwiseConv2d),
    "depthwise, stride 2": (lambda: nn.Conv2d(6, 6, 5, 2, padding=2, groups=6, bias=False), 6, DepthwiseConv2d),
    "depthwise, 3x3": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), 6, DepthwiseConv2d),
}


def differentiate(layer: nn.Module, images_BCHW: Tensor) -> list[Tensor]:
    """The outputs, and the gradient of a weighted sum of them by the image and each parameter."""
    inputs_BCHW = images_BCHW.clone().requires_grad_()
    outputs_BCHW = layer(inputs_BCHW)
    weights = torch.arange(outputs_BCHW.numel(), dtype=outputs_BCHW.dtype).view_as(outputs_BCHW).cos()
    gradients = torch.autograd.grad((outputs_BCHW * weights).sum(), [inputs_BCHW, *layer.parameters()])
    return [outputs_BCHW.detach(), *gradients]


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (4, 4), (2, 3), (7, 5)])
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_are_those_of_torch_in_float64(
    name: str, size: tuple[int, int], memory_format: torch.memory_format
) -> None:
    build, num_channels, expected_class = LAYERS[name]
    torch.manual_seed(0)
    layer = build()
    exact = copy.deepcopy(layer).double()
    assert speed_up_convolutions_(layer) == 1 and type(layer) is expected_class
    layer.to(memory_format=memory_format)
    images_BCHW = torch.randn(3, num_channels, *size)
    found = differentiate(layer, images_BCHW.to(memory_format=memory_format))
    for value, reference in zip(found, differentiate(exact, images_BCHW.double()), strict=True):
        torch.testing.assert_close(value.double(), reference, rtol=1e-4, atol=1e-5)


def test_the_ways_of_its_own_are_taken_on_small_images_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    linear, apply = F.linear, _Depthwise.apply
    monkeypatch.setattr(F, "linear", lambda *inputs: calls.append("matmul") or linear(*inputs))
    monkeypatch.setattr(_Depthwise, "apply", lambda *inputs: calls.append("taps") or apply(*inputs))
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 5, padding=2, groups=4), nn.Conv2d(4, 4, 3, padding=1))
    speed_up_convolutions_(model)
    model(torch.zeros(1, 4, 8, 8))
    with torch.no_grad():
        model(torch.zeros(1, 4, 2, 2))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.zeros(1, 4, 2, 2))
    model.eval()(torch.zeros(1, 4, 2, 2))
    assert calls == []
    model.train()(torch.zeros(1, 4, 2, 2))
    assert calls == ["matmul", "taps", "matmul"]


def test_other_convolutions_stay_as_they_are() -> None:
    others = [
        nn.Conv2d(4, 8, 1, padding=1),
        nn.Conv2d(4, 8, 3, stride=(1, 2)),
        nn.Conv2d(4, 8, 1, groups=2),
        nn.Conv2d(4, 8, 3, groups=4),
        nn.Conv2d(4, 4, 3, padding="same", groups=4),
        nn.Conv2d(4, 4, (5, 3), groups=4),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4),
        nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="reflect"),
    ]
    assert speed_up_convolutions_(nn.ModuleList(others)) == 0
    assert {type(layer) for layer in others} == {nn.Conv2d}


@pytest.mark.parametrize(("name", "num_changed"), [("mobilenet_v3_small", 52), ("resnet18", 20)])
def test_a_model_learns_as_before_under_the_same_names(name: str, num_changed: int) -> None:
    torch.manual_seed(0)
    plain = zoo.build(name, num_classes=3, **({"width": 8} if name == "resnet18" else {"dropout": 0.0})).train()
    fast = copy.deepcopy(plain)
    assert speed_up_convolutions_(fast) == num_changed
    assert list(fast.state_dict()) == list(plain.state_dict())
    images_BCHW, targets_B = torch.randn(8, 3, 64, 64), torch.arange(8) % 3
    for model in (plain, fast):
        F.cross_entropy(model(images_BCHW), targets_B).backward()
    for own, reference in zip(fast.parameters(), plain.parameters(), strict=True):
        assert (own.grad - reference.grad).norm() <= 1e-3 * reference.grad.norm() + 1e-6
    assert [type(module) for module in copy.deepcopy(fast).modules()] == [type(module) for module in fast.modules()]
