"""Apache TVM: the exported graph through Relax, for this very processor, with kernels that are tuned when there is
time.

TVM has no kernels of its own for a CPU: what it generates is right and, untuned, two orders of magnitude too slow (8.6
s for a ResNet-50 that eager answers in 0.07 s), which measuring shows at once. Its speed comes from tuning:
MetaSchedule compiles and times schedules for each distinct layer. That takes `SECONDS_PER_TRIAL` each and tens of
trials for every layer, most of an hour for ResNet-50, so it is done only in the time that `select(..., tuning_s=...)`
gives it.

Targets are dictionaries since 0.20, when the names with dashes went, and with them the torch backend for TVM.
Source: Shao et al. 2022 ("Tensor program optimization with probabilistic programs"), for MetaSchedule.
"""

from __future__ import annotations

import math
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from deepseek.compiler.runtimes.backends.interface import Backend, BackendError, Built, Job, Missing, Variant, quiet
from deepseek.core.extras import DISTRIBUTION, has_library, require

SECONDS_PER_TRIAL = 1.5
TRIALS_PER_TASK = 64
ALIGNMENT_BYTES = 64  # which torch gives its own tensors
SEED = 0


def find_missing() -> Missing | None:
    """The compiler."""
    return None if has_library("tvm") else Missing("apache-tvm", f"pip install '{DISTRIBUTION}[compile]'")


def run_untuned(job: Job) -> Built:
    """Return the model with TVM's default schedules."""
    library = require("tvm", extra="compile")
    return _build(library, _import(job), job, notes=("default schedules",))


def run_tuned(job: Job) -> Built:
    """Return the model with schedules that were tried out in the time that the job gives for it."""
    library = require("tvm", extra="compile")
    module = _prepare(library, _import(job))
    num_tasks = count_tasks(library, module)
    if job.tuning_s <= 0:
        cost_s = num_tasks * TRIALS_PER_TASK * SECONDS_PER_TRIAL
        raise BackendError(
            f"tuning its {num_tasks} kernels with {TRIALS_PER_TASK} trials each takes about {cost_s / 60:.0f} minutes; "
            "give the seconds it may take as tuning_s"
        )
    num_trials = max(num_tasks, int(job.tuning_s / SECONDS_PER_TRIAL))
    tuned = tune(library, module, num_trials, math.ceil(num_trials / num_tasks))
    return _build(library, tuned, job, notes=(f"{num_trials} trials for {num_tasks} kernels",))


def find_target(library: Any) -> Any:
    """This processor with as many cores as torch has threads."""
    processor = library.target.codegen.llvm_get_system_cpu()
    return library.target.Target({"kind": "llvm", "mcpu": processor, "num-cores": torch.get_num_threads()})


def count_tasks(library: Any, module: Any) -> int:
    """Return the number of distinct kernels that tuning would work on."""
    integration = require("tvm.s_tir.meta_schedule.relax_integration", extra="compile")
    with quiet():
        return len(integration.extract_tasks(module, find_target(library), {}))


def tune(library: Any, module: Any, num_trials: int, num_trials_per_task: int) -> Any:
    """`module` with the best schedules of `num_trials` trials; the search needs no other library than TVM."""
    integration = require("tvm.s_tir.meta_schedule.relax_integration", extra="compile")
    relax = require("tvm.relax", extra="compile")
    target = find_target(library)
    with tempfile.TemporaryDirectory(prefix="deepseek-tvm-") as folder, quiet():
        integration.tune_relax(
            module,
            {},
            target,
            folder,
            max_trials_global=num_trials,
            max_trials_per_task=num_trials_per_task,
            num_trials_per_iter=min(TRIALS_PER_TASK, num_trials_per_task),
            cost_model="random",
            seed=SEED,
        )
        with target:
            return relax.transform.MetaScheduleApplyDatabase(folder)(module)


class VirtualMachine:
    """TVM's virtual machine over torch's own memory; one call at a time."""

    def __init__(self, library: Any, executable: Any) -> None:
        self.library = library
        self.machine = require("tvm.relax", extra="compile").VirtualMachine(executable, library.cpu())
        self.lock = threading.Lock()

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        arrays = [self.library.runtime.from_dlpack(_align(tensor.detach().contiguous())) for tensor in inputs]
        with self.lock:
            answer = self.machine["main"](*arrays)
        return [from_dlpack(array) for array in answer]


def _align(tensor: Tensor) -> Tensor:
    """Return `tensor`, or a copy where its memory begins elsewhere than TVM asks for: arrays, rows of a tensor."""
    return tensor if tensor.data_ptr() % ALIGNMENT_BYTES == 0 else tensor.clone()


def _import(job: Job) -> Any:
    frontend = require("tvm.relax.frontend.torch", extra="compile")
    program = job.export()
    make: Callable[[], Any] = lambda: frontend.from_exported_program(program, keep_params_as_input=False)  # noqa: E731
    return job.once("tvm", make)


def _prepare(library: Any, module: Any) -> Any:
    """Return the operators as loops, neighbours fused: what tuning starts from."""
    relax = require("tvm.relax", extra="compile")
    steps = (
        relax.transform.DecomposeOpsForInference(),
        relax.transform.CanonicalizeBindings(),
        relax.get_pipeline("zero"),
    )
    with find_target(library):
        return library.transform.Sequential(list(steps))(module)


def _build(library: Any, module: Any, job: Job, notes: tuple[str, ...]) -> Built:
    with quiet():
        executable = library.compile(module, target=find_target(library))
    return Built(VirtualMachine(library, executable), notes=notes)


BACKEND = Backend(
    name="tvm",
    summary="Apache TVM through Relax",
    find_missing=find_missing,
    variants=(
        Variant("default", "fp32", "default schedules", run_untuned, 95),
        Variant("tuned", "fp32", "schedules tried out by MetaSchedule", run_tuned, 96),
    ),
    unsupported={
        "bf16": "its schedules for a CPU know no bf16 matmuls",
        "fp16": "its schedules for a CPU know no fp16 matmuls",
        "int8": "its importer takes no quantized graphs of torch",
    },
)
