"""The planner against published runs: how far off are predicted times and memory, and would it have chosen well?

    python -m benchmarks.planner                 all rows, leaving each source out of the fit that predicts it
    python -m benchmarks.planner --quick         every tenth row, constants as shipped
    python -m benchmarks.planner --plot out.png  also the scatter plot (needs matplotlib)

Every row with full inputs is predicted with constants that were fitted without its source (`planner_fit.py`), so that
no reported error is of a row that was fitted on; a family that only one source published on has no such constants,
and its rows are marked. (The model's fixed numbers, which no fit touches, were set with all these runs in view;
`constants.py` says which. Only runs that nobody here has seen test those.) Beside each error stand the best single
number of TFLOP/s for that source (which is fitted on it) and what peers published about themselves. Choosing is
judged in groups of plans for one model, cluster and batch.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import Bar, print_bars, write_json
from benchmarks.planner_fit import MeasuredRun, fit_without, load_collectives, load_runs, predict_seconds, select_timed
from deepseek.planning.estimate.columns import Array, Columns, describe_constants
from deepseek.planning.estimate.memory import measure_memory
from deepseek.planning.machines.constants import FAMILIES, Constants, get_constants
from deepseek.planning.published_runs import stack_runs

# Goal for the mean error of a source, and the error that peers published on the same kind of runs.
GOALS: dict[str, float] = {
    "vtrain_single_a100": 0.08,
    "vtrain_multi_a100": 0.12,
    "megatron_sc21_table2_zero3": 0.10,
    "nanotron_playbook_best": 0.12,
    "mosaic_llm_foundry": 0.08,
    "bloom_jz_a100": 0.06,
    "nvidia_dgxc_h100_gb200": 0.05,
    "nemo_h100_fp8": 0.05,
    "nvidia_megatron_bridge": 0.05,
    "megatron_seqpar_2205.05198": 0.035,
}
PEERS: dict[str, str] = {
    "vtrain_single_a100": "vTrain 8.4 % (MICRO 2024, profiles one GPU)",
    "vtrain_multi_a100": "vTrain 14.7 %",
    "megatron_seqpar_2205.05198": "calculon 3.65 % (fitted on these rows)",
}
GROUP_KEYS = ("source_id", "model", "layers", "hidden", "heads", "seq_len", "accel", "n_accel", "gbs", "precision")
INPUT_KEYS = (*GROUP_KEYS, "tp", "pp", "cp", "ep", "vp", "mbs", "zero_stage", "fsdp", "act_ckpt", "seq_parallel")


@dataclass(frozen=True)
class SourceErrors:
    """Relative errors of one source's step times."""

    source: str
    rows: int
    mean: float
    median: float
    p90: float
    bias: float
    one_constant: float
    equal_inputs: float
    goal: float | None
    peer: str
    is_left_out: bool


@dataclass(frozen=True)
class Choice:
    """The cost of choosing by prediction among the plans of one source's groups."""

    source: str
    groups: int
    ordered: int
    regret_median: float
    regret_mean: float
    random_median: float
    spearman_median: float
    spearman_mean: float


@dataclass(frozen=True)
class Result:
    """Everything that the benchmark found."""

    times: list[SourceErrors]
    choices: list[Choice]
    memory: dict[str, float]
    collectives: dict[str, float]


def predict_left_out(runs: Sequence[MeasuredRun], is_quick: bool) -> tuple[Array, NDArray[np.bool_]]:
    """Return the seconds of each run under constants that never saw its source, and whether there were any."""
    everything = load_runs()
    seconds, is_left_out = np.zeros(len(runs)), np.zeros(len(runs), dtype=bool)
    for family, source in sorted({(run.family, run.source) for run in runs}):
        rows = np.array([i for i, run in enumerate(runs) if (run.family, run.source) == (family, source)])
        others = {run.source for run in select_timed(everything) if run.family == family} - {source}
        constants = fit_without(everything, family, source) if others and not is_quick else get_constants(family)
        seconds[rows] = predict_with(stack_runs(runs[i].published for i in rows), constants)
        is_left_out[rows] = bool(others) and not is_quick
    return seconds, is_left_out


