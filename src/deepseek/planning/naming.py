"""From what people write to values: clusters and models by name, by file, or as plain dictionaries.

`find_cluster` takes an accelerator of `hardware.csv`, the name of a box that is sold with it (`dgx-a100`), the label
that Kubernetes gives to its nodes (`nvidia-tesla-a100`), or a JSON file written by `save_cluster`, for instance after
measuring. `find_model` takes a shape of `model_shapes.csv`, a folder or file with a configuration, or the manifest of
an artifact. Both name the nearest known name when one is not known.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from deepseek.core.errors import ConfigError
from deepseek.core.model_folder import check_sizes, read_settings
from deepseek.core.names import explain_unknown
from deepseek.core.storage import write_file
from deepseek.distributed.topology import LinkClass
from deepseek.planning.machines.cluster import Accelerator, Cluster, Node, load_accelerators
from deepseek.planning.machines.constants import Constants
from deepseek.planning.models.families import FAMILIES
from deepseek.planning.models.model_shape import ModelShape, load_model_shapes, model_shape_from_config

_SCHEMA = "deepseek-cluster/1"
# A box or a node label -> its accelerator.
ALIASES: dict[str, str] = {
    "dgx-1": "V100-SXM-32GB",
    "dgx-2": "V100-SXM-32GB",
    "dgx-a100": "A100-SXM-80GB",
    "dgx-h100": "H100-SXM-80GB",
    "dgx-h200": "H200-SXM",
    "dgx-b200": "B200-SXM",
    "dgx-b300": "B300-SXM",
    "gb200-nvl72": "GB200",
    "gb300-nvl72": "GB300",
    "nvidia-tesla-v100": "V100-SXM-16GB",
    "nvidia-tesla-a100": "A100-SXM-40GB",
    "nvidia-a100-80gb": "A100-SXM-80GB",
    "nvidia-h100-80gb": "H100-SXM-80GB",
    "nvidia-h200-141gb": "H200-SXM",
    "nvidia-l4": "L4",
    "nvidia-tesla-t4": "T4",
    "v100": "V100-SXM-32GB",
    "a100": "A100-SXM-80GB",
    "h100": "H100-SXM-80GB",
    "h200": "H200-SXM",
    "b200": "B200-SXM",
}


# Names under which `load_model` knows the same model -> its row in model_shapes.csv.
MODEL_ALIASES: dict[str, str] = {
    "llama7b": "Llama2-7B",
    "llama8b": "Llama3-8B",
    "llama13b": "Llama2-13B",
    "llama70b": "Llama2-70B",
}


def find_accelerator(name: str) -> Accelerator:
    """Return the accelerator that `name` stands for, upper or lower case.

    >>> find_accelerator("dgx-a100").name
    'A100-SXM-80GB'
    """
    known = {known_name.lower(): known_name for known_name in load_accelerators()} | ALIASES
    if name.lower() not in known:
        raise ConfigError(explain_unknown("accelerator", name, {*load_accelerators(), *ALIASES}))
    return load_accelerators()[known[name.lower()]]


def find_cluster(
    name: str,
    *,
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    network_gbit_per_s: float | None = None,
) -> Cluster:
    """Return the cluster of `nodes` boxes that `name` stands for, or the one that a JSON file of that name holds.

    Several kinds are joined with `+`, each with its own number of nodes: `dgx-h100:2+dgx-a100:4`. Without numbers it is
    one node of eight devices. Raises `ConfigError` for a number that nothing in `name` leaves open.

    >>> find_cluster("dgx-h100:1+dgx-a100:2").num_devices
    24
    """
    if name.endswith(".json"):
        said = {"nodes": nodes, "gpus-per-node": gpus_per_node, "network-gbit-per-s": network_gbit_per_s}
        if given := next((option for option, value in said.items() if value is not None), None):
            raise ConfigError(
                f"{name} says what its cluster is, and --{given} {said[given]} was given too; leave it out"
            )
        return load_cluster(Path(name))
    parts = [_read_part(part) for part in name.split("+")]
    if nodes is not None and all(count is not None for _, count in parts):
        raise ConfigError(
            f"{name} has its own numbers of nodes, and --nodes {nodes} was given too; leave one of them out"
        )
    clusters = [
        Cluster.of(
            find_accelerator(kind),
            nodes=(1 if nodes is None else nodes) if count is None else count,
            gpus_per_node=8 if gpus_per_node is None else gpus_per_node,
            network_gbit_per_s=network_gbit_per_s,
        )
        for kind, count in parts
    ]
    joined = clusters[0]
    for cluster in clusters[1:]:
        joined = joined.join(cluster)
    return joined


def _read_part(part: str) -> tuple[str, int | None]:
    kind, _, count = part.partition(":")
    if count and not count.isdecimal():
        raise ConfigError(f"{part!r} does not say how many nodes; write for example dgx-a100:4")
    return kind, int(count) if count else None


def save_cluster(cluster: Cluster, path: Path, *, measured_on: Mapping[str, Any] | None = None) -> None:
    """Write a cluster as JSON, whole or not at all; `measured_on` says on which machine it was measured."""
    values = cluster_to_dict(cluster) | ({"measured_on": dict(measured_on)} if measured_on else {})
    write_file(path, (json.dumps(values, indent=2) + "\n").encode())


def load_cluster(path: Path) -> Cluster:
    """Read a cluster that `save_cluster` wrote, or that was written by hand in the same form."""
    return cluster_from_dict(_read_cluster_file(path))


def load_measured(path: Path, machine: Mapping[str, Any]) -> Cluster | str:
    """Load the cluster that was measured on this very `machine`, or say why the file does not hold one."""
    try:
        values = _read_cluster_file(path)
        cluster = cluster_from_dict(values)
    except ConfigError as error:
        return str(error)
    measured_on = values.get("measured_on") or {}
    if changed := [name for name in machine if measured_on.get(name) != machine[name]]:
        name = changed[0]
        return f"{path} was measured where {name} was {measured_on.get(name)!r}, which is {machine[name]!r} here"
    if any(device.shares is None for device in cluster.accelerators):
        return f"{path} lacks the shares that plans of this machine are estimated with"
    return cluster


def _read_cluster_file(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is not there; write it with deepseek plan measure --out {path}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not JSON ({error}); write it with deepseek plan measure") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no table of a cluster; write it with deepseek plan measure")
    return values


def cluster_to_dict(cluster: Cluster) -> dict[str, Any]:
    """Write a cluster as dictionaries and numbers."""
    kinds = {device.name: device for device in cluster.accelerators}
    return {
        "schema": _SCHEMA,
        "accelerators": [asdict(kind) for kind in kinds.values()],
        "nodes": [{"accelerator": node.accelerator.name, "gpus": node.gpus} for node in cluster.nodes],
        "network": asdict(cluster.network),
        "links": asdict(cluster.links) if cluster.links else None,
        "domain_size": cluster.domain_size,
        "num_cores": cluster.num_cores,
    }


def cluster_from_dict(values: Mapping[str, Any]) -> Cluster:
    """Read a cluster out of a dictionary as `cluster_to_dict` writes it; a missing link or number is named.

    >>> cluster = Cluster.of("H100-SXM-80GB", nodes=2)
    >>> cluster_from_dict(cluster_to_dict(cluster)) == cluster
    True
    """
    if values.get("schema") != _SCHEMA:
        raise ConfigError(f"a cluster file says schema {_SCHEMA!r}, this one {values.get('schema')!r}; measure again")
    try:
        kinds = {kind["name"]: _read_accelerator(kind) for kind in values["accelerators"]}
        nodes = tuple(Node(kinds[node["accelerator"]], node["gpus"]) for node in values["nodes"])
        network = LinkClass(**values["network"])
        links = LinkClass(**values["links"]) if values.get("links") else None
    except KeyError as error:
        raise ConfigError(
            f"the cluster file lacks {error.args[0]!r}; links need alpha_s and bandwidth_bytes_per_s, "
            "nodes an accelerator"
        ) from error
    except TypeError as error:
        raise ConfigError(
            f"the cluster file has a part of the wrong form ({error}); compare it with a measured one"
        ) from error
    return Cluster(nodes, network, links, values.get("domain_size", 0), values.get("num_cores", 0))


def _read_accelerator(values: Mapping[str, Any]) -> Accelerator:
    if not {"bf16", "fp16"} & values["peak_flops"].keys():
        raise ConfigError(f"{values['name']} has no peak_flops for bf16 or fp16; measure it, or write what it reaches")
    links = {name: LinkClass(**values[name]) for name in ("scale_up", "network")}
    shares = Constants(**values["shares"]) if values.get("shares") else None
    return Accelerator(**{**values, **links, "shares": shares})


def find_model(name: str, *, sequence: int | None = None) -> ModelShape:
    """Find the shape that `name` stands for: a known model, a `config.json`, or a folder with one or a manifest.

    >>> find_model("Llama3-8B", sequence=4096).sequence
    4096
    """
    if _is_path(name):
        return find_model_in(Path(name), sequence=sequence)
    row = _find_row(name)
    if row is None:
        raise ConfigError(explain_unknown("model", name, load_model_shapes()))
    shape = load_model_shapes()[row]
    return shape if sequence is None else shape.with_sequence(sequence)


def is_model(name: str) -> bool:
    """Return whether `find_model` knows the name, or looks for it on disk."""
    return _is_path(name) or _find_row(name) is not None


def _is_path(name: str) -> bool:
    return Path(name).is_dir() or name.endswith(".json")


def _find_row(name: str) -> str | None:
    """Find the row of `model_shapes.csv`; at Hugging Face an organization stands before the name."""
    known = {_simplify(known_name): known_name for known_name in load_model_shapes()} | MODEL_ALIASES
    return known.get(_simplify(name.rpartition("/")[2]))


def _simplify(name: str) -> str:
    """Write a name without case and separators, so that Llama-3-8B is Llama3-8B.

    >>> _simplify("Llama-3 8B")
    'llama38b'
    """
    return re.sub(r"[-_. ]", "", name.lower())


def find_model_in(path: Path, *, sequence: int | None = None) -> ModelShape:
    """Find the shape of the model in a folder (an artifact, or the Hugging Face layout), or in a configuration file."""
    if (path / "manifest.json").exists():
        from deepseek.artifact.reading import read_manifest

        return replace(read_config(read_manifest(path).architecture_config, sequence=sequence), name=path.name)
    file = path / "config.json" if path.is_dir() else path
    if not file.exists():
        raise ConfigError(f"{path} holds neither manifest.json nor config.json; give a model folder or a name")
    values = read_settings(file, error=ConfigError)
    check_sizes(values, str(file))
    shape = read_config(values, sequence=sequence)
    return shape if shape.name else replace(shape, name=path.stem)


# Key of our decoder's configuration -> the key that `model_shape_from_config` knows.
_OUR_KEYS = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "ffn_size": "intermediate_size",
    "max_length": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
}
_OUR_EXPERT_KEYS = {"num_experts": "num_experts", "top_k": "num_experts_per_tok", "ffn_size": "moe_intermediate_size"}


def read_config(config: Mapping[str, Any], *, sequence: int | None = None) -> ModelShape:
    """Read the shape of a decoder's configuration, in the Hugging Face layout or in ours.

    >>> read_config({"num_layers": 2, "hidden_size": 64, "num_heads": 4, "ffn_size": 128, "vocab_size": 100,
    ...              "max_length": 32, "moe": {"num_experts": 4, "top_k": 2, "ffn_size": 32}}).expert_ffn
    32
    """
    if config.get("model_type") and config["model_type"] not in FAMILIES:
        from deepseek.planning.models.built_families import read_by_building

        built = read_by_building(config, sequence=sequence)
        if built is not None:
            return built
    values = {_OUR_KEYS.get(key, key): value for key, value in config.items() if value is not None}
    if isinstance(moe := values.pop("moe", None), Mapping):
        values |= {_OUR_EXPERT_KEYS[key]: moe[key] for key in _OUR_EXPERT_KEYS}
        values["capacity_factor"] = moe.get("capacity_factor")
    if values.get("feedforward") == "gelu":
        values["gated"] = False
    if values.get("position") == "learned":
        values["learned_positions"] = True
    return model_shape_from_config(values, sequence=sequence)
