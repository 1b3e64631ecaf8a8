"""The main job, end to end, as one stream of events: train, compare, quantize, serve, report.

    text -> train -> ARTIFACT -> compare with n-grams -> int8 -> ARTIFACT -> server process <- completions over HTTP
                                                                                   `-> report.json

`deepseek quickstart` shows these events. Each phase reads what the one before wrote to disk, so a run that was stopped
goes on where it was, and every phase proves that the artifact of the one before is whole.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepseek.compress.quality import Comparison
from deepseek.compress.quantizing import quantize
from deepseek.core.errors import ConfigError
from deepseek.core.events import Event, record
from deepseek.core.folder_lock import locked_folder
from deepseek.core.machine import describe_machine, describe_versions
from deepseek.core.storage import write_file
from deepseek.data.batching import evaluation_batches
from deepseek.data.config import DataConfig
from deepseek.data.corpus import load_data
from deepseek.data.ngrams import NgramLosses, measure_ngrams
from deepseek.recipes.server_probe import Completion, probe_server
from deepseek.train.config import TrainConfig
from deepseek.train.events import read_events, steps_by_number
from deepseek.train.loop import DATA_FOLDER, MODEL_FOLDER, train_in_locked_folder
from deepseek.train.run_state import open_device

INT8_FOLDER, EVENTS_FILE, REPORT_FILE = "model-int8", "events.jsonl", "report.json"
PROMPTS = ("def get", "class Test", "def read(self")
# The likeliest token each time leads so small a model in circles; these are drawn, and the same for the same weights.
SAMPLING = {"temperature": 0.6, "top_p": 0.9, "seed": 1}
_MAX_TOKENS = 48


@dataclass(frozen=True)
class PhaseStarted(Event):
    """A phase after training begins: counting n-grams, int8, or serving."""

    phase: str


@dataclass(frozen=True)
class BaselinesMeasured(Event):
    """Losses of counting on the same held-out tokens, in nats per token."""

    unigram_loss: float
    bigram_loss: float
    bigram_discounted_loss: float


@dataclass(frozen=True)
class ModelQuantized(Event):
    """The int8 artifact is written."""

    path: str
    bytes_ratio: float
    heldout_loss: float
    heldout_loss_float: float
    decode_speedup: float
    decode_tokens_per_s: float


@dataclass(frozen=True)
class CompletionReceived(Event):
    """The server streamed one answer."""

    prompt: str
    text: str
    first_token_ms: float
    tokens_per_s: float


@dataclass(frozen=True)
class ReportWritten(Event):
    """The job is done."""

    path: str
    report: dict[str, Any]


def run_main_job(config: TrainConfig) -> Generator[Event, None, None]:
    """All phases for `config`; the report and the artifacts are in its folder.

    Raises `ConfigError` where no text is held out, since every number of the report is a comparison on such text, and
    what the phases raise.
    """
    if not config.data_of(DataConfig).has_heldout:
        raise ConfigError(
            "data.heldout_fraction is 0 and the job compares on held-out text; set it to 0.05, for example"
        )
    began_s = time.perf_counter()
    folder = Path(config.folder)
    open_device(config.device)
    with locked_folder(folder):
        with contextlib.closing(_run_phases(config)) as phases:  # left early, training saves itself
            yield from record(phases, folder / EVENTS_FILE)
        report = build_report(read_events(folder / EVENTS_FILE), wall_s=time.perf_counter() - began_s)
        write_file(folder / REPORT_FILE, json.dumps(report, indent=2).encode())
    yield ReportWritten(str(folder / REPORT_FILE), report)


def _run_phases(config: TrainConfig) -> Generator[Event, None, None]:
    yield from train_in_locked_folder(config)
    yield PhaseStarted("counting n-grams")
    yield from _measure_baselines(config)
    yield PhaseStarted("int8")
    yield from _quantize(config)
    yield PhaseStarted("serving")
    yield from _serve(config)


def build_report(events: list[dict[str, Any]], *, wall_s: float) -> dict[str, Any]:
    """Build the report from the events of all processes that worked on the run; `wall_s` is the last one's."""
    latest = {event["kind"]: event for event in events}
    steps = list(steps_by_number(events).values())
    completions = [event for event in events if event["kind"] == "completion_received"][-len(PROMPTS) :]
    quantized, baselines = latest["model_quantized"], latest["baselines_measured"]
    return {
        "train": {
            "first_step": latest["run_started"]["first_step"],
            "loss_first": steps[0]["loss"],
            "loss_last": steps[-1]["loss"],
            "heldout_loss": latest["evaluated"]["heldout_loss"],
            "tokens_per_s": statistics.median(event["units_per_s"] for event in steps),
            "num_parameters": latest["run_started"]["num_parameters"],
            "num_steps": steps[-1]["step"],
            "precision": latest["run_started"]["precision"],
        },
        "baseline": {name: baselines[name] for name in ("unigram_loss", "bigram_loss", "bigram_discounted_loss")},
        "int8": {name: quantized[name] for name in ("bytes_ratio", "heldout_loss", "decode_speedup")},
        "serve": {
            "first_token_ms": statistics.median(event["first_token_ms"] for event in completions),
            "tokens_per_s": statistics.median(event["tokens_per_s"] for event in completions),
        },
        "wall_s": wall_s,
        "versions": describe_versions(),
        "machine": describe_machine(),
    }


def _measure_baselines(config: TrainConfig) -> Iterator[Event]:
    data = load_data(config.data_of(DataConfig), Path(config.folder) / DATA_FOLDER, is_verified=True)
    assert data.heldout is not None
    losses: NgramLosses = measure_ngrams(data.train.tokens, data.heldout.tokens, data.tokenizer.vocab_size)
    yield BaselinesMeasured(losses.unigram, losses.bigram, losses.bigram_discounted)


def _quantize(config: TrainConfig) -> Iterator[Event]:
    folder = Path(config.folder)
    data = load_data(config.data_of(DataConfig), folder / DATA_FOLDER, is_verified=True)
    assert data.heldout is not None
    batches = evaluation_batches(data.heldout, config.data_of(DataConfig))
    comparison: Comparison = quantize(folder / MODEL_FOLDER, folder / INT8_FOLDER, batches, overwrite=True)
    yield ModelQuantized(
        path=str(folder / INT8_FOLDER),
        bytes_ratio=comparison.bytes_ratio,
        heldout_loss=comparison.loss_after,
        heldout_loss_float=comparison.loss_before,
        decode_speedup=comparison.decode_speedup,
        decode_tokens_per_s=comparison.decode_tokens_per_s_after,
    )


def _serve(config: TrainConfig) -> Iterator[Event]:
    max_tokens = min(_MAX_TOKENS, max(1, config.model.max_length // 2))
    completions: Iterator[Completion] = probe_server(
        Path(config.folder) / INT8_FOLDER, PROMPTS, max_tokens=max_tokens, sampling=SAMPLING
    )
    for completion in completions:
        yield CompletionReceived(**asdict(completion))
