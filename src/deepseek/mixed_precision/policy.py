"""Which precision a layer may run in, from what its values looked like: pure policy, without a tensor in it.

`DynamicPrecision` measures and carries out; here stand the rules, as functions on frozen values:

    evidence of each layer ──> judge ──> choose (under the joint budget) ──> apply_hysteresis ──> precision

The rule is that rounding must drown in the noise that stochastic gradients have anyway. For a layer,

    noise    E |Q(v) - v|^2 / E v^2     what rounding to a format adds, from histograms of exponents
    signal   |E g|^2 / tr Var g         of the weight's gradient over the batches of a window
    share    noise * signal             rounding noise over gradient noise

and a 16-bit format is allowed where share is at most the one that was asked for, where at most a stated share of the
gradient's elements falls below its smallest number (after loss scaling) and where nothing is above its largest. Among
formats that save nothing, measured in seconds and bytes, FP32 stays. Going down takes several good windows, going up
one violation.

A value of exponent e, rounded to p bits after the point, is off by a uniform error: ulp^2 / 12 with ulp = 2^(e - p);
below the smallest normal number ulp no longer shrinks, and below half the smallest subnormal the value is lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from deepseek.core.errors import ConfigError
from deepseek.core.names import explain_unknown

NUM_BINS = 256
# Bin 0 holds exponents up to this one, the last bin 127.
LOWEST_EXPONENT = -128


@dataclass(frozen=True)
class Format:
    """A floating-point format: bits after the point, exponents of its smallest and largest normal numbers."""

    name: str
    mantissa_bits: int
    min_exponent: int
    max_exponent: int

    @property
    def tiny_exponent(self) -> int:
        """Exponent of the smallest subnormal number."""
        return self.min_exponent - self.mantissa_bits


FORMATS = {
    "fp32": Format("fp32", 23, -126, 127),
    "tf32": Format("tf32", 10, -126, 127),
    "bf16": Format("bf16", 7, -126, 127),
    "fp16": Format("fp16", 10, -14, 15),
}


@dataclass(frozen=True)
class Histogram:
    """How often each exponent floor(log2 |v|) was seen."""

    counts: tuple[float, ...] = (0.0,) * NUM_BINS
    num_zeros: float = 0.0
    num_non_finite: float = 0.0
    largest_exponent: float = -math.inf
    """Of all elements, where `counts` may be of a sample."""

    @property
    def num_nonzeros(self) -> float:
        """Finite elements other than zero."""
        return sum(self.counts)

    def shifted(self, exponents: float) -> Histogram:
        """Return the same values times 2^exponents."""
        num_bins = round(exponents)
        counts = [0.0] * NUM_BINS
        for index, count in enumerate(self.counts):
            counts[min(max(index + num_bins, 0), NUM_BINS - 1)] += count
        return replace(self, counts=tuple(counts), largest_exponent=self.largest_exponent + num_bins)


def rounding_noise(histogram: Histogram, format: Format) -> float:
    """E |Q(v) - v|^2 / E v^2 for values spread evenly within each power of two; 0 where nothing was seen.

    >>> counts = [0.0] * NUM_BINS
    >>> counts[-LOWEST_EXPONENT] = 1.0
    >>> noise = rounding_noise(Histogram(tuple(counts)), FORMATS["bf16"])
    >>> round(noise * 2**16, 3)
    0.143
    """
    error = energy = 0.0
    largest = max((index for index, count in enumerate(histogram.counts) if count), default=0)
    for index, count in enumerate(histogram.counts):
        if count:
            # Relative to the largest exponent, so that no square leaves the range of a float.
            square = 4.0 ** (index - largest)
            energy += count * square * _MEAN_SQUARE
            error += count * square * _squared_error(index + LOWEST_EXPONENT, format)
    return error / energy if energy else 0.0


_MEAN_SQUARE = 7 / 3  # of a number spread evenly over [1, 2)


def _squared_error(exponent: int, format: Format) -> float:
    """Return the mean squared error of rounding numbers in [2^exponent, 2^(exponent + 1)), over 4^exponent."""
    if exponent < format.tiny_exponent - 1:
        return _MEAN_SQUARE
    ulp_exponent = max(exponent, format.min_exponent) - format.mantissa_bits - exponent
    return float(4.0**ulp_exponent / 12)


def underflow_share(histogram: Histogram, format: Format) -> float:
    """Share of the nonzero elements that are below the format's smallest number."""
    total = histogram.num_nonzeros
    lost = sum(histogram.counts[: max(0, format.tiny_exponent - LOWEST_EXPONENT)])
    return lost / total if total else 0.0


