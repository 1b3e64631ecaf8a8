"""The same run gives the same weights: twice, stopped between steps, or killed anywhere."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek.checkpoint.restoring import Checkpoint, newest_valid
from deepseek.core.errors import CheckpointError, ConfigError, DataError, StorageError
from deepseek.core.folder_lock import LOCK_FILE
from deepseek.data.corpus import load_data
from deepseek.data.ngrams import measure_ngrams
from deepseek.models.loading import load_model
from deepseek.train.config import TrainConfig
from deepseek.train.events import ActivationsCheckpointed, CheckpointSaved, Evaluated, ModelSaved, StepDone
from deepseek.train.loop import train

NUM_STEPS = 12


def write_corpus(folder: Path) -> None:
    folder.mkdir()
    source = random.Random(0)
    words = ["def", "return", "import", "class", "self", "value", "for", "in", "range", "print"]
    for number in range(12):
        lines = [" ".join(source.choices(words, k=8)) for _ in range(120)]
        (folder / f"text{number}.txt").write_text("\n".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "text"
    write_corpus(folder)
    return folder


def make_config(corpus: Path, folder: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "folder": str(folder),
        "model": {
            "vocab_size": 300,
            "num_layers": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "max_length": 64,
            "moe": {"num_experts": 4, "ffn_size": 32, "capacity_factor": 1.5, "balance_rate": 0.01},
            "mask": {"opening_steps": 6},
        },
        "data": {
            "sources": [str(corpus)],
            "heldout_fraction": 0.2,
            "vocab_size": 300,
            "sequence_length": 32,
            "batch_size": 4,
        },
        "optimizer": {"name": "muon", "base_learning_rate": 0.64, "warmup_steps": 2},
        "num_steps": NUM_STEPS,
        "accum_steps": 2,
        "checkpoint_every": 3,
        "log_every": 1,
    }
    return TrainConfig.from_dict(values).override(changes)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = newest_valid(folder / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.step == NUM_STEPS
    flat: dict[str, torch.Tensor] = {}
    collect(checkpoint.state, (), flat)
    flat.pop("evaluated_step")  # which no weight depends on
    return flat


def collect(value: Any, path: tuple[str, ...], flat: dict[str, torch.Tensor]) -> None:
    """Every number of a checkpoint by its path: weights, moments, RNG, position."""
    if isinstance(value, dict):
        for key, inner in value.items():
            collect(inner, (*path, str(key)), flat)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            collect(inner, (*path, str(index)), flat)
    elif isinstance(value, torch.Tensor):
        flat[".".join(path)] = value
    elif isinstance(value, int | float):
        flat[".".join(path)] = torch.tensor(value, dtype=torch.float64)


def assert_bit_equal(one: Path, other: Path) -> None:
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped."""
    folder = tmp_path_factory.mktemp("finished")
    for _ in train(make_config(corpus, folder)):
        pass
    return folder


def test_two_runs_with_one_seed_have_bit_equal_weights(corpus: Path, finished: Path, tmp_path: Path) -> None:
    for _ in train(make_config(corpus, tmp_path)):
        pass
    assert_bit_equal(finished, tmp_path)


def test_another_seed_gives_other_weights(corpus: Path, finished: Path, tmp_path: Path) -> None:
    for _ in train(make_config(corpus, tmp_path, seed=1)):
        pass
    assert not torch.equal(weights(finished)["model.embed.weight"], weights(tmp_path)["model.embed.weight"])


def test_run_that_is_left_between_two_steps_goes_on_bit_equal(corpus: Path, finished: Path, tmp_path: Path) -> None:
    config = make_config(corpus, tmp_path, checkpoint_every=500)
    for stop_at in (4, 5, 9):
        events = train(config)
        for event in events:
            if isinstance(event, StepDone) and event.step == stop_at:
                events.close()
                break
        saved = newest_valid(tmp_path / "checkpoints")
        assert saved is not None
        assert saved.step == stop_at
    steps = [event.step for event in train(config) if isinstance(event, StepDone)]
    assert steps == list(range(10, NUM_STEPS + 1))
    assert_bit_equal(finished, tmp_path)


