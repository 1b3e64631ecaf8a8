from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.distributed.collectives.uneven_all_to_all import order_pairs, order_ring

matrices = st.integers(1, 6).flatmap(
    lambda size: st.lists(st.lists(st.integers(0, 4), min_size=size, max_size=size), min_size=size, max_size=size)
)


@pytest.mark.parametrize("order", [order_ring, order_pairs])
@given(lengths=matrices)
def test_every_part_arrives_in_rank_order_and_no_rank_sends_twice_in_a_step(order, lengths):
    world = len(lengths)
    sources = [np.repeat(np.arange(world) + 10 * rank, row) for rank, row in enumerate(lengths)]
    targets = [np.full(sum(row[rank] for row in lengths), -1) for rank in range(world)]
    for step in order(lengths):
        assert max(Counter(message.source for message in step).values()) == 1
        assert max(Counter(message.target for message in step).values()) == 1
        for message in step:
            assert message.num_elements > 0
            target = targets[message.target]
            part = sources[message.source][message.start : message.stop]
            target[message.target_start : message.target_start + message.num_elements] = part
    for rank in range(world):
        expected = [10 * source + rank for source in range(world) for _ in range(lengths[source][rank])]
        assert targets[rank].tolist() == expected


@given(lengths=matrices, rank=st.integers(0, 5))
def test_a_rank_that_knows_its_own_row_and_column_only_has_its_own_messages_right(lengths, rank):
    rank %= len(lengths)
    known = [
        [length if rank in (source, target) else 0 for target, length in enumerate(row)]
        for source, row in enumerate(lengths)
    ]

    def find_own(steps):
        sent = {(m.target, m.start, m.stop) for step in steps for m in step if m.source == rank}
        received = {(m.source, m.target_start, m.num_elements) for step in steps for m in step if m.target == rank}
        return sent, received

    assert find_own(order_ring(known)) == find_own(order_ring(lengths))
