"""Each recipe is a config that builds what its docstring claims."""

from __future__ import annotations

import re

import pytest
import torch

from deepseek.core.errors import ConfigError
from deepseek.models.decoder.model import Decoder, count_parameters
from deepseek.recipes import RECIPES, load_recipe
from deepseek.train.config import TrainConfig


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_builds_a_model_of_the_size_it_names(name: str) -> None:
    config = load_recipe(name)
    assert isinstance(config, TrainConfig)
    with torch.device("meta"):
        num_millions = count_parameters(Decoder(config.model)) / 1e6
    claimed = re.search(r"([\d.]+) M", RECIPES[name])
    assert claimed is not None
    assert num_millions == pytest.approx(float(claimed[1]), rel=0.05)


def test_quickstart_is_a_mixture_with_the_dynamic_mask_and_between_5_and_10_million() -> None:
    config = load_recipe("quickstart")
    assert config.model.moe is not None
    assert config.model.mask is not None
    assert config.model.mask.is_dynamic
    with torch.device("meta"):
        assert 5e6 <= count_parameters(Decoder(config.model)) <= 10e6


def test_recipe_survives_being_written_and_read() -> None:
    config = load_recipe("decoder_120m")
    assert TrainConfig.from_dict(config.to_dict()) == config


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'quickstart'"):
        load_recipe("quickstrat")
