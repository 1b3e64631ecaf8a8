import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.core.errors import ConfigError
from deepseek.optim.learning_rates import scale_learning_rate, schedule_factor
from deepseek.optim.optimizers import OptimizerConfig

runs = {
    "num_steps": st.integers(1, 200),
    "warmup_steps": st.integers(0, 50),
    "final_factor": st.floats(0, 1),
    "decay_share": st.floats(0.05, 1),
}
SCHEDULES = ["constant", "linear", "cosine", "trapezoid"]


def by_formula(schedule, step, *, num_steps, warmup_steps, final_factor, decay_share):
    """The factor from the words of the documentation: steps left to fall over, and how far the fall has come."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    length = max(1, num_steps - warmup_steps)
    done = min(step - warmup_steps, length)
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return final_factor + (1 - final_factor) * math.cos(math.pi / 2 * done / length) ** 2
    falling = length * (decay_share if schedule == "trapezoid" else 1)
    left = length - done
    return 1.0 if left > falling else final_factor + (1 - final_factor) * left / falling


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(**runs)
def test_every_step_is_the_formula(schedule, **run):
    for step in range(run["num_steps"] + 3):
        factor = schedule_factor(schedule, step, **run)
        assert factor == pytest.approx(by_formula(schedule, step, **run), abs=1e-9)
        assert 0 <= factor <= 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_a_straight_line_to_the_peak(schedule):
    run = {"num_steps": 20, "warmup_steps": 4, "final_factor": 0.0, "decay_share": 0.5}
    factors = [schedule_factor(schedule, step, **run) for step in range(5)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize(("schedule", "end"), [("constant", 1), ("linear", 0.1), ("cosine", 0.1), ("trapezoid", 0.1)])
def test_from_the_end_on_it_is_the_final_factor(schedule, end):
    run = {"num_steps": 10, "warmup_steps": 2, "final_factor": 0.1, "decay_share": 0.25}
    for step in (10, 11, 1000):
        assert schedule_factor(schedule, step, **run) == pytest.approx(end)
    last = schedule_factor(schedule, 9, **run)
    assert last == end == 1 or last > end


def test_a_trapezoid_falls_in_its_share_only():
    run = {"num_steps": 100, "warmup_steps": 0, "final_factor": 0.0, "decay_share": 0.2}
    factors = [schedule_factor("trapezoid", step, **run) for step in range(100)]
    assert factors == pytest.approx([1.0] * 80 + [1 - step / 20 for step in range(20)])


def test_no_warm_up_and_a_run_of_one_step():
    run = {"num_steps": 1, "warmup_steps": 0, "final_factor": 0.0, "decay_share": 0.5}
    assert [schedule_factor(schedule, 0, **run) for schedule in SCHEDULES] == [1, 1, 1, 1]


@given(batch_size=st.integers(1, 10**6), base=st.floats(1e-6, 1), reference=st.integers(1, 10**4))
def test_the_rule_is_linear_in_the_batch(batch_size, base, reference):
    rate = scale_learning_rate(batch_size, base=base, reference_batch_size=reference)
    assert rate == pytest.approx(base * batch_size / reference)
    assert scale_learning_rate(reference, base=base, reference_batch_size=reference) == pytest.approx(base)


def test_the_usual_rule_is_5e_4_for_256_sequences():
    assert [scale_learning_rate(size) for size in (128, 256, 1024)] == pytest.approx([2.5e-4, 5e-4, 2e-3])


def test_wsd_is_the_trapezoid():
    assert OptimizerConfig(schedule="wsd") == OptimizerConfig(schedule="trapezoid")
    with pytest.raises(ConfigError, match="schedule"):
        OptimizerConfig(schedule="wsdd")
