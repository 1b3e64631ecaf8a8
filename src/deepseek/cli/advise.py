"""`deepseek advise`: which generation fits, which rule decided, and what would change the answer."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deepseek.compat.advising import Advice, advise
from deepseek.core.units import parse_bytes, parse_count


def run(
    *,
    params: str | None = None,
    gpu_memory: str | None = None,
    latency: Literal["realtime", "batch"] | None = None,
    scale: Literal["single", "cluster"] | None = None,
    kubernetes: Literal["none", "basic", "expert"] | None = None,
    hardware: str | None = None,
    as_json: Annotated[bool, Parameter(name="--json")] = False,
) -> int:
    """Recommend a generation for a model and the place it runs in.

    Parameters
    ----------
    params
        Parameters of the model: 7e9 or 7B.
    gpu_memory
        Memory of one device: 24GB.
    latency
        realtime when somebody waits for each answer, else batch.
    scale
        single machine or cluster.
    kubernetes
        How well the team knows Kubernetes.
    hardware
        A device by name: a100, mi300, raspberry-pi, cpu and so on.
    as_json
        Print one JSON object instead of tables.
    """
    advice = advise(
        params=None if params is None else parse_count(params),
        gpu_memory_bytes=None if gpu_memory is None else parse_bytes(gpu_memory),
        latency=latency,
        scale=scale,
        kubernetes=kubernetes,
        hardware=hardware,
    )
    if as_json:
        print(json.dumps(advice.to_dict(), indent=2))
    else:
        _show(advice, Console())
    return 0


def _show(advice: Advice, console: Console) -> None:
    console.print(f"Generation {advice.generation}, by rule {advice.rule}: {advice.because}", markup=False)
    changes = [(f"{each.setting}: {each.value} -> {each.generation}", each.because) for each in advice.changes]
    for title, rows in (
        ("Runners-up", [(each.generation, each.because) for each in advice.runners_up]),
        ("Ruled out", [(each.generation, each.because) for each in advice.ruled_out]),
        ("Would change the answer", changes),
    ):
        table = Table(title=title, title_justify="left", show_header=False)
        for name, because in rows:
            table.add_row(name, Text(str(because)))
        if rows:
            console.print(table)
