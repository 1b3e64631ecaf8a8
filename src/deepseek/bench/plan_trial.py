"""Running a plan for some steps on this machine, to hold what was predicted against what is measured.

The recipe trains in a folder of its own that is removed afterwards, with the plan's micro-batch and accumulation and
without compiling, since a compiler takes longer than the steps that are measured. Time is the median step after the
first quarter. Memory is what the process gained at its peak on a CPU, from before the model was made, and what the
allocator held at its peak on a GPU; a driver's context is in neither, so it is not in the prediction beside it.
"""

from __future__ import annotations

import statistics
import tempfile
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from deepseek.core.allocator import give_back_freed_memory
from deepseek.core.errors import ConfigError
from deepseek.core.process_memory import forget_peak, peak_bytes
from deepseek.planning.search.results import PlanningResult

if TYPE_CHECKING:
    from deepseek.train.config import TrainConfig

_FEWEST_STEPS = 4


@dataclass(frozen=True)
class Checked:
    """Predicted against measured, for one step."""

    num_steps: int
    predicted_s: float
    measured_s: float
    predicted_bytes: float
    measured_bytes: float

    @property
    def time_ratio(self) -> float:
        """Predicted over measured seconds."""
        return self.predicted_s / self.measured_s

    def to_dict(self) -> dict[str, Any]:
        """Return everything by name."""
        return {**asdict(self), "time_ratio": self.time_ratio}


def check_plan(recipe: TrainConfig, result: PlanningResult, global_batch: int, steps: int) -> Checked:
    """Train `recipe` under the best plan for `steps` steps; raises `ConfigError` for plans of several devices."""
    plan = result.best.plan
    if plan.num_devices > 1:
        raise ConfigError(f"plan check runs plans of one device, this one has {plan.num_devices}; plan for one device")
    if steps < _FEWEST_STEPS:
        raise ConfigError(f"--steps {steps} leaves nothing to measure after the warm-up; give at least {_FEWEST_STEPS}")
    with tempfile.TemporaryDirectory() as folder:
        config = recipe.override(
            {
                "folder": folder,
                "num_steps": steps,
                "log_every": 1,
                "compile": "none",
                "data.batch_size": plan.micro_batch_size,
                "accum_steps": plan.count_micro_batches(global_batch),
            }
        )
        seconds, measured_bytes = _take_steps(config)
    return Checked(
        num_steps=steps,
        predicted_s=result.best.step_time_s,
        measured_s=statistics.median(seconds[len(seconds) // 4 :]),
        predicted_bytes=result.best.memory_bytes - result.best.memory_items_bytes.get("context", 0.0),
        measured_bytes=measured_bytes,
    )


def _take_steps(config: TrainConfig) -> tuple[list[float], float]:
    """Return seconds of each step after the first, and the peak of bytes over what was there before the model.

    The run ends before its model is evaluated and written.
    """
    from deepseek.train.events import RunStarted, StepDone
    from deepseek.train.loop import train

    _load_libraries()
    seconds: list[float] = []
    memory = _open_memory(config)
    with closing(train(config)) as events:
        for event in events:
            if isinstance(event, StepDone):
                if event.step > 1:
                    seconds.append(event.num_units / event.units_per_s)
                if event.step >= config.num_steps:
                    break
            elif not isinstance(event, RunStarted):
                memory.begin()
        return seconds, memory.measure()


def _load_libraries() -> None:
    """Take one step of a model of one number, so that what torch loads at first use counts as no memory of the plan."""
    import torch

    weight = torch.nn.Parameter(torch.ones(1, 1))
    (weight @ weight).sum().backward()
    torch.optim.AdamW([weight]).step()


class _ProcessMemory:
    """The most memory that this process has had since `begin`, over what it had then."""

    def __init__(self) -> None:
        self._start_bytes = peak_bytes()

    def begin(self) -> None:
        """Start over, where the system allows to forget the peak (Linux).

        What measuring the machine freed first goes back to the system, or the plan would use it and count for less.
        """
        give_back_freed_memory()
        forget_peak()
        self._start_bytes = peak_bytes()

    def measure(self) -> float:
        """Return the bytes."""
        return float(peak_bytes() - self._start_bytes)


class _DeviceMemory:
    """The most memory that the allocator of a GPU has held since `begin`."""

    def begin(self) -> None:
        """Forget the peak."""
        import torch

        torch.cuda.reset_peak_memory_stats()

    def measure(self) -> float:
        """Return the bytes."""
        import torch

        return float(torch.cuda.max_memory_reserved())


def _open_memory(config: TrainConfig) -> _ProcessMemory | _DeviceMemory:
    from deepseek.train.run_state import open_device

    return _DeviceMemory() if open_device(config.device).type == "cuda" else _ProcessMemory()
