"""`deepseek advise`: which generation fits, which rule decided, and what would change the answer."""

from __future__ import annotations

import sys
from typing import Literal

# Devices of today have megabytes to a terabyte; anything else is a slip of the unit.
_LEAST_MEMORY_BYTES, _MOST_MEMORY_BYTES = 1_000_000, 10**13
_LEAST_PARAMS = 1000


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

    A generation is one of the versions 1.0 to 6.0 of the engine that this product was built from: a set of abilities
    with a form of config and of checkpoints, and no version of this product, which reads and reproduces all of them
    (docs/reference/generations.md). Answers cite the documents that describe them: [D0] compares 2.0 to 3.5, [D1] is
    the guide to choosing and upgrading, [D2] the release notes of 3.1, [D3] a history of 1.0 to 3.0, [D4] the
    requirements of an installation; [house] is a decision of this project.

    Example: deepseek advise --params 7B --gpu-memory 24GB --latency realtime

    Parameters
    ----------
    params
        Parameters of the model: 7e9 or 7B.
    gpu_memory
        Memory of one device: 24GB. A number such as 24 counts gigabytes.
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
    from deepseek.compat.generations import name_documents

    advice = find(
        params=None if params is None else _parse_params(params),
        gpu_memory_bytes=None if gpu_memory is None else _parse_memory(gpu_memory),
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
    told = [advice.because, *(reason.because for reason in (*advice.runners_up, *advice.ruled_out))]
    told += [change.because for change in advice.changes]
    sys.stdout.write(f"{name_documents(told)}\n")


def _parse_params(text: str) -> int:
    from deepseek.core.errors import ConfigError
    from deepseek.core.units import parse_count

    params = parse_count(text)
    if params < _LEAST_PARAMS:
        raise ConfigError(f"--params {text} is a model of {params} parameters; write billions as 7B or 7e9")
    return params


def _parse_memory(text: str) -> int:
    """Read the memory of a device, whose bare number counts gigabytes: no device has 24 bytes."""
    from deepseek.core.errors import ConfigError
    from deepseek.core.units import format_bytes, parse_bytes

    is_bare = text.strip().replace(".", "", 1).isdecimal()
    memory_bytes = parse_bytes(f"{text.strip()}GB" if is_bare else text)
    if not _LEAST_MEMORY_BYTES <= memory_bytes <= _MOST_MEMORY_BYTES:
        raise ConfigError(
            f"--gpu-memory {text} is {format_bytes(memory_bytes)}; a device has {format_bytes(_LEAST_MEMORY_BYTES)} to "
            f"{format_bytes(_MOST_MEMORY_BYTES)}, write it as 24GB"
        )
    return memory_bytes
