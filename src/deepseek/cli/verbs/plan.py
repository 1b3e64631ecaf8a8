"""`deepseek plan`: which parallel plan trains a model fastest on a cluster, what it costs, and why not another one."""

from __future__ import annotations

import json as json_format
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from deepseek.core.errors import ConfigError
from deepseek.core.units import parse_seconds

if TYPE_CHECKING:
    from deepseek.planning.machines.cluster import Cluster
    from deepseek.planning.models.model_shape import ModelShape
    from deepseek.planning.search.estimates import Progress
    from deepseek.planning.search.request import Limits
    from deepseek.planning.search.results import PlanningResult
    from deepseek.train.config import TrainConfig

_PLANS_SHOWN = 10


@dataclass(frozen=True)
class Asked:
    """What is planned: a model, where, with how many sequences a step; `recipe` if the model came from one."""

    model: ModelShape
    cluster: Cluster
    global_batch: int
    precision: str
    recipe: TrainConfig | None = None


def plan(
    model: str | None = None,
    *,
    cluster: str | None = None,
    nodes: int = 1,
    gpus_per_node: int = 8,
    network_gbit_per_s: float | None = None,
    global_batch: int | None = None,
    sequence: int | None = None,
    precision: str | None = None,
    strategy: str | None = None,
    headroom: float = 0.0,
    max_step_time: str | None = None,
    max_energy_j: float | None = None,
    top: int = _PLANS_SHOWN,
    picture: Path | None = None,
    predict: Path | None = None,
    scaling: Annotated[list[str] | None, Parameter(consume_multiple=False)] = None,
    measure: bool = False,
    out: Path | None = None,
    check: bool = False,
    steps: int = 12,
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
        Boxes.
    gpus_per_node
        Devices in each box.
    network_gbit_per_s
        One device's share of the network cards; without it the usual one of the box.
    global_batch
        Sequences of one step; a recipe brings its own.
    sequence
        Tokens of one sequence; without it the model's usual length.
    precision
        bf16, fp16, fp32, fp8, mxfp8 or fp4.
    strategy
        A strategy as JSON, for instance {"type": "HybridParallel", "tensorParallel": 4}.
    headroom
        Share of a device's memory that stays free, 0 to below 1.
    max_step_time
        Longest step, for instance 2s or 500ms.
    max_energy_j
        Most energy of a step, in joules.
    top
        Runners-up to show.
    picture
        Draw the pipeline's timeline into this .png, .html or .svg file.
    predict
        Predict every run of this CSV file instead; --out says where to.
    scaling
        Draw a scaling curve instead: weak-scaling, weak-scaling-1750b, data-parallel-only, bert-large,
        hierarchical-all-reduce.
    measure
        Measure this machine instead, and keep the result for later plans.
    out
        File for --predict or --measure.
    check
        Train the plan for some steps on this machine and show predicted against measured; MODEL is a recipe.
    steps
        Optimizer steps of --check.
    json
        Print JSON.
    """
    if predict is not None:
        _predict_runs(predict, out)
    elif scaling:
        for name in scaling:
            _print_curve(name, cluster, as_json=json)
    elif measure:
        _measure(out, as_json=json)
    elif model is None:
        raise ConfigError("give a model (a known shape, a folder or a recipe), or --predict, --scaling or --measure")
    else:
        request = _read_request(
            model, cluster, nodes, gpus_per_node, network_gbit_per_s, global_batch, sequence, precision
        )
        limits = _read_limits(headroom, max_step_time, max_energy_j)
        if check and (request.recipe is None or cluster is not None):
            raise ConfigError("--check trains a recipe on this machine; give a recipe (quickstart) and no --cluster")
        compiles = request.recipe is not None and request.recipe.compile != "none"
        result = _search(request, limits, strategy, is_compiled=compiles and not check)
        if check:
            _check(request, result, steps, as_json=json)
            return
        _print_result(result, top, as_json=json)
        if picture is not None:
            _draw(request, result, picture)


def _read_limits(headroom: float, max_step_time: str | None, max_energy_j: float | None) -> Limits:
    from deepseek.planning.search.request import Limits

    return Limits(headroom, None if max_step_time is None else parse_seconds(max_step_time), max_energy_j)


def _read_request(
    name: str,
    cluster: str | None,
    nodes: int,
    gpus_per_node: int,
    network_gbit_per_s: float | None,
    global_batch: int | None,
    sequence: int | None,
    precision: str | None,
) -> Asked:
    from deepseek.planning.naming import find_cluster, find_model, read_config
    from deepseek.recipes import RECIPES, load_recipe

    machine = (
        _find_machine()
        if cluster is None
        else find_cluster(cluster, nodes=nodes, gpus_per_node=gpus_per_node, network_gbit_per_s=network_gbit_per_s)
    )
    if name not in RECIPES:
        if global_batch is None:
            raise ConfigError("--global-batch is missing; say how many sequences one step takes")
        return Asked(find_model(name, sequence=sequence), machine, global_batch, precision or "bf16")
    recipe = load_recipe(name)
    shape = read_config(
        {**recipe.model.to_dict(), "model_type": name}, sequence=sequence or recipe.data.sequence_length
    )
    batch = global_batch or recipe.sequences_per_step
    return Asked(shape, machine, batch, precision or _choose_precision(recipe, has_machine=cluster is None), recipe)


def _choose_precision(recipe: TrainConfig, *, has_machine: bool) -> str:
    asked = "auto" if recipe.precision == "dynamic" else recipe.precision  # most of its layers end in 16 bits
    if not has_machine:
        return "bf16" if asked == "auto" else asked
    from deepseek.mixed_precision.forward_precision import choose_precision
    from deepseek.train.loop import open_device

    return choose_precision(asked, open_device(recipe.device))


def _find_machine() -> Cluster:
    """This machine, as it was measured before, or as it is measured now."""
    from deepseek.planning.machines.measurement import default_file, describe_surroundings
    from deepseek.planning.naming import load_measured

    path = default_file()
    if not path.exists():
        return _measure_to(path)
    kept = load_measured(path, describe_surroundings())
    if isinstance(kept, str):
        print(f"{kept}; measuring again", file=sys.stderr)
        return _measure_to(path)
    return kept


def _measure_to(path: Path) -> Cluster:
    from deepseek.cli.screen.tables import working
    from deepseek.planning.machines.measurement import build_cluster, describe_surroundings, measure_machine
    from deepseek.planning.naming import save_cluster

    with working("measuring this machine"):
        cluster = build_cluster(measure_machine())
    save_cluster(cluster, path, measured_on=describe_surroundings())
    print(f"measured this machine, kept in {path}", file=sys.stderr)
    return cluster


def _measure(out: Path | None, *, as_json: bool) -> None:
    from deepseek.cli.screen.plans import show_cluster
    from deepseek.planning.machines.measurement import default_file
    from deepseek.planning.naming import cluster_to_dict

    cluster = _measure_to(out or default_file())
    if as_json:
        _print_json(cluster_to_dict(cluster))
    else:
        show_cluster(cluster)


def _predict_runs(runs: Path, out: Path | None) -> None:
    from deepseek.planning.published_runs import predict_file

    if out is None:
        raise ConfigError("--out is missing; say which CSV file the predictions go to")
    print(f"{predict_file(runs, out)} runs predicted in {out}")


def _print_curve(name: str, cluster: str | None, *, as_json: bool) -> None:
    from deepseek.cli.screen.plans import show_curve
    from deepseek.planning.naming import find_accelerator
    from deepseek.planning.scaling import build_curve

    curve = build_curve(name, accelerator=find_accelerator(cluster or "dgx-a100").name)
    if as_json:
        _print_json(curve.to_dict())
    else:
        show_curve(curve)


def _search(request: Asked, limits: Limits, strategy: str | None, *, is_compiled: bool) -> PlanningResult:
    from deepseek.planning.search.planner import plan as search
    from deepseek.planning.strategies import read_strategy

    space = read_strategy(_read_json(strategy)).space if strategy else None
    with _progress() as tell:
        return search(
            request.model,
            request.cluster,
            global_batch=request.global_batch,
            limits=limits,
            space=_narrow(request, space, is_compiled=is_compiled),
            on_progress=tell,
        )


def _narrow(request: Asked, space: Any, *, is_compiled: bool) -> Any:
    """The space of a request: its precision, and for a recipe what this trainer does."""
    from dataclasses import replace

    from deepseek.core.names import explain_unknown
    from deepseek.distributed.plan import PRECISIONS
    from deepseek.planning.machines.software import SOFTWARE
    from deepseek.planning.search.request import Space

    if request.precision not in PRECISIONS:
        raise ConfigError(explain_unknown("precision", request.precision, PRECISIONS))
    narrowed = replace(space or Space(), precision=request.precision)
    if request.recipe is None:
        return narrowed
    narrowed = replace(narrowed, software=replace(SOFTWARE["deepseek"], is_compiled=is_compiled))
    return replace(narrowed, recomputations=("none",)) if request.cluster.num_devices == 1 else narrowed


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


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on standard error while a long search goes on; nothing where nobody looks."""
    from rich.console import Console
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    with Bars(console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("plans", total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _print_result(result: PlanningResult, top: int, *, as_json: bool) -> None:
    from deepseek.cli.screen.plans import show_result

    if as_json:
        _print_json(result.to_dict())
    else:
        show_result(result, top)


def _draw(request: Asked, result: PlanningResult, path: Path) -> None:
    from deepseek.cli.screen.plans import draw_picture

    draw_picture(request.model, request.cluster, result.best.plan, request.global_batch, path, result.software)
    print(f"timeline: {path}", file=sys.stderr)


def _check(request: Asked, result: PlanningResult, steps: int, *, as_json: bool) -> None:
    from deepseek.bench.plan_check import check_plan
    from deepseek.cli.screen.plans import show_check
    from deepseek.cli.screen.tables import working

    assert request.recipe is not None
    with working("training some steps of the plan"):
        checked = check_plan(request.recipe, result, request.global_batch, steps)
    if as_json:
        _print_json(checked.to_dict())
    else:
        show_check(result, checked)


def _print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(json_format.dumps(value) + "\n")
