"""A model as a backend runs it: `load_model` with a backend ends here.

    module, Program  ->  sample inputs  ->  compiler.select, or a runtime on the file itself  ->  LoadedModel

What is a module goes to `select`, which measures. An ONNX file has two ways: a runtime takes the file as it is, with
whatever int8 is in it, or it is converted and goes the way of modules; `auto` tries both and takes the faster one. A
TensorFlow file has the one runtime that reads it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepseek.compiler.runtimes.selection import SelectionEvent, read_backend, select
from deepseek.core.caller_warnings import warn_caller
from deepseek.core.errors import ConfigError, PermanentError
from deepseek.models.model_sources import LoadConfig, Opened, is_onnx, open_source
from deepseek.models.programs import RUNTIMES, Program, run_onnx
from deepseek.models.sample_file import Batch, read_samples
from deepseek.onnx.files import UnsupportedOperatorError, draw_inputs, read_onnx

AUTO = "auto"
Listener = Callable[[SelectionEvent], None] | None
_UNCALIBRATED = "it is calibrated on inputs, and these were drawn at random; give samples, an .npz file of real ones"
_FILE_TOLERANCE = 0.05  # of a file that a runtime runs as it is, against the same file in PyTorch
_ROUNDS = 7


@dataclass(frozen=True)
class LoadedModel:
    """A model as the chosen backend runs it; called like the model itself."""

    summary: str
    """What it is and where its weights come from, random ones above all."""
    run: Callable[..., Any]
    """What a call runs."""
    sample_inputs: tuple[Tensor, ...]
    """The inputs that it was measured with."""
    reason: str
    """Why this backend, with what was measured and refused."""
    choice: str
    """The backend that was taken, in a few words."""
    module: nn.Module | None = None
    """The plain module, for training and for saving; none for a file that only a runtime can run."""

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The answer of the model."""
        return self.run(*inputs, **named)

    def explain(self) -> str:
        """What the model is, who runs it, what it was measured with, and why."""
        shapes = ", ".join(str(tuple(each.shape)) for each in self.sample_inputs)
        return f"{self.summary}\nsample inputs: {shapes}\n{self.reason}"


