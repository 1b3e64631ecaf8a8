"""The main job from text to a served int8 model, every number of its report worked out a second time."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from deepseek.artifact.reading import open_artifact
from deepseek.checkpoint.restoring import newest_valid
from deepseek.core.errors import ConfigError, StorageError
from deepseek.core.events import Event
from deepseek.data.tokenizing import load_tokenizer
from deepseek.models.loading import load_model
from deepseek.recipes import load_recipe
from deepseek.recipes.main_job import (
    PROMPTS,
    SAMPLING,
    CompletionReceived,
    ReportWritten,
    build_report,
    read_events,
    run_main_job,
    steps_by_number,
)
from deepseek.serve.config import EngineConfig
from deepseek.serve.engine import Engine
from deepseek.serve.sampling import Sampling
from deepseek.train.config import TrainConfig
from deepseek.train.events import StepDone
from tests.cli.commands import write_corpus

# The keys that the report promises.
KEYS = {
    "train": ("loss_first", "loss_last", "heldout_loss", "tokens_per_s"),
    "baseline": ("unigram_loss", "bigram_loss", "bigram_discounted_loss"),
    "int8": ("bytes_ratio", "heldout_loss", "decode_speedup"),
    "serve": ("first_token_ms", "tokens_per_s"),
}
DISCOUNT = 0.75


def make_config(corpus: Path, folder: Path) -> TrainConfig:
    """A small relative of the quickstart, in FP32 so that what it reports can be worked out exactly."""
    changes = {
        "folder": str(folder),
        "model.vocab_size": 300,
        "model.num_layers": 2,
        "model.hidden_size": 32,
        "model.num_heads": 2,
        "model.num_kv_heads": 1,
        "model.max_length": 64,
        "model.moe.ffn_size": 32,
        "data.sources": [str(corpus)],
        "data.heldout_fraction": 0.2,
        "data.vocab_size": 300,
        "data.sequence_length": 32,
        "data.batch_size": 8,
        "optimizer.base_learning_rate": 0.32,
        "optimizer.warmup_steps": 5,
        "num_steps": 60,
        "compile": "none",
        "precision": "fp32",
        "log_every": 1,
        "checkpoint_every": 20,
    }
    return load_recipe("quickstart").override(changes)


@dataclass(frozen=True)
class Job:
    config: TrainConfig
    folder: Path
    events: list[Event]
    report: dict[str, Any]
    wall_s: float

    def tokens(self, part: str) -> np.ndarray[Any, Any]:
        """The tokens on disk, read without our reader."""
        return np.fromfile(self.folder / "data" / part / "tokens.bin", dtype="<u2").astype(np.int64)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture(scope="module")
def job(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("job") / "run"
    config = make_config(corpus, folder)
    began_s = time.perf_counter()
    events = list(run_main_job(config))
    wall_s = time.perf_counter() - began_s
    return Job(config, folder, events, json.loads((folder / "report.json").read_text()), wall_s)


def test_the_report_has_every_promised_number_and_where_it_was_measured(job: Job) -> None:
    values = {f"{part}.{name}": job.report[part][name] for part, names in KEYS.items() for name in names}
    for name, value in (values | {"wall_s": job.report["wall_s"]}).items():
        assert isinstance(value, float), name
        assert math.isfinite(value), name
        assert value > 0, name
    assert job.report["versions"]["torch"] == torch.__version__
    assert job.report["machine"]["num_cores"] == len(os.sched_getaffinity(0))
    last = job.events[-1]
    assert isinstance(last, ReportWritten)
    assert last.report == job.report
    assert last.path == str(job.folder / "report.json")


def test_training_is_reported_as_its_steps_were(job: Job) -> None:
    steps = [event for event in job.events if isinstance(event, StepDone)]
    assert [step.step for step in steps] == list(range(1, 61))
    assert job.report["train"]["loss_first"] == steps[0].loss
    assert job.report["train"]["loss_last"] == steps[-1].loss
    assert job.report["train"]["tokens_per_s"] == statistics.median(step.units_per_s for step in steps)
    assert job.report["train"]["num_steps"] == 60
    assert job.report["train"]["first_step"] == 0
    assert 0.5 * job.wall_s < job.report["wall_s"] <= job.wall_s
    # An untrained model knows nothing but the number of tokens.
    assert steps[0].loss == pytest.approx(math.log(300), rel=0.05)


@torch.no_grad()
def plain_heldout_loss(job: Job, model_folder: str) -> float:
    """One row after the other through the model that is on disk, in FP32."""
    model, tokens, length = load_model(job.folder / model_folder), job.tokens("heldout"), 32
    losses = []
    for begin in range(0, len(tokens) - 1, length):
        row = torch.from_numpy(tokens[begin : begin + length + 1])
        log_probabilities = model(row[None, :-1])[0].float().log_softmax(dim=-1)
        losses += (-log_probabilities[torch.arange(len(row) - 1), row[1:]]).tolist()
    assert len(losses) == len(tokens) - 1
    return statistics.fmean(losses)


def test_the_heldout_loss_is_that_of_the_model_on_disk(job: Job) -> None:
    assert job.report["train"]["heldout_loss"] == pytest.approx(plain_heldout_loss(job, "model"), rel=1e-5)
    stored = open_artifact(job.folder / "model").manifest.metrics["heldout_loss"]
    assert stored == job.report["train"]["heldout_loss"]
    assert job.report["train"]["heldout_loss"] < job.report["train"]["loss_first"]


def test_the_baselines_are_what_counting_gives(job: Job) -> None:
    """Counted one by one, from the formulas."""
    train, heldout = job.tokens("train").tolist(), job.tokens("heldout").tolist()
    vocab_size = load_tokenizer(job.folder / "model").vocab_size
    ones, pairs, contexts = Counter(train), Counter(pairwise(train)), Counter(train[:-1])
    followers = Counter(first for first, _ in pairs)
    losses: dict[str, list[float]] = {"unigram": [], "bigram": [], "bigram_discounted": []}
    for before, after in pairwise(heldout):
        unigram = (ones[after] + 1) / (len(train) + vocab_size)
        losses["unigram"].append(-math.log(unigram))
        losses["bigram"].append(-math.log((pairs[before, after] + 1) / (contexts[before] + vocab_size)))
        backed_off = unigram
        if contexts[before]:
            seen = max(pairs[before, after] - DISCOUNT, 0) / contexts[before]
            backed_off = seen + DISCOUNT * followers[before] / contexts[before] * unigram
        losses["bigram_discounted"].append(-math.log(backed_off))
    for name, each in losses.items():
        assert job.report["baseline"][f"{name}_loss"] == pytest.approx(statistics.fmean(each), rel=1e-9), name


def test_int8_is_as_small_and_as_good_as_reported(job: Job) -> None:
    sizes = {
        name: sum(tensor.nbytes for tensor in load_file(job.folder / name / "model.safetensors").values())
        for name in ("model", "model-int8")
    }
    assert job.report["int8"]["bytes_ratio"] == sizes["model-int8"] / sizes["model"]
    assert job.report["int8"]["bytes_ratio"] < 0.35
    assert job.report["int8"]["heldout_loss"] == pytest.approx(plain_heldout_loss(job, "model-int8"), rel=2e-3)
    assert job.report["int8"]["heldout_loss"] == pytest.approx(job.report["train"]["heldout_loss"], rel=0.01)
    parent, child = (open_artifact(job.folder / name).manifest for name in ("model", "model-int8"))
    assert child.parent_digest == parent.digest


def test_the_server_answered_as_the_engine_does(job: Job) -> None:
    completions = [event for event in job.events if isinstance(event, CompletionReceived)]
    assert [completion.prompt for completion in completions] == list(PROMPTS)
    folder = job.folder / "model-int8"
    engine = Engine(load_model(folder, packed=True), load_tokenizer(folder), EngineConfig(max_num_seqs=1))
    sampling = Sampling(**SAMPLING)
    expected = [engine.generate([prompt], max_tokens=32, sampling=sampling)[0].text for prompt in PROMPTS]
    assert [completion.text for completion in completions] == expected
    for name in ("first_token_ms", "tokens_per_s"):
        assert job.report["serve"][name] == statistics.median(getattr(each, name) for each in completions)


def test_a_job_that_is_left_saves_itself_at_once(corpus: Path, tmp_path: Path) -> None:
    events = run_main_job(make_config(corpus, tmp_path / "run"))
    for event in events:
        if isinstance(event, StepDone) and event.step == 7:
            break
    events.close()
    saved = newest_valid(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert saved.step == 7


def test_a_job_that_cannot_save_itself_says_so(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while a generator is collected would only be printed, so all of them are closed on purpose."""

    def refuse(*_: object, **__: object) -> Path:
        raise StorageError("the disk is full")

    events = run_main_job(make_config(corpus, tmp_path / "run"))
    next(event for event in events if isinstance(event, StepDone))
    monkeypatch.setattr("deepseek.train.run_state.save", refuse)
    with pytest.raises(StorageError, match="the disk is full"):
        events.close()


