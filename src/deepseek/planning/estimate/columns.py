"""Many predictions at once: every size of model, cluster and plan as an array with one entry per case.

The formulas of `compute`, `communication`, `memory` and `step` are written once, on these columns: a single prediction
is a table of one row, the search a table of 10**5 rows over one model, the fit a table of all published runs. Arrays
broadcast, so a column that is the same for all cases has length 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray

from deepseek.core.errors import ConfigError
from deepseek.core.names import explain_unknown
from deepseek.distributed.plan import RECOMPUTATIONS, SCHEDULES, Plan
from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.machines.constants import NAMES, Constants
from deepseek.planning.machines.software import ATTENTIONS, MODERN, Software
from deepseek.planning.models.model_shape import ModelShape, OperatorList

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]

_TOPOLOGIES = ("switch", "pairs", "mesh")
# Words are stored as their index in the list of choices; these are the ones that formulas ask for.
SELECTIVE, FULL = (float(RECOMPUTATIONS.index(word)) for word in ("selective", "full"))
GPIPE, INTERLEAVED, ZERO_BUBBLE = (float(SCHEDULES.index(word)) for word in ("gpipe", "interleaved", "zero_bubble"))
UNFUSED, FLASH, FLASH_3 = (float(ATTENTIONS.index(word)) for word in ("unfused", "flash", "flash3"))
SWITCH, PAIRS, MESH = (float(_TOPOLOGIES.index(word)) for word in ("switch", "pairs", "mesh"))

# Bytes of one element of a matrix operand as it is read by the matrix units.
OPERAND_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "fp8": 1.0, "mxfp8": 1.0, "fp4": 0.5}

# Achievable share of the 16 bit peak on the devices that a family's constants were fitted on: another device of the
# family whose own share is known differs by the ratio.
_USUAL_ACHIEVABLE = {"ampere": 0.869, "hopper": 0.803, "blackwell": 0.775, "cdna": 0.803, "other": 0.869, "ada": 0.869}
_SWITCH_REDUCTION = frozenset({"hopper", "blackwell"})  # NVSwitch 3 and later add up inside the switch
_ASYNCHRONOUS_MATMUL = frozenset({"hopper", "blackwell"})  # what FlashAttention 3 builds on


class _ModelColumns:
    """Sizes of a decoder, as `ModelShape` has them."""

    layers: Array
    hidden: Array
    heads: Array
    kv_heads: Array
    head_dim: Array
    ffn: Array
    gated: Array
    vocabulary: Array
    sequence: Array
    experts: Array
    top_k: Array
    expert_ffn: Array
    shared_experts: Array
    moe_layers: Array
    tied_embeddings: Array
    is_latent: Array
    q_lora_rank: Array
    kv_lora_rank: Array
    qk_nope_dim: Array
    qk_rope_dim: Array
    v_head_dim: Array
    mtp_layers: Array
    attention_parameters: Array
    dense_mlp_parameters: Array
    expert_parameters: Array
    embedding_parameters: Array
    capacity_factor: Array
    frozen_weights: Array
    extra_parameters: Array


class _PlanColumns:
    """Numbers of a `Plan`; the search varies these."""

    tp: Array
    pp: Array
    dp: Array
    ep: Array
    cp: Array
    etp: Array
    zero_stage: Array
    micro_batch_size: Array
    virtual_stages: Array
    sequence_parallel: Array
    shard_group: Array


class _SoftwareColumns:
    """Traits of a program, as `Software` has them."""

    is_compiled: Array
    overlaps_gradients: Array
    overlaps_tensors: Array
    overlaps_experts: Array
    overlaps_input_gradients: Array
    splits_messages: Array
    fuses_accumulation: Array
    fuses_elementwise: Array
    has_fp32_gradients: Array
    stops_recomputing: Array
    regathers_inputs: Array
    logit_bytes: Array
    offloads_optimizer: Array
    gathers_layers: Array
    counts_tokens: Array
    balances_stages: Array
    selects_attention: Array
    sends_tokens_once: Array
    narrows_shards: Array
    records_layers: Array
    fuses_experts: Array


class _ConstantColumns:
    """The shares of a datasheet that are reached, as `Constants` says."""

    matmul_fraction: Array
    narrow_fraction: Array
    matmul_fill_depth: Array
    attention_fraction: Array
    memory_fraction: Array
    launch_s: Array
    scale_up_fraction: Array
    network_fraction: Array
    collective_s: Array
    exposed_fraction: Array
    communicator_bytes: Array
    fragmentation_fraction: Array


MODEL_COLUMNS = tuple(_ModelColumns.__annotations__)
PLAN_COLUMNS = tuple(_PlanColumns.__annotations__)
SOFTWARE_COLUMNS = tuple(_SoftwareColumns.__annotations__)


class Columns(_ModelColumns, _PlanColumns, _SoftwareColumns, _ConstantColumns):
    """A table whose columns are attributes; a table of a traced network lacks those of a decoder."""

    recomputation: Array
    schedule: Array
    attention: Array
    operand_bytes: Array
    global_batch: Array
    num_parameters: Array  # of a traced network only
    gpus_per_node: Array
    num_devices: Array
    num_nodes: Array
    num_cores: Array
    scale_up_size: Array
    peak_flops: Array
    peak_flops_16: Array
    processors: Array
    topology: Array
    has_switch_reduction: Array
    has_asynchronous_matmul: Array
    is_host: Array
    memory_bandwidth: Array
    device_memory_bytes: Array
    scale_up_alpha_s: Array
    scale_up_bandwidth: Array
    network_alpha_s: Array
    network_bandwidth: Array

    def __init__(self, values: Mapping[str, Array]) -> None:
        assert set(values) <= _KNOWN_COLUMNS, f"unknown columns {set(values) - _KNOWN_COLUMNS}"
        self.__dict__.update(values)

    def with_columns(self, **values: Array) -> Self:
        """Return the same table with some columns added or replaced."""
        return type(self)({**self.__dict__, **values})

    def take(self, rows: NDArray[np.intp] | NDArray[np.bool_] | slice) -> Self:
        """Return some of the rows; columns of length 1 stay as they are."""
        return type(self)({name: value if len(value) == 1 else value[rows] for name, value in self.__dict__.items()})


_KNOWN_COLUMNS = frozenset(name for kind in Columns.__mro__ for name in getattr(kind, "__annotations__", {}))


def describe_model(model: ModelShape) -> dict[str, float]:
    """Describe the sizes of a model, by column."""
    return {name: float(getattr(model, name)) for name in MODEL_COLUMNS}


def describe_plan(plan: Plan) -> dict[str, float]:
    """Describe the numbers of a plan, by column; words become their index in the list of choices."""
    values = {name: float(getattr(plan, name)) for name in PLAN_COLUMNS}
    values["recomputation"] = float(RECOMPUTATIONS.index(plan.recomputation))
    values["schedule"] = float(SCHEDULES.index(plan.schedule))
    values["operand_bytes"] = OPERAND_BYTES[plan.precision]
    return values


def describe_software(software: Software) -> dict[str, float]:
    """Describe the traits of a program, by column; the attention kernel becomes its index in the list of choices."""
    values = {name: float(getattr(software, name)) for name in SOFTWARE_COLUMNS}
    return {**values, "attention": float(ATTENTIONS.index(software.attention))}


def describe_cluster(cluster: Cluster, precision: str) -> dict[str, float]:
    """Describe speeds of the slowest device and of the links of a cluster, by column."""
    slowest = min((node.accelerator for node in cluster.nodes), key=lambda device: device.get_peak_flops(precision))
    usual = _USUAL_ACHIEVABLE.get(slowest.family, 1.0)
    share = 1.0 if slowest.achievable_fraction is None else slowest.achievable_fraction / usual
    return {
        "gpus_per_node": float(cluster.gpus_per_node),
        "num_devices": float(cluster.num_devices),
        "num_nodes": float(len(cluster.nodes)),
        "num_cores": float(cluster.num_cores or cluster.num_devices),
        "scale_up_size": float(cluster.scale_up_size),
        "peak_flops": share * slowest.get_peak_flops(precision),
        "peak_flops_16": share * slowest.get_peak_flops("bf16"),
        "processors": float(slowest.processors),
        "topology": float(_TOPOLOGIES.index(slowest.topology) if cluster.gpus_per_node <= 8 else 0),
        "has_switch_reduction": float(slowest.family in _SWITCH_REDUCTION),
        "has_asynchronous_matmul": float(slowest.family in _ASYNCHRONOUS_MATMUL),
        "is_host": float(slowest.is_host),
        "memory_bandwidth": slowest.memory_bandwidth_bytes_per_s,
        "device_memory_bytes": min(node.accelerator.memory_bytes for node in cluster.nodes),
        "scale_up_alpha_s": cluster.scale_up.alpha_s,
        "scale_up_bandwidth": cluster.scale_up.bandwidth_bytes_per_s,
        "network_alpha_s": cluster.network.alpha_s,
        "network_bandwidth": cluster.network.bandwidth_bytes_per_s,
    }


def describe_constants(constants: Constants) -> dict[str, float]:
    """Describe the constants of one device or family, by column."""
    return {name: getattr(constants, name) for name in NAMES}


def describe_case(
    model: ModelShape, cluster: Cluster, plan: Plan, global_batch: int, software: Software = MODERN
) -> dict[str, float]:
    """Describe everything one prediction needs, by column."""
    return {
        **describe_model(model),
        **describe_cluster(cluster, plan.precision),
        **describe_constants(cluster.nodes[0].accelerator.constants),
        **describe_plan(plan),
        **describe_software(software),
        "global_batch": float(global_batch),
    }


def describe_operators(
    model: OperatorList, cluster: Cluster, plan: Plan, global_batch: int, software: Software = MODERN
) -> dict[str, float]:
    """Describe everything one prediction of a traced list needs, by column; its sizes stay in the list."""
    return {
        **describe_cluster(cluster, plan.precision),
        **describe_constants(cluster.nodes[0].accelerator.constants),
        **describe_plan(plan),
        **describe_software(software),
        "num_parameters": float(model.num_parameters),
        "global_batch": float(global_batch),
    }


def spread_plans(
    model: ModelShape,
    cluster: Cluster,
    plan: Plan,
    global_batch: int,
    varied: Mapping[str, Array],
    software: Software = MODERN,
) -> Columns:
    """Build a table over one model and cluster: `plan` but for the `varied` columns (one entry per candidate).

    Columns that do not vary have length 1, so a million candidates cost what their differences cost.

    >>> from deepseek.planning.machines.cluster import Cluster
    >>> from deepseek.planning.models.model_shape import get_model_shape
    >>> sizes = {"tp": np.array([1.0, 2.0, 4.0]), "dp": np.array([8.0, 4.0, 2.0])}
    >>> spread_plans(get_model_shape("Llama3-8B"), Cluster.of("H100-SXM-80GB"), Plan(), 64, sizes).tp
    array([1., 2., 4.])
    """
    unknown = set(varied) - set(PLAN_COLUMNS) - {"recomputation", "schedule"}
    if unknown:
        raise ConfigError(explain_unknown("plan column", min(unknown), (*PLAN_COLUMNS, "recomputation", "schedule")))
    return stack_cases([describe_case(model, cluster, plan, global_batch, software)]).with_columns(**varied)


def stack_cases(cases: Sequence[Mapping[str, float]]) -> Columns:
    """Build a table with one row per case."""
    names = cases[0].keys()
    return Columns({name: np.array([case[name] for case in cases], dtype=np.float64) for name in names})
