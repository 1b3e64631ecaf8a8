"""`deepseek plan check`: train a plan for some steps on this machine, predicted against measured."""

from __future__ import annotations

from dataclasses import replace

from deepseek.cli.verbs.plan_measure import find_machine


def plan_check(
    recipe: str = "quickstart", *, steps: int = 12, global_batch: int | None = None, json: bool = False
) -> None:
    """Plan RECIPE for this machine, train the plan for some steps, and show predicted against measured.

    Example: deepseek plan check quickstart --steps 20

    Parameters
    ----------
    recipe
        A recipe, for instance quickstart.
    steps
        Optimizer steps to train.
    global_batch
        Sequences of one step; without it those of the recipe.
    json
        Print JSON.
    """
    from deepseek.bench.plan_trial import check_plan
    from deepseek.bench.recipe_requests import choose_recipe_precision, narrow_space, read_recipe_shape
    from deepseek.cli.screen.plans import print_json, search, show_check
    from deepseek.cli.screen.tables import working
    from deepseek.planning.search.request import Request, Space
    from deepseek.recipes import load_recipe

    config = load_recipe(recipe)
    machine = find_machine()
    space = replace(Space(), precision=choose_recipe_precision(config, is_here=True))
    space = narrow_space(space, config, num_devices=machine.num_devices, is_compiled=False)
    shape = read_recipe_shape(config, recipe, sequence=None)
    batch = config.sequences_per_step if global_batch is None else global_batch
    result = search(Request(shape, machine, batch, space=space))
    with working("training some steps of the plan"):
        checked = check_plan(config, result, batch, steps)
    if json:
        print_json(checked.to_dict())
    else:
        show_check(result, checked)
