"""Many predictions at once: every size of model, cluster and plan as an array with one entry per case.

The formulas of `cost`, `collectives_cost`, `memory` and `predict` are written once, on these columns: a single
prediction is a table of one row, the search a table of 10**5 rows over one model, the fit a table of all published
runs. Arrays broadcast, so a column that is the same for all cases has length 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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

MODEL_COLUMNS = (
    "layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "gated", "vocabulary", "sequence", "experts", "top_k",
    "expert_ffn", "shared_experts", "moe_layers", "tied_embeddings", "is_latent", "q_lora_rank", "kv_lora_rank",
    "qk_nope_dim", "qk_rope_dim", "v_head_dim", "mtp_layers", "attention_parameters", "dense_mlp_parameters",
    "expert_parameters", "embedding_parameters", "capacity_factor", "frozen_weights",
)  # fmt: skip
PLAN_COLUMNS = (
    "tp", "pp", "dp", "ep", "cp", "etp", "zero_stage", "micro_batch_size", "virtual_stages", "sequence_parallel",
    "shard_group",
)  # fmt: skip
SOFTWARE_COLUMNS = (
    "is_compiled", "overlaps_gradients", "overlaps_tensors", "overlaps_experts", "overlaps_input_gradients",
    "splits_messages", "fuses_accumulation", "fuses_elementwise", "has_fp32_gradients", "stops_recomputing",
    "regathers_inputs", "logit_bytes", "offloads_optimizer", "gathers_layers", "counts_tokens",
    "balances_stages", "selects_attention", "sends_tokens_once", "narrows_shards", "records_layers", "fuses_experts",
)  # fmt: skip
# Bytes of one element of a matrix operand as it is read by the matrix units.
OPERAND_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "fp8": 1.0, "mxfp8": 1.0, "fp4": 0.5}

# Achievable share of the 16 bit peak on the devices that a family's constants were fitted on: another device of the
# family whose own share is known differs by the ratio.
_USUAL_ACHIEVABLE = {"ampere": 0.869, "hopper": 0.803, "blackwell": 0.775, "cdna": 0.803, "other": 0.869, "ada": 0.869}
_TOPOLOGIES = ("switch", "pairs", "mesh")
_SWITCH_REDUCTION = frozenset({"hopper", "blackwell"})  # NVSwitch 3 and later add up inside the switch
_ASYNCHRONOUS_MATMUL = frozenset({"hopper", "blackwell"})  # what FlashAttention 3 builds on


class Columns:
    """Named arrays, read as attributes."""

    def __init__(self, values: Mapping[str, Array]) -> None:
        self._values = dict(values)

    def __getattr__(self, name: str) -> Array:
        """The column called `name`."""
        try:
            return self.__dict__["_values"][name]  # type: ignore[no-any-return]
        except KeyError:
            raise AttributeError(f"no column {name!r}") from None

    def with_columns(self, **values: Array) -> Columns:
        """The same table with some columns added or replaced."""
        return Columns({**self._values, **values})

    def take(self, rows: NDArray[np.intp] | NDArray[np.bool_] | slice) -> Columns:
        """Some of the rows; columns of length 1 stay as they are."""
        return Columns({name: value if len(value) == 1 else value[rows] for name, value in self._values.items()})


def describe_model(model: ModelShape) -> dict[str, float]:
    """The sizes of a model, by column."""
    return {name: float(getattr(model, name)) for name in MODEL_COLUMNS}


def describe_plan(plan: Plan) -> dict[str, float]:
    """The numbers of a plan, by column; words become their place in the list of choices."""
    values = {name: float(getattr(plan, name)) for name in PLAN_COLUMNS}
    values["recomputation"] = float(RECOMPUTATIONS.index(plan.recomputation))
    values["schedule"] = float(SCHEDULES.index(plan.schedule))
    values["operand_bytes"] = OPERAND_BYTES[plan.precision]
    return values


def describe_software(software: Software) -> dict[str, float]:
    """The traits of a program, by column; the attention kernel becomes its index in the list of choices."""
    values = {name: float(getattr(software, name)) for name in SOFTWARE_COLUMNS}
    return {**values, "attention": float(ATTENTIONS.index(software.attention))}


def describe_cluster(cluster: Cluster, precision: str) -> dict[str, float]:
    """Speeds of the slowest device and of the links of a cluster, by column."""
    slowest = min((node.accelerator for node in cluster.nodes), key=lambda each: each.get_peak_flops(precision))
    usual = _USUAL_ACHIEVABLE.get(slowest.family, 1.0)
    share = 1.0 if slowest.achievable_fraction is None else slowest.achievable_fraction / usual
    return {
        "gpus_per_node": float(cluster.gpus_per_node),
        "num_devices": float(cluster.num_devices),
        "num_nodes": float(len(cluster.nodes)),
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
    """The constants of one device or family, by column."""
    return {name: getattr(constants, name) for name in NAMES}


def describe_case(
    model: ModelShape, cluster: Cluster, plan: Plan, global_batch: int, software: Software = MODERN
) -> dict[str, float]:
    """Everything one prediction needs, by column."""
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
    """Everything one prediction of a traced list needs, by column; its sizes stay in the list."""
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
    """A table over one model and cluster: `plan` everywhere, but for the `varied` columns (one entry per candidate).

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
    """A table with one row per case."""
    names = cases[0].keys()
    return Columns({name: np.array([case[name] for case in cases], dtype=np.float64) for name in names})
