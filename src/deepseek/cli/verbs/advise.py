"""`deepseek advise`: which generation fits, which rule decided, and what would change the answer."""

from __future__ import annotations

import sys
from typing import Literal


def advise(
    *,
    params: str | None = None,
    gpu_memory: str | None = None,
    latency: Literal["realtime", "batch"] | None = None,
    scale: Literal["single", "cluster"] | None = None,
    kubernetes: Literal["none", "basic", "expert"] | None = None,
    hardware: str | None = None,
    json: bool = False,
) -> None:
    """Recommend a generation for a model and the hardware it runs on.

    Example: deepseek advise --params 7B --gpu-memory 24GB --latency realtime

    Parameters
    ----------
    params
        Parameters of the model: 7e9 or 7B.
    gpu_memory
        Memory of one device: 24GB.
    latency
        `realtime` when somebody waits for each answer, else `batch`.
    scale
        A `single` machine or a `cluster`.
    kubernetes
        How well the team knows Kubernetes.
    hardware
        A device by name: a100, mi300, raspberry-pi, cpu and so on.
    json
        Print the whole advice as JSON.
    """
    from deepseek.cli.screen.tables import show_table
    from deepseek.compat.advice import advise as find
    from deepseek.core.units import parse_bytes, parse_count

    advice = find(
        params=None if params is None else parse_count(params),
        gpu_memory_bytes=None if gpu_memory is None else parse_bytes(gpu_memory),
        latency=latency,
        scale=scale,
        kubernetes=kubernetes,
        hardware=hardware,
    )
    if json:
        sys.stdout.write(advice.model_dump_json() + "\n")
        return
    sys.stdout.write(f"Generation {advice.generation}, by rule {advice.rule}: {advice.because}\n")
    changes = [
        (f"{change.setting}: {change.value} -> {change.generation}", change.because) for change in advice.changes
    ]
    for title, rows in (
        ("Runners-up", [(reason.generation, reason.because) for reason in advice.runners_up]),
        ("Ruled out", [(reason.generation, reason.because) for reason in advice.ruled_out]),
        ("Would change the answer", changes),
    ):
        if rows:
            show_table(title, ("", ""), [(name, str(because)) for name, because in rows])
