import itertools
from collections import Counter

import numpy as np
import pytest

from deepseek.core.errors import ConfigError
from deepseek.planning.estimate.step import predict
from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.models.model_shape import get_model_shape
from deepseek.planning.search.estimates import BUSY_ITEMS, WAITING_POWER, Estimates, apply_limits
from deepseek.planning.search.planner import plan
from deepseek.planning.search.request import Limits
from tests.planning.search.brute_force import SMALL, brute_force

LLAMA = get_model_shape("Llama3-8B")


def test_prices_are_those_of_predict():
    cluster = Cluster.of("H100-SXM-80GB", nodes=2)
    best = plan(LLAMA, cluster, global_batch=64).best
    alone = predict(LLAMA, cluster, best.plan, 64, is_checked=False)
    assert best.step_time_s == pytest.approx(alone.step_time_s)
    assert best.memory_bytes == pytest.approx(alone.memory_bytes)
    assert best.time_items_s == pytest.approx(alone.time_items_s)


def test_the_front_holds_exactly_what_nothing_beats():
    cluster = Cluster.of("A100-SXM-40GB", gpus_per_node=4)
    front = plan(SMALL, cluster, global_batch=4).front
    points = [(each.step_time_s, each.memory_bytes, each.energy_j) for each in front]
    for one, other in itertools.permutations(points, 2):
        assert not all(mine <= theirs for mine, theirs in zip(one, other, strict=True))
    least = min(each.memory_bytes for each in brute_force(SMALL, cluster, 4).values())
    assert min(each.memory_bytes for each in front) == pytest.approx(least)


def test_energy_is_the_power_limit_while_busy_and_a_share_of_it_while_waiting():
    cluster = Cluster.of("H100-SXM-80GB", nodes=2)
    best = plan(LLAMA, cluster, global_batch=64).best
    busy = sum(best.time_items_s[name] for name in BUSY_ITEMS)
    waiting = best.step_time_s - busy
    assert best.energy_j == pytest.approx(16 * 700 * (busy + WAITING_POWER * waiting))


def test_limits_that_contradict_each_other_are_named_together():
    rows = np.zeros((2, 13), np.int32)
    prices = Estimates(rows, np.array([1.0, 2.0]), np.array([1e9, 1e9]), np.array([500.0, 300.0]))
    kept = apply_limits(prices, Limits(max_step_time_s=2.0, max_energy_j=400.0), Counter())
    assert list(kept.seconds) == [2.0]
    with pytest.raises(ConfigError, match=r"can each be met, but not together; .* the fastest plan takes 2 s"):
        apply_limits(prices, Limits(max_step_time_s=1.5, max_energy_j=400.0), Counter())


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        (Limits(memory_headroom=0.9), "it fits with all of the memory, without the headroom of 90%"),
        (Limits(max_step_time_s=1e-6), "the fastest takes"),
        (Limits(max_energy_j=1.0), "the thriftiest takes"),
    ],
    ids=["headroom", "time", "energy"],
)
def test_limits_that_nothing_meets_say_how_far_off_they_are(limits, sentence):
    with pytest.raises(ConfigError, match=sentence):
        plan(LLAMA, Cluster.of("H100-SXM-80GB"), global_batch=32, limits=limits)


def test_progress_reaches_the_total():
    told = []
    plan(LLAMA, Cluster.of("H100-SXM-80GB"), global_batch=32, on_progress=lambda *each: told.append(each))
    assert told[-1][0] == told[-1][1] > 0
