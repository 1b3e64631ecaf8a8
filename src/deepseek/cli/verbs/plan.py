"""`deepseek plan`: which parallel plan trains a model fastest on a cluster, what it costs, and why not another one.

    deepseek plan MODEL ...          the fastest plan, with time and memory by item
    deepseek plan check RECIPE       train a plan for some steps here, predicted against measured
    deepseek plan measure            measure this machine, for later plans
    deepseek plan runs FILE          predict a table of runs that somebody else measured
    deepseek plan scaling CURVE...   what the model says about often quoted scaling figures

Each has a file of its own; this one holds the search.
"""

from __future__ import annotations

import json as json_format
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import App

from deepseek.cli.verbs.plan_check import plan_check
from deepseek.cli.verbs.plan_measure import find_machine, plan_measure
from deepseek.cli.verbs.plan_runs import plan_runs, predict_into
from deepseek.cli.verbs.plan_scaling import plan_scaling
from deepseek.core.errors import ConfigError
from deepseek.core.units import parse_count, parse_length, parse_seconds

if TYPE_CHECKING:
    from deepseek.planning.models.model_shape import ModelShape
    from deepseek.planning.search.request import Space

_PLANS_SHOWN = 10


def build_app() -> App:
    """Build the verb with its subcommands."""
    app = App(name="plan")
    app.default(plan)
    app.command(plan_check, name="check")
    app.command(plan_measure, name="measure")
    app.command(plan_runs, name="runs")
    app.command(plan_scaling, name="scaling")
    return app


