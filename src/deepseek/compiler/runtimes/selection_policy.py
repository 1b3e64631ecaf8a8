"""The policy of choosing a backend: who may run, who is right, who is worth another look, who wins. No tensors here.

`selection.select` builds and times; everything it decides, it decides with these functions on plain values, so that the
rules are tested in milliseconds. The steps, in order:

    list_candidates   backends x precisions allowed -> candidates in the order to try, and rejections with reasons
    judge_numbers     error against FP32 -> None, or why it is refused
    keep_fastest      short timings -> those that could still win
    choose            long timings -> the winner, with noise taken into account

Halving follows Karnin et al. 2013 ("Almost optimal exploration in multi-armed bandits"): each round drops the slower
half and measures the rest twice as long.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from deepseek.core.errors import ConfigError
from deepseek.core.names import explain_unknown

AUTO = "auto"
PRECISIONS = ("fp32", "bf16", "fp16", "int8")
NOT_TRIED = "not tried: "
"""How the reason begins why a candidate that might have run was not built."""
AS_WRITTEN = "as written"
"""The precision of a file that a runtime runs as it is: whatever stands in it."""
NOISE = 0.02
"""Medians nearer than this share of the faster one are the same speed; the more exact candidate is then taken."""


class BackendSelector(StrEnum):
    """Who runs a model: `AUTO` measures what is installed, the others are asked for by name."""

    AUTO = "auto"
    EAGER = "eager"
    INDUCTOR = "inductor"
    ONNXRUNTIME = "onnxruntime"
    OPENVINO = "openvino"
    TVM = "tvm"
    TENSORRT = "tensorrt"
    CUDA = "cuda"
    ROCM = "rocm"
    GAUDI = "gaudi"
    ASCEND = "ascend"


@dataclass(frozen=True)
class Traits:
    """The traits of a model that the policy can read without looking at its tensors."""

    num_convolutions: int = 0
    num_linears: int = 0
    batch_size: int = 1
    num_parameters: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class Candidate:
    """One way of running a model."""

    backend: str
    variant: str
    precision: str
    prior: int = 50
    refines: str | None = None
    """The variant of the same backend and precision that this one polishes."""

    def __str__(self) -> str:
        return f"{self.backend} {self.variant} {self.precision}"


@dataclass(frozen=True)
class Rejection:
    """A candidate that was not taken, and why; `candidate` may stand for a whole backend."""

    candidate: str
    reason: str


@dataclass(frozen=True)
class Tolerance:
    """How far an answer may be from FP32."""

    relative_error: float
    """Largest norm of the difference over the norm of the reference, for each output."""
    cosine: float
    """Least cosine between the two, for each output."""
    agreement: float
    """Least share of rows with the same largest entry, among rows that an error of this size cannot flip."""


DEFAULT_TOLERANCES: Mapping[str, Tolerance] = {
    "fp32": Tolerance(relative_error=1e-3, cosine=0.9999, agreement=1.0),
    "bf16": Tolerance(relative_error=0.06, cosine=0.998, agreement=1.0),
    "fp16": Tolerance(relative_error=0.01, cosine=0.9999, agreement=1.0),
    "int8": Tolerance(relative_error=0.25, cosine=0.97, agreement=0.95),
    AS_WRITTEN: Tolerance(relative_error=0.05, cosine=0.998, agreement=1.0),
}


@dataclass(frozen=True)
class Numbers:
    """How a candidate's answers compare with FP32 eager: the worst over all outputs."""

    relative_error: float
    cosine: float
    agreement: float | None
    """Share of decided rows with the same largest entry; `None` where no row is decided."""
    raw_agreement: float | None = None
    """Share of all rows with the same largest entry; `None` for outputs that are not rows of scores."""
    is_finite: bool = True


@dataclass(frozen=True)
class Measurement:
    """The measurement of one candidate."""

    candidate: Candidate
    numbers: Numbers
    times_ms: tuple[float, ...]
    build_s: float
    findings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def median_ms(self) -> float:
        """Return the median time of a call."""
        return statistics.median(self.times_ms)


