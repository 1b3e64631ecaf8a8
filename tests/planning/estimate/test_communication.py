import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.planning.estimate import communication as collectives
from deepseek.planning.estimate.columns import describe_cluster, describe_constants, stack_cases
from deepseek.planning.estimate.communication import Group
from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.machines.constants import get_constants

RANKS, BYTES = st.integers(2, 24), st.floats(1e3, 1e10)
ALPHA, BANDWIDTH = 4e-6, 2e11


def table(**changes):
    cluster = Cluster.of("A100-SXM-80GB", nodes=4)
    values = {**describe_cluster(cluster, "bf16"), **describe_constants(get_constants("ampere"))}
    plain = {
        "collective_s": 0.0, "scale_up_alpha_s": ALPHA, "network_alpha_s": ALPHA, "scale_up_fraction": 1.0,
        "network_fraction": 1.0, "scale_up_bandwidth": BANDWIDTH, "network_bandwidth": BANDWIDTH,
    }  # fmt: skip
    return stack_cases([{**values, **plain, **changes}])


def group(size, spread=1):
    return Group(np.array([float(size)]), np.array([float(spread)]))


def pass_around_ring(ranks, num_bytes, alpha, bandwidth, rounds):
    """Move every message: in each step every rank sends one part to its right and waits for the one from its left."""
    clock = [0.0] * ranks
    for _ in range(rounds * (ranks - 1)):
        arrived = [clock[rank] + alpha + num_bytes / ranks / bandwidth for rank in range(ranks)]
        clock = [max(arrived[rank], arrived[rank - 1]) for rank in range(ranks)]
    return max(clock)


def send_to_all(ranks, num_bytes, alpha, bandwidth, *, is_waiting):
    """Every rank sends its parts one after another; until each has arrived if `is_waiting`, else until it has left."""
    left, arrived = [0.0] * ranks, [0.0] * ranks
    for _step, rank in itertools.product(range(ranks - 1), range(ranks)):
        start = arrived[rank] if is_waiting else left[rank]
        left[rank] = start + num_bytes / ranks / bandwidth
        arrived[rank] = left[rank] + alpha
    return max(arrived)


@given(RANKS, BYTES)
def test_ring_all_reduce_takes_as_long_as_its_messages(ranks, num_bytes):
    seconds = collectives.ring_all_reduce_s(table(), np.array([num_bytes]), group(ranks))[0]
    assert seconds == pytest.approx(pass_around_ring(ranks, num_bytes, ALPHA, BANDWIDTH, rounds=2))


@given(RANKS, BYTES)
def test_reduce_scatter_is_one_round_of_the_ring(ranks, num_bytes):
    seconds = collectives.scatter_reduce_s(table(), np.array([num_bytes]), group(ranks))[0]
    assert seconds == pytest.approx(pass_around_ring(ranks, num_bytes, ALPHA, BANDWIDTH, rounds=1))


@given(st.integers(2, 8), BYTES, st.sampled_from(["switch", "pairs"]))
def test_all_to_all_takes_as_long_as_its_messages(ranks, num_bytes, topology):
    is_switched = topology == "switch"
    c = table(topology=0.0 if is_switched else 1.0)
    seconds = collectives.all_to_all_s(c, np.array([num_bytes]), group(ranks))[0]
    share = 1.0 if is_switched else (ranks - 1) / 7
    expected = send_to_all(
        ranks, num_bytes, ALPHA, collectives._SCATTERED * share * BANDWIDTH, is_waiting=not is_switched
    )
    assert seconds == pytest.approx(expected)


def test_between_domains_a_ring_leaves_on_every_rail():
    c = table(network_bandwidth=BANDWIDTH / 20, network_alpha_s=0.0, scale_up_alpha_s=0.0)
    num_bytes = np.array([1e12])  # so long that filling the chain does not count
    narrow = collectives.ring_all_reduce_s(c, num_bytes, group(4, spread=4))[0]
    wide = collectives.ring_all_reduce_s(c, num_bytes, group(32, spread=4))[0]
    assert narrow == pytest.approx(2 * 3 / 4 * 1e12 / (BANDWIDTH / 20), rel=1e-3)
    assert wide == pytest.approx(2 * 31 / 32 * 1e12 / (8 * BANDWIDTH / 20), rel=1e-3)


def test_the_hierarchical_form_pays_for_the_slower_of_its_two_rings():
    c = table(network_bandwidth=BANDWIDTH / 4, network_alpha_s=0.0, scale_up_alpha_s=0.0)
    seconds = collectives.hierarchical_all_reduce_s(c, np.array([1e12]), group(32, spread=4))[0]
    inside, across = 2 * 7 / 8 * 1e12 / BANDWIDTH, 2 * 3 / 4 * 1e12 / 8 / (BANDWIDTH / 4)
    assert seconds == pytest.approx(max(inside, across), rel=1e-3)


def test_latency_counts_boxes_in_the_tree_and_ranks_in_the_ring():
    c = table(network_alpha_s=1e-3, scale_up_alpha_s=0.0)
    one_byte = np.array([1.0])
    assert collectives.ring_all_reduce_s(c, one_byte, group(128, spread=128))[0] == pytest.approx(2 * 127e-3, rel=1e-3)
    assert collectives.tree_all_reduce_s(c, one_byte, group(128, spread=128))[0] == pytest.approx(2 * 7e-3, rel=1e-3)


@given(RANKS, st.integers(1, 4), BYTES, st.sampled_from(["scale_up_bandwidth", "network_bandwidth"]))
def test_doubling_a_bandwidth_never_slows(inside, spread, num_bytes, link):
    sizes, size = group(inside * spread, spread), np.array([num_bytes])
    slow = table(network_bandwidth=BANDWIDTH / 10)
    fast = slow.with_columns(**{link: 2 * getattr(slow, link)})
    for form in (collectives.all_reduce_s, collectives.scatter_reduce_s, collectives.all_to_all_s):
        assert form(fast, size, sizes)[0] <= form(slow, size, sizes)[0]


@given(RANKS, BYTES)
def test_the_chosen_algorithm_is_never_slower_than_the_ring(ranks, num_bytes):
    size = np.array([num_bytes])
    assert collectives.all_reduce_s(table(), size, group(ranks)) <= collectives.ring_all_reduce_s(
        table(), size, group(ranks)
    )


@pytest.mark.parametrize("form", [collectives.all_reduce_s, collectives.scatter_reduce_s, collectives.all_to_all_s])
def test_a_group_of_one_and_a_message_of_nothing_cost_nothing(form):
    assert form(table(collective_s=1.0), np.array([1e6]), group(1))[0] == 0
    assert form(table(collective_s=1.0), np.array([0.0]), group(8))[0] == 0


@pytest.mark.parametrize(
    ("size", "stride", "spread"), [(8, 1, 1), (16, 1, 2), (4, 8, 4), (8, 4, 4), (2, 4, 1), (32, 1, 4), (3, 16, 3)]
)
def test_groups_are_placed_in_rank_order(size, stride, spread):
    placed = collectives.form_group(table(), np.array([float(size)]), np.array([float(stride)]))
    assert placed.spread[0] == spread


def test_without_a_switch_few_ranks_have_few_links():
    pairs = table(topology=1.0)
    two, eight = (collectives.ring_all_reduce_s(pairs, np.array([1e12]), group(n))[0] for n in (2, 8))
    assert two / eight == pytest.approx((1 / (1 / 7)) / (2 * 7 / 8), rel=1e-3)
