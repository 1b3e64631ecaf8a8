"""The ways of running a model that are compared, by generation or by backend and precision; pure policy.

A generation of the engine is reproduced by today's: its profile (`compat/generations.py`) says which arithmetic it had,
how many bits its weights, whether its graphs were compiled and how. A profile asks for hardware of its time, so where
this device has no such arithmetic the nearest that it has is taken, and the row says so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from deepseek.bench.baselines import Row
from deepseek.compat.generations import Profile, profile

# The documents' own table, oldest first.
DOCUMENTED = ("v1.2", "v2.3", "v3.1", "v4.2", "v5.0")

_BACKENDS = {"none": "eager", "dynamic": "inductor", "static": "inductor", "autotune": "auto"}
_NEAREST = {"fp16": "bf16", "bf16": "fp32", "tf32": "fp32", "int4": "int8", "int8": "bf16", "dynamic": "bf16"}


@dataclass(frozen=True)
class Subject:
    """One row: `backend` and `precision` as `load_model` takes them, and in `note` what differs from the name."""

    name: str
    backend: str
    precision: str
    note: str = ""


def subjects_of_generations(names: Iterable[str], native: Collection[str]) -> list[Subject]:
    """A subject for each generation, on a device whose arithmetic is `native`.

    Raises `ConfigError` for an unknown generation and for one that has no profile.

    >>> [subject.precision for subject in subjects_of_generations(["v1.2", "v4.2"], {"fp32", "bf16", "int8"})]
    ['fp32', 'bf16']
    """
    return [_as_on_this_device(name, profile(name), native) for name in names]


def subjects_of_pairs(backends: Iterable[str], precisions: Iterable[str]) -> list[Subject]:
    """Every backend with every precision."""
    precisions = list(precisions)
    return [Subject(f"{backend} {precision}", backend, precision) for backend in backends for precision in precisions]


def explain_slower(row: Row, rows: Iterable[Row], reason: str) -> str:
    """Say why a row that chose by measurement is slower than another one; nothing where it is the fastest.

    `reason` is the report of its choice: a line for each way of running that was measured, and for each refused one.
    """
    measured = [(other.latency_ms, other) for other in rows if other.latency_ms is not None]
    if row.backend != "auto" or row.latency_ms is None or not measured:
        return ""
    fastest_ms, faster = min(measured, key=lambda pair: pair[0])
    if fastest_ms >= row.latency_ms:
        return ""
    pair = f"{faster.backend} {faster.precision}"
    ahead = f"{row.latency_ms / fastest_ms:.2f} times as slow as {faster.name}, which is {pair}"
    refused = []
    for line in reason.splitlines():
        fate = next((word for word in ("refused", "not tried") if line.startswith(f"{word}: ")), None)
        candidate, _, why = line.removeprefix(f"{fate}: ").partition(": ")
        words = candidate.split()
        if words[:1] != [faster.backend] or faster.precision not in words:
            continue
        if fate is None and len(words) > 3:
            return f"{ahead}: that was measured as well, and lost ({words[3]} ms) when the choice was made"
        refused += [f"{candidate} was {fate}: {why}"] if fate else []
    if refused:
        return f"{ahead}: {refused[0]}"
    if faster.precision == "int8":
        return f"{ahead}: int8 is not tried without real inputs to calibrate it on and to check it with; give --data"
    return f"{ahead}: that was not among what was tried"


def _as_on_this_device(name: str, wanted: Profile, native: Collection[str]) -> Subject:
    backend = _BACKENDS[wanted.compile]
    if backend == "auto":
        return Subject(name, backend, "auto", "every backend and precision that is correct, the fastest by measurement")
    asked = wanted.precision if wanted.quantization == "none" else wanted.quantization
    subject = Subject(name, backend, asked)
    while subject.precision not in native:
        subject = replace(subject, precision=_NEAREST[subject.precision])
    if subject.precision == asked:
        return subject
    return replace(subject, note=f"{asked} of that generation runs as {subject.precision} here")