def overflows(histogram: Histogram, format: Format) -> bool:
    """Return whether an element is infinite or above the format's largest number."""
    return histogram.num_non_finite > 0 or histogram.largest_exponent > format.max_exponent


@dataclass(frozen=True)
class Evidence:
    """Statistics of one layer in a window, the same on every rank."""

    activations: Histogram = field(default_factory=Histogram)
    """Inputs and outputs."""
    gradients: Histogram = field(default_factory=Histogram)
    """Of the outputs, without the loss scale."""
    signal: float = 0.0
    """|E g|^2 / tr Var g of the weight's gradient; infinite where it does not vary."""
    num_samples: int = 0
    saved_s: float = 0.0
    """Measured seconds of forward and backward in FP32 less those in 16 bits."""
    saved_bytes: float = 0.0
    """Bytes kept for the backward pass in FP32 less those in 16 bits."""


@dataclass(frozen=True)
class Rules:
    """The bounds, and how slowly they are believed."""

    share: float = 0.05
    """Rounding noise over gradient noise that one layer may have."""
    joint_share: float = 1.0
    """The sum of that over all layers in 16 bits."""
    max_underflow: float = 0.01
    """Share of a gradient's nonzero elements that may be lost."""
    patience: int = 2
    """Good windows in a row before a layer goes down to 16 bits."""
    min_samples: int = 2
    """Batches that a verdict needs."""

    def __post_init__(self) -> None:
        for name in ("share", "joint_share", "max_underflow"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; give 0 or more")
        if self.patience < 1 or self.min_samples < 2:
            raise ConfigError(
                f"patience is {self.patience} and min_samples {self.min_samples}; give at least 1 window and 2 batches"
            )


@dataclass(frozen=True)
class Verdict:
    """The conclusion from the evidence on a layer in 16 bits."""

    is_allowed: bool
    noise: float
    share: float
    """noise * signal."""
    underflow: float
    reason: str


@dataclass(frozen=True)
class LayerState:
    """The current precision of a layer, and why."""

    precision: str
    num_good: int = 0
    """Windows in a row that allowed 16 bits."""
    reason: str = "as it started"


def judge(evidence: Evidence, low: Format, rules: Rules, *, scale: float = 1.0) -> Verdict:
    """Judge whether the layer may run in `low` with gradients times `scale`; the reason names the number."""
    gradients = evidence.gradients.shifted(math.log2(scale))
    noise = max(rounding_noise(evidence.activations, low), rounding_noise(gradients, low))
    share = noise * evidence.signal if noise else 0.0
    underflow = underflow_share(gradients, low)
    for is_violated, reason in (
        (overflows(evidence.activations, low), _too_large("activations", evidence.activations, low)),
        (_overflows_unscaled(evidence.gradients, low), _too_large("gradients", evidence.gradients, low)),
        (_is_lost(evidence.gradients, low), f"all gradients are zero, as if below the smallest {low.name} number"),
        (underflow > rules.max_underflow, f"{underflow:.1%} of the gradient is below the smallest {low.name} number"),
        (share > rules.share, f"rounding noise is {share:.2g} of the gradient noise"),
    ):
        if is_violated:
            return Verdict(False, noise, share, underflow, reason)
    return Verdict(True, noise, share, underflow, f"rounding noise is {share:.2g} of the gradient noise")


def _overflows_unscaled(gradients: Histogram, low: Format) -> bool:
    """A scaler finds a scale that fits; what is too large without one never will."""
    return gradients.num_non_finite > 0 or gradients.largest_exponent > low.max_exponent


def _is_lost(gradients: Histogram, low: Format) -> bool:
    """A layer that runs in a narrow range shows no small gradients any more, only zeros."""
    has_narrow_range = low.min_exponent > FORMATS["fp32"].min_exponent
    return has_narrow_range and gradients.num_zeros > 0 and gradients.num_nonzeros == 0


def _too_large(what: str, histogram: Histogram, low: Format) -> str:
    if histogram.num_non_finite:
        return f"{what} are infinite or no numbers"
    return f"{what} reach 2^{histogram.largest_exponent:.0f}, {low.name} ends below 2^{low.max_exponent + 1}"


def choose(
    evidence: Mapping[str, Evidence], low: Format, rules: Rules, *, scale: float = 1.0
) -> dict[str, tuple[bool, Verdict]]:
    """Choose the layers for 16 bits, where allowed and worth it within the joint budget, each with its verdict.

    Those that save most for the noise they add come first; the order does not depend on the order of the dict.
    """
    verdicts = {name: judge(item, low, rules, scale=scale) for name, item in evidence.items()}
    benefit = _benefits(evidence)
    answers: dict[str, tuple[bool, Verdict]] = {}
    spent = 0.0
    for name in sorted(verdicts, key=lambda layer: (-benefit[layer] / max(verdicts[layer].share, 1e-30), layer)):
        verdict = verdicts[name]
        if verdict.is_allowed and benefit[name] <= 0:
            verdict = replace(verdict, is_allowed=False, reason="16 bits save too little here")
        elif verdict.is_allowed and spent + verdict.share > rules.joint_share:
            verdict = replace(verdict, is_allowed=False, reason=f"the joint budget of {rules.joint_share:g} is spent")
        elif verdict.is_allowed:
            spent += verdict.share
        answers[name] = verdict.is_allowed, verdict
    return answers


def _benefits(evidence: Mapping[str, Evidence]) -> dict[str, float]:
    """Return each layer's saving, as its share of all that is at stake; a share of time weighs as two of memory.

    So a machine where 16 bits are slower everywhere stays in FP32, though they would save memory.
    """
    total_s = sum(abs(layer.saved_s) for layer in evidence.values()) or 1.0
    total_bytes = sum(abs(layer.saved_bytes) for layer in evidence.values()) or 1.0
    return {name: 2 * item.saved_s / total_s + item.saved_bytes / total_bytes for name, item in evidence.items()}


def apply_hysteresis(state: LayerState, verdict: Verdict, low: str, rules: Rules) -> LayerState:
    """Return the next state of a layer: up at once, down after `patience` good windows.

    >>> good = Verdict(True, 0.0, 0.0, 0.0, "quiet")
    >>> first = apply_hysteresis(LayerState("fp32"), good, "bf16", Rules(patience=2))
    >>> first.precision, apply_hysteresis(first, good, "bf16", Rules(patience=2)).precision
    ('fp32', 'bf16')
    """
    if not verdict.is_allowed:
        return LayerState("fp32", 0, verdict.reason)
    num_good = state.num_good + 1
    if state.precision == low or num_good >= rules.patience:
        return LayerState(low, num_good, verdict.reason)
    return LayerState("fp32", num_good, f"good for {num_good} of {rules.patience} windows")


def find_culprits(samples: Sequence[tuple[str, bool, bool]]) -> tuple[str, ...]:
    """Return the layers where infinities began, from (name, are its inputs finite, are its results finite) in one pass.

    >>> find_culprits([("a", True, True), ("b", True, False), ("c", False, False)])
    ('b',)
    """
    return tuple(name for name, is_fed_well, is_well in samples if is_fed_well and not is_well)


def find_format(name: str) -> Format:
    """Return the format `name`; `ConfigError` lists the known ones."""
    if name not in FORMATS:
        raise ConfigError(explain_unknown("precision", name, FORMATS))
    return FORMATS[name]
