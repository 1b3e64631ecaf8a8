"""The ways of running a model that are compared, by generation or by backend and precision; pure policy.

A generation of the engine is reproduced by today's: its profile (`compat/generations.py`) says which arithmetic it had,
how many bits its weights, whether its graphs were compiled and how. A profile asks for hardware of its time, so where
this device has no such arithmetic the nearest that it has is taken, and the row says so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

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
