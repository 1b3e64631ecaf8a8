"""`deepseek train`: from a recipe, a config file, a task or an earlier run, with overrides, to an artifact."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from deepseek.core.allocator import keep_freed_memory
from deepseek.core.config import SETTINGS_SUFFIXES, parse_overrides, read_settings
from deepseek.core.errors import ConfigError, first_line
from deepseek.core.extras import has_library
from deepseek.distributed.launch_environment import LaunchEnvironment, read_launch_environment
from deepseek.recipes import RECIPES, load_recipe

if TYPE_CHECKING:
    from deepseek.distributed.plan import Plan
    from deepseek.train.config import TrainConfig
    from deepseek.train.parallel_run import PlanChooser
    from deepseek.train.task import Task

EVENTS_FILE = "events.jsonl"
CURVES_FILE = "curves.png"


def train(
    recipe: str | None = None,
    *,
    config: Path | None = None,
    task: str | None = None,
    set: Annotated[list[str] | None, Parameter(name=["--set", "-s"])] = None,
    plan: str | None = None,
    log: str | None = None,
    show: bool = False,
    json: bool = False,
) -> None:
    """Train a model and write it to FOLDER/model.

    Started again with the same settings after Ctrl-C or a crash, it goes on from the last checkpoint.

    Example: deepseek train decoder_tiny --set num_steps=100 --set model.num_layers=2

    Parameters
    ----------
    recipe
        Name of a recipe: quickstart, decoder_tiny, decoder_120m, resnet_digits, mobilenet_emoji, yolov7_tiny_scenes,
        bert_small, bert_topics or bert_answers; or the folder of an earlier run, which goes on.
    config
        YAML, TOML or JSON file with the settings of a run, instead of a recipe. Files of every generation are read, as
        `deepseek migrate` writes them, and a note says what their keys became.
    task
        Task whose default settings the run begins with, instead of a recipe; or MODULE:CLASS, a task of your own in a
        module that can be imported from here, with the settings of the recipe or file if there is one.
    set
        One setting to change, as KEY=VALUE with dots between levels; may be given several times.
    plan
        How several ranks share the run, which `deepseek launch --ranks N train ...` starts: tp=2,dp=2,zero_stage=3, a
        file that `deepseek plan --json` wrote, or auto for what the planner finds fastest here. What is learned stays
        the same: the rows of a step are dealt over the dp ranks. A micro_batch_size above 1 cuts them so.
    log
        Where losses and metrics go besides, with commas between: tensorboard (files in FOLDER/tensorboard), mlflow,
        wandb. Each takes the extra of that name.
    show
        Print the settings as YAML, which --config reads back, and stop.
    json
        Print events as JSON lines instead of progress bars, and settings as JSON.
    """
    settings, own_task = choose_run(recipe, config, task, parse_overrides(set or []))
    chosen: Plan | PlanChooser | None = None
    if plan is not None:
        settings, chosen = choose_plan(plan, settings)
    if show:
        _print_settings(settings, as_json=json)
        return
    launched = read_launch_environment(os.environ) if plan is not None or "RANK" in os.environ else LaunchEnvironment()
    if plan is None and launched.world_size > 1:
        raise ConfigError(
            f"{launched.world_size} ranks were started and no plan says what each of them does; add for example "
            f"--plan dp={launched.world_size}, or --plan auto"
        )
    from deepseek.cli.screen.events import follow, ignored_signals
    from deepseek.train.loop import train as run
    from deepseek.train.metric_logs import log_metrics, open_logs

    keep_freed_memory()
    if launched.rank:
        with ignored_signals():
            for _ in run(settings, task=own_task, plan=chosen):  # events are rank 0's
                pass
        return
    events_file = Path(settings.folder) / EVENTS_FILE
    logs = open_logs(log.split(","), settings) if log is not None else []
    events = run(settings, task=own_task, plan=chosen)
    follow(log_metrics(events, logs) if logs else events, file=events_file, as_json=json)
    _draw_curves(events_file, is_shown=not json)


def choose_plan(text: str, settings: TrainConfig) -> tuple[TrainConfig, Plan | PlanChooser]:
    """The plan that `text` says, and the settings with the precision that it names, if it does."""
    if text == "auto":
        return settings, _choose_fastest
    from deepseek.distributed.plan import Plan
    from deepseek.distributed.plan_files import read_plan_settings

    named = read_plan_settings(text)
    plan = Plan(**named)
    if "precision" not in named or plan.precision == settings.precision:
        return settings, plan
    if settings.precision != "auto":
        raise ConfigError(
            f"the plan has precision={plan.precision} and the run precision={settings.precision}; make the two equal"
        )
    if plan.precision not in ("fp32", "bf16"):
        raise ConfigError(
            f"the plan has precision={plan.precision}, which the trainer does not compute in; plan with --precision "
            "bf16 or fp32"
        )
    return settings.override({"precision": plan.precision}), plan


def _choose_fastest(settings: TrainConfig, num_ranks: int) -> Plan:
    from deepseek.bench.rank_plans import choose_rank_plan
    from deepseek.cli.verbs.plan_measure import find_machine

    return choose_rank_plan(settings, num_ranks, find_machine())


def _draw_curves(events_file: Path, *, is_shown: bool) -> None:
    """The losses and metrics of the whole run, whichever processes did its steps: in its folder and on the screen."""
    from rich.console import Console

    from deepseek.cli.screen.plots import plot_curves, print_curves
    from deepseek.train.events import read_curves, read_events

    curves = read_curves(read_events(events_file))
    if len(curves.losses) < 2:
        return
    if has_library("matplotlib"):
        plot_curves(curves, events_file.parent / CURVES_FILE)
    if is_shown and has_library("plotext"):
        print_curves(curves, width=Console().width)


def _print_settings(settings: TrainConfig, *, as_json: bool) -> None:
    import yaml

    print(settings.model_dump_json() if as_json else yaml.safe_dump(settings.to_dict(), sort_keys=False).rstrip())


def choose_run(
    recipe: str | None, config: Path | None, task: str | None, changes: Mapping[str, Any]
) -> tuple[TrainConfig, type[Task] | None]:
    """The settings of a run with `changes`, and its task where that is one's own."""
    own_task = find_own_task(task)
    chosen = {} if task is None or own_task else {"task": task}
    return choose_config(recipe, config, task).override({**chosen, **changes}), own_task