def predict_with(columns: Columns, constants: Constants) -> Array:
    """Return the step seconds of every row with these constants."""
    values = describe_constants(constants)
    return predict_seconds(columns.with_columns(**{name: np.array([value]) for name, value in values.items()}))


def count_flops(measured: MeasuredRun) -> float:
    """Matrix and attention operations of one step, recomputation included: what one constant rate would explain."""
    model, plan = measured.published.model, measured.published.plan
    attention = 4 * model.sequence * model.heads * model.head_dim * model.layers
    per_token = 2 * (model.num_active_parameters - model.embedding_parameters + model.vocabulary * model.hidden)
    passes = 4 if plan.recomputation == "full" else 3
    return float(passes * (per_token + attention) * model.sequence * measured.published.global_batch)


def fit_one_constant(runs: Sequence[MeasuredRun]) -> float:
    """Return the mean error of the best single FLOP/s for each accelerator and precision of a source."""
    groups: dict[tuple[str, str], list[MeasuredRun]] = defaultdict(list)
    for run in runs:
        groups[run.row["accel"], "16" if run.published.plan.precision in ("fp16", "bf16") else "8"].append(run)
    errors: list[float] = []
    for group in groups.values():
        slowness = np.array(
            [count_flops(e) / e.published.cluster.num_devices / float(e.row["iter_time_s"]) for e in group]
        )
        errors += min((np.abs(slowness / rate - 1).tolist() for rate in slowness), key=np.mean)
    return float(np.mean(errors))


def measure_floor(runs: Sequence[MeasuredRun]) -> float:
    """Return the mean error of the best answer for rows whose inputs are equal: no planner can do better on them."""
    groups: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for run in runs:
        groups[tuple(run.row[key] for key in INPUT_KEYS)].append(float(run.row["iter_time_s"]))
    errors = [abs(float(np.median(times)) / time - 1) for times in groups.values() for time in times]
    return float(np.mean(errors))


def judge_times(runs: Sequence[MeasuredRun], seconds: Array, is_left_out: NDArray[np.bool_]) -> list[SourceErrors]:
    """One row per source."""
    measured = np.array([float(run.row["iter_time_s"]) for run in runs])
    errors = seconds / measured - 1
    answers = []
    for source in dict.fromkeys(run.source for run in runs):
        rows = np.array([i for i, run in enumerate(runs) if run.source == source])
        mine, size = [runs[i] for i in rows], np.abs(errors[rows])
        answers.append(
            SourceErrors(
                source,
                len(rows),
                float(size.mean()),
                float(np.median(size)),
                float(np.quantile(size, 0.9)),
                float(np.median(errors[rows])),
                fit_one_constant(mine),
                measure_floor(mine),
                GOALS.get(source),
                PEERS.get(source, ""),
                bool(is_left_out[rows].all()),
            )
        )
    return answers


def rank(values: Array) -> Array:
    """Rank each value, ties sharing the middle."""
    below = (values[:, None] > values[None, :]).sum(1)
    equal = (values[:, None] == values[None, :]).sum(1)
    return np.asarray(below + (equal - 1) / 2)


def correlate(one: Array, two: Array) -> float:
    """Spearman's correlation."""
    return float(np.corrcoef(rank(one), rank(two))[0, 1]) if np.ptp(one) > 0 and np.ptp(two) > 0 else math.nan


def judge_choices(runs: Sequence[MeasuredRun], seconds: Array) -> list[Choice]:
    """Among the plans for one model, cluster and batch: how much slower is the one that we rank first?

    A plan that was run several times counts once, with the median of its times; three plans make an order.
    """
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, run in enumerate(runs):
        groups[tuple(run.row[key] for key in GROUP_KEYS)].append(index)
    by_source: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for key, rows in groups.items():
        plans: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for index in rows:
            plans[_name_plan(runs[index])].append(index)
        if len(plans) < 2:
            continue
        times = np.array([np.median([float(runs[i].row["iter_time_s"]) for i in same]) for same in plans.values()])
        guesses = np.array([seconds[same[0]] for same in plans.values()])
        first = float(times[np.argmin(guesses)] / times.min() - 1)
        order = correlate(times, guesses) if len(plans) > 2 else math.nan
        by_source[key[0]].append((first, float(times.mean() / times.min() - 1), order))
    return [_summarise(source, values) for source, values in by_source.items()]


