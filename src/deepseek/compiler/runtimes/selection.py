"""`select`: the fastest correct way of running a model here, found by trying.

    selection = select(model, sample_inputs)          # all backends, all precisions, within 60 s
    answers = selection.model(*sample_inputs)
    print(selection.explain())

Candidates are what is installed times the precisions allowed. Each is built, compared with FP32 eager on the sample
inputs, and refused when its numbers are beyond the bound or when it is not what it says (`fallbacks.py`); the rest are
timed in turns, shortly at first, finalists longer. Everything that is decided is decided in `choosing.py`; the result
is kept by `decisions.py`, and with it every measurement and every refusal, so that the next process only builds the
winner.

Cost: the time budget, once per model, shape, precision, machine and library versions.
"""

from __future__ import annotations

import copy
import inspect
import statistics
import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deepseek.compiler.runtimes import decisions
from deepseek.compiler.runtimes.accuracy import check_numbers
from deepseek.compiler.runtimes.backends import BACKENDS
from deepseek.compiler.runtimes.backends.flat_signature import Flattened, flatten_model, require_model
from deepseek.compiler.runtimes.backends.interface import BackendError, Built, Job, Variant, build
from deepseek.compiler.runtimes.digests import digest_model
from deepseek.compiler.runtimes.selected_model import SelectedModel
from deepseek.compiler.runtimes.selection_options import SelectionOptions
from deepseek.compiler.runtimes.selection_policy import (
    AS_WRITTEN,
    NOT_TRIED,
    BackendSelector,
    Candidate,
    Decision,
    Measurement,
    Numbers,
    Rejection,
    Tolerance,
    choose,
    find_stale_parent,
    judge_numbers,
    keep_fastest,
    order,
    plan_rounds,
)
from deepseek.compiler.runtimes.selection_report import explain
from deepseek.compiler.runtimes.timing import SLOW_CALL_S, measure_in_turns, time_call
from deepseek.core.allocator import keep_freed_memory
from deepseek.core.errors import ConfigError, first_line
from deepseek.core.events import Event

__all__ = [
    "BackendSelector",
    "Selection",
    "SelectionEvent",
    "SelectionOptions",
    "Tolerance",
    "search",
    "select",
]

BASELINE = Candidate("eager", "plain", "fp32", prior=0)
BUILD_SHARE = 0.75
"""Of the time budget, what building and short timings may use; the rest is for finalists."""
FINALIST_MARGIN = 0.25
NUM_SHORT_ROUNDS = 2
SLOW_SHARE = 0.05
"""Of the time budget. A call that takes longer is timed once before the final; where the model as it was given does,
what may be faster than eager is tried first."""
HOPELESS = 4.0
"""A candidate whose one call takes so many times the best, and long, is not called again."""


@dataclass(frozen=True)
class SelectionEvent(Event):
    """Progress of a search; `candidate` is what it is about."""

    candidate: str
    spent_s: float


@dataclass(frozen=True)
class CandidateStarted(SelectionEvent):
    """A candidate is being built; `index` of `total`."""

    index: int
    total: int


@dataclass(frozen=True)
class CandidateMeasured(SelectionEvent):
    """A candidate is right, and this fast."""

    median_ms: float
    relative_error: float


@dataclass(frozen=True)
class CandidateRejected(SelectionEvent):
    """A candidate is refused."""

    reason: str


@dataclass(frozen=True)
class FinalStarted(SelectionEvent):
    """So many candidates are timed longer; `candidate` leads."""

    num_finalists: int


@dataclass(frozen=True)
class DecisionMade(SelectionEvent):
    """`candidate` runs the model."""

    median_ms: float
    baseline_ms: float
    is_remembered: bool


@dataclass(frozen=True)
class Selection:
    """A model that runs in the way that was decided, and the decision."""

    model: SelectedModel
    decision: Decision

    def explain(self) -> str:
        """Return what was measured and refused, and why the winner won, as text."""
        return explain(self.decision)


