"""The table of what a manifest may name: every family is rebuilt from its settings, and named again."""

import pytest
import torch
from torch import nn

from deepseek.core.errors import ArtifactError, ConfigError
from deepseek.models import zoo
from deepseek.models.architectures import DECODER, TRANSFORMERS, list_architectures, name_architecture
from deepseek.models.text_zoo import build as build_text
from deepseek.models.weight_loading import build_without_values

SMALL = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "vocab_size": 32, "max_length": 8}


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_our_decoder_and_every_family_of_the_zoo_are_known():
    assert set(list_architectures()) == {DECODER, "resnet", "mobilenet_v3", "vit", "yolov7"}


@pytest.mark.parametrize("name", zoo.NAMES)
def test_a_model_of_the_zoo_is_rebuilt_from_its_settings_alone(name):
    model = build_without_values(lambda: zoo.build(name))
    family = name_architecture(model)
    settings = model.config.to_dict()
    rebuilt = build_without_values(lambda: list_architectures()[family].build(settings))
    assert type(rebuilt) is type(model)
    assert shapes(rebuilt) == shapes(model)
    assert name_architecture(rebuilt) == family


def test_a_decoder_is_rebuilt_from_its_settings_and_answers_with_the_same_weights():
    model = build_text("llama-135m", **SMALL, num_kv_heads=1, ffn_size=24)
    rebuilt = list_architectures()[name_architecture(model)].build(model.config.to_dict()).eval()
    rebuilt.load_state_dict(model.state_dict())
    tokens = torch.arange(6)[None]
    assert name_architecture(model) == DECODER
    assert torch.equal(rebuilt(tokens), model(tokens))


def test_a_model_of_transformers_is_named_though_no_config_of_ours_says_it():
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    assert name_architecture(build_text("bert-base", **small, vocab_size=32)) == TRANSFORMERS
    assert TRANSFORMERS not in list_architectures()


def test_a_model_that_cannot_be_rebuilt_is_refused_with_those_that_can():
    with pytest.raises(ArtifactError, match=r"decoder, .*transformers and was given a Linear; pass one of them"):
        name_architecture(nn.Linear(1, 1))


def test_an_unknown_architecture_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown architecture 'resnt'.*'resnet'"):
        list_architectures()["resnt"]


def test_a_setting_that_the_architecture_does_not_have_is_refused():
    with pytest.raises(ConfigError, match="num_layer"):
        list_architectures()[DECODER].build(SMALL | {"num_layer": 2})