def test_a_job_without_held_out_text_is_refused_before_anything_is_written(corpus: Path, tmp_path: Path) -> None:
    config = make_config(corpus, tmp_path / "run").override({"data.heldout_fraction": 0})
    with pytest.raises(ConfigError, match="heldout_fraction"):
        next(run_main_job(config))
    assert not (tmp_path / "run").exists()


def write_events(path: Path, *events: dict[str, Any] | str) -> list[dict[str, Any]]:
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in events))
    return read_events(path)


def start_at(step: int) -> dict[str, Any]:
    return {"kind": "run_started", "first_step": step}


def step(number: int, loss: float) -> dict[str, Any]:
    return {"kind": "step_done", "step": number, "loss": loss}


def test_events_of_an_earlier_run_in_the_folder_do_not_count(tmp_path: Path) -> None:
    events = write_events(
        tmp_path / "events.jsonl", start_at(0), step(1, 9.0), step(90, 8.0), start_at(0), step(1, 7.0), step(2, 6.0)
    )
    assert {number: each["loss"] for number, each in steps_by_number(events).items()} == {1: 7.0, 2: 6.0}


def test_steps_that_a_killed_process_had_done_count_once_and_as_they_were_done_last(tmp_path: Path) -> None:
    events = write_events(
        tmp_path / "events.jsonl", start_at(0), step(1, 9.0), step(2, 8.0), step(3, 7.0), start_at(1), step(2, 8.5)
    )
    assert [(number, each["loss"]) for number, each in steps_by_number(events).items()] == [
        (1, 9.0),
        (2, 8.5),
        (3, 7.0),
    ]


