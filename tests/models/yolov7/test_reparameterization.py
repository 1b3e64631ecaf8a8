"""A folded network answers as before."""

import copy

import pytest
import torch
from torch import nn
from torch.export import Dim, export

from deepseek.core.errors import ConfigError
from deepseek.models.yolov7.model import (
    RepConv,
    YOLOv7,
)
from deepseek.models.yolov7.reparameterization import fold_
from deepseek.models.zoo import settle_
from tests.models.pictures import (
    noise,
    randomize,
)
from tests.models.yolov7.examples import SMALL, TINY


def test_a_folded_network_answers_the_same_with_fewer_parameters(model):
    folded = fold_(copy.deepcopy(model))
    pictures = noise(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(folded(pictures), model(pictures), rtol=1e-10, atol=1e-10)
    assert not any(isinstance(each, nn.BatchNorm2d) for each in folded.modules())
    assert not any("implicit" in name or "rbr_1x1" in name for name in folded.state_dict())
    assert folded.config.is_folded and not model.config.is_folded


def test_a_folded_tiny_network_answers_the_same():
    network = settle_(randomize(YOLOv7(TINY)), noise(16, 3, 64, 64, seed=3))
    pictures = noise(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(fold_(copy.deepcopy(network))(pictures), network(pictures), rtol=1e-10, atol=1e-10)


def test_a_folded_network_in_float32_is_off_by_rounding_only(model):
    single = copy.deepcopy(model).float()
    pictures = noise(1, 3, 64, 64).float()
    with torch.inference_mode():
        before, after, exact = single(pictures), fold_(copy.deepcopy(single))(pictures), model(pictures.double())
    error_before, error_after = ((each - exact).abs().max().item() for each in (before, after))
    assert error_after < 10 * error_before + 1e-6


def test_a_repconv_with_an_identity_folds_into_one_convolution():
    layer, x = randomize(RepConv(SMALL, 8, 8)), noise(2, 8, 7, 6)
    expected = layer(x)
    whole = YOLOv7(SMALL).double().eval()
    whole.model[102] = layer
    fold_(whole)
    assert set(layer.state_dict()) == {"rbr_reparam.weight", "rbr_reparam.bias"}
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_stored_folded_weights_load_into_a_network_built_folded(model):
    stored = fold_(copy.deepcopy(model)).state_dict()
    loaded = YOLOv7(SMALL.override({"is_folded": True})).double().eval()
    loaded.load_state_dict(stored)
    pictures = noise(1, 3, 64, 64)
    torch.testing.assert_close(loaded(pictures), model(pictures), rtol=1e-10, atol=1e-10)


def test_folding_twice_changes_nothing_more(model):
    folded = fold_(copy.deepcopy(model))
    before = {name: each.clone() for name, each in folded.state_dict().items()}
    torch.testing.assert_close(dict(fold_(folded).state_dict()), before, rtol=0, atol=0)


def test_folding_keeps_channels_last(model):
    folded = fold_(copy.deepcopy(model).to(memory_format=torch.channels_last))
    weight = folded.model[6].conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def test_a_network_in_training_is_not_folded():
    with pytest.raises(ConfigError, match="eval"):
        fold_(YOLOv7(SMALL).train())


def test_it_exports_folded_with_any_size(model):
    folded = fold_(copy.deepcopy(model))
    sizes = {0: Dim("batch", max=16), 2: 32 * Dim("rows", max=40), 3: 32 * Dim("columns", max=40)}
    program = export(folded, (noise(2, 3, 64, 96),), dynamic_shapes=(sizes,), strict=False).module()
    pictures = noise(1, 3, 96, 64)
    torch.testing.assert_close(program(pictures), folded(pictures))
