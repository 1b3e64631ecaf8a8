"""Each recipe is the run that its docstring claims."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest
import torch

from deepseek.core.errors import ConfigError
from deepseek.data.config import DataConfig
from deepseek.models import zoo
from deepseek.models.decoder.model import Decoder
from deepseek.recipes import RECIPES, load_recipe
from deepseek.train.config import TrainConfig

DECODERS = [name for name in RECIPES if load_recipe(name).init is None]


def count_by_formula(config: TrainConfig) -> int:
    """Parameters of a decoder with tied embeddings, RMS norms and no biases, from its shape alone."""
    model = config.model
    assert (model.tie_embeddings, model.norm, model.position) == (True, "rms", "rotary")
    hidden, head = model.hidden_size, model.hidden_size // model.num_heads
    attention = hidden * head * (2 * model.num_heads + 2 * (model.num_kv_heads or model.num_heads))
    if model.moe:
        feedforward = model.moe.num_experts * (3 * hidden * model.moe.ffn_size + hidden)
    else:
        feedforward = 3 * hidden * model.ffn_size
    gates = 0
    if model.mask and model.mask.is_dynamic:
        gates = sum(
            model.mask.num_local_heads(model.num_heads, layer) * (hidden + 1) for layer in range(model.num_layers)
        )
    return model.vocab_size * hidden + model.num_layers * (attention + feedforward + 2 * hidden) + hidden + gates


@pytest.mark.parametrize("name", DECODERS)
def test_the_model_has_the_parameters_that_the_docstring_claims(name: str) -> None:
    config = load_recipe(name)
    with torch.device("meta"):
        model = Decoder(config.model)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert num_parameters == count_by_formula(config)
    function = getattr(importlib.import_module(f"deepseek.recipes.{name}"), name)
    for text in (inspect.getdoc(function) or "", RECIPES[name]):
        claimed = re.search(r"([\d.]+) M", text)
        assert claimed is not None
        assert num_parameters / 1e6 == pytest.approx(float(claimed[1]), rel=0.03)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_one_config_with_a_folder_of_its_own(name: str) -> None:
    config = load_recipe(name)
    assert isinstance(config, TrainConfig)
    assert config.folder == f"runs/{name}"
    assert config == load_recipe(name)
    assert TrainConfig.from_dict(config.to_dict()) == config
    if name in DECODERS:
        assert config.data_of(DataConfig).vocab_size == config.model.vocab_size


def test_the_digits_are_read_by_as_many_parameters_as_it_says() -> None:
    config = load_recipe("resnet_digits")
    model = zoo.build(str(config.init), **config.init_settings, num_classes=10)
    assert f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M" in RECIPES["resnet_digits"]
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 10)


def test_the_quickstart_sees_as_many_tokens_as_it_says() -> None:
    config = load_recipe("quickstart")
    num_tokens = config.num_steps * config.accum_steps * config.data.batch_size * config.data.sequence_length
    from deepseek.recipes.quickstart import quickstart

    claimed = re.search(r"([\d.]+) M tokens", inspect.getdoc(quickstart) or "")
    assert claimed is not None
    assert round(num_tokens / 1e6, 1) == float(claimed[1])


def test_the_quickstart_is_what_the_main_job_asks_for() -> None:
    config = load_recipe("quickstart")
    assert config.model.moe is not None
    assert config.model.mask is not None
    assert config.data.sources == ("stdlib",)
    assert config.data.vocab_size == 4096
    assert config.precision == "auto"
    assert config.optimizer.grad_clip is not None


def test_an_unknown_recipe_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="did you mean 'decoder_tiny'") as caught:
        load_recipe("decoder_tny")
    assert all(name in str(caught.value) for name in RECIPES)
