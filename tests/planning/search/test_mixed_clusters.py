from dataclasses import replace

import pytest
from hypothesis import strategies as st

from deepseek.core.errors import ConfigError
from deepseek.planning.machines.cluster import Cluster, Node
from deepseek.planning.models.model_shape import get_model_shape
from deepseek.planning.search import mixed_clusters
from deepseek.planning.search.planner import plan
from deepseek.planning.search.request import Limits, Space

LLAMA = get_model_shape("Llama3-8B")
H100, A100 = "H100-SXM-80GB", "A100-SXM-80GB"
MIXED = Cluster.of(H100).join(Cluster.of(A100))
speeds = st.lists(st.integers(1, 9), min_size=1, max_size=4)


def test_a_mixed_cluster_is_faster_than_its_slow_half_doubled_and_slower_than_its_fast_half_doubled():
    seconds = [plan(LLAMA, each, global_batch=128).best.step_time_s for each in (
        Cluster.of(H100, nodes=2), MIXED, Cluster.of(A100, nodes=2),
    )]  # fmt: skip
    assert seconds == sorted(seconds)
    assert seconds[1] < 0.75 * seconds[2]


def test_equal_devices_under_two_names_get_what_one_name_gets():
    twin = replace(MIXED.accelerators[0], name="H100-twin")
    alike = Cluster.of(H100)
    alike = replace(alike, nodes=(*alike.nodes, Node(twin, 8)))
    mixed = plan(LLAMA, alike, global_batch=128)
    plain = plan(LLAMA, Cluster.of(H100, nodes=2), global_batch=128)
    assert mixed.best.step_time_s == pytest.approx(plain.best.step_time_s, rel=1e-6)


def test_fast_stages_get_more_layers_and_small_ones_fewer():
    space = Space(pp=(2,), tp=(8,))
    found = plan(LLAMA, MIXED, global_batch=64, space=space).placement
    assert found.is_by_stage
    fast, slow = found.shares
    assert (fast.accelerator, slow.accelerator) == (H100, A100)
    assert fast.layers > slow.layers
    assert fast.layers + slow.layers == LLAMA.layers
    small = Cluster.of(A100).join(Cluster.of("A100-SXM-40GB"))
    tight = replace(LLAMA, layers=96)
    roomy, narrow = plan(tight, small, global_batch=64, space=space).placement.shares
    assert roomy.layers >= narrow.layers


def test_fast_replicas_get_more_micro_batches_unless_they_meet_in_each():
    space = Space(pp=(1,), tp=(8,), cp=(1,), zero_stages=(1,))
    fast, slow = plan(LLAMA, MIXED, global_batch=64, space=space).placement.shares
    assert fast.micro_batches > slow.micro_batches
    assert (
        fast.micro_batches + slow.micro_batches
        == 64 // plan(LLAMA, MIXED, global_batch=64, space=space).best.plan.micro_batch_size
    )
    fast, slow = plan(LLAMA, MIXED, global_batch=64, space=replace(space, zero_stages=(3,))).placement.shares
    assert fast.micro_batches == slow.micro_batches


@pytest.mark.parametrize("batch", [16, 48])
@pytest.mark.parametrize("slow", [A100, "A100-SXM-40GB"])
def test_stopping_early_loses_nothing(monkeypatch, batch, slow):
    cluster = Cluster.of(H100, gpus_per_node=4).join(Cluster.of(slow, gpus_per_node=4))
    quick = plan(LLAMA, cluster, global_batch=batch)
    monkeypatch.setattr(mixed_clusters, "NUM_RUNNERS_UP", 10**9)
    thorough = plan(LLAMA, cluster, global_batch=batch)
    assert thorough.num_fitting > 2 * quick.num_fitting
    shown = [quick.best, *(each.candidate for each in quick.runners_up)]
    best = [thorough.best, *(each.candidate for each in thorough.runners_up)][: len(shown)]
    assert [each.step_time_s for each in shown] == [each.step_time_s for each in best]


def test_interleaved_stages_get_as_many_layers_in_each_chunk():
    space = Space(pp=(2,), tp=(8,), schedules=("interleaved",), virtual_stages=(4,))
    found = plan(LLAMA, MIXED, global_batch=64, space=space)
    assert [share.layers % 4 for share in found.placement.shares] == [0, 0]


def test_unequal_nodes_are_planned_as_one():
    cluster = Cluster.of(H100, gpus_per_node=8).join(Cluster.of(H100, gpus_per_node=4))
    found = plan(LLAMA, cluster, global_batch=96)
    assert found.best.plan.num_devices == 12
    assert sum(share.num_devices for share in found.placement.shares) == 12


def test_no_kind_of_device_is_given_more_than_it_holds():
    cluster = Cluster.of(A100).join(Cluster.of("A100-SXM-40GB"))
    found = plan(get_model_shape("Llama2-13B"), cluster, global_batch=64, limits=Limits(memory_headroom=0.1))
    assert found.best.memory_bytes <= 0.9 * 80 * 2**30


def test_what_fits_no_mixture_says_so():
    cluster = Cluster.of("A100-SXM-40GB").join(Cluster.of("V100-SXM-16GB"))
    with pytest.raises(ConfigError, match="does not fit on 16 unequal devices"):
        plan(get_model_shape("GPT3-175B"), cluster, global_batch=64)
    with pytest.raises(ConfigError, match="choose a batch that more of"):
        plan(replace(LLAMA, heads=37, hidden=37 * 64, head_dim=64, kv_heads=37, layers=1, sequence=999),
             Cluster.of(H100, gpus_per_node=7).join(Cluster.of(A100, gpus_per_node=4)), global_batch=3)  # fmt: skip
