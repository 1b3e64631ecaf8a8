"""From a recipe to what the planner is asked: its shape, the precision it trains in, and what this trainer does."""

from __future__ import annotations

from dataclasses import replace

from deepseek.core.errors import ConfigError
from deepseek.data.config import DataConfig
from deepseek.distributed.plan import Precision
from deepseek.mixed_precision.forward_precision import choose_precision
from deepseek.planning.machines.software import SOFTWARE
from deepseek.planning.models.model_shape import ModelShape
from deepseek.planning.naming import read_config
from deepseek.planning.search.request import Space
from deepseek.train.config import TrainConfig
from deepseek.train.run_state import open_device


def read_recipe_shape(recipe: TrainConfig, name: str, *, sequence: int | None) -> ModelShape:
    """Read the shape of a recipe's model; without `sequence` its rows are as long as the recipe's data.

    Raises `ConfigError` for a recipe that trains another model than a decoder of its own.
    """
    if recipe.task.kind != "causal_lm" or recipe.init is not None:
        raise ConfigError(
            f"the recipe {name} trains for {recipe.task.kind}, and recipes are planned for causal_lm from random "
            "weights; choose another recipe, or give a model or its config"
        )
    shape = read_config(recipe.model.to_dict(), sequence=sequence or recipe.data_of(DataConfig).sequence_length)
    return replace(shape, name=name)


def choose_recipe_precision(recipe: TrainConfig, *, is_here: bool) -> Precision:
    """Choose what a recipe trains in: on this machine what its trainer would take, elsewhere 16 bits if it may choose.

    Dynamic precision counts as a free choice, since most of its layers end in 16 bits.
    """
    asked = "auto" if recipe.precision == "dynamic" else recipe.precision
    chosen = choose_precision(asked, open_device(recipe.device)) if is_here else asked
    return "bf16" if chosen == "auto" else chosen


def narrow_space(space: Space, recipe: TrainConfig, *, num_devices: int, is_compiled: bool) -> Space:
    """Narrow the choices to what `deepseek train` does; a single device keeps its activations."""
    software = replace(SOFTWARE["deepseek"], is_compiled=is_compiled and recipe.compile != "none")
    recomputations = ("none",) if num_devices == 1 else space.recomputations
    return replace(space, software=software, recomputations=recomputations)