def test_a_line_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    events = write_events(tmp_path / "events.jsonl", start_at(0), step(1, 9.0), '{"kind": "step_do', step(2, 8.0))
    assert [event["kind"] for event in events] == ["run_started", "step_done", "step_done"]


def test_the_report_of_a_resumed_run_spans_its_processes(job: Job) -> None:
    """Two processes' events in one file, with a step that both did."""
    lines = read_events(job.folder / "events.jsonl")
    begin = next(event for event in lines if event["kind"] == "run_started")
    steps = [event for event in lines if event["kind"] == "step_done"]
    rest = lines[lines.index(steps[-1]) + 1 :]
    resumed = [begin, *steps[:40], begin | {"first_step": 20}, *steps[20:], *rest]
    report = build_report(resumed, wall_s=1.5)
    assert report["train"] == job.report["train"] | {"first_step": 20}
    assert report["baseline"] == job.report["baseline"]
    assert report["wall_s"] == 1.5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_real_quickstart_beats_its_bars(tmp_path: Path) -> None:
    """All of it, as `make quickstart` runs it; needs two cores."""
    command = [sys.executable, "-m", "deepseek", "quickstart", "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "runs" / "quickstart" / "report.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1])["report"] == report
    baseline, int8 = report["baseline"], report["int8"]
    losses = [
        report["train"]["heldout_loss"],
        *(baseline[f"{n}_loss"] for n in ("bigram_discounted", "bigram", "unigram")),
    ]
    assert losses == sorted(losses)
    assert len(set(losses)) == 4
    assert int8["bytes_ratio"] <= 0.35
    assert abs(int8["heldout_loss"] / report["train"]["heldout_loss"] - 1) <= 0.01
    assert report["wall_s"] > 0