def plan(
    model: str | None = None,
    *,
    cluster: str | None = None,
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    network_gbit_per_s: float | None = None,
    global_batch: int | None = None,
    sequence: str | None = None,
    precision: str | None = None,
    strategy: str | None = None,
    headroom: float = 0.1,
    max_step_time: str | None = None,
    max_energy_j: float | None = None,
    tokens: str | None = None,
    price_per_device_hour: float | None = None,
    top: int = _PLANS_SHOWN,
    picture: Path | None = None,
    predict: Path | None = None,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Find the fastest plan for MODEL on a cluster, with memory and time by item and ten runners-up.

    MODEL is a known shape (Llama3-8B), a model folder, a config.json, or a recipe. Without --cluster it is planned for
    this very machine, which is measured first.

    Example: deepseek plan Llama3-8B --cluster dgx-a100 --nodes 8 --global-batch 512

    Parameters
    ----------
    model
        Known shape, model folder, configuration file, or recipe.
    cluster
        Box (dgx-h100), accelerator (H100-SXM-80GB), several joined with + (dgx-h100:2+dgx-a100:4), or a JSON file.
    nodes
        Boxes; without it one.
    gpus_per_node
        Devices in each box; without it eight.
    network_gbit_per_s
        One device's share of the network cards; without it the usual one of the box.
    global_batch
        Sequences of one step; a recipe brings its own.
    sequence
        Tokens of one sequence (4096, 4k); without it the model's usual length.
    precision
        bf16, fp16, fp32, fp8, mxfp8 or fp4; without it the 16 bit format that the devices have.
    strategy
        A strategy as JSON, for instance {"type": "HybridParallel", "tensorParallel": 4}.
    headroom
        Share of a device's memory that stays free, 0 to below 1.
    max_step_time
        Longest step, for instance 2s or 500ms.
    max_energy_j
        Most energy of a step, in joules.
    tokens
        Tokens to train on (300B, 15T): how many days and device hours that takes.
    price_per_device_hour
        Price of a device for an hour: what the tokens cost at least.
    top
        Runners-up to show.
    picture
        Plot the pipeline's timeline into this .png, .html or .svg file.
    predict
        The same as `plan runs FILE`: predict every run of this CSV file instead; --out says where to.
    out
        File for --predict.
    json
        Print JSON.
    """
    if predict is not None or out is not None:
        others = (model, cluster, nodes, gpus_per_node, network_gbit_per_s, global_batch, sequence, precision, strategy)
        limits_and_outputs = (max_step_time, max_energy_j, tokens, price_per_device_hour, picture)
        is_said = [value is not None for value in others] + [value is not None for value in limits_and_outputs]
        _predict(predict, out, has_others=json or any(is_said))
        return
    if model is None:
        raise ConfigError("give a model (a known shape, a folder or a recipe), or see deepseek plan --help")
    from deepseek.cli.screen.plans import print_json, search, show_result
    from deepseek.planning.naming import find_cluster
    from deepseek.planning.search.request import Limits, Request, choose_space, read_precision
    from deepseek.planning.search.throughput import estimate_budget
    from deepseek.planning.strategies import read_strategy

    limits = Limits(headroom, None if max_step_time is None else parse_seconds(max_step_time), max_energy_j)
    if price_per_device_hour is not None and tokens is None:
        raise ConfigError("--price-per-device-hour needs --tokens; say how many tokens are paid for, for example 300B")
    if picture is not None:
        from deepseek.cli.screen.timelines import check_ending

        check_ending(picture)
    if global_batch is None and not _is_recipe(model):
        raise ConfigError("--global-batch is missing; say how many sequences one step takes")
    if cluster is None and (nodes is not None or gpus_per_node is not None or network_gbit_per_s is not None):
        raise ConfigError(
            "--nodes, --gpus-per-node and --network-gbit-per-s describe a --cluster, and without one the plan is for "
            "this machine; add for example --cluster dgx-h100, or leave them out"
        )
    machine = (
        find_machine()
        if cluster is None
        else find_cluster(cluster, nodes=nodes, gpus_per_node=gpus_per_node, network_gbit_per_s=network_gbit_per_s)
    )
    length = None if sequence is None else parse_length(sequence)
    choices = choose_space(machine)
    if strategy:
        asked = read_strategy(_read_json(strategy)).space
        choices = replace(asked, precision=choices.precision, software=choices.software)
    shape, usual_batch, space = _read_model(
        model, choices, num_devices=machine.num_devices, is_here=cluster is None, sequence=length
    )
    batch = usual_batch if global_batch is None else global_batch
    assert batch is not None
    if precision is not None:
        space = replace(space, precision=read_precision(precision))
    request = Request(shape, machine, batch, limits, space)
    result = search(request)
    budget = None
    if tokens is not None:
        assert result.throughput is not None  # a decoder has tokens
        budget = estimate_budget(result.throughput, parse_count(tokens), price_per_device_hour)
    if json:
        print_json(result.to_dict() | ({"budget": asdict(budget)} if budget else {}))
    else:
        show_result(request, result, top, budget)
    if picture is not None:
        from deepseek.cli.screen.timelines import plot_plan

        plot_plan(request, result, picture)
        print(f"timeline: {picture}", file=sys.stderr)


def _predict(runs: Path | None, out: Path | None, *, has_others: bool) -> None:
    """Do what `plan runs` does, as an option."""
    if runs is None:
        raise ConfigError("--out belongs to --predict; give --picture FILE for the timeline, or > FILE with --json")
    if has_others:
        raise ConfigError("--predict takes --out and nothing else; plan MODEL in a command of its own")
    predict_into(runs, out)


def _is_recipe(name: str) -> bool:
    from deepseek.recipes import RECIPES

    return name in RECIPES


def _read_model(
    name: str, space: Space, *, num_devices: int, is_here: bool, sequence: int | None
) -> tuple[ModelShape, int | None, Space]:
    """Read what `name` stands for: its shape, the batch that it brings, and what may be chosen for it."""
    from deepseek.recipes import load_recipe

    if not _is_recipe(name):
        from deepseek.planning.naming import find_model

        return find_model(name, sequence=sequence), None, space
    from deepseek.bench.recipe_requests import choose_recipe_precision, narrow_space, read_recipe_shape

    recipe = load_recipe(name)
    space = replace(space, precision=choose_recipe_precision(recipe, is_here=is_here))
    narrowed = narrow_space(space, recipe, num_devices=num_devices, is_compiled=True)
    return read_recipe_shape(recipe, name, sequence=sequence), recipe.sequences_per_step, narrowed


def _read_json(text: str) -> dict[str, Any]:
    try:
        value = json_format.loads(text)
    except json_format.JSONDecodeError as error:
        raise ConfigError(
            f'--strategy is not JSON ({error}); write for example \'{{"type": "AutoParallel"}}\''
        ) from error
    if not isinstance(value, dict):
        raise ConfigError(f'--strategy {text} is no table; write for example \'{{"type": "AutoParallel"}}\'')
    return value
