"""A model for a backend: `load_model` with a backend ends here.

    module          ->  sample inputs  ->  select                                 ->  RunModel
    ONNX file       ->  converted, and its runtimes as further candidates  ->  select
    TensorFlow file ->  the one runtime that reads it

There is one way of choosing, `compiler/runtimes/selection.py`, which measures. An ONNX file has two ways of being run:
a runtime takes it as it is, with whatever int8 is in it, or it is converted and goes the way of modules. Both are
candidates of the same selection; where the file cannot be converted, the first runtime that takes it is the reference.
A runtime that is asked for by name takes the file without a search.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from deepseek.compiler.runtimes.backends.interface import BackendError, Built, Job, Variant
from deepseek.compiler.runtimes.selection import Selection, SelectionEvent, SelectionOptions, select
from deepseek.compiler.runtimes.selection_policy import AS_WRITTEN, AUTO, read_backend
from deepseek.core.caller_warnings import warn_caller
from deepseek.core.errors import ConfigError, PermanentError
from deepseek.models.loaded_model import Batch, LoadedModel, Origin, RunModel
from deepseek.models.model_sources import LoadConfig, Opened, draw_for_specs, is_onnx, open_source
from deepseek.models.programs import RUNTIMES, Program, run_onnx
from deepseek.models.sample_file import read_samples
from deepseek.models.yolov7.model import YOLOv7
from deepseek.models.yolov7.reparameterization import fold_
from deepseek.onnx.files import UnsupportedOperatorError, read_onnx

Listener = Callable[[SelectionEvent], None] | None
_UNCALIBRATED = "it is calibrated on inputs, and these were drawn at random; give samples, an .npz file of real ones"
_FILE_PRIOR = 5
"""Rank of the file as it is among candidates: before those that have to be exported first."""


def run_on_backend(
    source: str | Path, settings: LoadConfig, *, verify: bool = True, on_event: Listener = None
) -> LoadedModel:
    """Load the model that `source` names, run by the backend of `settings`.

    Raises `ConfigError` for an unknown backend and for one that cannot take the source, and `BackendError` for one that
    is not here or runs the model wrongly.
    """
    read_backend(str(settings.backend))
    settings = choose_half(settings)
    if is_onnx(Path(source)):
        return _load_onnx(Path(source), settings, on_event)
    opened = open_source(source, settings, verify=verify)
    if isinstance(opened.model, Program):
        return _load_program(opened, settings)
    return _select(opened, opened.model, settings, on_event)


def choose_half(settings: LoadConfig) -> LoadConfig:
    """fp16 where no unit computes in it: `auto` takes bf16 and says so, a named backend answers for itself."""
    if settings.precision != "fp16" or settings.backend != AUTO or has_half_arithmetic():
        return settings
    warn_caller(
        "fp16 was asked for and neither a GPU nor fp16 instructions are here; bf16 is used instead, which rounds to 8 "
        "bits where fp16 rounds to 11: ask for bf16 or fp32 to choose yourself"
    )
    return settings.override({"precision": "bf16"})


def _load_program(opened: Opened, settings: LoadConfig) -> LoadedModel:
    assert isinstance(opened.model, Program)
    if settings.backend not in (AUTO, opened.model.runtime):
        raise ConfigError(
            f"{opened.name} is run by {opened.model.runtime} only and backend {settings.backend!r} was asked for; "
            f"give '{AUTO}', or convert the model to ONNX"
        )
    return present_program(opened.model, opened.summary, _take_inputs(opened.draw_inputs(settings), settings)[0])


def present_program(program: Program, summary: str, inputs: Batch) -> RunModel:
    """A file that one runtime runs as it is, as a loaded model."""
    return RunModel(program, Origin(summary, partial(tuple, inputs), program.explain(), program.runtime), None)


def _select(
    opened: Opened,
    model: nn.Module,
    settings: LoadConfig,
    on_event: Listener,
    further: Mapping[str, Variant] = MappingProxyType({}),
) -> LoadedModel:
    """Return the fastest way to run `model`, `further` ways of running the file it was converted from included."""
    if settings.precision == "int8" and settings.samples is None:
        warn_caller(
            "int8 is calibrated on inputs that were drawn at random, which may be nothing like yours; give samples, an "
            ".npz file of real ones"
        )
    batches = _take_inputs(opened.draw_inputs(settings), settings)
    options = replace(_options_of(settings, opened.name, batches), further=further)
    selection = select(prepare(model.float()), batches[0], options, on_event=on_event)
    return _present(selection, opened.summary, batches[0], model, opened.folder)


def prepare(module: nn.Module) -> nn.Module:
    """Return `module` as it is best run: a copy of a YOLOv7 without what only training needs, others as they are."""
    if isinstance(module, YOLOv7) and not module.config.is_folded:
        return fold_(copy.deepcopy(module))
    return module


def _options_of(settings: LoadConfig, name: str, batches: Sequence[Batch]) -> SelectionOptions:
    assert settings.backend is not None
    return SelectionOptions(
        backend=settings.backend,
        precision=settings.precision,
        time_budget_s=settings.time_budget_s,
        tolerance=settings.tolerance,
        calibration=batches if len(batches) > 1 else (),
        name=name,
        excluded={} if settings.samples else {"int8": _UNCALIBRATED},
    )


def _present(
    selection: Selection, summary: str, inputs: Batch, module: nn.Module | None, folder: Path | None = None
) -> RunModel:
    origin = Origin(summary, partial(tuple, inputs), selection.explain(), str(selection.decision.chosen), folder)
    return RunModel(selection.model, origin, module)


def _load_onnx(path: Path, settings: LoadConfig, on_event: Listener) -> LoadedModel:
    """Open an ONNX file: by a named runtime as it is, or by the fastest of that and its conversion."""
    runs_as_it_is = settings.precision == "auto" or (settings.precision, settings.backend) == ("fp32", "openvino")
    if settings.backend in RUNTIMES and runs_as_it_is:
        read_onnx(path)  # refuses what is damaged, and weights outside the folder
        program = run_onnx(path, str(settings.backend), settings.precision)
        return present_program(program, f"{path}, an ONNX file", _take_for_program(program, settings))
    is_compared = settings.backend == AUTO and runs_as_it_is
    try:
        opened = open_source(path, settings)
    except UnsupportedOperatorError as error:
        if not is_compared:
            raise
        warn_caller(f"{error}: that is what is done now, and only runtimes that take the file are compared")
        return _select_program(path, settings, on_event)
    assert isinstance(opened.model, nn.Module)
    further = list_candidates(*open_programs(path)) if is_compared else {}
    return _select(opened, opened.model, settings, on_event, further)


def _select_program(path: Path, settings: LoadConfig, on_event: Listener) -> LoadedModel:
    """Return the fastest runtime for a file that cannot be converted; the first runtime is the reference."""
    programs, refused = open_programs(path)
    if not programs:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise ConfigError(f"nothing here runs {path} ({reasons}); export it again for one of them")
    program = next(iter(programs.values()))
    inputs = _take_for_program(program, settings)
    options = replace(
        _options_of(settings, str(path), [inputs]),
        precision=AS_WRITTEN,
        further=list_candidates(programs, refused),
        reference=f"{program.runtime}, which is the reference,",
    )
    selection = select(ProgramModule(program, path).eval(), inputs, options, on_event=on_event)
    return _present(selection, f"{path}, an ONNX file run as it is", inputs, None)


def open_programs(path: Path) -> tuple[dict[str, Program], dict[str, str]]:
    """Open the file on every runtime that takes it; return these, and why the others do not."""
    programs, refused = {}, {}
    for name in RUNTIMES:
        try:
            programs[name] = run_onnx(path, name)
        except PermanentError as error:
            refused[name] = str(error)
    return programs, refused


def list_candidates(programs: Mapping[str, Program], refused: Mapping[str, str]) -> dict[str, Variant]:
    """Return the file as it is, as one more candidate for each runtime; one that refuses it says why there."""
    builders: dict[str, Callable[[Job], Built]] = {
        **{name: partial(_build_program, program) for name, program in programs.items()},
        **{name: partial(_refuse, reason) for name, reason in refused.items()},
    }
    return {
        name: Variant("file", AS_WRITTEN, "the file as it is", builders[name], _FILE_PRIOR)
        for name in RUNTIMES
        if name in builders
    }


def _take_for_program(program: Program, settings: LoadConfig) -> Batch:
    return _take_inputs(draw_for_specs(program.inputs, settings), settings)[0]


def _take_inputs(drawn: Batch, settings: LoadConfig) -> list[Batch]:
    """Return batches of the user's samples, or the one that was drawn."""
    return read_samples(Path(settings.samples), drawn) if settings.samples else [drawn]


def _build_program(program: Program, job: Job) -> Built:
    kept = job.flattened.model.kept
    assert kept is not None

    def run(*inputs: Tensor) -> list[Tensor]:
        answers = program.run(program.bind(inputs, {}))
        return [answers[index] for index in kept]

    return Built(run, takes_any_shape=True)


def _refuse(reason: str, job: Job) -> Built:
    raise BackendError(reason)


class ProgramModule(nn.Module):
    """A file on a runtime in the form in which a selection takes its reference."""

    def __init__(self, program: Program, path: Path) -> None:
        super().__init__()
        self.program = program
        self.input_names = tuple(spec.name for spec in program.inputs)
        self.digest = hashlib.sha256(path.read_bytes()).hexdigest()

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        """Return the outputs of the file; inputs in order or by name."""
        return self.program(*inputs, **named)

    def extra_repr(self) -> str:
        return f"{self.program.runtime}, {self.digest}"  # by which a decision about it is remembered


def has_half_arithmetic() -> bool:
    """Return whether fp16 is as fast as fp32 here: there is a GPU, or a CPU with instructions for it."""
    return torch.cuda.is_available() or bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
