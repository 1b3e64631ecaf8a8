from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.core.errors import ConfigError
from deepseek.distributed.plan import SCHEDULES
from deepseek.distributed.schedules import Work, order_work

STAGES = st.integers(1, 6)


@given(st.sampled_from(SCHEDULES), STAGES, st.integers(1, 4), st.integers(1, 3), st.data())
def test_every_pass_is_ordered_once_and_after_what_it_needs(schedule, stages, rounds, chunks, data):
    chunks = chunks if schedule == "interleaved" else 1
    micro_batches = rounds * stages
    stage = data.draw(st.integers(0, stages - 1))
    order = order_work(schedule, stages, stage, micro_batches, chunks)
    kinds = ("forward", "backward", "weight") if schedule == "zero_bubble" else ("forward", "backward")
    passes = [Work(kind, index, chunk) for kind in kinds for index in range(micro_batches) for chunk in range(chunks)]
    assert Counter(order) == Counter(passes)
    position = {work: index for index, work in enumerate(order)}
    for work in order:
        if work.kind != "forward":
            needed = "forward" if work.kind == "backward" else "backward"
            assert position[Work(needed, work.micro_batch, work.chunk)] < position[work]


@given(STAGES, st.integers(1, 8))
def test_stages_of_1f1b_start_as_many_forwards_as_stages_follow(stages, micro_batches):
    for stage in range(stages):
        kinds = [work.kind for work in order_work("1f1b", stages, stage, micro_batches)]
        assert kinds.index("backward") == min(stages - stage, micro_batches)


def test_interleaved_forwards_are_those_of_the_published_figure():
    # Narayanan et al. 2021, figure 4: 4 stages, 8 micro-batches, 2 chunks; device 1 starts 1 2 3 4 1 2 3 4 5 6 ...
    forwards = [work for work in order_work("interleaved", 4, 0, 8, 2) if work.kind == "forward"]
    assert [work.micro_batch + 1 for work in forwards] == [1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7, 8]
    assert [work.chunk for work in forwards] == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("1f1b", 0, 0, 4), "0 stages"),
        (("1f1b", 2, 0, 0), "0 micro-batches"),
        (("interleaved", 4, 0, 7, 2), "7 micro-batches cannot be interleaved over 4 stages"),
        (("1f1", 2, 0, 4), "did you mean '1f1b'"),
    ],
)
def test_an_impossible_schedule_is_refused_in_one_sentence(arguments, words):
    with pytest.raises(ConfigError, match=words):
        order_work(*arguments)
