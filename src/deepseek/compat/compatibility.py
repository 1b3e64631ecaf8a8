"""Compatibility of a machine: every property judged, every generation judged, each failing line with its next step.

`deepseek-cli check-compatibility` prints it; `get_version_info` is its small sibling. The rules are functions of the
frozen `Machine` and of the table's requirements, so a machine of any kind can be judged in a test.

What a generation asks for is what the documents name for it, and no condition of this product, which trains, converts
and serves wherever the lines about the machine are fine; so a generation is `unmet`, never `failing`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal

import deepseek
from deepseek.compat.generations import FrameworkGeneration, find_generation, load_table
from deepseek.compat.machine_probe import COMPILERS, CPU_FEATURES, RUNTIMES, Machine, probe_machine
from deepseek.core.config import Config
from deepseek.core.units import format_bytes

Status = Literal["ok", "absent", "unmet", "failing"]

CURRENT_GENERATION = "5.0"
_MIN_PYTHON, _MIN_TORCH = "3.11", "2.11"
_MIN_SHARED_MEMORY_BYTES = 1_000_000_000
_MIN_FILE_DESCRIPTORS = 4096


class Check(Config):
    """One line of the report: a property, what was seen, and what to do about it."""

    name: str
    seen: str
    status: Status
    """`absent` is optional and not there, `unmet` is asked for by the documents of a generation only, and `failing`
    keeps something from running."""
    next_step: str | None = None


def check_compatibility(machine: Machine | None = None) -> tuple[Check, ...]:
    """Judge `machine`, or the one this runs on, property by property and generation by generation."""
    machine = machine or probe_machine()
    released = [generation for generation in load_table().generations if generation.status == "released"]
    return (
        *_check_machine(machine),
        *(_check_generation(generation, machine) for generation in released),
    )


def get_version_info() -> dict[str, Any]:
    """Describe what runs here: `version`, `cuda_version`, `recommended_gpu` and `new_features`.

    `cuda_version` is the runtime of torch where a CUDA device can be used, else `None`; `recommended_gpu` is the device
    of this machine with the most memory, else `None`; `new_features` are those of the current generation.
    """
    machine = probe_machine()
    gpus = sorted(machine.gpus, key=lambda gpu: gpu.memory_bytes)
    features = [feature.text for feature in find_generation(CURRENT_GENERATION).capabilities.features]
    return {
        "version": deepseek.__version__,
        "cuda_version": machine.torch_cuda if gpus else None,
        "recommended_gpu": gpus[-1].name if gpus else None,
        "new_features": [feature for feature in features if "TVM" not in feature or "TVM" in machine.runtimes],
    }


def is_at_least(version: str, least: str) -> bool:
    """Whether one dotted version is not below another; letters after the numbers do not count.

    >>> is_at_least("11.10", "11.6"), is_at_least("2.11.0+cpu", "2.11")
    (True, True)
    """
    parts, least_parts = _numbers(version), _numbers(least)
    width = max(len(parts), len(least_parts))
    return parts + [0] * (width - len(parts)) >= least_parts + [0] * (width - len(least_parts))


def _numbers(version: str) -> list[int]:
    match = re.match(r"v?([0-9]+(?:\.[0-9]+)*)", version)
    return [int(number) for number in match[1].split(".")] if match else [0]


def _check_machine(machine: Machine) -> Iterator[Check]:
    yield Check(name="deepseek", seen=deepseek.__version__, status="ok")
    yield _at_least("Python", machine.python, _MIN_PYTHON, f"install Python {_MIN_PYTHON} or later")
    yield _at_least("torch", machine.torch, _MIN_TORCH, f"pip install 'torch>={_MIN_TORCH}'")
    build = f"CUDA {machine.torch_cuda}" if machine.torch_cuda else f"ROCm {machine.torch_rocm}"
    is_cpu_build = not (machine.torch_cuda or machine.torch_rocm)
    if machine.gpus and is_cpu_build:
        yield _failing("torch build", "CPU only, although there is a GPU", "install the CUDA or ROCm build of torch")
    else:
        yield Check(name="torch build", seen="CPU" if is_cpu_build else build, status="ok")
    for gpu in machine.gpus:
        seen = f"{gpu.name}, {format_bytes(gpu.memory_bytes)}, compute capability {gpu.compute_capability or 'unknown'}"
        yield Check(name="GPU", seen=seen, status="ok")
    if not machine.gpus:
        yield _absent("GPU", "none found", "runs on the CPU; for a GPU install its driver and see `nvidia-smi`")
    yield _optional("CUDA driver", machine.cuda_driver, "needed for NVIDIA devices only")
    yield _optional("NCCL", machine.nccl, "needed between GPUs only; gloo runs on CPUs")
    yield Check(name="memory", seen=format_bytes(machine.memory_bytes), status="ok")
    for name in CPU_FEATURES:
        is_there = name in machine.cpu_features
        yield (
            Check(name=f"CPU {name}", seen="yes", status="ok")
            if is_there
            else _absent(f"CPU {name}", "no", "16 and 8 bit arithmetic is slower on this processor")
        )
    compilers = ", ".join(machine.compilers)
    yield (
        Check(name="compilers", seen=compilers, status="ok")
        if machine.compilers
        else _failing("compilers", "none", f"compiled graphs need one of {', '.join(COMPILERS)}: install g++")
    )
    yield from _check_limits(machine)
    for name in RUNTIMES.values():
        yield _optional(name, "installed" if name in machine.runtimes else None, f"optional backend: install {name}")
    if machine.has_kubeconfig and machine.kubernetes is None:
        yield _failing("Kubernetes", "a kubeconfig, but no answer", "see `kubectl version` and the cluster's address")
    else:
        yield _optional("Kubernetes", machine.kubernetes, "needed for 4.x: set KUBECONFIG to a cluster's config")


def _check_limits(machine: Machine) -> Iterator[Check]:
    shared, descriptors = machine.shared_memory_bytes, machine.num_file_descriptors
    if shared is not None and shared < _MIN_SHARED_MEMORY_BYTES:
        step = "data workers pass batches through it: docker run --shm-size=8g, or mount /dev/shm larger"
        yield _failing("shared memory", format_bytes(shared), step)
    else:
        yield _optional("shared memory", None if shared is None else format_bytes(shared), "no /dev/shm here")
    if descriptors is not None and descriptors < _MIN_FILE_DESCRIPTORS:
        yield _failing(
            "file descriptors", str(descriptors), f"many connections need more: ulimit -n {_MIN_FILE_DESCRIPTORS * 16}"
        )
    else:
        yield _optional(
            "file descriptors", None if descriptors is None else str(descriptors), "no limit to be read here"
        )


def _check_generation(generation: FrameworkGeneration, machine: Machine) -> Check:
    """Whether the machine meets what the documents ask for; several unmet ones are reported together."""
    name, missing = f"meets {generation.name}", list(_missing(generation, machine))
    if not missing:
        return Check(name=name, seen="yes", status="ok")
    seen, steps = "; ".join(seen for seen, _ in missing), "; ".join(step for _, step in missing)
    return Check(name=name, seen=f"no: {seen}", status="unmet", next_step=steps)


def _known_bad(generation: FrameworkGeneration, machine: Machine) -> Iterator[tuple[str, str]]:
    """Yield the pairs of CUDA and driver that the documents know to fail with a generation."""
    for bad in load_table().known_bad:
        is_cuda = machine.torch_cuda is not None and _numbers(machine.torch_cuda)[:2] == _numbers(bad.cuda)
        is_old = machine.cuda_driver is not None and not is_at_least(machine.cuda_driver, bad.driver_below)
        if bad.generation == generation.name and is_cuda and is_old:
            seen = f"CUDA {machine.torch_cuda} with driver {machine.cuda_driver} raises {bad.symptom}"
            yield seen, str(bad.fix)


def _missing(generation: FrameworkGeneration, machine: Machine) -> Iterator[tuple[str, str]]:
    needs = generation.requirements
    is_rocm_enough = (
        needs.rocm is not None and machine.torch_rocm is not None and is_at_least(machine.torch_rocm, needs.rocm)
    )
    if needs.cuda and not is_rocm_enough:
        choice = f"CUDA {needs.cuda}" + (f" or ROCm {needs.rocm}" if needs.rocm else "")
        if machine.torch_cuda is None or not machine.gpus:
            yield "no CUDA device", f"use a GPU with {choice} or later"
        elif not is_at_least(machine.torch_cuda, needs.cuda):
            yield f"CUDA {machine.torch_cuda}", f"install torch for {choice} or later"
    yield from _known_bad(generation, machine)
    if needs.nccl and machine.nccl and not is_at_least(machine.nccl, needs.nccl):
        yield f"NCCL {machine.nccl}", f"install NCCL {needs.nccl} or later"
    if needs.kubernetes and machine.kubernetes is None:
        yield "no Kubernetes cluster", f"set KUBECONFIG to a cluster of Kubernetes {needs.kubernetes} or later"
    elif needs.kubernetes and machine.kubernetes and not is_at_least(machine.kubernetes, needs.kubernetes):
        yield f"Kubernetes {machine.kubernetes}", f"upgrade the cluster to {needs.kubernetes} or later"
    largest = max((gpu.memory_bytes for gpu in machine.gpus), default=machine.memory_bytes)
    if needs.gpu_memory_gb and largest < needs.gpu_memory_gb * 1e9:
        yield f"{format_bytes(largest)} of memory", f"needs {needs.gpu_memory_gb:g} GB; the quantised form needs less"


def _at_least(name: str, seen: str | None, least: str, next_step: str) -> Check:
    if seen is not None and is_at_least(seen, least):
        return Check(name=name, seen=seen, status="ok")
    return _failing(name, seen or "not installed", next_step)


def _optional(name: str, seen: str | None, next_step: str) -> Check:
    return _absent(name, "none", next_step) if seen is None else Check(name=name, seen=seen, status="ok")


def _absent(name: str, seen: str, next_step: str) -> Check:
    return Check(name=name, seen=seen, status="absent", next_step=next_step)


def _failing(name: str, seen: str, next_step: str) -> Check:
    return Check(name=name, seen=seen, status="failing", next_step=next_step)
