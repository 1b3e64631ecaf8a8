"""`deepseek verify`: hold parallel plans of a run against the same run in one process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from deepseek.core.config import parse_overrides


def verify(
    recipe: str | None = None,
    *,
    config: Path | None = None,
    plan: Annotated[list[str] | None, Parameter(name=["--plan"])] = None,
    ranks: int = 2,
    steps: int = 2,
    task: str | None = None,
    set: Annotated[list[str] | None, Parameter(name=["--set", "-s"])] = None,
    json: bool = False,
) -> int:
    """Train a small model like RECIPE's under parallel plans on local ranks, and compare with one process.

    Loss, norm, every gradient and every weight are compared in float64 after each step, with SGD and with AdamW. What
    parts first is named, and the status is 1. Nothing is kept but the prepared data of the run.

    Example: deepseek verify decoder_tiny --plan tp=2 --plan dp=2,zero_stage=3

    Parameters
    ----------
    recipe
        A recipe, or the folder of an earlier run.
    config
        File with the settings of a run, instead of a recipe.
    plan
        Plan to hold, as tp=2,dp=2,zero_stage=3 or as a file that `deepseek plan --json` wrote; may be given several
        times. Without it, all plans that can run on --ranks ranks.
    ranks
        Processes that share this machine, where no plan is given.
    steps
        Optimizer steps with each optimizer.
    task
        Task instead of a recipe, or MODULE:CLASS, a task of your own.
    set
        One setting to change, as KEY=VALUE with dots between levels; may be given several times.
    json
        Print one JSON object for each plan.
    """
    from dataclasses import asdict
    from json import dumps

    from deepseek.bench.plan_parity import verify_plans
    from deepseek.cli.screen.tables import show_table, working
    from deepseek.cli.verbs.train import choose_run
    from deepseek.distributed.plan_files import read_plan

    settings, own_task = choose_run(recipe, config, task, parse_overrides(set or []))
    if own_task is not None:
        sys.path.append(str(Path.cwd()))  # ranks import the task as well
    plans = [read_plan(text) for text in plan or ()]
    with working("training under the plans, and in one process"):
        verdicts = list(verify_plans(settings, plans, num_ranks=ranks, num_steps=steps, task=own_task))
    if json:
        for verdict in verdicts:
            sys.stdout.write(dumps({**asdict(verdict), "is_equal": verdict.is_equal}) + "\n")
    else:
        rows = [
            (
                verdict.description,
                *(found.first_parting or f"equal ({found.num_compared})" for found in verdict.verdicts),
            )
            for verdict in verdicts
        ]
        show_table("Against one process, in float64 (values compared)", ("plan", "SGD", "AdamW"), rows)
    return int(not all(verdict.is_equal for verdict in verdicts))
