"""`deepseek quickstart`: the main job, shown while it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from deepseek.core.config import parse_overrides


def quickstart(
    *,
    folder: Path = Path("runs/quickstart"),
    set: Annotated[list[str] | None, Parameter(name=["--set", "-s"])] = None,  # noqa: A002
    json: bool = False,
) -> None:
    """Train a small language model on Python's own source code, make it int8, serve it, and report.

    Takes a few minutes on two cores. FOLDER/report.json has the numbers, FOLDER/loss.png the picture, FOLDER/model and
    FOLDER/model-int8 the artifacts. Stopped with Ctrl-C, the same command goes on where it was.

    Parameters
    ----------
    folder
        Where everything goes.
    set
        One training setting to change, as KEY=VALUE with dots between levels; may be given several times.
    json
        Print events as JSON lines instead of progress bars.
    """
    from deepseek.cli.showing import follow, show_summary
    from deepseek.recipes.main_job import EVENTS_FILE, ReportWritten, run_main_job
    from deepseek.recipes.quickstart import quickstart as recipe

    config = recipe().override({"folder": str(folder)} | parse_overrides(set or []))
    last = follow(run_main_job(config), as_json=json)
    if isinstance(last, ReportWritten):
        show_summary(last.report, Path(config.folder), Path(config.folder) / EVENTS_FILE, as_json=json)
