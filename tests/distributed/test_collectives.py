from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.core.errors import ConfigError
from deepseek.distributed.collectives import COLLECTIVES
from deepseek.distributed.collectives.executing import play_steps_
from deepseek.distributed.collectives.messages import count_sent, cut
from deepseek.distributed.topology import LinkClass
from deepseek.planning.estimate import communication as prices
from deepseek.planning.estimate.communication import time_steps
from deepseek.planning.machines.cluster import Cluster, get_accelerator
from deepseek.planning.scaling import make_link_columns
from tests.distributed.spawning import run_ranks
from tests.planning.rank_work import exchange

worlds = st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1), (4, 2), (6, 3), (8, 4), (9, 3), (12, 4)])


def make_buffers(world, size, seed=0):
    source = np.random.default_rng(seed)
    return [source.integers(-50, 50, size).astype(np.float64) for _ in range(world)]


@settings(max_examples=40, deadline=None)
@given(world=worlds, size=st.integers(0, 50), name=st.sampled_from(["ring_all_reduce", "hierarchical_all_reduce"]))
def test_all_reduce_gives_every_rank_the_sum(world, size, name):
    buffers = make_buffers(world[0], size)
    expected = sum(buffers)
    play_steps_(buffers, COLLECTIVES[name](world[0], size, world[1]))
    assert all((buffer == expected).all() for buffer in buffers)


@settings(max_examples=40, deadline=None)
@given(world=st.integers(1, 9), size=st.integers(0, 50))
def test_the_others_do_what_their_names_say(world, size):
    given_ = make_buffers(world, size)
    scattered = [each.copy() for each in given_]
    play_steps_(scattered, COLLECTIVES["ring_reduce_scatter"](world, size, 1))
    sent_out = [each.copy() for each in given_]
    play_steps_(sent_out, COLLECTIVES["tree_broadcast"](world, size, 1))
    gathered = [each.copy() for each in given_]
    play_steps_(gathered, COLLECTIVES["ring_all_gather"](world, size, 1))
    for rank, (start, stop) in enumerate(cut(size, world)):
        assert (scattered[rank][start:stop] == sum(given_)[start:stop]).all()
        assert (sent_out[rank] == given_[0]).all()
        assert all((each[start:stop] == given_[rank][start:stop]).all() for each in gathered)
    swapped = make_buffers(world, size * world)
    whole = [each.copy() for each in swapped]
    play_steps_(swapped, COLLECTIVES["pairwise_all_to_all"](world, size * world, 1))
    for target, source in np.ndindex(world, world):
        mine = swapped[target][source * size : (source + 1) * size]
        assert (mine == whole[source][target * size : (target + 1) * size]).all()


@settings(max_examples=40, deadline=None)
@given(world=worlds, size=st.integers(0, 50), name=st.sampled_from(sorted(COLLECTIVES)))
def test_the_bytes_that_move_are_the_bytes_that_are_counted(world, size, name):
    size *= world[0]
    steps = COLLECTIVES[name](world[0], size, world[1])
    sent = play_steps_(make_buffers(world[0], size), steps)
    assert sent == [8 * count_sent(steps, rank) for rank in range(world[0])]


# Links without latency that carry one byte a second, and constants that take nothing off: seconds are bytes.
BYTES = LinkClass(0.0, 1.0)


def price_bytes(formula, world, domain, num_bytes, fast_network=1.0):
    device = replace(get_accelerator("A100-SXM-80GB"), scale_up=BYTES, network=BYTES)
    cluster = Cluster.of(device, nodes=world // domain, gpus_per_node=domain)
    columns = make_link_columns(cluster).with_columns(
        scale_up_fraction=np.ones(1), network_fraction=np.full(1, fast_network), collective_s=np.zeros(1),
        topology=np.zeros(1), has_switch_reduction=np.zeros(1),
    )  # fmt: skip
    group = prices.place_group(columns, np.full(1, float(world)), np.ones(1))
    return float(formula(columns, np.full(1, float(num_bytes)), group)[0])


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("ring_all_reduce", prices.ring_all_reduce_s),
        ("ring_reduce_scatter", prices.scatter_reduce_s),
        ("ring_all_gather", prices.scatter_reduce_s),
    ],
)
def test_predicted_bytes_are_those_that_a_rank_sends(world, name, formula):
    elements = 24 * world
    steps = COLLECTIVES[name](world, elements, 1)
    sent = [4 * count_sent(steps, rank) for rank in range(world)]
    assert sent == pytest.approx([price_bytes(formula, world, world, 4 * elements)] * world)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_predicted_bytes_of_all_to_all_are_those_that_a_rank_sends(world):
    elements = 24 * world
    sent = 4 * count_sent(COLLECTIVES["pairwise_all_to_all"](world, elements, 1), 0)
    predicted = price_bytes(prices.all_to_all_s, world, world, 4 * elements) * prices._SCATTERED
    assert predicted == pytest.approx(sent)


@pytest.mark.parametrize(("world", "domain"), [(4, 2), (16, 4), (16, 8)])
def test_predicted_bytes_of_two_levels_are_those_inside_and_those_across(world, domain):
    elements = 48 * world
    steps = COLLECTIVES["hierarchical_all_reduce"](world, elements, domain)
    own = [message for step in steps for message in step if message.source == 0]
    across = 4 * sum(each.num_elements for each in own if each.target // domain)
    inside = 4 * sum(each.num_elements for each in own if not each.target // domain)
    filling = 2 * np.ceil(np.log2(world // domain)) * 4 * elements / domain  # the first chunk on its way up the tree
    predicted = price_bytes(prices.hierarchical_all_reduce_s, world, domain, 4 * elements)
    assert predicted == pytest.approx(max(inside, across) + filling)
    slow = price_bytes(prices.hierarchical_all_reduce_s, world, domain, 4 * elements, fast_network=1e-3)
    assert slow == pytest.approx(1e3 * (across + filling))


def test_two_levels_spare_the_network_as_often_as_a_domain_has_ranks():
    flat, two = (COLLECTIVES[name](16, 64, 4) for name in ("ring_all_reduce", "hierarchical_all_reduce"))

    def leaving(steps, domain):
        messages = (message for step in steps for message in step)
        return sum(each.num_elements for each in messages if each.source // 4 == domain != each.target // 4)

    assert leaving(two, 0) == 4 * 2 * 3 * 4  # of four ranks, 2 (d-1) pieces of 64 / 4 / 4 elements each
    assert leaving(flat, 0) == 2 * 15 * 4
    slow, fast = LinkClass(1e-4, 1e9), LinkClass(1e-6, 1e11)
    assert time_steps(two, 4, 4, fast, slow) < 0.3 * time_steps(flat, 4, 4, fast, slow)


@pytest.mark.parametrize(("world", "size", "domain"), [(0, 8, 1), (4, -1, 1), (4, 8, 3), (4, 8, 0)])
def test_groups_that_do_not_exist_are_refused(world, size, domain):
    with pytest.raises(ConfigError):
        COLLECTIVES["ring_all_reduce"](world, size, domain)


def test_a_buffer_that_cannot_be_shared_out_is_refused():
    with pytest.raises(ConfigError, match="pad the buffer"):
        COLLECTIVES["pairwise_all_to_all"](3, 8, 1)


def test_between_processes_schedules_give_what_torch_gives_and_send_what_they_count():
    for results in run_ranks(exchange, 4, 4):
        assert sorted(results) == sorted(COLLECTIVES)
        for name, (difference, sent, counted) in results.items():
            assert difference == 0, name
            assert sent == counted, name
