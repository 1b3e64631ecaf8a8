"""How layers are split over stages, and what they are measured to cost."""

import itertools
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deepseek.core.errors import ConfigError
from deepseek.distributed.parallel.layer_costs import measure_layers, split_layers
from deepseek.distributed.parallel.legality import ModelParts
from deepseek.distributed.parallel.parallel_model import ModelRows


def list_splits(costs, num_stages):
    for cuts in itertools.combinations(range(1, len(costs)), num_stages - 1):
        yield [costs[first:stop] for first, stop in itertools.pairwise((0, *cuts, len(costs)))]


def measure_split(parts):
    return max(map(sum, parts)), sum(sum(part) ** 2 for part in parts)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 8))
def test_no_other_split_has_a_cheaper_costliest_stage_or_more_equal_ones(costs, num_stages):
    if num_stages > len(costs):
        return
    stages = split_layers(costs, num_stages)
    parts = [costs[stage.first : stage.stop] for stage in stages]
    assert [cost for part in parts for cost in part] == costs and all(parts)
    assert measure_split(parts) == min(map(measure_split, list_splits(costs, num_stages)))


def test_of_layers_that_do_not_divide_the_first_stages_have_more():
    assert [stage.stop - stage.first for stage in split_layers([1.0] * 11, 4)] == [3, 3, 3, 2]


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ConfigError, match=r"pp\*virtual_stages = 4 is more than layers=3; use at most 3"):
        split_layers([1, 1, 1], 4)


@pytest.mark.parametrize(
    ("costs", "words"), [((1.0,), "1 layer costs were given for layers=2"), ((1.0, 0.0), "give positive numbers")]
)
def test_costs_that_do_not_fit_the_layers_are_refused(costs, words):
    with pytest.raises(ConfigError, match=words):
        ModelRows(ModelParts("Mine", num_layers=2), layer_costs=costs).list_costs()


class Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(2 * ctx.seconds)
        return gradient, None


class Slow(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.seconds = seconds

    def forward(self, x):
        return Sleep.apply(x * self.scale, self.seconds)


class SlowTask:
    def forward(self, model, batch):
        return model(batch)

    def loss(self, outputs, batch):
        return Sleep.apply(outputs, 0.02).sum()


def test_ends_are_measured_as_part_of_the_first_and_the_last_layer():
    model = nn.Sequential(Slow(0.01), Slow(0.001), Slow(0.01), Slow(0.001))
    seconds = measure_layers(model, list(model)[1:], SlowTask(), torch.ones(2))
    # A machine that is busy only adds to these.
    for found, slept in zip(seconds, (0.033, 0.03, 0.063), strict=True):
        assert found >= slept
    assert all(layer.scale.grad is None for layer in model)


def test_layers_that_do_not_run_once_each_are_refused():
    model, other = nn.Sequential(Slow(0.0)), Slow(0.0)
    with pytest.raises(ConfigError, match="1 of 2 layers ran forward and 1 backward in one pass"):
        measure_layers(model, [model[0], other], SlowTask(), torch.ones(2))