def run_on_backend(
    source: str | Path, settings: LoadConfig, *, verify: bool = True, on_event: Listener = None
) -> LoadedModel:
    """The model that `source` names, run by the backend of `settings`.

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
    program = opened.model
    inputs = _take_inputs(opened.draw_inputs(settings), settings)[0]
    return LoadedModel(opened.summary, program, inputs, program.explain(), program.runtime)


def _select(opened: Opened, model: nn.Module, settings: LoadConfig, on_event: Listener) -> LoadedModel:
    inputs, *further = _take_inputs(opened.draw_inputs(settings), settings)
    assert settings.backend is not None
    if settings.precision == "int8" and settings.samples is None:
        warn_caller(
            "int8 is calibrated on inputs that were drawn at random, which may be nothing like yours; give samples, an "
            ".npz file of real ones"
        )
    selection = select(
        model.float(),
        inputs,
        backend=settings.backend,
        precision=settings.precision,
        time_budget_s=settings.time_budget_s,
        tolerance=settings.tolerance,
        calibration=(inputs, *further) if further else (),
        name=opened.name,
        excluded={} if settings.samples else {"int8": _UNCALIBRATED},
        on_event=on_event,
    )
    return LoadedModel(
        opened.summary, selection.model, inputs, selection.explain(), str(selection.decision.chosen), model
    )


def _load_onnx(path: Path, settings: LoadConfig, on_event: Listener) -> LoadedModel:
    """An ONNX file: by a runtime as it is, converted, or for `auto` whichever is faster."""
    runs_as_it_is = settings.precision == "auto" or (settings.precision, settings.backend) == ("fp32", "openvino")
    if settings.backend in RUNTIMES and runs_as_it_is:
        read_onnx(path)  # refuses what is damaged, and weights outside the folder
        program = run_onnx(path, str(settings.backend), settings.precision)
        return LoadedModel(
            f"{path}, an ONNX file", program, _take_for_program(program, settings), program.explain(), program.runtime
        )
    try:
        opened = open_source(path, settings)
    except UnsupportedOperatorError as error:
        if settings.backend != AUTO or not runs_as_it_is:
            raise
        warn_caller(f"{error}: that is what is done now, and only runtimes that take the file are compared")
        return _fastest_program(path, settings, None)
    assert isinstance(opened.model, nn.Module)
    loaded = _select(opened, opened.model, settings, on_event)
    return _fastest_program(path, settings, loaded) if settings.backend == AUTO and runs_as_it_is else loaded


def _fastest_program(path: Path, settings: LoadConfig, converted: LoadedModel | None) -> LoadedModel:
    """The fastest of the installed runtimes on the file itself and, where there is one, the converted model."""
    programs, refused = _open_programs(path)
    if not programs and converted is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise ConfigError(f"nothing here runs {path} ({reasons}); export it again for one of them")
    inputs = converted.sample_inputs if converted else _take_for_program(next(iter(programs.values())), settings)
    reference: Any = converted.module if converted else next(iter(programs.values()))
    runners: dict[str, Callable[..., Any]] = {}
    for name, program in programs.items():
        error = _relative_error(program, reference, inputs)
        if error <= (settings.tolerance or _FILE_TOLERANCE):
            runners[name] = program
        else:
            refused[name] = f"relative error {error:.3g}"
    if converted:
        runners["converted"] = converted.run
    medians_ms = _time(runners, inputs)
    best = min(medians_ms, key=lambda name: medians_ms[name])
    reason = _explain_choice(best, medians_ms, refused) + (f"\nconverted: {converted.reason}" if converted else "")
    summary = converted.summary if converted and best == "converted" else f"{path}, an ONNX file run as it is"
    return LoadedModel(summary, runners[best], inputs, reason, best, converted.module if converted else None)


def _open_programs(path: Path) -> tuple[dict[str, Program], dict[str, str]]:
    """The file on every runtime that takes it, and why the others do not."""
    programs, refused = {}, {}
    for name in RUNTIMES:
        try:
            programs[name] = run_onnx(path, name)
        except PermanentError as error:
            refused[name] = str(error)
    return programs, refused


def _explain_choice(best: str, medians_ms: Mapping[str, float], refused: Mapping[str, str]) -> str:
    ranked = sorted(medians_ms, key=lambda name: medians_ms[name])
    lines = [f"{name}: {medians_ms[name]:.2f} ms" for name in ranked]
    lines += [f"{name} refused: {reason}" for name, reason in refused.items()]
    return f"{best} is the fastest ({'; '.join(lines)})"


def _take_for_program(program: Program, settings: LoadConfig) -> Batch:
    drawn = draw_inputs(
        program.inputs, settings.shapes, batch_size=settings.batch_size, sequence_length=settings.sequence_length
    )
    return _take_inputs(drawn, settings)[0]


def _take_inputs(drawn: Batch, settings: LoadConfig) -> list[Batch]:
    """Batches of the user's samples, or the one that was drawn."""
    return read_samples(Path(settings.samples), drawn) if settings.samples else [drawn]


@torch.inference_mode()
def _relative_error(program: Program, reference: Any, inputs: tuple[Tensor, ...]) -> float:
    """The largest norm of the difference over the norm of the reference's answer, of all outputs."""
    pairs = zip(_listed(program(*inputs)), _listed(reference(*inputs)), strict=True)
    return max(
        float((ours.float() - theirs.float()).norm() / theirs.float().norm().clamp(min=1e-12)) for ours, theirs in pairs
    )


def _listed(answer: Any) -> list[Tensor]:
    return list(answer) if isinstance(answer, tuple | list) else [answer]


@torch.inference_mode()
def _time(runners: Mapping[str, Callable[..., Any]], inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """Median milliseconds of a call of each, in turns, after one call to warm up."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    for round_ in range(_ROUNDS + 1):
        for name, run in runners.items():
            began = time.perf_counter()
            run(*inputs)
            if round_:
                times[name].append((time.perf_counter() - began) * 1000)
    return {name: statistics.median(each) for name, each in times.items()}


def has_half_arithmetic() -> bool:
    """Whether this machine computes in fp16 as fast as in fp32: it has a GPU, or a CPU with instructions for it."""
    return torch.cuda.is_available() or bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
