"""What logs get from a run, and that a run which goes on is one in them, too."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from deepseek.core.errors import ConfigError, MissingExtraError
from deepseek.train.loop import train
from deepseek.train.metric_logs import log_metrics, open_logs
from tests.train.own_task import Line, configure

NUM_STEPS = 9


class Recorder(types.ModuleType):
    """A library of the kind that has `init`, `log` and `finish`, or `start_run`, `log_metrics` and `end_run`."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.is_down = False
        self.begun: list[dict[str, Any]] = []
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.ends: list[Any] = []
        self.params: dict[str, str] = {}
        self.Error = self.MlflowException = ZeroDivisionError
        self.info = types.SimpleNamespace(run_id="seven")

    def init(self, **settings: Any) -> Recorder:
        if self.is_down:
            raise ZeroDivisionError("the server is down\nand a long trace")
        self.begun.append(settings)
        return self

    def start_run(self, **settings: Any) -> Recorder:
        return self.init(**settings)

    def log(self, values: dict[str, float], step: int) -> None:
        self.rows.append((step, values))

    log_metrics = log

    def log_params(self, params: dict[str, str]) -> None:
        self.params = params

    def finish(self, exit_code: int) -> None:
        self.ends.append(exit_code)

    def end_run(self, status: str) -> None:
        self.ends.append(status)


def run(folder: Path, names: list[str], *, last: int | None = None) -> list[Any]:
    config = configure(folder, num_steps=NUM_STEPS, evaluate_every=4)
    events = log_metrics(train(config, task=Line), open_logs(names, config))
    seen = []
    for event in events:
        seen.append(event)
        if event.kind == "step_done" and event.step == last:
            events.close()
    return seen


@pytest.mark.parametrize(("name", "ends"), [("mlflow", ["KILLED", "FINISHED"]), ("wandb", [1, 0])])
def test_a_log_gets_every_number_once_and_one_name_for_a_run_in_two_parts(
    name: str, ends: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Recorder(name)
    monkeypatch.setitem(sys.modules, name, library)
    seen = run(tmp_path / "a", [name], last=3) + run(tmp_path / "a", [name])
    losses = [(step, values["loss"]) for step, values in library.rows if "loss" in values]
    assert losses == [(event.step, event.loss) for event in seen if event.kind == "step_done"]
    assert [step for step, _ in losses] == list(range(1, NUM_STEPS + 1))
    evaluated = [(step, values) for step, values in library.rows if "heldout_loss" in values]
    assert evaluated == [(event.step, event.all_metrics) for event in seen if event.kind == "evaluated"]
    assert "distance" in evaluated[0][1] and library.ends == ends
    first, second = library.begun
    if name == "wandb":
        assert first == second and first["config"]["num_steps"] == NUM_STEPS and first["name"] == "a"
    else:
        assert (first["run_id"], first["run_name"], second["run_id"]) == (None, "a", "seven")
        assert library.params["optimizer.name"] == "sgd"


def test_tensorboard_reads_the_curve_of_a_run_that_was_killed_and_went_on(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, ["tensorboard"], last=6)
    for checkpoint in (tmp_path / "checkpoints").iterdir():  # what came after step 4 is lost, as if killed
        if checkpoint.name > "step-00000004":
            for file in checkpoint.iterdir():
                file.unlink()
            checkpoint.rmdir()
    seen = run(tmp_path, ["tensorboard"])
    assert seen[-1].kind == "model_saved"
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    scalars = read.Scalars("loss")
    assert [scalar.step for scalar in scalars] == list(range(1, NUM_STEPS + 1))
    again = {event.step: event.loss for event in seen if event.kind == "step_done"}
    assert {scalar.step: scalar.value for scalar in scalars if scalar.step > 4} == pytest.approx(again)
    assert {"heldout_loss", "distance", "grad_norm", "learning_rate", "units_per_s"} <= set(read.Tags()["scalars"])


def test_an_unknown_log_and_a_library_that_is_not_there_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(tmp_path / "run")
    with pytest.raises(ConfigError, match="unknown log 'tensorbord'; did you mean 'tensorboard'"):
        open_logs(["tensorbord"], config)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        MissingExtraError, match=r"wandb is needed here and is not installed: pip install '.*\[wandb\]'"
    ):
        open_logs(["wandb"], config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_log_that_cannot_begin_is_one_sentence_and_the_run_may_go_on_without_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Recorder(name)
    library.is_down = True
    monkeypatch.setitem(sys.modules, name, library)
    with pytest.raises(ConfigError, match=rf"{name} cannot log this run \(.*the server is down\); change what it says"):
        run(tmp_path / "a", [name])
    assert library.ends == [] and run(tmp_path / "a", [])[-1].kind == "model_saved"
