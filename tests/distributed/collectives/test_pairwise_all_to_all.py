import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.core.errors import ConfigError
from deepseek.distributed.collectives import COLLECTIVES
from deepseek.distributed.topology import LinkClass

worlds = st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1), (4, 2), (6, 3), (8, 4), (9, 3), (12, 4)])


BYTES = LinkClass(0.0, 1.0)


def test_a_buffer_that_cannot_be_shared_out_is_refused():
    with pytest.raises(ConfigError, match="pad the buffer"):
        COLLECTIVES["pairwise_all_to_all"](3, 8, 1)


@given(st.integers(2, 9), st.integers(1, 5))
def test_every_pair_of_ranks_meets_once_and_swaps_what_each_holds_for_the_other(world, share):
    steps = COLLECTIVES["pairwise_all_to_all"](world, world * share, 1)
    pairs = [(message.source, message.target) for step in steps for message in step]
    assert sorted(pairs) == [(one, two) for one in range(world) for two in range(world) if one != two]
    for step in steps:
        ranks = [message.source for message in step]
        assert len(ranks) == len(set(ranks))  # nobody sends two things at once
        for message in step:
            assert message.start == message.target * share
            assert message.target_start == message.source * share
