from dataclasses import replace

import pytest

from deepseek.core.errors import ConfigError
from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.models.model_shape import get_model_shape
from deepseek.planning.search.planner import plan
from deepseek.planning.search.request import Limits

GPT_1750B = replace(get_model_shape("SC21-GPT-1008.0B"), layers=224, name="GPT-1.75T")


@pytest.mark.parametrize(
    ("model", "nodes", "remedy"),
    [
        (GPT_1750B, 4, "fits on 64 nodes of 8 A100-SXM-80GB"),
        (get_model_shape("Llama3-70B"), 1, "keep the optimizer in the host's memory"),
    ],
    ids=["nodes", "offloading"],
)
def test_a_model_that_fits_nowhere_is_told_what_would_help(model, nodes, remedy):
    with pytest.raises(ConfigError, match=remedy) as caught:
        plan(model, Cluster.of("A100-SXM-80GB", nodes=nodes), global_batch=512, limits=Limits())
    assert "85.9 GB may be used" in str(caught.value)


def test_the_smallest_cluster_that_is_named_fits_and_the_one_before_does_not():
    model = get_model_shape("SC21-GPT-310.1B")
    with pytest.raises(ConfigError) as caught:
        plan(model, Cluster.of("A100-SXM-80GB", nodes=2), global_batch=1536)
    words = str(caught.value).split("fits on ")[1].split()
    nodes = int(words[0])
    assert plan(model, Cluster.of("A100-SXM-80GB", nodes=nodes), global_batch=1536).best
    with pytest.raises(ConfigError):
        plan(model, Cluster.of("A100-SXM-80GB", nodes=nodes - 1), global_batch=1536)
