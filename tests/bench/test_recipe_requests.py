import pytest

from deepseek.bench.recipe_requests import choose_recipe_precision, narrow_space, read_recipe_shape
from deepseek.core.errors import ConfigError
from deepseek.mixed_precision.forward_precision import choose_precision
from deepseek.planning.search.request import Space
from deepseek.recipes import load_recipe
from deepseek.train.run_state import open_device

TINY = load_recipe("decoder_tiny")


def test_the_shape_of_a_recipe_is_that_of_its_model_on_rows_of_its_data():
    shape = read_recipe_shape(TINY, "decoder_tiny", sequence=None)
    assert (shape.layers, shape.hidden) == (TINY.model.num_layers, TINY.model.hidden_size)
    assert shape.sequence == TINY.data.sequence_length
    assert read_recipe_shape(TINY, "decoder_tiny", sequence=64).sequence == 64


@pytest.mark.parametrize("sequence", [None, 64])
def test_a_recipe_that_trains_no_decoder_is_not_planned_as_one(sequence):
    with pytest.raises(ConfigError, match="resnet_digits trains for image_classification, and recipes are"):
        read_recipe_shape(load_recipe("resnet_digits"), "resnet_digits", sequence=sequence)


@pytest.mark.parametrize(("asked", "elsewhere"), [("auto", "bf16"), ("dynamic", "bf16"), ("fp32", "fp32")])
def test_precision_is_what_the_trainer_takes_here_and_16_bits_elsewhere_if_it_may_choose(asked, elsewhere):
    recipe = TINY.override({"precision": asked})
    assert choose_recipe_precision(recipe, is_here=False) == elsewhere
    free = "auto" if asked == "dynamic" else asked
    assert choose_recipe_precision(recipe, is_here=True) == choose_precision(free, open_device(recipe.device))


def test_the_space_is_narrowed_to_what_this_trainer_does():
    compiled = TINY.override({"compile": "blocks"})
    one, many = (narrow_space(Space(), compiled, num_devices=count, is_compiled=True) for count in (1, 8))
    assert one.recomputations == ("none",)
    assert many.recomputations == Space().recomputations
    assert one.software.is_compiled
    assert not narrow_space(Space(), compiled, num_devices=1, is_compiled=False).software.is_compiled
    assert not narrow_space(
        Space(), TINY.override({"compile": "none"}), num_devices=1, is_compiled=True
    ).software.is_compiled
