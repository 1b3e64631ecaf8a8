"""Strategies as users and Kubernetes resources write them, resolved into plans.

    {"type": "AutoParallel"}                                             everything is searched
    {"type": "HybridParallel", "tensorParallel": 4, "pipelineParallel": 4}   what is said stays, the rest is searched
    {"model_parallel": {"tensor_parallel_size": 4, "pipeline_parallel_size": 2}, "device_map": {"gpu0": [0, 1]}}

The first two are `spec.strategy` of InferenceJob and TrainingJob, the third is the configuration of generation 3.x,
whose device map says which devices the plan covers. All three come out as a `Plan` that fits the model and the
cluster.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from deepseek.core.device_map import read_device_groups
from deepseek.core.errors import ConfigError
from deepseek.core.names import explain_unknown
from deepseek.distributed.plan import Plan
from deepseek.planning.machines.cluster import Cluster, Node
from deepseek.planning.models.model_shape import ModelShape, OperatorList
from deepseek.planning.search.planner import plan
from deepseek.planning.search.request import Limits, Space


@dataclass(frozen=True)
class AutoParallel:
    """Everything is chosen by the planner.

    >>> AutoParallel().space.tp
    ()
    """

    @property
    def space(self) -> Space:
        """The choices open to the search."""
        return Space()


@dataclass(frozen=True)
class HybridParallel:
    """Numbers that are said stay as they are (0: searched); the rest is chosen by the planner.

    >>> HybridParallel(tensor_parallel=4).space.tp
    (4,)
    """

    tensor_parallel: int = 0
    pipeline_parallel: int = 0
    data_parallel: int = 0
    expert_parallel: int = 0
    context_parallel: int = 0

    @property
    def space(self) -> Space:
        """The choices open to the search."""
        return Space(
            tp=_fix(self.tensor_parallel),
            pp=_fix(self.pipeline_parallel),
            dp=_fix(self.data_parallel),
            ep=_fix(self.expert_parallel),
            cp=_fix(self.context_parallel),
        )


def _fix(value: int) -> tuple[int, ...]:
    return (value,) if value else ()


# Key in a strategy -> field of `HybridParallel`.
_KEYS = {
    "tensorParallel": "tensor_parallel",
    "pipelineParallel": "pipeline_parallel",
    "dataParallel": "data_parallel",
    "expertParallel": "expert_parallel",
    "contextParallel": "context_parallel",
}
# Key in `model_parallel` of generation 3.x -> the same.
_SIZE_KEYS = {f"{field}_size": field for field in _KEYS.values()}
_TYPES = ("AutoParallel", "HybridParallel")


def read_strategy(strategy: Mapping[str, Any]) -> AutoParallel | HybridParallel:
    """Read a strategy or a 3.x configuration; unknown keys are refused with the nearest known one.

    >>> read_strategy({"type": "HybridParallel", "tensorParallel": 4, "pipelineParallel": 4}).pipeline_parallel
    4
    """
    if "model_parallel" in strategy:
        sizes = strategy["model_parallel"]
        if not isinstance(sizes, Mapping):
            raise ConfigError(
                f"model_parallel={sizes!r} is not a table; write tensor_parallel_size and pipeline_parallel_size"
            )
        _check_keys({key for key in strategy if key != "device_map"}, ("model_parallel",))
        return HybridParallel(**_read_sizes(sizes, _SIZE_KEYS))
    kind = strategy.get("type")
    if kind not in _TYPES:
        raise ConfigError(explain_unknown("strategy", str(kind), _TYPES))
    sizes = {key: value for key, value in strategy.items() if key != "type"}
    if kind == "AutoParallel":
        if sizes:
            raise ConfigError(f"AutoParallel chooses {', '.join(sizes)} itself; leave them out, or use HybridParallel")
        return AutoParallel()
    return HybridParallel(**_read_sizes(sizes, _KEYS))


def _read_sizes(sizes: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, int]:
    _check_keys(set(sizes), tuple(keys))
    for key, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{key}={value!r} is not a positive whole number; use 1 to switch it off")
    return {keys[key]: value for key, value in sizes.items()}


def _check_keys(given: set[str], known: tuple[str, ...]) -> None:
    for key in sorted(given - set(known)):
        raise ConfigError(explain_unknown("key of a strategy", key, known))


def resolve_strategy(
    strategy: Mapping[str, Any] | AutoParallel | HybridParallel,
    model: ModelShape | OperatorList,
    cluster: Cluster,
    *,
    global_batch: int,
    limits: Limits | None = None,
    space: Space | None = None,
) -> Plan:
    """Find the best plan of a strategy; raise `ConfigError` where none fits.

    `space` narrows what a strategy leaves open (precision, schedules, micro-batches).

    >>> from deepseek.planning.models.model_shape import get_model_shape
    >>> chosen = resolve_strategy({"type": "HybridParallel", "tensorParallel": 4, "pipelineParallel": 2},
    ...                           get_model_shape("Llama3-8B"), Cluster.of("A100-SXM-80GB"), global_batch=16)
    >>> chosen.tp, chosen.pp, chosen.dp
    (4, 2, 1)
    """
    devices = read_device_map(strategy.get("device_map")) if isinstance(strategy, Mapping) else ()
    value = read_strategy(strategy) if isinstance(strategy, Mapping) else strategy
    fixed = {name: getattr(value.space, name) for name in ("tp", "pp", "dp", "ep", "cp") if getattr(value.space, name)}
    chosen = replace(space or Space(), **fixed)
    _check_fixed(fixed, cluster if not devices else keep_devices(cluster, devices))
    reached = keep_devices(cluster, devices) if devices else cluster
    return plan(model, reached, global_batch=global_batch, limits=limits, space=chosen).best.plan


def _check_fixed(fixed: Mapping[str, tuple[int, ...]], cluster: Cluster) -> None:
    product = math.prod(fixed.get(name, (1,))[0] for name in ("tp", "pp", "dp", "cp"))
    if cluster.num_devices % product:
        said = " * ".join(f"{name}={value[0]}" for name, value in fixed.items() if name != "ep")
        raise ConfigError(f"{said} = {product} does not divide the {cluster.num_devices} devices; choose sizes that do")


def read_device_map(device_map: Mapping[str, Any] | None) -> tuple[int, ...]:
    """Read the devices that a device map names, once each, in ascending order.

    >>> read_device_map({"gpu0": [0, 1], "gpu1": [2, 3]})
    (0, 1, 2, 3)
    """
    if not device_map:
        return ()
    return tuple(sorted(device for group in read_device_groups(device_map) for device in group))


def keep_devices(cluster: Cluster, devices: tuple[int, ...]) -> Cluster:
    """Return the part of a cluster that holds `devices`, counted through its nodes."""
    if devices[-1] >= cluster.num_devices:
        raise ConfigError(
            f"device_map names device {devices[-1]} and the cluster has {cluster.num_devices}; count from 0"
        )
    nodes, first = [], 0
    for node in cluster.nodes:
        count = sum(first <= device < first + node.gpus for device in devices)
        nodes += [Node(node.accelerator, count)] if count else []
        first += node.gpus
    return replace(cluster, nodes=tuple(nodes))
