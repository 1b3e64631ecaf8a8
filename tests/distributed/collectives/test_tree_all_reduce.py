import math

from hypothesis import given
from hypothesis import strategies as st

from deepseek.distributed.collectives import COLLECTIVES
from deepseek.distributed.collectives.messages import count_sent


@given(st.integers(1, 17), st.integers(1, 20))
def test_it_takes_twice_the_logarithm_of_the_ranks_and_moves_the_buffer_once_up_and_once_down(world, size):
    steps = COLLECTIVES["tree_all_reduce"](world, size, 1)
    assert len(steps) == 2 * math.ceil(math.log2(world))
    assert sum(count_sent(steps, rank) for rank in range(world)) == 2 * (world - 1) * size
