import json

import pytest

from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.models.model_shape import get_model_shape
from deepseek.planning.search.planner import plan

LLAMA = get_model_shape("Llama3-8B")


@pytest.mark.parametrize("runner_up", plan(LLAMA, Cluster.of("H100-SXM-80GB"), global_batch=32).runners_up[:4])
def test_a_runner_up_names_the_item_that_it_loses_most_in(runner_up):
    best = plan(LLAMA, Cluster.of("H100-SXM-80GB"), global_batch=32).best
    items = runner_up.candidate.time_items_s
    losses = {name: value - best.time_items_s[name] for name, value in items.items()}
    assert runner_up.difference == pytest.approx(max(losses.values()))
    assert runner_up.item in runner_up.reason


def test_the_result_goes_into_json_and_counts_what_was_rejected():
    found = plan(LLAMA, Cluster.of("A100-SXM-40GB"), global_batch=32)
    values = json.loads(json.dumps(found.to_dict()))
    assert values["best"]["plan"]["tp"] == found.best.plan.tp
    memory_rules = [count for rule, count in found.rejected_candidates.items() if rule.startswith("memory")]
    assert sum(memory_rules) + found.num_fitting == found.num_candidates
    assert any("power limit" in sentence for sentence in found.assumptions)
