"""`deepseek evaluate`: how good a model is on data, with intervals."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from deepseek.core.config import parse_overrides


def evaluate(
    model: str,
    *,
    data: Path | None = None,
    task: str | None = None,
    set: Annotated[list[str] | None, Parameter(name=["--set", "-s"])] = None,
    json: bool = False,
) -> None:
    """Measure MODEL on all of DATA, or on what its run held out: the metrics of its task, with 95 % intervals.

    Language models have a loss and a perplexity, classifiers accuracy and F1, detectors mAP. Nothing is trained and
    nothing written.

    Example: deepseek evaluate runs/tiny --data notes

    Parameters
    ----------
    model
        Folder of a training run, whose settings are taken, of an artifact, of a Hugging Face model, or of an adapter.
    data
        What to measure on, in the form that the task learns from: a folder, a file, or for boxes the annotations. Left
        out, what the run that made the model held out.
    task
        Task that is measured; that of the run, or causal_lm for a decoder, unless given. MODULE:CLASS is a task of your
        own, as in `deepseek train`.
    set
        One setting to change, as KEY=VALUE as in `deepseek train`: data.kind=chat, task.label=stars.
    json
        Print the report as JSON.
    """
    from deepseek.cli.screen.events import progress_on_errors
    from deepseek.cli.screen.tables import show_table
    from deepseek.cli.verbs.train import find_own_task
    from deepseek.train.model_evaluation import evaluate_model

    wanted = find_own_task(task) or task
    with progress_on_errors() as show:
        report = evaluate_model(model, data, task=wanted, changes=parse_overrides(set or []), on_event=show)
    if data is None:
        sys.stderr.write(f"deepseek: note: measured on {report.data}\n")
    if json:
        from dataclasses import asdict
        from json import dumps

        sys.stdout.write(dumps(asdict(report)) + "\n")
        return
    metrics = report.metrics
    rows = [
        (name, f"{value:.4f}", f"{metrics[f'{name}_low']:.4f} to {metrics[f'{name}_high']:.4f}")
        if f"{name}_low" in metrics
        else (name, f"{value:.4f}", "")
        for name, value in metrics.items()
        if not name.endswith(("_low", "_high"))
    ]
    show_table(
        f"{model} on {report.data}: {report.num_units} {report.unit}", (report.task, "value", "95 % interval"), rows
    )
