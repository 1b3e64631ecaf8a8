"""How large a step is: the rule that scales it with the batch, and the schedules that change it over a run.

The rule is linear scaling, `base * batch_size / reference_batch_size` with 5e-4 per 256 sequences (Goyal et al. 2017).
A schedule is a pure function of the step, so a resumed run needs no scheduler state to continue exactly.
"""

from __future__ import annotations

import math
from typing import Literal

BASE_LEARNING_RATE = 5e-4
REFERENCE_BATCH_SIZE = 256

Schedule = Literal["constant", "linear", "cosine", "trapezoid"]


_OTHER_NAMES = {"wsd": "trapezoid"}


def read_schedule(name: object) -> object:
    """Return the name of a schedule as it is known here: warm-up, stable, decay (`wsd`) is a trapezoid."""
    return _OTHER_NAMES.get(name, name) if isinstance(name, str) else name


def scale_learning_rate(
    batch_size: int, *, base: float = BASE_LEARNING_RATE, reference_batch_size: int = REFERENCE_BATCH_SIZE
) -> float:
    """Return the learning rate for `batch_size` sequences per optimizer step.

    >>> scale_learning_rate(512)
    0.001
    """
    return base * batch_size / reference_batch_size


def schedule_factor(
    schedule: Schedule, step: int, *, num_steps: int, warmup_steps: int, final_factor: float, decay_share: float
) -> float:
    """Return the factor on the peak learning rate at `step` (from 0): a linear warm-up, then the schedule.

    `linear` and `cosine` fall from one towards `final_factor` over all of these; `trapezoid` stays at one and falls
    linearly during the last `decay_share` of them (Hägele et al. 2024); `constant` stays. From `num_steps` on it is
    `final_factor`, or one for `constant`.

    >>> [round(schedule_factor("linear", step, num_steps=4, warmup_steps=0, final_factor=0.0, decay_share=1.0), 2)
    ...  for step in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    shapes = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "trapezoid": min(1.0, (1 - progress) / decay_share),
    }
    return final_factor + (1 - final_factor) * shapes[schedule]