def select(
    model: nn.Module,
    sample_inputs: Any,
    options: SelectionOptions | None = None,
    *,
    on_event: Callable[[SelectionEvent], None] | None = None,
    **settings: Any,
) -> Selection:
    """Find the fastest correct way of running `model` on inputs like `sample_inputs`, as `options` say.

    `sample_inputs` is a tensor, a tuple of positional arguments or a dict of keywords. `settings` are fields of
    `SelectionOptions` that replace those of `options`. The model is copied first: what happens to its weights
    afterwards shows in none of the answers.

    Raises `ConfigError` for an unknown setting, missing samples, a model in training mode or not in float32, or one
    that answers NaN or infinity; `BackendError` when the backend asked for is not here, or nothing that is allowed runs
    correctly.

    >>> chosen = select(nn.Linear(4, 2).eval(), torch.ones(1, 4), backend="eager", remember=False)
    >>> chosen.decision.chosen.backend, tuple(chosen.model(torch.ones(1, 4)).shape)
    ('eager', (1, 2))
    """
    steps = search(model, sample_inputs, (options or SelectionOptions()).override(settings))
    while True:
        try:
            event = next(steps)
        except StopIteration as done:
            selection: Selection = done.value
            return selection
        if on_event is not None:
            on_event(event)


def search(
    model: nn.Module, sample_inputs: Any, options: SelectionOptions
) -> Generator[SelectionEvent, None, Selection]:
    """`select` as a generator of events that returns the selection."""
    began_s = time.monotonic()
    if options.tune_allocator:
        keep_freed_memory()
    flattened = flatten_model(copy_frozen(model), sample_inputs)
    require_reference(flattened)
    calibration = [flattened.read_samples(samples) for samples in options.calibration]
    job = Job(flattened, calibration=calibration, tuning_s=options.tuning_s)
    key = describe_key(job, options)
    known = decisions.recall(key) if options.remember else None
    if known is not None:
        built = rebuild(job, known, options)
        if built is not None:
            yield _announce(known, began_s)
            build_other = partial(build_alike, known.chosen, options)
            return Selection(SelectedModel(built, flattened, known.chosen, build_other), known)
    decision, built = yield from Search(job, options, key, began_s).run()
    if options.remember:
        decisions.remember(decision, options.name or type(inspect.unwrap(model)).__name__)
    yield _announce(decision, began_s)
    build_other = partial(build_alike, decision.chosen, options)
    return Selection(SelectedModel(built, flattened, decision.chosen, build_other), decision)


def copy_frozen(model: nn.Module) -> nn.Module:
    """Return a copy of `model` that nobody else holds, so that no backend shares weights with what is trained on.

    OpenVINO keeps some constants where torch has them and copies others: weights that changed under it gave answers of
    neither the old model nor the new one.
    """
    require_model(model)
    plain: nn.Module = inspect.unwrap(model)
    try:
        return copy.deepcopy(plain)
    except Exception as error:
        raise ConfigError(
            f"the {type(model).__name__} cannot be copied ({first_line(error)}), and a backend must own its weights; "
            "give a module that copy.deepcopy takes"
        ) from error