def _name_plan(measured: MeasuredRun) -> tuple[object, ...]:
    """Return what identifies a plan in repeated runs: all published inputs, and the program with its age."""
    run = measured.published
    return (*(measured.row[name] or "0" for name in INPUT_KEYS), run.plan, run.software, run.model.frozen_weights)


def _summarise(source: str, values: list[tuple[float, float, float]]) -> Choice:
    regret, random, order = (np.array(column) for column in zip(*values, strict=True))
    known = order[~np.isnan(order)]
    middle, mean = (float(np.median(known)), float(known.mean())) if len(known) else (math.nan, math.nan)
    return Choice(
        source,
        len(values),
        len(known),
        float(np.median(regret)),
        float(regret.mean()),
        float(np.median(random)),
        middle,
        mean,
    )


def judge_memory(runs: Sequence[MeasuredRun]) -> dict[str, float]:
    """Return the errors where memory was reported, out-of-memory rows foreseen, and runs that would have been
    refused."""
    columns = stack_runs(run.published for run in runs)
    needed = np.sum(np.broadcast_arrays(*measure_memory(columns).values()), axis=0)
    is_over = needed > columns.device_memory_bytes
    answers: dict[str, float] = {}
    for source in dict.fromkeys(run.source for run in runs if run.row["mem_gb"]):
        rows = [i for i, run in enumerate(runs) if run.source == source and run.row["mem_gb"]]
        told = np.array([float(runs[i].row["mem_gb"]) for i in rows]) * 1e9
        size = np.abs(needed[rows] / told - 1)
        answers[f"memory error mean, {source} ({len(rows)} rows)"] = float(size.mean())
        answers[f"memory error median, {source} ({len(rows)} rows)"] = float(np.median(size))
    failed = np.array([run.row["oom"] == "1" for run in runs])
    happened = np.array([bool(run.row["iter_time_s"]) and run.row["use"] != "sanity_only" for run in runs])
    answers["out-of-memory rows"] = float(failed.sum())
    answers["out-of-memory rows foreseen"] = float((failed & is_over).sum())
    answers["runs that happened"] = float(happened.sum())
    answers["runs that happened but would be refused"] = float((happened & is_over).sum())
    return answers


def judge_collectives() -> dict[str, float]:
    """Return the median error of the measured curves, from 1 MB up."""
    answers: dict[str, float] = {}
    for family in FAMILIES:
        if (curves := load_collectives(family)) is None:
            continue
        values = {name: np.array([value]) for name, value in describe_constants(get_constants(family)).items()}
        size = np.abs(curves.predict(curves.columns.with_columns(**values)) / curves.seconds - 1)
        for operation, rows in (("all-reduce", ~curves.is_all_to_all), ("all-to-all", curves.is_all_to_all)):
            if rows.any():
                answers[f"{operation}, {family} ({rows.sum()} points)"] = float(np.median(size[rows]))
    return answers


