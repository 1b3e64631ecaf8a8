"""`deepseek quickstart`: the main job, shown while it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from deepseek.core.allocator import keep_freed_memory
from deepseek.core.config import parse_overrides
from deepseek.core.extras import require

# Optional libraries that the end of the job needs -> the extra that brings each.
_LIBRARIES = {
    "matplotlib": "train",
    "plotext": "train",
    "starlette": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
}


def quickstart(
    *,
    folder: Path = Path("runs/quickstart"),
    set: Annotated[list[str] | None, Parameter(name=["--set", "-s"])] = None,
    json: bool = False,
) -> None:
    """Train a small language model on Python's own source code, make it int8, serve it, and report.

    Takes a few minutes on two cores. FOLDER/report.json has the numbers, FOLDER/loss.png the picture, FOLDER/model and
    FOLDER/model-int8 the artifacts. Stopped with Ctrl-C, the same command goes on where it was.

    Example: deepseek quickstart --folder runs/short --set num_steps=100

    Parameters
    ----------
    folder
        Where everything goes.
    set
        One training setting to change, as KEY=VALUE with dots between levels; may be given several times.
    json
        Print events as JSON lines instead of progress bars.
    """
    for library, extra in _LIBRARIES.items():
        require(library, extra=extra)  # now, and not when minutes of work are done
    from deepseek.cli.screen.events import follow
    from deepseek.cli.screen.report import show_summary
    from deepseek.recipes.main_job import EVENTS_FILE, ReportWritten, run_main_job
    from deepseek.recipes.quickstart import quickstart as recipe
    from deepseek.train.events import read_events, steps_by_number

    config = recipe().override({"folder": str(folder)} | parse_overrides(set or []))
    keep_freed_memory()
    last = follow(run_main_job(config), as_json=json)
    assert isinstance(last, ReportWritten)
    steps = steps_by_number(read_events(Path(config.folder) / EVENTS_FILE))
    losses = {number: step["loss"] for number, step in steps.items()}
    show_summary(last.report, losses, Path(config.folder), as_json=json)
