"""Gradient prediction: a divergence is foreseen from the trend of the last losses and norms, and the step is damped.

Divergence announces itself. Before a loss explodes it rises for some steps, and the gradient's norm jumps before that.
The loop shows this class the loss and norm of each step before the step is taken, and multiplies the step's learning
rate by what it answers. A clipped gradient still points where it pointed, and an adaptive optimizer undoes any constant
factor on gradients: so it is the learning rate that is damped.

- *Usual* are the last `MEMORY` steps: for the loss the lowest median of `BLOCK` steps in a row, for the logarithm of
  the norm the median; the spread is that of the differences from step to step, so that a falling loss is no spread.
- A *spike* is a norm over the limit, `sensitivity` times the spread above the usual and at least `_LEAST_JUMP`. One
  may be an odd batch: it alone is damped, in proportion. Two within `_NEAR` steps, with a loss above the usual, are a
  trend.
- The loss is *foreseen* by the line through the lower of each two neighbors (which one odd batch does not move) among
  the last `TREND` steps, prolonged by `HORIZON`. Where it rises over its limit, trouble is ahead.

A foreseen divergence halves the learning rate, or more where the norm says so. When it is over the rate comes back, in
some steps to a little less than what went wrong, or to half of it where that was not the first time, and slowly from
there. What is over a limit enters the memory as the limit, so that a loss that went up for good becomes usual in time.

Measured in benchmarks/gradient_prediction.py: it saves what a too large step blows up, SGD above all, and leaves calm
runs alone; a network that a too large step has already killed stays dead. Some ten microseconds a step, nothing random.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pydantic import Field

from deepseek.core.config import Config

MEMORY, BLOCK, TREND, HORIZON = 32, 8, 5, 2
_NEAR = 8  # steps within which two spikes are a trend; at the very start one is, since nothing says it is odd
_LEAST_JUMP = math.log(4)  # of a norm
_LEAST_RISE = 0.08  # of a loss, relative to it
_LEAST_SPIKE, _LEAST_ALARM, _ALARM = 1 / 64, 1 / 8, 1 / 2  # factors
_PATIENCE = 6  # calm steps after which the learning rate comes back
_FAST, _SLOW = 1.05, 1.005  # factors per step on the way back
_FIRST_SAFE, _SAFE = 0.9, 0.5  # shares of the factor that went wrong
_COOLDOWN = 2  # steps from one alarm to the next; one of them needs to show
_AGAIN = 64  # steps within which an alarm is not the first
_NORMAL = 1.4826 / math.sqrt(2)  # median absolute deviation of differences -> standard deviation of normal noise


class GradientPredictionConfig(Config):
    """When a divergence is foreseen."""

    sensitivity: float = Field(default=5.0, gt=0)
    """Usual spreads above the usual at which a loss or norm is trouble; lower values see more of it."""
    smallest_factor: float = Field(default=1 / 1024, gt=0, le=1)
    """Least factor on the learning rate."""


def read_gradient_prediction(value: object) -> object:
    """Return the settings for `true`, and none for `false`; validators see everything else as it is."""
    return ({} if value else None) if isinstance(value, bool) else value


@dataclass(frozen=True)
class Damping:
    """The answer to one step."""

    factor: float
    """On the learning rate of the step, over 0 and at most 1."""
    reason: str = ""
    """What was foreseen; empty where nothing was."""


UNDAMPED = Damping(1.0)
"""The answer where nothing is foreseen."""


class GradientPrediction:
    """The factor on the learning rate, step by step.

    >>> prediction = GradientPrediction(GradientPredictionConfig())
    >>> calm = [prediction.observe(loss=2.0 + 0.01 * (step % 3), norm=1.0).factor for step in range(40)]
    >>> rising = [prediction.observe(loss=2.0 * 1.2**step, norm=1.5**step).factor for step in range(8)]
    >>> min(calm), rising[-1] < 0.5
    (1.0, True)
    """

    def __init__(self, config: GradientPredictionConfig) -> None:
        self.config = config
        self.factor = 1.0
        """The factor that lasts; a spike damps its own step further."""
        self._ceiling = 1.0
        self._num_calm = _PATIENCE
        self._step = 0
        self._alarmed: int | None = None
        self._spiked: int | None = None
        self._losses: deque[float] = deque(maxlen=MEMORY)
        self._log_norms: deque[float] = deque(maxlen=MEMORY)
        self._recent: deque[float] = deque(maxlen=TREND)

    def observe(self, loss: float, norm: float) -> Damping:
        """Take in the loss and norm of a step, both finite, and return the factor on its learning rate."""
        log_norm = math.log(max(norm, 1e-30))
        self._recent.append(loss)
        if not self._losses:
            self._remember(loss, log_norm)
            return Damping(self.factor)
        usual = _find_usual_loss(self._losses)
        limit = usual + max(_LEAST_RISE * abs(usual), self.config.sensitivity * _measure_spread(self._losses))
        usual_norm = statistics.median(self._log_norms)
        norm_limit = usual_norm + max(_LEAST_JUMP, self.config.sensitivity * _measure_spread(self._log_norms))
        is_spike = log_norm > norm_limit
        ahead = _foresee(self._recent)
        is_alarm = ahead > limit or (is_spike and loss > usual and self._is_near_spike())
        # Twice what is usual is no spike; the rest is taken away.
        spike_factor = max(_LEAST_SPIKE, 2 * math.exp(usual_norm - log_norm)) if is_spike else 1.0
        reason = ""
        if is_spike:
            self._spiked = self._step
            reason = f"the gradient norm is {norm:.3g}, usual is {math.exp(usual_norm):.3g}"
        if is_alarm and (is_spike or self._alarmed is None or self._step - self._alarmed >= _COOLDOWN):
            self._alarm(max(_LEAST_ALARM, min(_ALARM, spike_factor)))
            reason = reason or f"the loss rises towards {ahead:.3g}, usual is {usual:.3g}"
        if not is_alarm:
            self._calm()
        self._remember(min(loss, limit), min(log_norm, norm_limit))
        return Damping(self.factor * spike_factor, reason)

    def _is_near_spike(self) -> bool:
        return self._step <= _NEAR or (self._spiked is not None and self._step - self._spiked <= _NEAR)

    def _alarm(self, factor: float) -> None:
        is_again = self._step < MEMORY or (self._alarmed is not None and self._step - self._alarmed < _AGAIN)
        self._alarmed = self._step
        self._ceiling = self.factor * (_SAFE if is_again else _FIRST_SAFE)
        self.factor = max(self.config.smallest_factor, self.factor * factor)
        self._num_calm = 0

    def _calm(self) -> None:
        self._num_calm += 1
        if self._num_calm > _PATIENCE:
            self.factor = min(1.0, self.factor * (_FAST if self.factor < self._ceiling else _SLOW))

    def _remember(self, loss: float, log_norm: float) -> None:
        self._losses.append(loss)
        self._log_norms.append(log_norm)
        self._step += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the state, as JSON values."""
        return {
            "factor": self.factor,
            "ceiling": self._ceiling,
            "num_calm": self._num_calm,
            "step": self._step,
            "alarmed": self._alarmed,
            "spiked": self._spiked,
            "losses": list(self._losses),
            "log_norms": list(self._log_norms),
            "recent": list(self._recent),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.factor, self._ceiling = float(state["factor"]), float(state["ceiling"])
        self._num_calm, self._step = int(state["num_calm"]), int(state["step"])
        self._alarmed, self._spiked = state["alarmed"], state["spiked"]
        self._losses = deque(state["losses"], maxlen=MEMORY)
        self._log_norms = deque(state["log_norms"], maxlen=MEMORY)
        self._recent = deque(state["recent"], maxlen=TREND)


def fit_line(values: Sequence[float]) -> tuple[float, float]:
    """Return the slope of the least-squares line through equally spaced `values`, and its value at the last of them.

    >>> fit_line([1.0, 2.0, 3.0])
    (1.0, 3.0)
    """
    middle = (len(values) - 1) / 2
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return 0.0, mean
    slope = math.fsum((index - middle) * value for index, value in enumerate(values))
    slope /= math.fsum((index - middle) ** 2 for index in range(len(values)))
    return slope, mean + slope * middle


def _find_usual_loss(losses: Sequence[float]) -> float:
    values = list(losses)
    num_blocks = max(1, len(values) - BLOCK + 1)
    return min(statistics.median(values[first : first + BLOCK]) for first in range(num_blocks))


def _measure_spread(values: Sequence[float]) -> float:
    """Return the standard deviation of the noise on `values`; 0 where too few say anything."""
    known = list(values)
    changes = [after - before for before, after in pairwise(known)]
    if len(changes) < BLOCK - 2:
        return 0.0
    middle = statistics.median(changes)
    return _NORMAL * statistics.median(abs(change - middle) for change in changes)


def _foresee(recent: Sequence[float]) -> float:
    """Return where the lower envelope of the last losses is going; minus infinity where it is not rising."""
    values = list(recent)
    lower = [min(pair) for pair in pairwise(values)]
    if len(lower) > 1 and lower[-1] <= lower[0]:
        return -math.inf
    slope, end = fit_line(lower)
    return end + max(0.0, slope) * HORIZON
