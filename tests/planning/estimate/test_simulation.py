from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.planning.estimate.simulation import StageWork, simulate

STAGES, MICRO_BATCHES = st.integers(1, 8), st.integers(1, 12)
SECONDS = st.floats(0.1, 3.0)


def count_held(timeline, stage):
    """Most micro-batch chunks whose activations `stage` holds at once, from start of forward to end of backward."""
    mine = [event for event in timeline.events if event.stage == stage]
    changes = [(event.start_s, 1) for event in mine if event.work.kind == "forward"]
    changes += [(event.end_s, -1) for event in mine if event.work.kind == "backward"]
    return max(accumulate(change for _, change in sorted(changes)))


@given(STAGES, MICRO_BATCHES, SECONDS, SECONDS)
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_even_stages_take_what_the_closed_form_says(schedule, stages, micro_batches, forward, backward):
    timeline = simulate(schedule, [StageWork(forward, backward)] * stages, micro_batches)
    assert timeline.step_time_s == pytest.approx((micro_batches + stages - 1) * (forward + backward))


@given(st.integers(2, 6), st.integers(1, 4), st.integers(1, 4), SECONDS, SECONDS)
def test_interleaving_divides_the_bubble_by_the_chunks(stages, rounds, chunks, forward, backward):
    work = [StageWork(forward / chunks, backward / chunks)] * stages
    timeline = simulate("interleaved", work, rounds * stages, virtual_stages=chunks)
    ideal = rounds * stages * (forward + backward)
    assert timeline.step_time_s == pytest.approx(ideal + (stages - 1) * (forward + backward) / chunks)


@given(STAGES, MICRO_BATCHES, SECONDS, SECONDS, st.floats(0, 1))
def test_zero_bubble_saves_two_weight_gradients_a_stage(stages, micro_batches, forward, rest, share):
    weight = share * min(forward, rest)
    timeline = simulate("zero_bubble", [StageWork(forward, rest + weight, weight)] * stages, micro_batches)
    saved = min(2 * (stages - 1), micro_batches + stages - 2) * weight
    expected = (micro_batches + stages - 1) * (forward + rest + weight) - saved
    assert timeline.step_time_s == pytest.approx(expected)


@pytest.mark.parametrize(
    ("schedule", "chunks", "fraction"),
    [
        ("1f1b", 1, 7 / 39),
        ("gpipe", 1, 7 / 39),
        ("interleaved", 4, 7 / (32 * 4 + 7)),
        ("zero_bubble", 1, 7 / (3 * 32 + 7)),
    ],
)
def test_the_bubble_is_the_published_fraction_of_the_step(schedule, chunks, fraction):
    # 8 stages, 32 micro-batches; forward, input gradient and weight gradient equal (zero bubble's own assumption).
    work = [StageWork(1.0 / chunks, 2.0 / chunks, 1.0 / chunks)] * 8
    assert simulate(schedule, work, 32, virtual_stages=chunks).bubble_fraction == pytest.approx(fraction)


@given(st.integers(2, 8), st.integers(2, 24), SECONDS, SECONDS, st.floats(1.0, 3.0))
def test_a_busier_last_stage_sets_the_pace(stages, micro_batches, forward, backward, factor):
    work = [StageWork(forward, backward)] * (stages - 1) + [StageWork(factor * forward, factor * backward)]
    both = forward + backward
    expected = micro_batches * factor * both + (stages - 1) * both
    assert simulate("1f1b", work, micro_batches).step_time_s == pytest.approx(expected)


@given(st.integers(1, 8), st.integers(1, 16))
def test_one_forward_one_backward_holds_no_more_than_the_stages_behind(stages, micro_batches):
    timeline = simulate("1f1b", [StageWork(1.0, 2.0)] * stages, micro_batches)
    for stage in range(stages):
        assert count_held(timeline, stage) == min(stages - stage, micro_batches)


def test_gpipe_holds_everything():
    assert count_held(simulate("gpipe", [StageWork(1.0, 2.0)] * 4, 10), 0) == 10


def test_interleaving_holds_what_the_published_factor_says():
    stages, chunks = 4, 3
    timeline = simulate("interleaved", [StageWork(1.0, 2.0)] * stages, 24, virtual_stages=chunks)
    factor = 1 + (stages - 1) / (stages * chunks)  # arXiv:2205.05198, 4.2.3
    assert count_held(timeline, 0) == pytest.approx(stages * chunks * factor)


@given(st.sampled_from(["gpipe", "1f1b", "zero_bubble"]), st.integers(1, 6), st.integers(1, 10))
def test_no_stage_does_two_things_at_once_and_every_pass_happens_once(schedule, stages, micro_batches):
    timeline = simulate(schedule, [StageWork(1.0, 2.0, 0.5)] * stages, micro_batches)
    kinds = 3 if schedule == "zero_bubble" else 2
    for stage in range(stages):
        events = [event for event in timeline.events if event.stage == stage]
        assert len({event.work for event in events}) == len(events) == kinds * micro_batches
        for before, after in pairwise(events):
            assert after.start_s >= before.end_s - 1e-9


def test_messages_delay_the_first_micro_batch_at_every_boundary():
    quiet = simulate("gpipe", [StageWork(1.0, 1.0)] * 4, 1)
    assert simulate("gpipe", [StageWork(1.0, 1.0)] * 4, 1, message_s=0.5).step_time_s == quiet.step_time_s + 6 * 0.5
