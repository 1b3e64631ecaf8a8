"""Which evaluation was the best so far, and for how many there has been no better one. Pure numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class BestMetric:
    """The best value of one metric.

    >>> best = BestMetric(is_lower_better=True)
    >>> [best.observe(step, value) for step, value in [(10, 2.0), (20, 1.5), (30, 1.6)]]
    [True, True, False]
    >>> best.value, best.step, best.num_without_better
    (1.5, 20, 1)
    """

    is_lower_better: bool
    min_change: float = 0.0
    value: float | None = None
    """`None` before the first evaluation."""
    step: int = 0
    num_without_better: int = 0
    """Evaluations since the best one."""

    def observe(self, step: int, value: float) -> bool:
        """Take in the value of one evaluation, and return whether it is the best so far; NaN never is."""
        if step == self.step and value == self.value:
            return True  # of a finished run that is evaluated again
        if self._is_better(value):
            self.value, self.step, self.num_without_better = value, step, 0
            return True
        self.num_without_better += 1
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return the state, as JSON values."""
        return {"value": self.value, "step": self.step, "num_without_better": self.num_without_better}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.value, self.step = state["value"], int(state["step"])
        self.num_without_better = int(state["num_without_better"])

    def _is_better(self, value: float) -> bool:
        if math.isnan(value):
            return False
        if self.value is None:
            return True
        gain = self.value - value if self.is_lower_better else value - self.value
        return gain > self.min_change
