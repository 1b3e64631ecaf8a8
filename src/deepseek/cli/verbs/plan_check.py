"""`deepseek plan check`: train plans for some steps on this machine, predicted against measured.

Without `--ranks` the best plan for this machine as it is, through the trainer. With it, up to `--plans` plans on that
many local ranks, in the order that was predicted for them beside the one that was measured.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from deepseek.cli.verbs.plan_measure import find_machine
from deepseek.core.errors import ConfigError

if TYPE_CHECKING:
    from deepseek.train.config import TrainConfig

_STEPS, _STEPS_ON_RANKS, _PLANS = 12, 4, 12


def plan_check(
    recipe: str = "quickstart",
    *,
    ranks: int | None = None,
    plans: int | None = None,
    steps: int | None = None,
    global_batch: int | None = None,
    json: bool = False,
) -> None:
    """Plan RECIPE for this machine, train plans for some steps, and show predicted against measured.

    With --ranks, several plans are trained in turns on local ranks, in FP32 and on random tokens, and the order of
    their step times is compared with the predicted one.

    Example: deepseek plan check decoder_tiny --ranks 4

    Parameters
    ----------
    recipe
        A recipe, for instance quickstart.
    ranks
        Train plans for so many ranks of this machine, 2 or 4 as a rule; without it, the best plan for one device.
    plans
        Plans to train on the ranks; 12 unless given.
    steps
        Optimizer steps to train; 12 unless given, and 4 of each plan in each of three rounds with --ranks.
    global_batch
        Sequences of one step; without it those of the recipe.
    json
        Print JSON.
    """
    from deepseek.recipes import load_recipe

    config = load_recipe(recipe)
    batch = config.sequences_per_step if global_batch is None else global_batch
    if ranks is not None:
        num_plans, num_steps = _PLANS if plans is None else plans, _STEPS_ON_RANKS if steps is None else steps
        _check_ranks(config, recipe, ranks, num_plans, num_steps, batch, is_json=json)
    elif plans is not None:
        raise ConfigError(f"--plans {plans} says how many are trained on local ranks; add --ranks 4, or leave it out")
    else:
        _check_best(config, recipe, _STEPS if steps is None else steps, batch, is_json=json)


def _check_best(config: TrainConfig, recipe: str, steps: int, global_batch: int, *, is_json: bool) -> None:
    from deepseek.bench.plan_trial import check_plan
    from deepseek.bench.recipe_requests import choose_recipe_precision, narrow_space, read_recipe_shape
    from deepseek.cli.screen.plans import print_json, search, show_check
    from deepseek.cli.screen.tables import working
    from deepseek.planning.search.request import Request, Space

    machine = find_machine()
    space = replace(Space(), precision=choose_recipe_precision(config, is_here=True))
    space = narrow_space(space, config, num_devices=machine.num_devices, is_compiled=False)
    shape = read_recipe_shape(config, recipe, sequence=None)
    result = search(Request(shape, machine, global_batch, space=space))
    with working("training some steps of the plan"):
        checked = check_plan(config, result, global_batch, steps)
    if is_json:
        print_json(checked.to_dict())
    else:
        show_check(result, checked)


def _check_ranks(
    config: TrainConfig, recipe: str, ranks: int, num_plans: int, num_steps: int, global_batch: int, *, is_json: bool
) -> None:
    from deepseek.bench.plan_ranking import rank_plans
    from deepseek.bench.recipe_requests import read_recipe_shape
    from deepseek.cli.screen.plans import print_json, show_ranking
    from deepseek.cli.screen.tables import working

    shape = read_recipe_shape(config, recipe, sequence=None)
    with working(f"measuring {ranks} ranks, and training plans on them"):
        ranking = rank_plans(
            config, shape, num_ranks=ranks, num_plans=num_plans, num_steps=num_steps, global_batch=global_batch
        )
    if is_json:
        print_json(ranking.to_dict())
    else:
        show_ranking(ranking)
