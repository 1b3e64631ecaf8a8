"""The text models have the shapes that were published: their parameters are counted, and small ones are run."""

import pytest
import torch

from deepseek.core.errors import ConfigError
from deepseek.models import text_zoo
from deepseek.models.decoder.model import Decoder, DecoderConfig
from deepseek.models.transformers_models.model import build_transformers
from deepseek.models.weight_loading import build_without_values

# As counted by the models' own pages and by transformers, tied weights once.
PUBLISHED = {
    "bert-base": 109_482_240,
    "bert-large": 335_141_888,
    "gpt2": 124_439_808,
    "t5-small": 60_506_624,
    "llama-135m": 134_515_008,
    "llama-360m": 361_821_120,
    "llama-1.1b": 1_100_048_384,
    "llama-7b": 6_738_415_616,
    "llama-8b": 8_030_261_248,
    "llama-13b": 13_015_864_320,
    "llama-70b": 68_976_648_192,
}
SMALL_BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
SMALL_LLAMA = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "num_kv_heads": 1, "ffn_size": 24, "vocab_size": 32}


def build_shape(name):
    config = text_zoo.configure(name)
    is_ours = isinstance(config, DecoderConfig)
    return build_without_values(lambda: Decoder(config) if is_ours else build_transformers(config))


@pytest.mark.parametrize("name", text_zoo.NAMES)
def test_a_model_has_the_published_number_of_parameters(name):
    assert sum(parameter.numel() for parameter in build_shape(name).parameters()) == PUBLISHED[name]


def test_overrides_change_the_shape_and_models_are_built_for_inference():
    model = text_zoo.build("llama-7b", **SMALL_LLAMA)
    assert not model.training
    assert model.config == text_zoo.MODELS["llama-7b"].override(SMALL_LLAMA)
    assert model.config.max_length == 4096
    bert = text_zoo.build("bert-base", **SMALL_BERT, vocab_size=64)
    assert not bert.training
    assert {tuple(weight.shape) for name, weight in bert.state_dict().items() if "word_embeddings" in name} == {
        (64, 16)
    }


def test_an_unknown_name_and_an_unknown_setting_are_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown model 'gtp2'.*'gpt2'"):
        text_zoo.build("gtp2")
    with pytest.raises(ConfigError, match=r"unknown setting of bert 'hiden_size'.*'hidden_size'"):
        text_zoo.build("bert-base", hiden_size=16)
    with pytest.raises(ConfigError, match="hiden_size"):
        text_zoo.build("gpt2", hiden_size=16)


def test_a_model_larger_than_the_memory_is_refused_with_its_size_before_it_is_built(monkeypatch):
    monkeypatch.setattr(text_zoo, "describe_machine", lambda: {"memory_bytes": 16e9})
    with pytest.raises(ConfigError, match="llama-70b has 276 GB of weights in fp32 and this machine has 16 GB"):
        text_zoo.build("llama-70b")
    monkeypatch.setattr(text_zoo, "describe_machine", lambda: {"memory_bytes": 1})
    with pytest.raises(ConfigError, match="lower num_layers by overrides"):
        text_zoo.build("llama-7b", **SMALL_LLAMA)


def test_drawn_tokens_fit_the_model_and_are_the_same_in_every_call():
    model = text_zoo.build("llama-7b", **SMALL_LLAMA, max_length=8)
    (tokens_BT,) = text_zoo.draw_tokens(model, 3, 100)
    assert tokens_BT.shape == (3, 8)
    assert 0 <= int(tokens_BT.min()) < int(tokens_BT.max()) < 32
    assert torch.equal(tokens_BT, text_zoo.draw_tokens(model, 3, 100)[0])
    assert model(tokens_BT).shape == (3, 8, 32)
    bert = text_zoo.build("bert-base", **SMALL_BERT, vocab_size=64)
    drawn = text_zoo.draw_tokens(bert, 2, 5)
    assert drawn[0].shape == (2, 5)
    with torch.no_grad():
        bert(*drawn)
