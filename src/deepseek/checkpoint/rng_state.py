"""The state of every random number generator that training uses, as plain values for a checkpoint.

Python's `random`, numpy's global generator, torch's CPU generator and, where the machine has them, those of its CUDA
devices. Generators that code makes for itself are that code's own state.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from typing import Any

import numpy
import torch

from deepseek.core.errors import CheckpointError


class RandomStateWarning(UserWarning):
    """Some generators could not be set back, so random numbers differ from the interrupted run's."""


def capture_rng() -> dict[str, Any]:
    """Return the generators' states as nested tuples of numbers and tensors.

    >>> state = capture_rng()
    >>> first = random.random()
    >>> restore_rng(state)
    >>> random.random() == first
    True
    """
    name, keys, *rest = numpy.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),  # type: ignore[union-attr]  # legacy=True always gives a tuple
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_rng(state: Mapping[str, Any]) -> None:
    """Set the generators back to what `capture_rng` saw; warns when the number of CUDA devices changed."""
    missing = {"python", "numpy", "torch", "cuda"} - state.keys()
    if missing:
        raise CheckpointError(f"the random state lacks {sorted(missing)}; give what capture_rng() returned")
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_devices != len(state["cuda"]):
        warnings.warn(
            f"the random state is of {len(state['cuda'])} CUDA devices and this machine has {num_devices}; "
            "those that match are set back, so a resumed run will not be bit-equal",
            RandomStateWarning,
            stacklevel=2,
        )
    for device, device_state in enumerate(state["cuda"][:num_devices]):
        torch.cuda.set_rng_state(device_state, device)