class Search:
    """One search: what was built and measured so far."""

    def __init__(self, job: Job, options: SelectionOptions, key: Mapping[str, Any], began_s: float) -> None:
        self.job, self.options, self.key, self.began_s = job, options, key, began_s
        self.tolerances = options.tolerances
        self.time_budget_s = options.time_budget_s
        self.built: dict[Candidate, Built] = {}
        self.numbers: dict[Candidate, Numbers] = {}
        self.build_s: dict[Candidate, float] = {}
        self.times_ms: dict[Candidate, list[float]] = {}
        self.rejections = [Rejection(f"all of {name}", reason) for name, reason in options.exclusions.items()]
        self.baseline_ms: list[float] = []
        self.let_go: set[Candidate] = set()

    @property
    def spent_s(self) -> float:
        """Return the seconds since the search began."""
        return time.monotonic() - self.began_s

    @property
    def medians_ms(self) -> dict[Candidate, float]:
        """Return the median time of each candidate that runs."""
        return {candidate: statistics.median(times) for candidate, times in self.times_ms.items()}

    @property
    def kept_ms(self) -> dict[Candidate, float]:
        """Return the median time of each candidate that can still run; what was let go cannot come back."""
        return {candidate: time_ms for candidate, time_ms in self.medians_ms.items() if candidate not in self.let_go}

    def run(self) -> Generator[SelectionEvent, None, tuple[Decision, Built]]:
        """Try all candidates, time the finalists longer, decide."""
        candidates, refused = list_candidates(self.job, self.options)
        self.rejections += refused
        if self._is_slow(self.job.flattened.seconds):
            candidates.sort(key=lambda candidate: candidate.backend == BASELINE.backend)
        for index, candidate in enumerate(candidates):
            yield CandidateStarted(str(candidate), self.spent_s, index, len(candidates))
            yield self._try(candidate)
        self._require_any()
        yield from self._run_final()
        self._time_baseline()
        chosen = choose(
            self.kept_ms, {candidate: numbers.relative_error for candidate, numbers in self.numbers.items()}
        )
        return self._decide(chosen), self.built[chosen]

    def _try(self, candidate: Candidate) -> SelectionEvent:
        """Build, check and time one candidate."""
        before_s = self.spent_s
        try:
            self._require_chance(candidate)
            built = build(find_variant(candidate, self.options), self.job)
            self._check(candidate, built)
        except BackendError as error:
            return self._reject(candidate, str(error))
        self.build_s[candidate] = self.spent_s - before_s
        self.built[candidate] = built
        if not self._is_timed_by_one_call(candidate):
            self._time_shortly(candidate)
        self._let_go_of_the_slow()
        median_ms = statistics.median(self.times_ms[candidate])
        return CandidateMeasured(str(candidate), self.spent_s, median_ms, self.numbers[candidate].relative_error)

    def _require_chance(self, candidate: Candidate) -> None:
        """Raise `BackendError` where building it is not worth the time that is left."""
        if self.built and self.spent_s > self.time_budget_s * BUILD_SHARE:
            raise BackendError(f"{NOT_TRIED}the time budget of {self.time_budget_s:g} s was used up")
        reason = find_stale_parent(candidate, self.medians_ms)
        if reason is not None:
            raise BackendError(reason)

    def _check(self, candidate: Candidate, built: Built) -> None:
        """Raise `BackendError` for a candidate that is wrong, or not what it says."""
        serious = [finding for finding in built.findings if finding.is_serious]
        if serious:
            raise BackendError(f"it is not what it says: {serious[0]}")
        numbers = check_numbers(self.job, built, self.tolerances[candidate.precision])
        reason = judge_numbers(numbers, self.tolerances[candidate.precision])
        if reason is not None:
            raise BackendError(reason)
        self.numbers[candidate] = numbers

    def _reject(self, candidate: Candidate, reason: str) -> SelectionEvent:
        self.rejections.append(Rejection(str(candidate), reason))
        return CandidateRejected(str(candidate), self.spent_s, reason)

    def _time_baseline(self) -> None:
        """Time the model as it was given, unless the final has, and beside it what will be compared with it."""
        if self.baseline_ms:
            return
        if self._is_slow(self.job.flattened.seconds):
            self.baseline_ms = [self.job.flattened.seconds * 1000]
            return
        best = self._find_best()
        assert best is not None
        self._time_together([best], NUM_SHORT_ROUNDS)

    def _time_together(
        self, candidates: Sequence[Candidate], num_rounds: int, deadline_s: float | None = None
    ) -> dict[Candidate, list[float]]:
        """Time candidates and the model as it was given in the same rounds, so that one may be divided by the other."""
        sides = {candidate: self._call(self.built[candidate]) for candidate in candidates}
        if not self._is_slow(self.job.flattened.seconds):
            sides.setdefault(BASELINE, self._call(Built(self.job.flattened.model)))
        fresh = measure_in_turns(sides, num_rounds, deadline_s=deadline_s)
        self.baseline_ms = fresh.get(BASELINE, self.baseline_ms)
        for candidate in fresh.keys() & {*self.times_ms}:
            self.times_ms[candidate] = fresh[candidate]
        return fresh

    def _is_slow(self, seconds: float) -> bool:
        """Return whether the budget has no time for many calls that take so long."""
        return seconds > SLOW_SHARE * self.time_budget_s

    def _is_timed_by_one_call(self, candidate: Candidate) -> bool:
        """Return whether one call, then its measurement, shows that it cannot win or is all there is time for."""
        best = self._find_best()
        once_ms = time_call(self._call(self.built[candidate]))
        is_hopeless = best is not None and once_ms >= max(HOPELESS * self.medians_ms[best], SLOW_CALL_S * 1000)
        if not is_hopeless and not self._is_slow(once_ms / 1000):
            return False
        self.times_ms[candidate] = [once_ms]
        return True

    def _time_shortly(self, candidate: Candidate) -> None:
        """Time a new candidate in turns with the best so far."""
        sides = {candidate: self._call(self.built[candidate])}
        best = self._find_best()
        if best is not None:
            sides[best] = self._call(self.built[best])
        for side, times in measure_in_turns(sides, NUM_SHORT_ROUNDS).items():
            self.times_ms.setdefault(side, []).extend(times)

    def _let_go_of_the_slow(self) -> None:
        """Free what can no longer win, which holds a copy of the weights each."""
        best_ms = min(self.kept_ms.values())
        for candidate, median_ms in self.kept_ms.items():
            if median_ms > best_ms * 2 and candidate != BASELINE:  # which is the reference itself, and no copy
                self.let_go.add(candidate)
                self.built[candidate] = replace(self.built[candidate], run=_let_go)

    def _find_best(self) -> Candidate | None:
        kept_ms = self.kept_ms
        return min(kept_ms, key=lambda candidate: kept_ms[candidate], default=None)

    def _run_final(self) -> Generator[SelectionEvent, None, None]:
        """Rounds of turns among those that could still win, the slower half leaving after each."""
        finalists = keep_fastest(self.kept_ms, margin=FINALIST_MARGIN)
        while len(finalists) > 1 and self.spent_s < self.time_budget_s:
            yield FinalStarted(str(finalists[0]), self.spent_s, len(finalists))
            left_s = self.time_budget_s - self.spent_s
            num_rounds = plan_rounds(finalists, self.medians_ms, left_s / 2)
            fresh = self._time_together(finalists, num_rounds, time.perf_counter() + left_s / 2)
            finalists = keep_fastest(
                {candidate: statistics.median(fresh[candidate]) for candidate in finalists}, margin=FINALIST_MARGIN
            )

    def _call(self, built: Built) -> Callable[[], object]:
        inputs = self.job.inputs

        def call() -> object:
            with torch.no_grad():
                answers = built.run(*inputs)
            if inputs[0].is_cuda:
                torch.cuda.synchronize()
            return answers

        return call

    def _require_any(self) -> None:
        if not self.built:
            reasons = "; ".join(f"{rejection.candidate}: {rejection.reason}" for rejection in self.rejections)
            raise BackendError(
                f"nothing that is allowed (backend {self.options.backend}, precision "
                f"{' or '.join(self.options.precisions)}) runs this model correctly: {reasons}"
            )

    def _decide(self, chosen: Candidate) -> Decision:
        measurements = [
            Measurement(
                candidate,
                self.numbers[candidate],
                tuple(self.times_ms[candidate]),
                self.build_s[candidate],
                tuple(str(finding) for finding in self.built[candidate].findings),
                self.built[candidate].notes,
            )
            for candidate in sorted(self.medians_ms, key=lambda candidate: self.medians_ms[candidate])
        ]
        for finding in self.built[chosen].findings:
            warnings.warn(f"{chosen}: {finding}", stacklevel=6)
        baseline_ms = statistics.median(self.baseline_ms)
        return Decision(
            chosen,
            baseline_ms,
            tuple(measurements),
            tuple(self.rejections),
            self.spent_s,
            self.key,
            reference=self.options.reference,
        )


