from dataclasses import replace

import numpy as np
import pytest

from benchmarks import planner, planner_fit
from deepseek.planning.machines.constants import get_constants
from deepseek.planning.published_runs import stack_runs


@pytest.fixture(scope="module")
def timed():
    return planner_fit.select_timed(planner_fit.load_runs())


def test_a_fit_finds_the_constants_that_made_the_times(timed):
    runs = [each for each in timed if each.family == "ampere"][::6]
    true = replace(get_constants("ampere"), matmul_fraction=0.7, launch_s=2.4e-5, memory_fraction=0.85)
    seconds = planner.predict_with(stack_runs(measured.published for measured in runs), true)
    made = [replace(each, row={**each.row, "iter_time_s": str(time)}) for each, time in zip(runs, seconds, strict=True)]
    problem = replace(planner_fit.pose(made, "ampere"), collectives=None)
    found = dict(zip(planner_fit.FITTED, np.exp(planner_fit.fit(problem, get_constants("ampere"))), strict=True))
    assert found["matmul_fraction"] == pytest.approx(0.7, rel=0.02)
    assert found["launch_s"] == pytest.approx(2.4e-5, rel=0.02)
    assert found["memory_fraction"] == pytest.approx(0.85, rel=0.05)


def test_leaving_a_source_out_never_reads_its_times(timed):
    runs = [each for each in timed if each.family == "ampere"][::12]
    wrong = [
        replace(each, row={**each.row, "iter_time_s": "1e9"}) if each.source == "bloom_jz_a100" else each
        for each in runs
    ]
    one, two = (planner_fit.fit_without(each, "ampere", "bloom_jz_a100") for each in (runs, wrong))
    assert one == two
    assert planner_fit.fit_family(wrong, "ampere") != planner_fit.fit_family(runs, "ampere")


def test_there_are_at_most_twelve_constants_within_their_bounds():
    assert len(planner_fit.NAMES) == 12
    for family in ("volta", "ampere", "hopper", "blackwell"):
        for name, (low, high) in planner_fit.BOUNDS.items():
            assert low * 0.999 <= getattr(get_constants(family), name) <= high * 1.001


def test_ranks_share_the_middle_of_their_ties():
    assert planner.rank(np.array([3.0, 1.0, 1.0, 2.0])).tolist() == [3.0, 0.5, 0.5, 2.0]
    assert planner.correlate(np.array([1.0, 2.0, 4.0]), np.array([10.0, 11.0, 90.0])) == pytest.approx(1.0)
    assert planner.correlate(np.array([1.0, 2.0, 4.0]), np.array([3.0, 2.0, 1.0])) == pytest.approx(-1.0)


def test_regret_is_what_the_first_choice_costs(timed):
    runs = [each for each in timed if each.source == "vtrain_multi_a100" and each.row["model"] == "GPT-3.6B"]
    measured = np.array([float(each.row["iter_time_s"]) for each in runs])
    (perfect,) = planner.judge_choices(runs, measured)
    (reverse,) = planner.judge_choices(runs, -measured)
    assert (perfect.regret_median, perfect.spearman_median) == (0.0, pytest.approx(1.0))
    assert reverse.regret_median == pytest.approx(measured.max() / measured.min() - 1)
    assert reverse.spearman_median == pytest.approx(-1.0)


def test_a_plan_that_was_run_twice_is_one_plan(timed):
    runs = [each for each in timed if each.source == "vtrain_multi_a100" and each.row["model"] == "GPT-3.6B"]
    measured = np.array([float(each.row["iter_time_s"]) for each in runs])
    (once,) = planner.judge_choices(runs, measured)
    (twice,) = planner.judge_choices([*runs, *runs], np.concatenate([measured, measured]))
    assert twice == once
    assert once.ordered == once.groups == 1


def test_the_quick_benchmark_runs_whole(tmp_path):
    result = planner.run(is_quick=True, plot=None)
    assert {each.source for each in result.times} >= {"vtrain_single_a100", "mosaic_llm_foundry"}
    assert "vtrain_single_a100" in planner.write_markdown(result)