@dataclass(frozen=True)
class Decision:
    """Who runs the model, and everything that was measured and refused on the way."""

    chosen: Candidate
    baseline_ms: float
    """Median time of a call of the model as it was given."""
    measurements: tuple[Measurement, ...]
    rejections: tuple[Rejection, ...]
    spent_s: float
    key: Mapping[str, object] = field(default_factory=dict)
    is_remembered: bool = False
    reference: str = "eager FP32"
    """Name of the model as it was given."""

    @property
    def winner(self) -> Measurement:
        """Return the measurement of the chosen candidate."""
        return next(measurement for measurement in self.measurements if measurement.candidate == self.chosen)


def read_backend(backend: BackendSelector | str) -> BackendSelector:
    """Return the selector called `backend`; raises `ConfigError` for an unknown name.

    >>> read_backend("openvino")
    <BackendSelector.OPENVINO: 'openvino'>
    """
    try:
        return BackendSelector(backend)
    except ValueError:
        raise ConfigError(
            explain_unknown("backend", str(backend), [str(selector) for selector in BackendSelector])
        ) from None


def list_precisions(precision: str) -> tuple[str, ...]:
    """Return the precisions that a request allows: all for `auto`.

    >>> list_precisions("bf16"), list_precisions("auto")
    (('bf16',), ('fp32', 'bf16', 'fp16', 'int8'))
    """
    if precision == AUTO:
        return PRECISIONS
    if precision == AS_WRITTEN:
        return (AS_WRITTEN,)
    if precision not in PRECISIONS:
        raise ConfigError(explain_unknown("precision", precision, (AUTO, *PRECISIONS)))
    return (precision,)


def read_tolerances(tolerance: Tolerance | Mapping[str, Tolerance] | float | None) -> dict[str, Tolerance]:
    """Return the bound for each precision: the defaults, one relative error for all, one tolerance for all, or a
    mapping."""
    if tolerance is None:
        return dict(DEFAULT_TOLERANCES)
    if isinstance(tolerance, Mapping):
        unknown = [name for name in tolerance if name not in DEFAULT_TOLERANCES]
        if unknown:
            raise ConfigError(explain_unknown("precision", unknown[0], PRECISIONS))
        return {**DEFAULT_TOLERANCES, **tolerance}
    if isinstance(tolerance, Tolerance):
        return dict.fromkeys(DEFAULT_TOLERANCES, tolerance)
    if not (math.isfinite(tolerance) and tolerance > 0):
        raise ConfigError(f"tolerance is {tolerance}; give a relative error above 0, for example 0.01")
    cosine = max(-1.0, 1 - float(tolerance) ** 2)
    return dict.fromkeys(DEFAULT_TOLERANCES, Tolerance(float(tolerance), cosine, agreement=0.0))


def merge_numbers(found: Sequence[Numbers]) -> Numbers:
    """One comparison from those of several batches: their mean.

    >>> merge_numbers([Numbers(0.1, 1.0, None), Numbers(0.3, 0.8, 0.5)])
    Numbers(relative_error=0.2, cosine=0.9, agreement=0.5, raw_agreement=None, is_finite=True)
    """
    agreements = [numbers.agreement for numbers in found if numbers.agreement is not None]
    raw = [numbers.raw_agreement for numbers in found if numbers.raw_agreement is not None]
    return Numbers(
        relative_error=statistics.fmean(numbers.relative_error for numbers in found),
        cosine=statistics.fmean(numbers.cosine for numbers in found),
        agreement=statistics.fmean(agreements) if agreements else None,
        raw_agreement=statistics.fmean(raw) if raw else None,
        is_finite=all(numbers.is_finite for numbers in found),
    )


