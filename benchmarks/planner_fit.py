"""Finding the constants of the planner on published runs, with one source left out at a time.

    python -m benchmarks.planner_fit            fit every family, print what to write into constants.py, and the errors
    python -m benchmarks.planner_fit --quick    every tenth row

The runs (`data/planner_runs.csv`) and collectives (`data/planner_collectives.csv`) are plain figures with their
sources. A family's ten constants of time are fitted to the logarithm of predicted over measured, by Gauss-Newton
steps with numerical derivatives inside physical bounds; a Cauchy loss keeps a source whose runs contradict the rest
from pulling everybody. Each source weighs a little more than the root of its number of rows. The two constants of
memory are chosen on a grid: smallest mean error among those that reject no run that happened. One fit takes about a
second, because all runs are one table (`deepseek.planning.estimate.columns`).
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.measuring import Bar, write_json
from deepseek.core.errors import ConfigError
from deepseek.planning.estimate.columns import Array, Columns, describe_cluster, describe_constants, stack_cases
from deepseek.planning.estimate.communication import Group, all_reduce_s, all_to_all_s
from deepseek.planning.estimate.memory import measure_memory
from deepseek.planning.estimate.step import predict_times
from deepseek.planning.machines.cluster import Cluster, get_accelerator
from deepseek.planning.machines.constants import FAMILIES, NAMES, Constants, get_constants
from deepseek.planning.published_runs import PublishedRun, read_run, stack_runs

DATA = Path(__file__).parent / "data"
FITTED = NAMES[:-2]  # the last two are of memory
# Where every fit starts, and what it keeps where the runs say nothing: round numbers, the same for all families, but
# for two that are published for each. FlashAttention 2 runs at 190 TFLOP/s on A100 and 340 on H100 (arXiv:2307.08691,
# 4.1), which is 0.75 and 0.5 of what large matmuls reach there. Hosts of the A100's years issue a kernel in 30 us
# where those of the H100's take 20 us: one thread of theirs is half as fast again.
_USUAL = Constants(
    matmul_fraction=0.8,
    narrow_fraction=0.65,
    matmul_fill_depth=100.0,
    attention_fraction=0.5,
    memory_fraction=0.75,
    launch_s=2e-5,
    scale_up_fraction=0.8,
    network_fraction=0.8,
    collective_s=4e-5,
    exposed_fraction=0.4,
    communicator_bytes=8e8,
    fragmentation_fraction=0.05,
)
START: dict[str, Constants] = {
    "volta": replace(_USUAL, launch_s=3e-5),
    "ampere": replace(_USUAL, launch_s=3e-5, attention_fraction=0.75),
}
BOUNDS: dict[str, tuple[float, float]] = {
    "matmul_fraction": (0.6, 0.92),
    "narrow_fraction": (0.3, 0.9),
    "matmul_fill_depth": (16.0, 400.0),
    "attention_fraction": (0.15, 1.0),
    "memory_fraction": (0.5, 0.95),
    "launch_s": (5e-6, 6e-5),
    "scale_up_fraction": (0.5, 0.95),
    "network_fraction": (0.4, 0.98),
    "collective_s": (5e-6, 1.2e-4),
    "exposed_fraction": (0.05, 0.9),
}
OTHER_NETWORKS = ("bigscience",)  # measured over Omni-Path, which no accelerator's usual network is
TIME_SCALE, COLLECTIVE_SCALE = 0.05, 0.15  # relative errors that still count as ordinary
COLLECTIVE_WEIGHT = 0.3
PRIOR_WEIGHT, PRIOR_SCALE = 2e-4, 0.35
COMMUNICATOR_BYTES = (2e8, 5e8, 8e8, 1.2e9, 1.6e9, 2e9)
FRAGMENTATION = (0.02, 0.05, 0.08, 0.12, 0.16, 0.2)


@dataclass(frozen=True)
class MeasuredRun:
    """A row as it was published, and as it was understood."""

    row: dict[str, str]
    published: PublishedRun

    @property
    def source(self) -> str:
        """Who measured it."""
        return self.row["source_id"]

    @property
    def family(self) -> str:
        """The family of its accelerators."""
        return self.published.cluster.nodes[0].accelerator.family


@cache
def load_runs() -> tuple[MeasuredRun, ...]:
    """Return every published run whose inputs can be understood."""
    with (DATA / "planner_runs.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return tuple(run for row in rows if (run := _understand(row)) is not None)


def _understand(row: dict[str, str]) -> MeasuredRun | None:
    try:
        return MeasuredRun(row, read_run(row))
    except ConfigError:
        return None


def select_timed(runs: Sequence[MeasuredRun], *, is_partial: bool = False) -> list[MeasuredRun]:
    """Runs with a time and full inputs (or, with `is_partial`, those with some inputs assumed)."""
    wanted = "partial" if is_partial else "full"
    return [run for run in runs if run.row["iter_time_s"] and run.row["simulatable"] == wanted]


@dataclass(frozen=True)
class Collectives:
    """Measured all-reduces and all-to-alls of one family, as columns."""

    columns: Columns
    group: Group
    num_bytes: Array
    seconds: Array
    is_all_to_all: NDArray[np.bool_]
    sources: NDArray[np.str_]

    def predict(self, columns: Columns) -> Array:
        """Return the seconds of each under the constants in `columns`."""
        scattered = all_to_all_s(columns, self.num_bytes, self.group)
        return np.where(self.is_all_to_all, scattered, all_reduce_s(columns, self.num_bytes, self.group))


@cache
def load_collectives(family: str) -> Collectives | None:
    """Return the measured collectives of a family, or `None` where nobody published any."""
    with (DATA / "planner_collectives.csv").open(encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if get_accelerator(row["accelerator"]).family == family]
    rows = [row for row in rows if row["source"] not in OTHER_NETWORKS]
    if not rows:
        return None
    constants = describe_constants(get_constants(family))
    cases = [{**describe_cluster(_cluster_of(row), "bf16"), **constants} for row in rows]
    group = Group(np.array([float(row["ranks"]) for row in rows]), np.array([float(row["nodes"]) for row in rows]))
    return Collectives(
        stack_cases(cases),
        group,
        np.array([float(row["bytes"]) for row in rows]),
        np.array([float(row["seconds"]) for row in rows]),
        np.array([row["operation"] == "all_to_all" for row in rows]),
        np.array([row["source"] for row in rows]),
    )


def _cluster_of(row: dict[str, str]) -> Cluster:
    return Cluster.of(row["accelerator"], nodes=int(row["nodes"]))


def insert(columns: Columns, theta: Array) -> Columns:
    """Return the table with the fitted constants at `exp(theta)`."""
    return columns.with_columns(**{name: np.array([np.exp(value)]) for name, value in zip(FITTED, theta, strict=True)})


def predict_seconds(columns: Columns) -> Array:
    """Return the step seconds of every row."""
    return np.asarray(np.sum(np.broadcast_arrays(*predict_times(columns).values()), axis=0))


def weigh(labels: NDArray[np.str_], power: float = 0.6, most: int = 150) -> Array:
    """One weight per row, so that a source counts as its number of rows to the `power`."""
    weights = np.empty(len(labels))
    for label in set(labels):
        rows = labels == label
        weights[rows] = min(rows.sum(), most) ** power / rows.sum()
    return weights


@dataclass(frozen=True)
class Problem:
    """The measurements that one family's constants are fitted to."""

    columns: Columns
    seconds: Array
    weights: Array
    collectives: Collectives | None

    def residuals(self, theta: Array) -> Array:
        """Return the logarithms of predicted over measured, runs first."""
        runs = np.log(predict_seconds(insert(self.columns, theta)) / self.seconds)
        if self.collectives is None:
            return runs
        others = self.collectives.predict(insert(self.collectives.columns, theta)) / self.collectives.seconds
        return np.concatenate([runs, np.log(others)])

    @property
    def all_weights(self) -> Array:
        """Return the weights of all residuals."""
        if self.collectives is None:
            return self.weights
        others = COLLECTIVE_WEIGHT * weigh(self.collectives.sources, 0.5, 10**6)
        return np.concatenate([self.weights, others])

    @property
    def scales(self) -> Array:
        """Return the errors that still count as ordinary, of all residuals."""
        others = 0 if self.collectives is None else len(self.collectives.seconds)
        return np.concatenate([np.full(len(self.seconds), TIME_SCALE), np.full(others, COLLECTIVE_SCALE)])


