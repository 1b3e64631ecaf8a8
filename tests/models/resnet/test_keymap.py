"""ResNets of Hugging Face under torchvision's names."""

import pytest
import torch
import torch.nn.functional as F
import transformers

from deepseek.core.errors import ArtifactError, ConfigError
from deepseek.models.resnet.keymap import find_places, import_config, import_tensors
from deepseek.models.resnet.model import ResNet
from tests.models.pictures import (
    noise,
    randomize,
)
from tests.models.resnet.examples import SMALL


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