def judge_numbers(numbers: Numbers, tolerance: Tolerance) -> str | None:
    """Return why these numbers are refused, or `None`.

    >>> judge_numbers(Numbers(0.5, 0.99, 1.0), Tolerance(0.1, 0.9, 1.0))
    'relative error 0.5 is above 0.1'
    """
    if not numbers.is_finite:
        return "its answer holds NaN or infinity where FP32 has none"
    if not numbers.relative_error <= tolerance.relative_error:
        return f"relative error {numbers.relative_error:.3g} is above {tolerance.relative_error:g}"
    if not numbers.cosine >= tolerance.cosine:
        return f"cosine {numbers.cosine:.5f} is below {tolerance.cosine:g}"
    if numbers.agreement is not None and numbers.agreement < tolerance.agreement:
        return f"top-1 agreement {numbers.agreement:.3f} is below {tolerance.agreement:g}"
    return None


def order(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return the candidates in the order to try: the likeliest winner first, so that a small budget still finds it."""
    rank = {name: index for index, name in enumerate(DEFAULT_TOLERANCES)}
    return sorted(candidates, key=lambda candidate: (candidate.prior, rank[candidate.precision], str(candidate)))


def is_worth_more(median_ms: float, best_ms: float, *, margin: float) -> bool:
    """Return whether a candidate that was timed shortly could still win."""
    return median_ms <= best_ms * (1 + margin)


def find_stale_parent(
    candidate: Candidate, medians_ms: Mapping[Candidate, float], *, margin: float = 0.3
) -> str | None:
    """Return why a refinement need not be built: what it refines is too far behind the best already; `None` if it may
    win."""
    parent = next(
        (
            refined
            for refined in medians_ms
            if (refined.backend, refined.precision, refined.variant)
            == (candidate.backend, candidate.precision, candidate.refines)
        ),
        None,
    )
    if parent is None:
        return None if candidate.refines is None else f"{NOT_TRIED}{candidate.refines}, which it refines, does not run"
    best_ms = min(medians_ms.values())
    if is_worth_more(medians_ms[parent], best_ms, margin=margin):
        return None
    return f"{NOT_TRIED}{candidate.refines}, which it refines, takes {medians_ms[parent] / best_ms:.1f} times the best"


def keep_fastest(medians_ms: Mapping[Candidate, float], *, margin: float = 0.5) -> list[Candidate]:
    """Return the faster half of the candidates, those within `margin` of the best, and never fewer than one; fastest
    first.

    >>> one, two = Candidate("a", "x", "fp32"), Candidate("b", "x", "fp32")
    >>> keep_fastest({one: 10.0, two: 1.0}) == [two]
    True
    """
    ranked = sorted(medians_ms, key=lambda candidate: medians_ms[candidate])
    best_ms = medians_ms[ranked[0]]
    half = ranked[: max(1, math.ceil(len(ranked) / 2))]
    return [candidate for candidate in half if is_worth_more(medians_ms[candidate], best_ms, margin=margin)]


def choose(
    medians_ms: Mapping[Candidate, float], errors: Mapping[Candidate, float], *, noise: float = NOISE
) -> Candidate:
    """Return the fastest candidate; among those that are as fast within `noise`, the one with the smallest error.

    >>> exact, rough = Candidate("a", "x", "fp32"), Candidate("a", "x", "int8")
    >>> choose({exact: 1.01, rough: 1.0}, {exact: 0.0, rough: 0.1}) == exact
    True
    """
    best_ms = min(medians_ms.values())
    near = [candidate for candidate in medians_ms if medians_ms[candidate] <= best_ms * (1 + noise)]
    return min(near, key=lambda candidate: (errors[candidate], medians_ms[candidate]))


def plan_rounds(finalists: Sequence[Candidate], medians_ms: Mapping[Candidate, float], left_s: float) -> int:
    """Return how many interleaved rounds of one call each fit into `left_s`, between 5 and 50.

    >>> plan_rounds([], {}, 1.0)
    5
    """
    round_s = sum(medians_ms[candidate] for candidate in finalists) / 1000
    return max(5, min(50, int(left_s / round_s))) if round_s > 0 else 5
