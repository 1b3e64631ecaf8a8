"""Keeping one bad batch from undoing many good ones: the norm of the whole gradient is bounded before each step.

A `GradientBound` gives the factor on the gradient of each step from the step's loss and norm; the loop asks it once a
step. `FixedBound` is the known one (Pascanu et al. 2013). It fits one phase of a run, since norms fall by orders of
magnitude while a model learns; `AdaptiveBound` follows them: a step's gradient is scaled to what, say, 90 of 100 of the
last steps stayed below, so that one odd batch counts for no more than the others (Seetharaman et al. 2020). The norm is
torch's; what is added for loops of one's own is that a gradient which is no longer a number stops with a sentence
instead of turning every weight into NaN.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from deepseek.core.errors import ConfigError, TrainingError

CLIP_WINDOW = 128
"""Steps whose norms an adaptive bound remembers, unless told otherwise."""


class GradientBound(Protocol):
    """How much of each step's gradient is used."""

    def factor(self, loss: float, norm: float) -> float:
        """Return the factor in (0, 1] on the gradient of the step with this loss and norm, both finite."""

    def state_dict(self) -> dict[str, Any]:
        """Return what later factors depend on, as JSON values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave."""


class FixedBound:
    """A gradient whose norm is over `max_norm` is scaled to it; `None` never scales.

    >>> FixedBound(2.0).factor(loss=1.0, norm=8.0)
    0.25
    """

    def __init__(self, max_norm: float | None) -> None:
        self.max_norm = max_norm

    def factor(self, loss: float, norm: float) -> float:
        """Return `max_norm` over the norm, at most 1."""
        return 1.0 if self.max_norm is None or norm <= self.max_norm else self.max_norm / norm

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: no factor depends on an earlier step."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is nothing to take up."""


class AdaptiveBound:
    """Scales a gradient to the `percentile` of the last `window` norms, its own included, and to `max_norm` at most.

    >>> bound = AdaptiveBound(percentile=50, window=5)
    >>> [round(bound.factor(loss=1.0, norm=norm), 2) for norm in (1.0, 1.0, 1.0, 10.0)]
    [1.0, 1.0, 1.0, 0.1]
    """

    def __init__(self, percentile: float, *, window: int = CLIP_WINDOW, max_norm: float | None = None) -> None:
        if not 0 < percentile <= 100:
            raise ConfigError(f"percentile is {percentile}; give a number over 0 and up to 100")
        if window < 1:
            raise ConfigError(f"window is {window}; remember at least 1 step")
        self.percentile = percentile
        self._fixed = FixedBound(max_norm)
        self._norms: deque[float] = deque(maxlen=window)

    def factor(self, loss: float, norm: float) -> float:
        """Return the bound over the norm, at most 1; the bound is the smallest norm that enough others stay within."""
        self._norms.append(norm)
        ranked = sorted(self._norms)
        limit = ranked[max(0, math.ceil(self.percentile / 100 * len(ranked)) - 1)]
        adaptive = limit / norm if norm > limit else 1.0
        # A bound of zero would stop a run for good: where most gradients vanish, one that does not is news.
        return min(adaptive or 1.0, self._fixed.factor(loss, norm))

    def state_dict(self) -> dict[str, Any]:
        """Return the norms that are remembered, as JSON values."""
        return {"norms": list(self._norms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave; nothing, where a fixed bound gave it."""
        self._norms.clear()
        self._norms.extend(float(norm) for norm in state.get("norms", ()))


def build_bound(max_norm: float | None, percentile: float | None, window: int = CLIP_WINDOW) -> GradientBound:
    """Build the bound of a run: `percentile` of the last `window` norms, if given, and never over `max_norm`."""
    return FixedBound(max_norm) if percentile is None else AdaptiveBound(percentile, window=window, max_norm=max_norm)


def gradient_norm(gradients: Sequence[Tensor]) -> float:
    """Return the norm of all `gradients` together."""
    return float(torch.nn.utils.get_total_norm(gradients))


def scale_gradients_(gradients: Sequence[Tensor], factor: float) -> None:
    """Multiply `gradients` by `factor`, in place."""
    if factor != 1.0:
        torch._foreach_mul_(list(gradients), factor)


def clip_gradients_(parameters: Iterable[Tensor], max_norm: float | None) -> float:
    """Scale gradients in place so that their joint norm is at most `max_norm`; return the norm before that.

    `None` only measures. Raises `TrainingError` when the norm is not finite; the gradients are then left as they are.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = gradient_norm(gradients)
    if not math.isfinite(norm):
        raise TrainingError(
            f"the gradient norm is {norm}; expected a finite number: lower the learning rate, "
            "check the batch for extreme values, or use precision 'fp32'"
        )
    scale_gradients_(gradients, FixedBound(max_norm).factor(0.0, norm))
    return norm
