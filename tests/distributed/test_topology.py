import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.distributed.topology import RankTopology


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_the_placement_names_every_rank_once_with_those_of_a_host_together(hosts):
    topology = RankTopology.of(hosts)
    assert sorted(topology.placement) == list(range(len(hosts)))
    placed = [topology.hosts[rank] for rank in topology.placement]
    assert placed == sorted(placed)
    assert topology.num_hosts == len(set(hosts))


@pytest.mark.parametrize(("hosts", "size"), [("abab", 2), ("aaaa", 4), ("aab", 1), ("abc", 1)])
def test_a_domain_is_the_ranks_of_a_host_where_all_have_equally_many(hosts, size):
    assert RankTopology.of(list(hosts)).domain_size == size


@given(st.permutations([0, 0, 1, 1, 2, 2]), st.randoms(use_true_random=False))
def test_hosts_are_found_from_latencies_between_pairs(hosts, noise):
    latencies_s = [[0.0] * 6 for _ in range(6)]
    for one in range(6):
        for two in range(one):
            base_s = 2e-5 if hosts[one] == hosts[two] else 1e-4
            latencies_s[one][two] = latencies_s[two][one] = base_s * noise.uniform(1.0, 1.4)
    assert RankTopology.from_latencies(latencies_s) == RankTopology.of(hosts)


def test_pairs_that_differ_by_noise_only_are_one_host():
    assert RankTopology.from_latencies([[0, 1.0, 1.5], [1.0, 0, 1.9], [1.5, 1.9, 0]]).hosts == (0, 0, 0)
    assert RankTopology.from_latencies([[0.0]]).hosts == (0,)