def list_candidates(job: Job, options: SelectionOptions) -> tuple[list[Candidate], list[Rejection]]:
    """Return the candidates in the order to try, and what is refused before anything is built.

    Raises `BackendError` when a backend is asked for by name that cannot be used here.
    """
    if options.backend != BackendSelector.AUTO:
        BACKENDS[options.backend].require_available()
    names = list(BACKENDS) if options.backend == BackendSelector.AUTO else [str(options.backend)]
    candidates = [_candidate(name, variant) for name, variant in options.alternatives.items()]
    rejections: list[Rejection] = []
    for name in names if options.precision != AS_WRITTEN else ():
        obstacle = find_backend_obstacle(name, job)
        if obstacle is not None:
            rejections.append(Rejection(name, obstacle))
            continue
        rejections += [
            Rejection(f"{name} {precision}", reason)
            for precision, reason in BACKENDS[name].unsupported.items()
            if precision in options.precisions
        ]
        for variant in BACKENDS[name].variants:
            if variant.precision in options.precisions:
                candidate = _candidate(name, variant)
                obstacle = variant.find_obstacle(job.traits)
                if obstacle is None:
                    candidates.append(candidate)
                else:
                    rejections.append(Rejection(str(candidate), obstacle))
    return order(candidates), rejections


def _candidate(backend: str, variant: Variant) -> Candidate:
    return Candidate(backend, variant.name, variant.precision, variant.prior, variant.refines)


