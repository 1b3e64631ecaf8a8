"""Seconds and bytes of one training step under a plan, before anything runs.

`predict` prices one plan; `predict_columns` prices a whole table of them with the same formulas, fast enough for a search
(`columns.py` says how). A step is

    m micro-batches on the busiest stage  +  the pipeline's fill and drain  +  what data parallelism could not hide
    +  the optimizer

where a stage is its layers (operators by shape, `cost.py`), its embedding or head, and the messages between ranks
(`collectives_cost.py`) that overlap leaves exposed. The closed form of the schedules equals the event by event
simulation of `simulate.py` for even stages (tested); `predict(..., is_timeline=True)` runs the simulation too and
returns its events for drawing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from deepseek.distributed import collectives_cost as collectives
from deepseek.distributed import cost
from deepseek.distributed.cluster import Cluster
from deepseek.distributed.columns import Array, Columns, describe_case, stack_cases
from deepseek.distributed.memory import measure_memory
from deepseek.distributed.model_shape import ModelShape
from deepseek.distributed.plan import Plan, validate

_NONE, _SELECTIVE, _FULL = 0.0, 1.0, 2.0  # places in plan.RECOMPUTATIONS
_SELECTED_MATMULS = 0.25  # of the products, where elementwise results and every other product are recomputed
_TENSORS_PER_LAYER = 12.0  # weights and biases of a decoder layer with biases
_ZERO_BUBBLE = 3.0  # place in plan.SCHEDULES
TIME_ITEMS = (
    "matmul", "attention", "memory_bound", "recomputation", "head", "launch_wait", "tensor_parallel", "context_parallel",
    "expert_parallel", "sharded_weights", "pipeline_messages", "pipeline_bubble", "data_parallel", "optimizer",
)  # fmt: skip


@dataclass(frozen=True)
class Prediction:
    """One step: seconds and worst-rank bytes, whole and by item."""

    step_time_s: float
    time_items_s: dict[str, float]
    memory_bytes: float
    memory_items_bytes: dict[str, float]
    is_out_of_memory: bool
    timeline: tuple[object, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class StageTime:
    """Forward and backward seconds of a stage for one micro-batch: the busiest stage, and the sum over all stages."""

    busiest_forward_s: Array
    busiest_backward_s: Array
    all_s: Array
    weight_gradient_s: Array


def _exposed(c: Columns, communication_s: Array, computation_s: Array) -> Array:
    """What is left of communication that runs beside computation."""
    hidden = np.minimum(communication_s, computation_s)
    return communication_s - hidden + c.exposed_fraction * hidden


def _time_tensor_parallel(c: Columns) -> Array:
    """Both exchanges of one layer's forward pass."""
    num_bytes = 2.0 * cost.count_tokens(c) * c.hidden
    group = collectives.place_group(c, c.tp, np.ones_like(c.tp))
    one = np.where(
        c.sequence_parallel > 0,
        2 * collectives.scatter_reduce_s(c, num_bytes, group),
        collectives.all_reduce_s(c, num_bytes, group),
    )
    exposed = np.where(c.overlaps_tensors > 0, c.exposed_fraction, 1.0)
    moe_share = c.moe_layers / c.layers
    return one * exposed * (2.0 - moe_share * (c.etp < c.tp))


def _time_context_parallel(c: Columns) -> Array:
    """Keys and values of one layer's forward pass from all context ranks, beside the attention."""
    keys = np.where(c.is_latent > 0, c.kv_lora_rank + c.qk_rope_dim, 2.0 * c.kv_heads * c.head_dim / c.tp)
    group = collectives.place_group(c, c.cp, c.tp)
    return collectives.scatter_reduce_s(c, 2.0 * c.micro_batch_size * c.sequence * keys, group)


def _time_expert_parallel(c: Columns) -> Array:
    """Sending tokens to their experts and back, one layer's forward pass."""
    tokens = cost.count_tokens(c) * c.etp / c.tp
    group = collectives.place_group(c, c.ep, c.etp)
    num_bytes = 2.0 * tokens * c.hidden * np.maximum(c.top_k, 1.0)
    domains = group.spread
    reached = domains * (1.0 - (1.0 - 1.0 / domains) ** np.maximum(c.top_k, 1.0)) * (1.0 - 1.0 / domains)
    remote = np.where(domains > 1, 2.0 * tokens * c.hidden * reached, 0.0)
    return 2 * collectives.all_to_all_s(c, num_bytes, group, remote) * c.moe_layers / c.layers


