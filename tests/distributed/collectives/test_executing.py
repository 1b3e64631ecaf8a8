import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.distributed.collectives import COLLECTIVES
from deepseek.distributed.collectives.executing import apply_steps_
from deepseek.distributed.collectives.messages import count_sent, cut
from deepseek.distributed.topology import LinkClass
from tests.distributed.ranks import run_ranks
from tests.planning.rank_work import exchange

worlds = st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1), (4, 2), (6, 3), (8, 4), (9, 3), (12, 4)])


def make_buffers(world, size, seed=0):
    source = np.random.default_rng(seed)
    return [source.integers(-50, 50, size).astype(np.float64) for _ in range(world)]


@settings(max_examples=40, deadline=None)
@given(
    world=worlds,
    size=st.integers(0, 50),
    name=st.sampled_from(["ring_all_reduce", "hierarchical_all_reduce", "tree_all_reduce"]),
)
def test_all_reduce_gives_every_rank_the_sum(world, size, name):
    buffers = make_buffers(world[0], size)
    expected = sum(buffers)
    apply_steps_(buffers, COLLECTIVES[name](world[0], size, world[1]))
    assert all((buffer == expected).all() for buffer in buffers)


@settings(max_examples=40, deadline=None)
@given(world=st.integers(1, 9), size=st.integers(0, 50))
def test_the_others_do_what_their_names_say(world, size):
    given_ = make_buffers(world, size)
    scattered = [each.copy() for each in given_]
    apply_steps_(scattered, COLLECTIVES["ring_reduce_scatter"](world, size, 1))
    sent_out = [each.copy() for each in given_]
    apply_steps_(sent_out, COLLECTIVES["tree_broadcast"](world, size, 1))
    gathered = [each.copy() for each in given_]
    apply_steps_(gathered, COLLECTIVES["ring_all_gather"](world, size, 1))
    for rank, (start, stop) in enumerate(cut(size, world)):
        assert (scattered[rank][start:stop] == sum(given_)[start:stop]).all()
        assert (sent_out[rank] == given_[0]).all()
        assert all((each[start:stop] == given_[rank][start:stop]).all() for each in gathered)
    swapped = make_buffers(world, size * world)
    whole = [each.copy() for each in swapped]
    apply_steps_(swapped, COLLECTIVES["pairwise_all_to_all"](world, size * world, 1))
    for target, source in np.ndindex(world, world):
        mine = swapped[target][source * size : (source + 1) * size]
        assert (mine == whole[source][target * size : (target + 1) * size]).all()


@settings(max_examples=40, deadline=None)
@given(world=worlds, size=st.integers(0, 50), name=st.sampled_from(sorted(COLLECTIVES)))
def test_the_bytes_that_move_are_the_bytes_that_are_counted(world, size, name):
    size *= world[0]
    steps = COLLECTIVES[name](world[0], size, world[1])
    sent = apply_steps_(make_buffers(world[0], size), steps)
    assert sent == [8 * count_sent(steps, rank) for rank in range(world[0])]


# Links without latency that carry one byte a second, and constants that take nothing off: seconds are bytes.
BYTES = LinkClass(0.0, 1.0)


def test_between_processes_schedules_give_what_torch_gives_and_send_what_they_count():
    for results in run_ranks(exchange, 4, 4):
        assert sorted(results) == sorted(COLLECTIVES)
        for name, (difference, sent, counted) in results.items():
            assert difference == 0, name
            assert sent == counted, name
