from dataclasses import replace

import numpy as np
import pytest
from hypothesis import strategies as st

from deepseek.distributed.collectives import COLLECTIVES
from deepseek.distributed.collectives.messages import count_sent
from deepseek.distributed.topology import LinkClass
from deepseek.planning.estimate import communication as prices
from deepseek.planning.estimate.communication import time_steps
from deepseek.planning.machines.cluster import Cluster, get_accelerator
from deepseek.planning.scaling import build_link_columns

worlds = st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1), (4, 2), (6, 3), (8, 4), (9, 3), (12, 4)])


BYTES = LinkClass(0.0, 1.0)


def price_bytes(formula, world, domain, num_bytes, fast_network=1.0):
    device = replace(get_accelerator("A100-SXM-80GB"), scale_up=BYTES, network=BYTES)
    cluster = Cluster.of(device, nodes=world // domain, gpus_per_node=domain)
    columns = build_link_columns(cluster).with_columns(
        scale_up_fraction=np.ones(1), network_fraction=np.full(1, fast_network), collective_s=np.zeros(1),
        topology=np.zeros(1), has_switch_reduction=np.zeros(1),
    )  # fmt: skip
    group = prices.form_group(columns, np.full(1, float(world)), np.ones(1))
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
