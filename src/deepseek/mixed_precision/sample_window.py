"""What `DynamicPrecision` has seen since its last decision: samples of all layers, added up over steps and ranks.

Each sampled step adds a row per layer: two histograms of exponents, the extremes, and the sampled gradient itself,
whose sum tells how much of it is signal (`estimate_signal`). All ranks end up with the same numbers, so that all of
them decide the same. A sample with values that are no numbers is not added; it says where they began.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek.mixed_precision.costs import Saving
from deepseek.mixed_precision.gradient_statistics import ROW_SIZE, Sample
from deepseek.mixed_precision.loss_scaling import Group, open_group
from deepseek.mixed_precision.policy import NUM_BINS, Evidence, Histogram

# Columns of a layer's row beside the two rows of counts: squared norm of the gradient's sample, and one per sample.
_NUM_EXTRA = 2


class SampleWindow:
    """Sums over the samples of the layers called `names`, on all ranks of `group`."""

    def __init__(self, names: Sequence[str], device: torch.device, group: Group) -> None:
        self._names, self._device, self._group = names, device, group
        self.clear()

    def clear(self) -> None:
        """Begin a new window."""
        self._counts = torch.zeros(len(self._names), 2 * ROW_SIZE + _NUM_EXTRA, dtype=torch.float64)
        self._extremes = torch.zeros(len(self._names), 2, dtype=torch.float64)
        self._gradient_sums: dict[str, Tensor] = {}

    @property
    def world_size(self) -> int:
        """Ranks that decide together."""
        group = open_group(self._group)
        return 1 if group is None else dist.get_world_size(group)

    @property
    def num_samples(self) -> int:
        """Samples of each rank in the window."""
        return round(float(self._counts[0, -1])) // self.world_size

    def state_dict(self) -> dict[str, Any]:
        """Return the window in progress: tensors by name."""
        return {
            "counts": self._counts.clone(),
            "extremes": self._extremes.clone(),
            "gradients": {name: gradient_sum.clone() for name, gradient_sum in self._gradient_sums.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the window that `state` holds."""
        self._counts, self._extremes = state["counts"].clone(), state["extremes"].clone()
        self._gradient_sums = {name: gradient_sum.clone() for name, gradient_sum in state["gradients"].items()}

    def add(self, samples: Mapping[str, Sample], gradients: Mapping[str, Tensor | None]) -> Tensor | None:
        """Add one step's samples; where some hold infinities, add nothing and return which layer has them where.

        The result is `(L, 3)`: inputs, outputs, gradients; the last is largest where gradients came first.
        """
        counts, extremes, flags = self._read(samples, gradients)
        if bool(flags.any()):
            return flags
        self._counts += counts
        self._extremes = torch.maximum(self._extremes, extremes)
        for name, gradient in gradients.items():
            if gradient is not None:
                self._gradient_sums[name] = self._gradient_sums.get(name, torch.zeros_like(gradient)) + gradient
        return None

    def _read(
        self, samples: Mapping[str, Sample], gradients: Mapping[str, Tensor | None]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(L, columns) counts, (L, 2) extremes and (L, 3) flags of non-finite values, over all ranks, on the CPU.

        The flags are of the layer's inputs, outputs and gradients; the last one is largest for the layer whose
        gradients were seen first.
        """
        counts = torch.zeros_like(self._counts)
        maxima = torch.zeros(len(samples), 5, dtype=torch.float64)
        for row, (name, sample) in enumerate(samples.items()):
            counts[row, :ROW_SIZE] = _add(sample.activations)
            counts[row, ROW_SIZE : 2 * ROW_SIZE] = _add(sample.gradients)
            gradient = gradients[name]
            counts[row, -2] = 0.0 if gradient is None else gradient.square().sum()
            counts[row, -1] = 1.0
            inputs, outputs, backwards = map(
                _largest, (sample.input_extremes, sample.output_extremes, sample.gradient_extremes)
            )
            maxima[row, 0], maxima[row, 1] = max(inputs, outputs), backwards
            maxima[row, 2], maxima[row, 3] = math.isinf(inputs), math.isinf(outputs)
            # Larger for what the backward pass reached earlier, so that the largest over the ranks is the first.
            maxima[row, 4] = math.isinf(backwards) * (len(samples) * 100.0 - sample.gradient_order)
        counts, maxima = self.reduce(counts, maxima)
        return counts, maxima[:, :2], maxima[:, 2:]

    def reduce(self, sums: Tensor, maxima: Tensor) -> tuple[Tensor, Tensor]:
        """Return `sums` added up and `maxima` maximized over the ranks."""
        group = open_group(self._group)
        if group is None:
            return sums, maxima
        for values, operation in ((sums, dist.ReduceOp.SUM), (maxima, dist.ReduceOp.MAX)):
            moved = values.to(self._device) if self._device.type == "cuda" else values
            dist.all_reduce(moved, op=operation, group=group)
            values.copy_(moved)
        return sums, maxima

    def gather(self, savings: Mapping[str, Saving], scale: float) -> dict[str, Evidence]:
        """Return the window's evidence by layer, equal on all ranks; `scale` is what gradients were multiplied with."""
        sums = torch.tensor(
            [
                [float(self._gradient_sums[name].square().sum()) if name in self._gradient_sums else 0.0]
                for name in self._names
            ],
            dtype=torch.float64,
        )
        sums, _ = self.reduce(sums, torch.zeros(0))
        num_samples = self.num_samples
        found = {}
        for row, name in enumerate(self._names):
            counts, extremes = self._counts[row].tolist(), self._extremes[row].tolist()
            saving = savings[name]
            found[name] = Evidence(
                _histogram(counts[:ROW_SIZE], extremes[0]),
                _histogram(counts[ROW_SIZE : 2 * ROW_SIZE], extremes[1]).shifted(-math.log2(scale)),
                estimate_signal(float(sums[row, 0]), counts[-2], num_samples),
                num_samples,
                saving.seconds,
                saving.num_bytes,
            )
        return found


def estimate_signal(squared_sum: float, sum_of_squares: float, num_samples: int) -> float:
    """|E g|^2 / tr Var g without bias, from |sum of g|^2 and the sum of |g|^2 over samples; infinite without variance.

    >>> estimate_signal(squared_sum=16.0, sum_of_squares=4.0, num_samples=4)
    inf
    >>> estimate_signal(squared_sum=4.0, sum_of_squares=4.0, num_samples=4)
    0.0
    """
    if sum_of_squares == 0 or num_samples < 2:
        return 0.0
    mean_squared = max(0.0, (squared_sum - sum_of_squares) / (num_samples * (num_samples - 1)))
    variance = sum_of_squares / num_samples - mean_squared
    # Below this the difference is rounding, and the batches are one and the same.
    return mean_squared / variance if variance > 1e-12 * mean_squared else math.inf


def _add(rows: Iterable[Tensor]) -> Tensor:
    rows = list(rows)
    return torch.stack(rows).sum(0).double().cpu() if rows else torch.zeros(ROW_SIZE, dtype=torch.float64)


def _largest(extremes: list[Tensor]) -> float:
    """Infinite where one value was infinite or no number."""
    if not extremes:
        return 0.0
    value = float(torch.stack(extremes).amax())
    return value if math.isfinite(value) else math.inf


def _histogram(row: list[float], largest: float) -> Histogram:
    exponent = math.frexp(largest)[1] - 1 if largest > 0 and math.isfinite(largest) else -math.inf
    return Histogram(tuple(row[:NUM_BINS]), row[NUM_BINS], row[NUM_BINS + 1], exponent)
