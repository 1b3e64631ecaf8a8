"""Vision transformers: numbers as in NumPy and as published."""

import pytest
import torch

from deepseek.core.errors import ConfigError
from deepseek.models.vit.model import ViT
from tests.models.pictures import (
    check_channels_last,
    check_export_with_any_batch,
    check_one_graph_in_training,
    find_modules_called_twice,
    noise,
    randomize,
)
from tests.models.vit.examples import SMALL


def test_the_state_dict_has_torchvisions_names():
    model = ViT(SMALL)
    layer = "encoder.layers.encoder_layer_{}."
    pairs = ("ln_1", "self_attention.out_proj", "ln_2", "mlp.0", "mlp.3")
    expected = {"class_token", "encoder.pos_embedding"}
    expected |= {f"{each}.{part}" for each in ("conv_proj", "encoder.ln", "heads.head") for part in ("weight", "bias")}
    for index in (0, 1):
        expected |= {f"{layer.format(index)}{each}.{part}" for each in pairs for part in ("weight", "bias")}
        expected |= {f"{layer.format(index)}self_attention.in_proj_{part}" for part in ("weight", "bias")}
    assert set(model.state_dict()) == expected


def test_attention_is_that_of_torchs_multi_head_layer_which_has_the_same_names():
    ours = randomize(ViT(SMALL)).encoder.layers[0].self_attention
    theirs = torch.nn.MultiheadAttention(24, 3, batch_first=True).double()
    theirs.load_state_dict(ours.state_dict())
    x = noise(2, 7, 24)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0], rtol=1e-12, atol=1e-12)


def test_dropout_happens_in_training_only():
    model = ViT(SMALL.override({"dropout": 0.5, "attention_dropout": 0.5}))
    pictures = torch.rand(1, 3, 32, 32)
    assert not torch.equal(model.train()(pictures), model(pictures))
    assert torch.equal(model.eval()(pictures), model(pictures))


def test_it_exports_with_any_batch():
    check_export_with_any_batch(randomize(ViT(SMALL)), noise(2, 3, 32, 32))


def test_its_training_forward_is_one_graph():
    check_one_graph_in_training(ViT(SMALL).double(), noise(4, 3, 32, 32))


def test_it_runs_with_channels_last():
    check_channels_last(randomize(ViT(SMALL)), noise(2, 3, 32, 32))


def test_no_module_is_called_twice():
    assert find_modules_called_twice(ViT(SMALL), torch.zeros(2, 3, 32, 32)) == []


def test_a_picture_of_another_size_is_refused():
    with pytest.raises(ConfigError, match="resize"):
        ViT(SMALL)(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("change", [{"num_heads": 5}, {"patch_size": 7}])
def test_a_shape_that_does_not_divide_is_refused_with_those_that_do(change):
    with pytest.raises(ConfigError, match="choose one of"):
        SMALL.override(change)