def plot_errors(runs: Sequence[MeasuredRun], seconds: Array, path: Path) -> None:
    """Predicted against measured seconds, one colour per source."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 7), dpi=140)
    measured = np.array([float(run.row["iter_time_s"]) for run in runs])
    for number, source in enumerate(dict.fromkeys(run.source for run in runs)):
        rows = [i for i, run in enumerate(runs) if run.source == source]
        axes.scatter(measured[rows], seconds[rows], s=9, alpha=0.6, color=f"C{number % 10}", label=source,
                     marker="o" if number < 10 else "^")  # fmt: skip
    ends = np.array([measured.min(), measured.max()])
    for factor, style in ((1.0, "-"), (0.9, ":"), (1.1, ":")):
        axes.plot(ends, factor * ends, style, color="0.4", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="measured seconds per step", ylabel="predicted seconds per step")
    axes.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def run(is_quick: bool, plot: Path | None) -> Result:
    """Predict and judge."""
    everything = load_runs()[:: 10 if is_quick else 1]
    timed = select_timed(everything)
    seconds, is_left_out = predict_left_out(timed, is_quick)
    if plot is not None:
        plot_errors(timed, seconds, plot)
    return Result(
        judge_times(timed, seconds, is_left_out),
        judge_choices(timed, seconds),
        judge_memory([run for run in everything if run.row["simulatable"] == "full"]),
        judge_collectives(),
    )


def list_bars(result: Result) -> list[Bar]:
    """List the goals: the mean error of each source that has one, and runs that happened but would be refused."""
    bars = [
        Bar(f"mean error, {errors.source}", errors.mean, errors.goal, at_least=False)
        for errors in result.times
        if errors.goal is not None
    ]
    refused = result.memory["runs that happened but would be refused"]
    foreseen, failed = result.memory["out-of-memory rows foreseen"], result.memory["out-of-memory rows"]
    return [
        *bars,
        Bar("runs that happened but would be refused", refused, 0.0, at_least=False),
        Bar("out-of-memory rows foreseen", foreseen, failed),
    ]


def _percent(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{100 * value:.1f} %"


def tabulate_times(result: Result) -> list[tuple[str, ...]]:
    """Return the rows of the table of errors, the first one its head."""
    head = ("source", "rows", "mean", "median", "p90", "bias", "one constant", "equal inputs", "goal", "met", "peer")
    rows = [head]
    for errors in result.times:
        name = errors.source if errors.is_left_out else f"{errors.source} (not left out)"
        met = "" if errors.goal is None else "yes" if errors.mean <= errors.goal else "no"
        numbers = (
            errors.mean,
            errors.median,
            errors.p90,
            errors.bias,
            errors.one_constant,
            errors.equal_inputs,
            errors.goal,
        )
        rows.append((name, str(errors.rows), *map(_percent, numbers), met, errors.peer))
    return rows


def tabulate_choices(result: Result) -> list[tuple[str, ...]]:
    """Return the rows of the table of choices, the first one its head."""
    rows = [
        ("source", "groups", "regret median", "regret mean", "random pick", "of 3 plans", "Spearman median", "mean")
    ]
    for choice in result.choices:
        orders = (f"{value:.2f}" for value in (choice.spearman_median, choice.spearman_mean))
        regrets = map(_percent, (choice.regret_median, choice.regret_mean, choice.random_median))
        rows.append((choice.source, str(choice.groups), *regrets, str(choice.ordered), *orders))
    return rows


def tabulate_rest(result: Result) -> list[tuple[str, ...]]:
    """Return the rows of memory and collectives, the first one its head."""
    shown: Callable[[str, float], str] = lambda name, value: _percent(value) if "error" in name else f"{value:.0f}"  # noqa: E731
    memory = [(name, shown(name, value)) for name, value in result.memory.items()]
    return [("what", "value"), *memory, *((name, _percent(value)) for name, value in result.collectives.items())]


def show(result: Result, console: Console) -> None:
    """Print all tables."""
    for rows in (tabulate_times(result), tabulate_choices(result), tabulate_rest(result)):
        table = Table(*rows[0])
        for row in rows[1:]:
            table.add_row(*row)
        console.print(table)


def write_markdown(result: Result) -> str:
    """Return all tables as Markdown."""
    parts = []
    for rows in (tabulate_times(result), tabulate_choices(result), tabulate_rest(result)):
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        parts.append("\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="every tenth row, constants as shipped")
    parser.add_argument("--plot", type=Path, help="write the scatter plot to this PNG file")
    parser.add_argument("--json", type=Path, help="also write the result to this file as JSON")
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file as Markdown")
    arguments = parser.parse_args()
    result = run(arguments.quick, arguments.plot)
    show(result, Console(width=200))
    bars = list_bars(result)
    print_bars(bars)
    if arguments.json:
        rows = [asdict(errors) for errors in result.times]
        choices = [asdict(choice) for choice in result.choices]
        write_json(
            arguments.json, "planner", "relative error", rows, bars,
            choices=choices, memory=result.memory, collectives=result.collectives,
        )  # fmt: skip
    if arguments.markdown:
        arguments.markdown.write_text(write_markdown(result), encoding="utf-8")


if __name__ == "__main__":
    main()