def test_run_that_is_killed_anywhere_goes_on_bit_equal(corpus: Path, finished: Path, tmp_path: Path) -> None:
    config = make_config(corpus, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(config.model_dump_json(), encoding="utf-8")
    command = [sys.executable, "-m", "deepseek", "train", "--config", str(path), "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    moment = random.Random(os.getpid())
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        kill_at = moment.randint(2, NUM_STEPS - 4)
        for line in process.stdout:
            if f'"step_done", "step": {kill_at},' in line:
                time.sleep(moment.random() * 0.05)
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.read()
    assert process.returncode == -signal.SIGKILL
    # Wherever that was: before the first checkpoint, in the middle of one, or after the last step.
    for _ in train(config):
        pass
    assert_bit_equal(finished, tmp_path)


@pytest.mark.parametrize("wanted", ["selective", "block", "full", 0.7])
def test_recomputed_activations_leave_the_weights_bit_equal(
    wanted: str | float, corpus: Path, finished: Path, tmp_path: Path
) -> None:
    events = list(train(make_config(corpus, tmp_path, ds_activation_checkpoint=wanted)))
    (told,) = [event for event in events if isinstance(event, ActivationsCheckpointed)]
    assert told.num_blocks == len(told.blocks) >= 1
    if isinstance(wanted, float):
        assert told.policy == "budget" and told.kept_bytes <= wanted * told.kept_before_bytes
    else:
        assert (told.policy, told.blocks) == (wanted, ("layers.0", "layers.1"))
    assert_bit_equal(finished, tmp_path)


def test_a_run_goes_on_under_another_activation_checkpoint(corpus: Path, finished: Path, tmp_path: Path) -> None:
    events = train(make_config(corpus, tmp_path, ds_activation_checkpoint="block"))
    for event in events:
        if isinstance(event, StepDone) and event.step >= 5:
            break
    events.close()
    assert not any(isinstance(event, ActivationsCheckpointed) for event in train(make_config(corpus, tmp_path)))
    assert_bit_equal(finished, tmp_path)


def test_a_budget_of_activations_that_cannot_be_met_is_one_sentence(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be met"):
        list(train(make_config(corpus, tmp_path, ds_activation_checkpoint=0.01)))


def test_events_tell_the_whole_run_and_the_model_reloads(corpus: Path, tmp_path: Path) -> None:
    config = make_config(corpus, tmp_path, num_steps=60, checkpoint_every=25, evaluate_every=30)
    events = list(train(config))
    assert [event.step for event in events if isinstance(event, StepDone)] == list(range(1, 61))
    assert [event.step for event in events if isinstance(event, CheckpointSaved)] == [25, 50, 60]
    evaluations = [event for event in events if isinstance(event, Evaluated)]
    assert [event.step for event in evaluations] == [30, 60]
    saved = events[-1]
    assert isinstance(saved, ModelSaved)
    data = load_data(config.data, tmp_path / "data")
    assert data.heldout is not None
    baseline = measure_ngrams(data.train.tokens, data.heldout.tokens, data.tokenizer.vocab_size)
    assert evaluations[-1].heldout_loss < baseline.unigram
    assert evaluations[-1].num_units == len(data.heldout.tokens) - 1
    model = load_model(saved.path)
    assert model.config == config.model


def test_checkpoints_of_other_settings_are_not_taken_up(corpus: Path, finished: Path) -> None:
    with pytest.raises(CheckpointError, match="other settings"):
        list(train(make_config(corpus, finished, **{"optimizer.weight_decay": 0.5})))


def test_a_setting_that_is_newer_than_a_checkpoint_counts_by_its_default(
    corpus: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_older(folder: Path) -> Checkpoint | None:
        checkpoint = newest_valid(folder)
        assert checkpoint is not None
        assert checkpoint.state["settings"].pop("model.rope_fraction") == 1.0
        return checkpoint

    monkeypatch.setattr("deepseek.train.run_state.newest_valid", read_older)
    events = list(train(make_config(corpus, finished)))
    assert not [event for event in events if isinstance(event, StepDone)]  # it went on where it was
    with pytest.raises(CheckpointError, match=r"model\.rope_fraction was None and is 0\.5"):
        list(train(make_config(corpus, finished, **{"model.rope_fraction": 0.5})))


def test_finished_run_is_evaluated_and_written_again_without_a_step(corpus: Path, finished: Path) -> None:
    events = list(train(make_config(corpus, finished, log_every=5)))
    assert not [event for event in events if isinstance(event, StepDone)]
    assert isinstance(events[-1], ModelSaved)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data.sources": ["/no/such/folder"]}, DataError, "/no/such/folder"),
        ({"model.vocab_size": 260}, ConfigError, "vocab_size"),
        ({"data.sequence_length": 65}, ConfigError, "max_length"),
        ({"model.num_heads": 5}, ConfigError, "choose one of"),
        ({"modle": 1}, ConfigError, "did you mean 'model'"),
        ({"precision": "fp8"}, ConfigError, "precision"),
    ],
)
def test_bad_settings_are_one_sentence(
    corpus: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        list(train(make_config(corpus, tmp_path, **changes)))
    assert "\n" not in str(caught.value)


def test_a_second_run_in_a_folder_is_refused_and_disturbs_nothing(corpus: Path, finished: Path, tmp_path: Path) -> None:
    config = make_config(corpus, tmp_path / "run")
    first = train(config)
    for event in first:
        if isinstance(event, StepDone) and event.step == 5:
            break
    with pytest.raises(StorageError, match=f"run is being written by process {os.getpid()} on"):
        next(train(config))
    for _ in first:
        pass
    assert_bit_equal(finished, tmp_path / "run")
    assert not (tmp_path / "run" / LOCK_FILE).exists()
    next(again := train(config))  # it is free again
    again.close()


def test_a_run_that_nobody_reads_says_that_nothing_was_done(corpus: Path, tmp_path: Path) -> None:
    config = make_config(corpus, tmp_path / "run")
    with pytest.warns(UserWarning, match=r"nothing was trained.*for event in train\(config\)"):
        train(config)
    assert not (tmp_path / "run").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(config).close()  # on purpose