def _time_sharded_weights(c: Columns) -> tuple[Array, Array]:
    """Gathering one layer's weights, and scattering its gradients, under ZeRO 3.

    Tensor by tensor, what arrives is copied out of the receiving buffer with one kernel per rank.
    """
    shared, experts = cost.count_rank_parameters(c)
    layers = np.ceil(c.layers / c.pp)
    ranks = np.where(c.shard_group > 0, c.shard_group, c.dp * c.cp)
    group = collectives.place_group(c, ranks, c.tp)
    pieces = np.where(c.gathers_layers > 0, 1.0, _TENSORS_PER_LAYER)
    weights = (shared + experts) / (layers * pieces)
    gradient = np.where(c.has_fp32_gradients > 0, 4.0, 2.0)
    copies = np.where(c.gathers_layers > 0, 0.0, ranks * cost.KERNEL_S)
    gather = pieces * (collectives.scatter_reduce_s(c, 2.0 * weights, group) + copies)
    scatter = pieces * collectives.scatter_reduce_s(c, gradient * weights, group)
    is_sharded = c.zero_stage == 3
    return np.where(is_sharded, gather, 0.0), np.where(is_sharded, scatter, 0.0)


def _time_data_parallel(c: Columns) -> Array:
    """Gradients (and weights under ZeRO 1 and 2) once per step, before overlap."""
    shared, experts = cost.count_rank_parameters(c)
    gradient = np.where(c.has_fp32_gradients > 0, 4.0, 2.0)
    group = collectives.place_group(c, c.dp * c.cp, c.tp)
    expert_dp = np.maximum(c.tp * c.cp * c.dp / (c.ep * c.etp), 1.0)
    expert_group = collectives.place_group(c, expert_dp, c.ep * c.etp)
    reduce = collectives.all_reduce_s(c, gradient * shared, group)
    reduce = reduce + collectives.all_reduce_s(c, gradient * experts, expert_group)
    pieces = np.where(c.gathers_layers > 0, 1.0, _TENSORS_PER_LAYER * np.ceil(c.layers / c.pp))
    split = collectives.scatter_reduce_s(c, gradient * shared / pieces, group)
    split = pieces * (split + collectives.scatter_reduce_s(c, 2.0 * shared / pieces, group))
    split = split + collectives.scatter_reduce_s(c, gradient * experts, expert_group)
    split = split + collectives.scatter_reduce_s(c, 2.0 * experts, expert_group)
    seconds = np.where(c.zero_stage == 0, reduce, np.where(c.zero_stage < 3, split, 0.0))
    hybrid = (c.zero_stage == 3) & (c.shard_group > 0) & (c.shard_group < c.dp)
    copies = collectives.place_group(c, np.where(hybrid, c.dp / np.maximum(c.shard_group, 1), 1.0), c.tp * np.maximum(c.shard_group, 1))
    across = collectives.all_reduce_s(c, gradient * shared / np.maximum(c.shard_group, 1), copies)
    return np.where(c.frozen_weights > 0, 0.0, np.where(hybrid, across, seconds))