def find_backend_obstacle(name: str, job: Job) -> str | None:
    """Return why no variant of a backend can run here, or `None`."""
    missing = BACKENDS[name].find_missing()
    if missing is not None:
        return str(missing)
    if job.traits.device not in BACKENDS[name].devices:
        return f"the sample inputs are on {job.traits.device}, and it runs on {' or '.join(BACKENDS[name].devices)}"
    return None


def find_variant(candidate: Candidate, options: SelectionOptions) -> Variant:
    """Return the variant that a candidate stands for."""
    if candidate.precision == AS_WRITTEN:
        alternatives = options.alternatives
        if candidate.backend not in alternatives:
            raise BackendError(f"{candidate.backend} does not run the file as it is here")
        return alternatives[candidate.backend]
    return BACKENDS[candidate.backend].find_variant(candidate.precision, candidate.variant)


def build_alike(chosen: Candidate, options: SelectionOptions, job: Job) -> Built:
    """Build what was chosen for a job of other shapes; raises `BackendError` where its answers are wrong.

    int8 is calibrated for the shape of the samples: for others the same backend runs FP32.
    """
    if chosen.precision == "int8":
        variant = BACKENDS[chosen.backend].find_variant("fp32")
    else:
        variant = find_variant(chosen, options)
    built, tolerance = build(variant, job), options.tolerances[variant.precision]
    reason = judge_numbers(check_numbers(job, built, tolerance), tolerance)
    if reason is not None:
        raise BackendError(reason)
    return built


def rebuild(job: Job, decision: Decision, options: SelectionOptions) -> Built | None:
    """Return the winner of a remembered decision, checked again; `None` with a warning when it no longer runs
    correctly."""
    chosen, tolerance = decision.chosen, options.tolerances[decision.chosen.precision]
    try:
        BACKENDS[chosen.backend].require_available()
        built = build(find_variant(chosen, options), job)
        reason = judge_numbers(check_numbers(job, built, tolerance), tolerance)
    except (BackendError, ConfigError) as error:
        reason = str(error)
    else:
        if reason is None:
            return built
    warnings.warn(f"{chosen} was chosen before and no longer runs ({reason}); all are measured again", stacklevel=4)
    return None


def require_reference(flattened: Flattened) -> None:
    """Raise `ConfigError` for a model that cannot be the reference: not float32, or its answers are not finite."""
    kinds = {parameter.dtype for parameter in flattened.model.parameters() if parameter.is_floating_point()}
    if kinds - {torch.float32}:
        names = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        raise ConfigError(
            f"the model's weights are {names}; give it in float32, and say precision= for what it runs in"
        )
    if not all(output.isfinite().all() for output in flattened.outputs if output.is_floating_point()):
        raise ConfigError(
            "the model answers NaN or infinity to the sample inputs in FP32, so nothing can be compared with it; "
            "check the samples and the weights"
        )


def describe_key(job: Job, options: SelectionOptions) -> dict[str, Any]:
    """Return everything that a decision depends on, as plain values."""
    tried = (*options.precisions, *((AS_WRITTEN,) if options.alternatives else ()))
    return {
        "model": digest_model(job.flattened.model.model),
        "inputs": [[list(shape), kind] for shape, kind in job.flattened.shapes],
        "constants": [repr(leaf) for leaf in job.flattened.input_leaves if not isinstance(leaf, Tensor)],
        "backend": str(options.backend),
        "precisions": list(options.precisions),
        "further": {name: variant.name for name, variant in options.alternatives.items()},
        "tolerances": {name: asdict(options.tolerances[name]) for name in tried},
        "num_calibration": len(job.calibration),
        "is_allocator_tuned": options.tune_allocator,
        "tuning_s": job.tuning_s,
        **decisions.describe_surroundings(torch.get_num_threads()),
    }


def _announce(decision: Decision, began_s: float) -> DecisionMade:
    spent_s = time.monotonic() - began_s
    winner = decision.winner
    return DecisionMade(str(decision.chosen), spent_s, winner.median_ms, decision.baseline_ms, decision.is_remembered)


def _let_go(*inputs: Tensor) -> Sequence[Tensor]:
    raise AssertionError("a candidate that was let go is never run again")
