from dataclasses import replace

import pytest

from deepseek.bench.plan_trial import Checked, check_plan
from deepseek.core.errors import ConfigError
from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.models.model_shape import ModelShape
from deepseek.planning.search.planner import plan
from deepseek.recipes import load_recipe
from tests.cli.commands import write_corpus

SHAPE = ModelShape(layers=2, hidden=64, heads=2, ffn=128, vocabulary=300, sequence=32)
RECIPE = load_recipe("decoder_tiny")


def find(devices):
    return plan(SHAPE, Cluster.of("L4", gpus_per_node=devices), global_batch=8)


def test_plans_of_several_devices_are_not_run_on_one():
    with pytest.raises(ConfigError, match="this one has 2; plan for one device"):
        check_plan(RECIPE, find(2), 8, 12)


def test_too_few_steps_say_how_many_are_needed():
    with pytest.raises(ConfigError, match="give at least 4"):
        check_plan(RECIPE, find(1), 8, 3)


def test_steps_are_trained_as_the_plan_says_and_the_recipe_stays_as_it_was(tmp_path):
    corpus = write_corpus(tmp_path / "text")
    small = RECIPE.override(
        {
            "model": {"vocab_size": 300, "num_layers": 1, "hidden_size": 32, "num_heads": 2, "max_length": 64},
            "data": {"sources": [str(corpus)], "heldout_fraction": 0.2, "vocab_size": 300, "sequence_length": 32},
        }
    )
    result = find(1)
    chosen = replace(result.best, plan=replace(result.best.plan, micro_batch_size=2))
    checked = check_plan(small, replace(result, best=chosen), 4, 4)
    assert checked.measured_s > 0
    assert checked.predicted_bytes == chosen.memory_bytes - chosen.memory_items_bytes["context"]
    assert checked.to_dict()["time_ratio"] == checked.time_ratio == checked.predicted_s / checked.measured_s
    assert isinstance(checked, Checked)
    assert small.data.batch_size == RECIPE.data.batch_size
