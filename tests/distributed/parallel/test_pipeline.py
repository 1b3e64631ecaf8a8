"""How layers are split, and what stands where others are. Numbers are in test_parity.py."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek.core.errors import ConfigError
from deepseek.distributed.parallel.pipeline import PipelineStage, Received, TakenOut, split_layers


def list_splits(num_layers, num_stages):
    for cuts in itertools.combinations(range(1, num_layers), num_stages - 1):
        yield [stop - first for first, stop in itertools.pairwise((0, *cuts, num_layers))]


@given(st.integers(1, 8), st.integers(1, 8), st.floats(0, 4), st.floats(0, 4))
def test_no_other_split_has_a_cheaper_costliest_stage(num_layers, num_stages, first_cost, last_cost):
    if num_stages > num_layers:
        return
    extras = [0.0] * num_stages
    extras[0] += first_cost
    extras[-1] += last_cost

    def costliest(sizes):
        return max(size + extra for size, extra in zip(sizes, extras, strict=True))

    stages = split_layers(num_layers, num_stages, first_cost=first_cost, last_cost=last_cost)
    sizes = [stage.stop - stage.first for stage in stages]
    assert sum(sizes) == num_layers and [stage.first for stage in stages[1:]] == [stage.stop for stage in stages[:-1]]
    assert costliest(sizes) == pytest.approx(min(costliest(split) for split in list_splits(num_layers, num_stages)))


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ConfigError, match=r"pp\*virtual_stages = 4 is more than layers=3; use at most 3"):
        split_layers(3, 4)


def test_a_stage_knows_its_layers_and_its_place():
    stage = PipelineStage(1, 3, 2, 4, 6)
    assert [layer for layer in range(6) if stage.holds(layer)] == [2, 3]
    assert not stage.is_first and not stage.is_last


def test_what_stands_for_a_layer_hands_its_input_on():
    x = torch.ones(2)
    received = Received()
    received.value = x
    assert TakenOut()(x, None, key=1) is x and received(torch.zeros(1), key=1) is x
