import math

import pytest
import torch
import torch.nn.functional as F
import transformers

from deepseek.core.errors import ArtifactError, ConfigError
from deepseek.models.resnet.keymap import find_places, import_config, import_tensors
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

SMALL = ResNetConfig(depths=(2, 1, 1), width=8, num_classes=5)
SMALL_BASIC = SMALL.override({"block": "basic"})
DIGITS = SMALL_BASIC.override({"stem": "cifar", "in_channels": 1})


def build_theirs(layer_type, depths, width, num_classes):
    expansion = 4 if layer_type == "bottleneck" else 1
    config = transformers.ResNetConfig(
        layer_type=layer_type,
        depths=list(depths),
        embedding_size=width,
        hidden_sizes=[width * expansion * 2**stage for stage in range(len(depths))],
        num_labels=num_classes,
    )
    return randomize(transformers.ResNetForImageClassification(config))


@pytest.mark.parametrize(
    ("layer_type", "depths", "width"),
    [("bottleneck", (2, 1, 1), 8), ("basic", (2, 2), 8), ("bottleneck", (3, 4, 6, 3), 64)],
    ids=["bottleneck", "basic", "resnet50"],
)
def test_it_computes_what_transformers_computes_from_the_same_weights(layer_type, depths, width):
    theirs = build_theirs(layer_type, depths, width, num_classes=7)
    config = import_config(theirs.config.to_dict())
    ours = ResNet(config).double().eval()
    ours.load_state_dict(import_tensors(theirs.state_dict(), config))
    pictures = noise(2, 3, 64, 96)
    with torch.inference_mode():
        expected = theirs(pictures).logits
        torch.testing.assert_close(ours(pictures), expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())


def test_gradients_are_those_of_transformers_in_training_mode():
    theirs = build_theirs("bottleneck", (1, 2), 8, num_classes=3).train()
    config = import_config(theirs.config.to_dict())
    ours = ResNet(config).double().train()
    ours.load_state_dict(import_tensors(theirs.state_dict(), config))
    pictures, labels = noise(4, 3, 32, 32), torch.tensor([0, 1, 2, 1])
    F.cross_entropy(theirs(pictures).logits, labels).backward()
    F.cross_entropy(ours(pictures), labels).backward()
    expected = import_tensors({name: each.grad for name, each in theirs.named_parameters()}, config)
    assert expected.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-8, atol=1e-10)


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
    weight = model.layer2[0].conv2.weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (128 * 9)), rel=0.02)
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


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"downsample_in_bottleneck": True}, "downsample_in_bottleneck"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": "regnet"}, "model_type"),
        ({"hidden_sizes": [256, 512, 1024, 1024]}, "hidden_sizes"),
    ],
)
def test_a_model_of_transformers_that_ours_cannot_follow_is_refused_by_name(change, named):
    with pytest.raises(ConfigError, match=named):
        import_config(transformers.ResNetConfig().to_dict() | change)


def test_a_tensor_without_a_place_is_refused():
    with pytest.raises(ArtifactError, match=r"stages\.9"):
        import_tensors({"resnet.encoder.stages.9.layers.0.shortcut.convolution.weight": torch.zeros(1)}, SMALL)


def test_every_module_with_weights_has_a_place_at_hugging_face():
    modules = {name.rpartition(".")[0] for name in ResNet(SMALL).state_dict()}
    assert modules <= set(find_places(SMALL).values())
