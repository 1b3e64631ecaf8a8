"""ResNets: shapes, parameters and gradients as published and as transformers has them."""

import math

import pytest
import torch
import torch.nn.functional as F

from deepseek.core.errors import ConfigError
from deepseek.models.resnet.model import ResNet, ResNetConfig
from tests.compat.torchvision_resnet import ResNet as TorchvisionResNet
from tests.models.pictures import (
    check_channels_last,
    check_export_with_any_batch,
    check_one_graph_in_training,
    find_modules_called_twice,
    noise,
    randomize,
)
from tests.models.resnet.examples import SMALL

SMALL_BASIC = SMALL.override({"block": "basic"})
DIGITS = SMALL_BASIC.override({"stem": "cifar", "in_channels": 1})


def test_a_state_dict_with_torchvisions_names_loads_strictly():
    theirs = randomize(TorchvisionResNet(8, [8, 16, 32, 64], [2, 1, 1, 1], 5))
    ours = ResNet(ResNetConfig(block="basic", depths=(2, 1, 1, 1), width=8, num_classes=5)).double().eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    pictures = noise(2, 3, 64, 64)
    torch.testing.assert_close(ours(pictures), theirs(pictures), rtol=1e-12, atol=1e-12)


def test_a_bottleneck_has_torchvisions_names_and_stride():
    model = ResNet(SMALL)
    names = {name.removeprefix("layer2.0.") for name, _ in model.named_parameters() if name.startswith("layer2.0.")}
    layers = {f"conv{n}.weight" for n in (1, 2, 3)} | {
        f"bn{n}.{each}" for n in (1, 2, 3) for each in ("weight", "bias")
    }
    assert names == layers | {"downsample.0.weight", "downsample.1.weight", "downsample.1.bias"}
    strides = [model.get_submodule(f"layer2.0.{each}").stride for each in ("conv1", "conv2", "downsample.0")]
    assert strides == [(1, 1), (2, 2), (2, 2)]


def test_small_grey_pictures_keep_their_size_through_the_stem():
    model = ResNet(DIGITS)
    seen = []
    model.layer1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 5)
    assert seen == [(2, 8, 32, 32)]


def test_digits_are_learned_by_a_few_steps_of_gradient_descent():
    torch.manual_seed(0)
    model = ResNet(DIGITS).train()
    pictures, labels = torch.randn(16, 1, 32, 32), torch.arange(16) % 5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(model(pictures), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1 and losses[-1] < 0.2


def test_convolutions_start_with_the_deviation_for_outgoing_connections():
    torch.manual_seed(0)
    model = ResNet(ResNetConfig(depths=(1, 1), width=64))
    widening, narrowing = model.layer2[0].downsample[0].weight, model.layer2[0].conv1.weight
    assert widening.std().item() == pytest.approx(math.sqrt(2 / 512), rel=0.02)
    assert narrowing.std().item() == pytest.approx(math.sqrt(2 / 128), rel=0.02)
    assert all(norm.weight.eq(1).all() for norm in (model.bn1, model.layer1[0].bn3))


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_a_zero_init_residual_makes_every_block_pass_on_its_shortcut(block):
    config = SMALL.override({"block": block})
    zeroed, usual = (ResNet(config.override({"zero_init_residual": each})).eval() for each in (True, False))
    x = torch.rand(1, zeroed.layer1[1].conv1.in_channels, 8, 8)
    torch.testing.assert_close(zeroed.layer1[1](x), x)
    assert not torch.allclose(usual.layer1[1](x), x)


@pytest.mark.parametrize("config", [SMALL, SMALL_BASIC], ids=["bottleneck", "basic"])
def test_it_exports_with_any_batch(config):
    check_export_with_any_batch(randomize(ResNet(config)), noise(2, 3, 64, 64))


def test_its_training_forward_is_one_graph():
    check_one_graph_in_training(ResNet(DIGITS).double(), noise(4, 1, 32, 32))


def test_it_runs_with_channels_last():
    check_channels_last(randomize(ResNet(SMALL)), noise(2, 3, 64, 64))


@pytest.mark.parametrize("config", [SMALL, SMALL_BASIC], ids=["bottleneck", "basic"])
def test_no_module_is_called_twice(config):
    assert find_modules_called_twice(ResNet(config), torch.zeros(2, 3, 64, 64)) == []


@pytest.mark.parametrize("depths", [(), (3, 0, 2)])
def test_a_stage_without_blocks_is_refused(depths):
    with pytest.raises(ConfigError, match="without blocks"):
        ResNetConfig(depths=depths)


def test_a_misspelt_setting_is_answered_with_the_right_one():
    with pytest.raises(ConfigError, match="num_classes"):
        ResNetConfig(num_clases=10)
