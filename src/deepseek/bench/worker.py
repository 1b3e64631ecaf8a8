"""One subject in a process of its own: it prepares the model once and then answers orders from the process above.

A process for each subject keeps its peak memory apart and lets no setting of one backend (threads, allocator, compiler
options) leak into another. The process above gives its orders in turns, so that all subjects meet the same noise.
"""

from __future__ import annotations

import time
import warnings
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from deepseek.bench.variants import Subject
from deepseek.core.errors import DeepSeekError
from deepseek.core.process_memory import forget_peak, peak_bytes
from deepseek.mixed_precision.forward_precision import has_native_bf16
from deepseek.models.loaded_model import LoadedModel
from deepseek.models.loading import load_model

ANY_ERROR = 1.0
"""Bound of a side that was told its precision, where accuracy on labelled data shows what it is worth."""


def work(connection: Connection, subject: Subject, model: str, settings: dict[str, Any]) -> None:
    """Prepare `subject`, send its note, or the sentence of its refusal; then answer orders until `None` comes.

    `settings` are those of `load_model` that all subjects share: batch size, shapes, time budget.

    Orders: `("time", count)` gives that many latencies in seconds, `("answers", inputs or None)` gives the outputs as
    an array, `("memory",)` the peak bytes while it ran, `("reason",)` why it is run as it is, `("warnings",)` what this
    process was warned of, which nobody would see here.
    """
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        _prepare_and_obey(connection, subject, model, settings, caught)


def _prepare_and_obey(
    connection: Connection,
    subject: Subject,
    model: str,
    settings: dict[str, Any],
    caught: list[warnings.WarningMessage],
) -> None:
    try:
        own: dict[str, Any] = {"backend": subject.backend, "precision": subject.precision}
        if "samples" in settings and subject.precision != "auto":
            own["tolerance"] = ANY_ERROR
        loaded = load_model(model, settings | own)
    except DeepSeekError as error:
        connection.send(("refused", str(error)))
        return
    inputs = loaded.sample_inputs
    _time(loaded, inputs, 1)
    _forget_peak()
    connection.send(("ready", "; ".join(note for note in (subject.note, loaded.choice) if note)))
    while (order := connection.recv()) is not None:
        connection.send(
            [str(warning.message) for warning in caught] if order == ("warnings",) else _obey(order, loaded, inputs)
        )


def native_precisions() -> frozenset[str]:
    """Arithmetic that this machine has instructions for, and int8, whose weights pay even without."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    native = {"fp32", "int8"} | ({"bf16"} if has_native_bf16(device) else set())
    return frozenset(native | ({"fp16", "tf32"} if device.type == "cuda" else set()))


def _obey(order: tuple[Any, ...], loaded: LoadedModel, inputs: tuple[Tensor, ...]) -> object:
    name, *arguments = order
    if name == "time":
        return _time(loaded, inputs, *arguments)
    if name == "answers":
        (given,) = arguments
        return _answers(loaded, inputs if given is None else (torch.from_numpy(given),))
    return loaded.reason if name == "reason" else _peak_bytes()


def _time(loaded: LoadedModel, inputs: tuple[Tensor, ...], count: int) -> list[float]:
    latencies_s = []
    with torch.no_grad():
        for _ in range(count):
            start = time.perf_counter()
            loaded(*inputs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            latencies_s.append(time.perf_counter() - start)
    return latencies_s


def _answers(loaded: LoadedModel, inputs: tuple[Tensor, ...]) -> object:
    with torch.no_grad():
        outputs = loaded(*inputs)
    while not isinstance(outputs, Tensor):
        outputs = next(iter(outputs.values() if isinstance(outputs, dict) else outputs))
    return outputs.float().flatten(1).cpu().numpy()


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    forget_peak()


def _peak_bytes() -> int:
    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else peak_bytes()