def pose(runs: Sequence[MeasuredRun], family: str) -> Problem:
    """Return the fit of one family on some runs."""
    seconds = np.array([float(run.row["iter_time_s"]) for run in runs])
    weights = weigh(np.array([run.source for run in runs]))
    return Problem(stack_runs(run.published for run in runs), seconds, weights, load_collectives(family))


def fit(problem: Problem, start: Constants, steps: int = 20) -> Array:
    """Return the logarithms of the fitted constants."""
    prior = np.log([getattr(start, name) for name in FITTED])
    low, high = (np.log([BOUNDS[name][side] for name in FITTED]) for side in (0, 1))
    weights, scales = problem.all_weights, problem.scales

    def score(residuals: Array, theta: Array) -> float:
        robust = np.sum(weights * scales**2 * np.log1p((residuals / scales) ** 2))
        return float(robust + PRIOR_WEIGHT * np.sum(((theta - prior) / PRIOR_SCALE) ** 2))

    theta, damping = np.clip(prior, low, high), 1e-2
    residuals = problem.residuals(theta)
    best = score(residuals, theta)
    for _ in range(steps):
        slopes = np.stack(
            [(problem.residuals(theta + 0.02 * unit) - residuals) / 0.02 for unit in np.eye(len(theta))], 1
        )
        robust = weights / (1 + (residuals / scales) ** 2)
        curvature = slopes.T @ (slopes * robust[:, None]) + PRIOR_WEIGHT / PRIOR_SCALE**2 * np.eye(len(theta))
        gradient = slopes.T @ (robust * residuals) + PRIOR_WEIGHT * (theta - prior) / PRIOR_SCALE**2
        previous = best
        for _ in range(6):
            damped = curvature + damping * np.diag(np.diag(curvature))
            trial = np.clip(theta - np.clip(np.linalg.solve(damped, gradient), -0.4, 0.4), low, high)
            trial_residuals = problem.residuals(trial)
            if (value := score(trial_residuals, trial)) < best:
                theta, residuals, best, damping = trial, trial_residuals, value, max(damping / 4, 1e-6)
                break
            damping *= 6
        if previous - best < 1e-4 * previous:
            break
    return theta


