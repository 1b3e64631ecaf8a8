import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.core.errors import ConfigError
from deepseek.distributed.collectives import COLLECTIVES
from deepseek.distributed.collectives.messages import count_sent, cut, merge_steps, pass_around
from deepseek.distributed.topology import LinkClass

worlds = st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1), (4, 2), (6, 3), (8, 4), (9, 3), (12, 4)])


BYTES = LinkClass(0.0, 1.0)


@pytest.mark.parametrize(("world", "size", "domain"), [(0, 8, 1), (4, -1, 1), (4, 8, 3), (4, 8, 0)])
def test_groups_that_do_not_exist_are_refused(world, size, domain):
    with pytest.raises(ConfigError):
        COLLECTIVES["ring_all_reduce"](world, size, domain)


@given(st.integers(0, 100), st.integers(1, 12))
def test_pieces_cover_a_buffer_without_gaps_and_differ_by_one_element(size, parts):
    pieces = cut(size, parts)
    assert [index for start, stop in pieces for index in range(start, stop)] == list(range(size))
    lengths = [stop - start for start, stop in pieces]
    assert len(lengths) == parts
    assert max(lengths) - min(lengths) <= 1


@given(st.integers(2, 9), st.integers(0, 40))
def test_around_a_ring_every_rank_sends_to_its_neighbor_only_and_every_part_but_one(world, size):
    steps = pass_around(list(range(world)), cut(size, world), 0, is_added=False)
    assert len(steps) == world - 1
    for step in steps:
        assert all(message.target == (message.source + 1) % world for message in step)
    for rank in range(world):
        start, stop = cut(size, world)[(rank + 1) % world]
        assert count_sent(steps, rank) == size - (stop - start)


def test_schedules_of_disjoint_groups_travel_side_by_side():
    one, two = (pass_around(ranks, cut(4, 2), 0, is_added=True) for ranks in ([0, 1], [2, 3]))
    (merged,) = merge_steps([one, two])
    assert set(merged) == {*one[0], *two[0]}
