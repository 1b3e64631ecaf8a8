"""Losses and metrics of a run for TensorBoard, MLflow and Weights & Biases, through their own libraries.

    for event in log_metrics(train(config), open_logs(["tensorboard"], config)): ...

A reader of events like the console: it passes them on and holds no trainer. A run that goes on is continued in each log
as well, under the name that the run's folder keeps; TensorBoard drops steps that were done twice. Where a server or a
project is chosen is the library's own business: `MLFLOW_TRACKING_URI`, `WANDB_PROJECT`, `WANDB_MODE=offline`.
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from deepseek.core.errors import ConfigError, first_line
from deepseek.core.events import Event
from deepseek.core.extras import require
from deepseek.core.names import explain_unknown
from deepseek.core.storage import write_file
from deepseek.train.config import TrainConfig
from deepseek.train.events import Evaluated, MemoryMeasured, RunStarted, StepDone
from deepseek.train.run_state import flatten_settings


class MetricLog(ABC):
    """One place that numbers are written to."""

    library: ClassVar[str]
    """Its library, whose name the extra has as well."""

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.folder = config, Path(config.folder)
        self.module: Any = self.find_library()

    @abstractmethod
    def find_library(self) -> ModuleType:
        """Import the library, before any work is done; raises `MissingExtraError`."""

    def explain(self, error: Exception) -> ConfigError:
        """Return one sentence for what the library says when it cannot begin."""
        return ConfigError(
            f"{self.library} cannot log this run ({first_line(error)}); change what it says, or leave it out of --log"
        )

    @abstractmethod
    def begin(self, first_step: int) -> None:
        """Begin, or go on after `first_step` steps."""

    @abstractmethod
    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers by name."""

    @abstractmethod
    def end(self, *, is_finished: bool) -> None:
        """Write out what is left; called after `begin` alone."""

    def read_id(self) -> str | None:
        """Return the name that the log gave the run, if an earlier process kept one."""
        return self._id_file.read_text(encoding="utf-8") if self._id_file.is_file() else None

    def keep_id(self, name: str) -> None:
        """Keep the name that the log gave the run in its folder."""
        write_file(self._id_file, name.encode())

    @property
    def _id_file(self) -> Path:
        return self.folder / f"{self.library}_run.txt"


class TensorBoardLog(MetricLog):
    """Event files in FOLDER/tensorboard."""

    library = "tensorboard"

    def find_library(self) -> ModuleType:
        """Import tensorboard."""
        return require("tensorboard", extra="tensorboard")

    def begin(self, first_step: int) -> None:
        """Open a file whose steps take the place of any after `first_step`."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(self.folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def end(self, *, is_finished: bool) -> None:
        """Close the file."""
        self._writer.close()


class MLflowLog(MetricLog):
    """A run of MLflow, with the settings as its parameters."""

    library = "mlflow"

    def find_library(self) -> ModuleType:
        """Import mlflow."""
        return require("mlflow", extra="mlflow")

    def begin(self, first_step: int) -> None:
        """Begin a run, or go on with the one whose name the folder keeps."""
        known = self.read_id()
        try:
            run = self.module.start_run(run_id=known, run_name=None if known else self.folder.name)
        except self.module.MlflowException as error:
            raise self.explain(error) from error
        if known is None:
            self.keep_id(run.info.run_id)
            self.module.log_params({name: str(value)[:500] for name, value in flatten_settings(self.config.to_dict())})

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write metrics."""
        self.module.log_metrics(dict(values), step=step)

    def end(self, *, is_finished: bool) -> None:
        """End the run, for now or for good."""
        self.module.end_run("FINISHED" if is_finished else "KILLED")


class WandbLog(MetricLog):
    """A run of Weights & Biases, with the settings as its config."""

    library = "wandb"

    def find_library(self) -> ModuleType:
        """Import wandb."""
        return require("wandb", extra="wandb")

    def begin(self, first_step: int) -> None:
        """Begin a run, or go on with the one whose name the folder keeps."""
        name = self.read_id() or uuid.uuid4().hex
        settings = self.config.to_dict()
        try:
            self._run: Any = self.module.init(
                id=name, name=self.folder.name, dir=str(self.folder), config=settings, resume="allow"
            )
        except self.module.Error as error:
            raise self.explain(error) from error
        self.keep_id(name)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write metrics."""
        self._run.log(dict(values), step=step)

    def end(self, *, is_finished: bool) -> None:
        """End the run, for now or for good."""
        self._run.finish(exit_code=0 if is_finished else 1)


LOGS: dict[str, type[MetricLog]] = {"mlflow": MLflowLog, "tensorboard": TensorBoardLog, "wandb": WandbLog}
"""Name on the command line -> log."""


def open_logs(names: Sequence[str], config: TrainConfig) -> list[MetricLog]:
    """Return the logs `names` of the run of `config`; raises `ConfigError` and `MissingExtraError` before any work."""
    if unknown := next((name for name in names if name not in LOGS), None):
        raise ConfigError(explain_unknown("log", unknown, LOGS))
    return [LOGS[name](config) for name in dict.fromkeys(names)]


def log_metrics(events: Generator[Event, None, None], logs: Sequence[MetricLog]) -> Generator[Event, None, None]:
    """Pass `events` of a run on, writing their numbers to the logs that `open_logs` returned for it.

    Raises `ConfigError` where a log cannot be begun; the run is then stopped as by Ctrl-C.
    """
    begun: list[MetricLog] = []
    is_finished = False
    try:
        with closing(events):
            for event in events:
                if isinstance(event, RunStarted):
                    for log in logs:
                        log.begin(event.first_step)
                        begun.append(log)
                if values := list_numbers(event):
                    for log in begun:
                        log.write(event.step, values)  # type: ignore[attr-defined]
                yield event
        is_finished = True
    finally:
        for log in begun:
            log.end(is_finished=is_finished)


def list_numbers(event: Event) -> dict[str, float]:
    """Return the numbers of an event that belong to a step, by name; none for an event without such."""
    if isinstance(event, StepDone):
        return {
            "loss": event.loss,
            "learning_rate": event.learning_rate,
            "grad_norm": event.grad_norm,
            "units_per_s": event.units_per_s,
        }
    if isinstance(event, Evaluated):
        return event.all_metrics
    if isinstance(event, MemoryMeasured):
        return {"peak_bytes": float(event.peak_bytes)}
    return {}