def fit_memory(runs: Sequence[MeasuredRun], start: Constants) -> tuple[float, float]:
    """Return the two constants of memory with the least mean error, among those that reject the fewest runs that
    happened."""
    told = [run for run in runs if run.row["mem_gb"] and run.row["use"] != "sanity_only"]
    happened = [run for run in runs if run.row["iter_time_s"] and run.row["oom"] != "1"]
    if not told:
        return start.communicator_bytes, start.fragmentation_fraction
    measured = np.array([float(run.row["mem_gb"]) * 1e9 for run in told])
    tables = stack_runs(run.published for run in told), stack_runs(run.published for run in happened)

    def judge(pair: tuple[float, float]) -> tuple[int, float]:
        needed, possible = (_measure(table, pair) for table in tables)
        error = float(
            np.median(np.abs(needed / measured - 1)) + np.mean(np.minimum(np.abs(needed / measured - 1), 0.5))
        )
        return int(np.sum(possible > tables[1].device_memory_bytes)), error

    return min(((one, two) for one in COMMUNICATOR_BYTES for two in FRAGMENTATION), key=judge)


def _measure(columns: Columns, pair: tuple[float, float]) -> Array:
    names = ("communicator_bytes", "fragmentation_fraction")
    table = columns.with_columns(**{name: np.array([value]) for name, value in zip(names, pair, strict=True)})
    return np.asarray(np.sum(np.broadcast_arrays(*measure_memory(table).values()), axis=0))


def fit_family(runs: Sequence[MeasuredRun], family: str) -> Constants:
    """Return all constants of a family, from the runs given."""
    mine = [run for run in runs if run.family == family]
    timed = select_timed(mine)
    start = START.get(family, _USUAL)
    if not timed:
        return start
    theta = fit(pose(timed, family), start)
    one, two = fit_memory(mine, start)
    fitted = dict(zip(FITTED, np.exp(theta).tolist(), strict=True))
    return replace(start, **fitted, communicator_bytes=one, fragmentation_fraction=two)


def fit_without(runs: Sequence[MeasuredRun], family: str, source: str) -> Constants:
    """Return the constants of a family as they would be if `source` had never published."""
    return fit_family([run for run in runs if run.source != source], family)


def main() -> None:
    """Fit and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="every tenth row")
    parser.add_argument("--json", type=Path, help="also write the result to this file as JSON")
    arguments = parser.parse_args()
    runs = load_runs()[:: 10 if arguments.quick else 1]
    fitted = {
        family: fit_family(runs, family)
        for family in FAMILIES
        if any(run.family == family for run in select_timed(runs))
    }
    for family, values in fitted.items():
        print(f"_{family.upper()} = Constants(")
        print("".join(f"    {name}={getattr(values, name):.4g},\n" for name in NAMES) + ")")
    if arguments.json:
        rows = [
            {"family": family, "constant": name, "fitted": getattr(values, name), "shipped": shipped}
            for family, values in fitted.items()
            for name, shipped in asdict(get_constants(family)).items()
        ]
        bars = [
            Bar(
                f"largest difference from what is shipped, {family}",
                compare_shipped(family, values),
                0.01,
                at_least=False,
            )
            for family, values in fitted.items()
        ]
        write_json(arguments.json, "planner_fit", "of each constant", rows, bars)


def compare_shipped(family: str, fitted: Constants) -> float:
    """Return the largest relative difference of a constant from the one that is shipped."""
    shipped = get_constants(family)
    return max(abs(getattr(fitted, name) / getattr(shipped, name) - 1) for name in NAMES)


if __name__ == "__main__":
    main()