def find_own_task(task: str | None) -> type[Task] | None:
    """Import a task that is written MODULE:CLASS; `None` for the name of one of ours."""
    return import_task(task) if task is not None and ":" in task else None


def choose_config(recipe: str | None, config: Path | None, task: str | None = None) -> TrainConfig:
    """The settings of a recipe, of a file or of an earlier run, or those that a task changes; exactly one is given.

    A task of one's own, MODULE:CLASS, may stand beside a recipe or a file.
    """
    is_own = task is not None and ":" in task
    num_given = (recipe is not None) + (config is not None) + (task is not None and not is_own)
    if num_given > 1 or (num_given == 0 and not is_own):
        raise ConfigError(f"give either a recipe ({', '.join(RECIPES)}), --config FILE or --task NAME")
    if recipe is not None and recipe not in RECIPES and Path(recipe).exists():
        return _read_run(Path(recipe))
    if recipe is not None:
        return load_recipe(recipe)
    from deepseek.train.config import TrainConfig

    if config is None:
        return TrainConfig()
    from deepseek.compat.generation_configs import read_generation_config

    values = read_settings(config)
    reading = read_generation_config(values)
    if reading is None:
        return TrainConfig.from_dict(values)
    sys.stderr.write(f"deepseek: note: {config} is {reading}\n")
    return TrainConfig.from_dict(reading.settings)


def _read_run(path: Path) -> TrainConfig:
    """The settings of the run in the folder `path`, wherever it lies now."""
    from deepseek.train.config import TrainConfig
    from deepseek.train.loop import CONFIG_FILE

    if path.suffix in SETTINGS_SUFFIXES and path.is_file():
        raise ConfigError(f"{path} is a file and a recipe was expected; write --config {path}")
    if not (path / CONFIG_FILE).is_file():
        raise ConfigError(
            f"{path} holds no run (no {CONFIG_FILE}) and a recipe was expected ({', '.join(RECIPES)}); to train on its "
            f"text, write for example: deepseek train decoder_tiny --set 'data.sources=[{path}]'"
        )
    return TrainConfig.from_file(path / CONFIG_FILE).override({"folder": str(path)})


def import_task(name: str) -> type[Task]:
    """Import the task MODULE:CLASS, from the folder one stands in as well."""
    from deepseek.train.task import Task

    module, _, kind = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), kind)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"--task {name} cannot be imported ({first_line(error)}); write MODULE:CLASS") from error
    finally:
        sys.path.pop(0)
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ConfigError(f"--task {name} is no class of deepseek.train.Task; derive it from Task")
    return found
