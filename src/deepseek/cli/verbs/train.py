"""`deepseek train`: from a recipe or a config file, with overrides, to an artifact."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from deepseek.core.allocator import keep_freed_memory
from deepseek.core.config import parse_overrides, read_settings
from deepseek.core.errors import ConfigError
from deepseek.core.extras import has_library
from deepseek.recipes import RECIPES, load_recipe

if TYPE_CHECKING:
    from deepseek.train.config import TrainConfig

EVENTS_FILE = "events.jsonl"


def train(
    recipe: str | None = None,
    *,
    config: Path | None = None,
    set: Annotated[list[str] | None, Parameter(name=["--set", "-s"])] = None,
    show: bool = False,
    json: bool = False,
) -> None:
    """Train a model and write it to FOLDER/model.

    Started again with the same settings after Ctrl-C or a crash, it goes on from the last checkpoint.

    Example: deepseek train decoder_tiny --set num_steps=100 --set model.num_layers=2

    Parameters
    ----------
    recipe
        Name of a recipe: quickstart, decoder_tiny or decoder_120m.
    config
        YAML, TOML or JSON file with the settings of a run, instead of a recipe. Files of every generation are read, as
        `deepseek migrate` writes them, and a note says what their keys became.
    set
        One setting to change, as KEY=VALUE with dots between levels; may be given several times.
    show
        Print the settings as YAML, which --config reads back, and stop.
    json
        Print events as JSON lines instead of progress bars, and settings as JSON.
    """
    settings = choose_config(recipe, config).override(parse_overrides(set or []))
    if show:
        _print_settings(settings, as_json=json)
        return
    from deepseek.cli.screen.events import follow
    from deepseek.train.loop import train as run

    keep_freed_memory()
    events_file = Path(settings.folder) / EVENTS_FILE
    follow(run(settings), file=events_file, as_json=json)
    if not json and has_library("plotext"):
        _draw_loss(events_file)


def _draw_loss(events_file: Path) -> None:
    """The loss of the whole run in the terminal, whichever processes did its steps."""
    from rich.console import Console

    from deepseek.cli.screen.plots import print_loss
    from deepseek.train.events import read_events, steps_by_number

    losses = {number: step["loss"] for number, step in steps_by_number(read_events(events_file)).items()}
    if len(losses) > 1:
        print_loss(losses, width=Console().width)


def _print_settings(settings: TrainConfig, *, as_json: bool) -> None:
    import yaml

    print(settings.model_dump_json() if as_json else yaml.safe_dump(settings.to_dict(), sort_keys=False).rstrip())


def choose_config(recipe: str | None, config: Path | None) -> TrainConfig:
    """The settings of a recipe or of a file; exactly one of them is given."""
    if (recipe is None) == (config is None):
        raise ConfigError(f"give either a recipe ({', '.join(RECIPES)}) or --config FILE")
    if recipe is not None:
        return load_recipe(recipe)
    from deepseek.compat.generation_configs import read_generation_config
    from deepseek.train.config import TrainConfig

    assert config is not None
    values = read_settings(config)
    reading = read_generation_config(values)
    if reading is None:
        return TrainConfig.from_dict(values)
    sys.stderr.write(f"deepseek: note: {config} is {reading}\n")
    return TrainConfig.from_dict(reading.settings)