def predict_times(c: Columns) -> dict[str, Array]:
    """Seconds of one step by item, for every row; their sum is the step time."""
    layer = cost.time_layer(c)
    micro_batches = np.maximum(c.global_batch / (c.dp * c.micro_batch_size), 1.0)
    accumulate = cost.time_accumulation(c) / np.ceil(c.layers / c.pp)
    tp, cp, ep = _time_tensor_parallel(c), _time_context_parallel(c), _time_expert_parallel(c)
    spared = np.where(c.stops_recomputing > 0, layer.last_matmul_s, 0.0)
    again = np.where(c.recomputation == _FULL, layer.forward_s - spared, 0.0)
    light = np.where(c.attention == 0, layer.attention_s, layer.memory_s + _SELECTED_MATMULS * layer.matmul_s)
    again = np.where(c.recomputation == _SELECTIVE, light, again)
    is_full = np.where(c.recomputation == _FULL, 1.0, 0.0)
    cp_forward = _exposed(c, cp, layer.attention_s)
    cp_backward = _exposed(c, 2 * cp, layer.attention_backward_s) + is_full * cp_forward
    gather, scatter = _time_sharded_weights(c)
    forward = layer.forward_s + tp + cp_forward + ep
    backward = layer.backward_s + accumulate + again + (1 + is_full) * (tp + ep) + cp_backward
    shard_forward = np.where(c.gathers_layers > 0, _exposed(c, gather, forward), gather)
    waited = gather * (1 + is_full) + scatter
    shard_backward = np.where(c.gathers_layers > 0, _exposed(c, gather + scatter, backward), waited)
    host_forward = np.where(c.is_compiled > 0, 0.3, 1.0) * layer.kernels * c.launch_s
    wait_forward = np.maximum(host_forward - forward - shard_forward, 0.0)
    wait_backward = np.maximum((1 + is_full) * host_forward - backward - shard_backward, 0.0)
    per_layer = {
        "matmul": layer.matmul_s + layer.matmul_backward_s,
        "attention": layer.attention_s + layer.attention_backward_s,
        "memory_bound": layer.memory_s + layer.memory_backward_s + accumulate,
        "recomputation": again,
        "launch_wait": wait_forward + wait_backward,
        "tensor_parallel": (2 + is_full) * tp,
        "context_parallel": cp_forward + cp_backward,
        "expert_parallel": (2 + is_full) * ep,
        "sharded_weights": shard_forward + shard_backward,
    }
    slots = np.ceil(c.layers / (c.pp * c.virtual_stages)) * c.virtual_stages
    missing = slots * c.pp - c.layers
    in_last = np.maximum(slots - np.ceil(missing / 2), 0.0)
    head_forward, head_backward = cost.time_head(c)
    embed_forward, embed_backward = cost.time_embedding(c)
    head = head_forward + head_backward + (embed_forward + embed_backward) * (c.pp == 1)
    layer_s = sum(per_layer.values())
    message = _time_pipeline_message(c)
    middle = slots * layer_s
    last = in_last * layer_s + head
    is_last = last > middle
    layers_on_busiest = np.where((c.pp == 1) | is_last, in_last, slots)
    head_on_busiest = np.where((c.pp == 1) | is_last, head, 0.0)
    share = (c.layers * layer_s + head) / c.pp
    even = np.maximum(np.ceil(share / layer_s - 1e-9), 1.0)
    is_balanced = (c.balances_stages > 0) & (c.pp > 1)
    layers_on_busiest = np.where(is_balanced, even, layers_on_busiest)
    head_on_busiest = np.where(is_balanced, 0.0, head_on_busiest)
    busiest = layers_on_busiest * layer_s + head_on_busiest + message
    everything = c.layers * layer_s + head + c.pp * message
    weight = slots * layer.weight_gradient_s
    bubble = (everything - busiest) / c.virtual_stages
    bubble = bubble - np.where(c.schedule == _ZERO_BUBBLE, np.minimum(2 * (c.pp - 1) * weight, bubble), 0.0)
    items = {name: micro_batches * layers_on_busiest * value for name, value in per_layer.items()}
    items["head"] = micro_batches * head_on_busiest
    items["pipeline_messages"] = micro_batches * message
    items["pipeline_bubble"] = bubble
    data = _time_data_parallel(c)
    beside = layers_on_busiest * backward
    items["data_parallel"] = np.where(c.overlaps_gradients > 0, _exposed(c, data, beside), data)
    items["optimizer"] = cost.time_optimizer(c)
    return items


def _time_pipeline_message(c: Columns) -> Array:
    """Passing one micro-batch on and its gradient back, as far as a stage waits for it."""
    num_bytes = 2.0 * cost.count_tokens(c) * c.hidden / np.where(c.splits_messages > 0, c.tp, 1.0)
    is_remote = c.tp * c.cp * c.dp >= c.scale_up_size
    one = collectives.send_s(c, num_bytes, is_remote)
    exposed = np.where(c.virtual_stages > 1, c.exposed_fraction, 1.0)
    return np.where(c.pp > 1, 2 * c.virtual_stages * one * exposed, 0.0)


def predict_columns(c: Columns) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Step seconds, worst-rank bytes and whether they fit, for every row."""
    seconds = np.sum(np.broadcast_arrays(*predict_times(c).values()), axis=0)
    needed = np.sum(np.broadcast_arrays(*measure_memory(c).values()), axis=0)
    return seconds, needed, needed > c.device_memory_bytes





def predict(model: ModelShape, cluster: Cluster, plan: Plan, global_batch: int, *, is_checked: bool = True) -> Prediction:
    """Time and memory of one step of `model` on `cluster` under `plan`, with `global_batch` sequences.

    Raises `ConfigError` where the plan cannot run; `is_checked=False` skips that, for published runs whose stages are
    uneven.

    >>> from deepseek.distributed.model_shape import get_model_shape
    >>> plan = Plan(tp=4, pp=2, dp=1, micro_batch_size=1, sequence_parallel=True)
    >>> predict(get_model_shape("Llama3-8B"), Cluster.of("H100-SXM-80GB"), plan, 8).is_out_of_memory
    False
    """
    if is_checked:
        validate(plan, model, cluster, global_batch)
    columns = stack_cases([describe_case(model, cluster, plan, global_batch)])
    times = {name: float(value[0]) for name, value in predict_times(columns).items()}
    memory = {name: float(value[0]) for name, value in measure_memory(columns).items()}
    needed = sum(memory.values())
    return Prediction(
        sum(times.values()), times, needed, memory, bool(needed > float(columns.device_memory_bytes[0]))
    )
