import json
import re

import pytest

from deepseek.core.errors import ConfigError
from deepseek.distributed.topology import LinkClass
from deepseek.planning.machines.cluster import Cluster, get_accelerator
from deepseek.planning.models.model_shape import get_model_shape
from deepseek.planning.naming import (
    ALIASES,
    cluster_from_dict,
    cluster_to_dict,
    find_accelerator,
    find_cluster,
    find_model,
    load_cluster,
    read_config,
    save_cluster,
)


def test_every_alias_leads_to_an_accelerator():
    for name, device in ALIASES.items():
        assert find_accelerator(name.upper()) == get_accelerator(device)


def test_a_cluster_is_found_by_the_name_of_its_boxes():
    assert find_cluster("dgx-a100", nodes=8, gpus_per_node=8) == Cluster.of("A100-SXM-80GB", nodes=8)
    mixed = find_cluster("h100:2+A100-SXM-40GB:3", gpus_per_node=4)
    assert [node.accelerator.name for node in mixed.nodes] == ["H100-SXM-80GB"] * 2 + ["A100-SXM-40GB"] * 3
    assert find_cluster("h100", network_gbit_per_s=80).network.bandwidth_bytes_per_s == 1e10


@pytest.mark.parametrize("name", ["dgx-h100:2+dgx-a100:2", "h100:3", "dgx-h100:1"])
def test_a_number_of_nodes_that_the_name_has_already_is_refused(name):
    with pytest.raises(
        ConfigError, match=f"{re.escape(name)} has its own numbers of nodes, and --nodes 4 was given too"
    ):
        find_cluster(name, nodes=4)
    assert find_cluster("dgx-h100:2+dgx-a100", nodes=4).num_devices == 48


@pytest.mark.parametrize("option", ["nodes", "gpus_per_node", "network_gbit_per_s"])
def test_numbers_beside_a_stored_cluster_are_refused(tmp_path, option):
    save_cluster(Cluster.of("H100-SXM-80GB"), tmp_path / "cluster.json")
    with pytest.raises(ConfigError, match=f"--{option.replace('_', '-')} 4 was given too; leave it out"):
        find_cluster(str(tmp_path / "cluster.json"), **{option: 4})


def test_a_stored_cluster_comes_back_as_it_was(tmp_path):
    cluster = Cluster(Cluster.of("H100-SXM-80GB", nodes=2).nodes, LinkClass(1e-5, 1e10), LinkClass(2e-6, 3e11), 16)
    save_cluster(cluster, tmp_path / "cluster.json")
    assert load_cluster(tmp_path / "cluster.json") == cluster
    assert find_cluster(str(tmp_path / "cluster.json")) == cluster


def without(*path):
    values = json.loads(json.dumps(cluster_to_dict(Cluster.of("H100-SXM-80GB", nodes=2))))
    place = values
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return values


@pytest.mark.parametrize(
    ("path", "word"),
    [
        (("network",), "lacks 'network'"),
        (("network", "alpha_s"), "alpha_s"),
        (("accelerators", 0, "scale_up"), "lacks 'scale_up'"),
        (("nodes", 0, "gpus"), "lacks 'gpus'"),
        (("schema",), "schema"),
        (("accelerators", 0, "peak_flops"), "lacks 'peak_flops'"),
    ],
)
def test_a_cluster_file_without_a_link_or_a_number_names_it(path, word):
    with pytest.raises(ConfigError, match=word):
        cluster_from_dict(without(*path))


def test_a_device_without_a_peak_is_refused():
    values = cluster_to_dict(Cluster.of("H100-SXM-80GB"))
    values["accelerators"][0]["peak_flops"] = {"fp32": 1e12}
    with pytest.raises(ConfigError, match="has no peak_flops for bf16 or fp16"):
        cluster_from_dict(values)


def test_files_that_are_no_clusters_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="write it with deepseek plan measure"):
        load_cluster(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        load_cluster(tmp_path / "broken.json")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("dgx-h10", "did you mean 'dgx-h100'"),
        ("h100:two", "does not say how many nodes"),
        ("X-9000", "unknown accelerator"),
    ],
)
def test_an_unknown_cluster_names_the_nearest(name, sentence):
    with pytest.raises(ConfigError, match=sentence):
        find_cluster(name)


def test_a_model_is_found_by_name_file_and_folder(tmp_path):
    config = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
              "intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 32}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert find_model(str(tmp_path)) == find_model(str(tmp_path / "config.json"))
    assert find_model(str(tmp_path), sequence=16).sequence == 16
    assert find_model("llama3-8b") == get_model_shape("Llama3-8B")
    with pytest.raises(ConfigError, match="did you mean 'Llama3-8B'"):
        find_model("Llama3-9B")


def test_folders_without_a_model_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"neither manifest\.json nor config\.json"):
        find_model(str(tmp_path))
    (tmp_path / "config.json").write_text("not json")
    with pytest.raises(ConfigError, match="is not JSON"):
        find_model(str(tmp_path))


def test_our_own_configuration_is_read():
    ours = {"vocab_size": 100, "num_layers": 2, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_size": None,
            "ffn_size": 96, "max_length": 32, "feedforward": "gelu", "position": "learned", "tie_embeddings": True,
            "moe": None}  # fmt: skip
    shape = read_config(ours)
    assert (shape.kv_heads, shape.ffn, shape.gated, shape.learned_positions, shape.tied_embeddings) == (
        2,
        96,
        False,
        True,
        True,
    )


def test_the_capacity_of_our_experts_is_read():
    config = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "ffn_size": 128, "vocab_size": 100, "max_length": 32}
    experts = {"num_experts": 4, "top_k": 2, "ffn_size": 32}
    assert read_config({**config, "moe": {**experts, "capacity_factor": 1.25}}).capacity_factor == 1.25
    assert read_config({**config, "moe": {**experts, "capacity_factor": None}}).capacity_factor == 1.0
    assert read_config({**config, "moe": experts}).capacity_factor == 1.0
