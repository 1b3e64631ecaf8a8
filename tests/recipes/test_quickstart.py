"""The quickstart's recipe says what it is: its size and its schedule follow from its numbers."""

import inspect
import re

from deepseek.models.decoder.model import Decoder
from deepseek.models.weight_loading import build_without_values
from deepseek.recipes import load_recipe
from deepseek.recipes.quickstart import quickstart


def test_the_model_has_as_many_parameters_as_the_recipe_says_and_as_its_shape_needs():
    config = quickstart().model
    counted = sum(parameter.numel() for parameter in build_without_values(lambda: Decoder(config)).parameters())
    width, head_dim = config.hidden_size, config.hidden_size // config.num_heads
    attention = 2 * width * width + 2 * width * config.num_kv_heads * head_dim
    experts = config.moe.num_experts * 3 * width * config.moe.ffn_size + width * config.moe.num_experts
    matrices = config.vocab_size * width + config.num_layers * (attention + experts)
    assert 0 <= counted - matrices < 0.001 * matrices  # norms and the masks' own numbers
    claimed = re.search(r"([\d.]+) M parameter", inspect.getdoc(quickstart) or "")
    assert claimed is not None
    assert round(counted / 1e6, 1) == float(claimed[1])


def test_model_and_data_agree_and_the_schedule_fits_into_the_run():
    config = quickstart()
    assert config.model.vocab_size == config.data.vocab_size
    assert config.data.sequence_length <= config.model.max_length
    assert config.optimizer.warmup_steps + config.optimizer.decay_share * config.num_steps <= config.num_steps
    assert config.model.mask.opening_steps < config.num_steps
    assert config.num_steps % config.checkpoint_every == 0


def test_the_recipe_is_found_by_its_name_and_survives_its_own_file_format():
    config = quickstart()
    assert load_recipe("quickstart") == config
    assert type(config).from_dict(config.to_dict()) == config


def test_the_peak_of_the_rate_is_the_one_that_was_measured_best():
    """The linear rule of Goyal et al. 2017: base rate times batch over 256."""
    config = quickstart()
    assert round(config.optimizer.base_learning_rate * config.data.batch_size / 256, 6) == 3e-3
