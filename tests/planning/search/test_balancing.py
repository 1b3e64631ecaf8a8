import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.core.errors import ConfigError
from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.models.model_shape import get_model_shape
from deepseek.planning.search.balancing import assign_batches, assign_layers, cut_blocks

LLAMA = get_model_shape("Llama3-8B")
H100, A100 = "H100-SXM-80GB", "A100-SXM-80GB"
MIXED = Cluster.of(H100).join(Cluster.of(A100))
speeds = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(
    costs=st.lists(st.integers(1, 5), min_size=1, max_size=8),
    paces=speeds,
    room=st.lists(st.integers(1, 8), min_size=4, max_size=4),
)
def test_layers_are_assigned_as_well_as_trying_all_cuts(costs, paces, room):
    best = None
    for cuts in itertools.combinations(range(1, len(costs)), len(paces) - 1):
        ends = (0, *cuts, len(costs))
        parts = [costs[start:end] for start, end in itertools.pairwise(ends)]
        if all(len(part) <= capacity for part, capacity in zip(parts, room, strict=False)):
            slowest = max(sum(part) * pace for part, pace in zip(parts, paces, strict=True))
            best = slowest if best is None else min(best, slowest)
    assigned = assign_layers(costs, paces, room[: len(paces)])
    assert (assigned is None) == (best is None)
    if assigned is not None:
        assert assigned[1] == best
        assert sum(assigned[0]) == len(costs)
        assert all(1 <= depth <= capacity for depth, capacity in zip(assigned[0], room, strict=False))


@settings(max_examples=60, deadline=None)
@given(seconds=speeds, extra=st.integers(0, 8))
def test_batches_are_assigned_as_well_as_trying_all_ways(seconds, extra):
    total = len(seconds) + extra
    ways = (way for way in itertools.product(range(1, total + 1), repeat=len(seconds)) if sum(way) == total)
    best = min(max(count * each for count, each in zip(way, seconds, strict=True)) for way in ways)
    assigned = assign_batches(seconds, total)
    assert sum(assigned) == total
    assert min(assigned) >= 1
    assert max(count * each for count, each in zip(assigned, seconds, strict=True)) == best


def test_too_few_batches_are_refused():
    with pytest.raises(ConfigError, match="give each at least one"):
        assign_batches([1.0, 1.0], 1)


def test_blocks_of_devices_know_what_they_hold():
    assert cut_blocks(MIXED, 8) == [(H100,), (A100,)]
    assert cut_blocks(MIXED, 16) == [(H100, A100)]
