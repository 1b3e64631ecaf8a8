"""Seconds and bytes of one training step under a plan, before anything runs.

`predict` estimates one plan; `predict_columns` a whole table of them with the same formulas, fast enough for a
search (`columns.py` says how). A step is

    m micro-batches on the busiest stage  +  the pipeline's fill and drain  +  what data parallelism could not hide
    +  the optimizer

where a stage is its layers (operators by shape, `compute.py`), its embedding or head, and the messages between ranks
(`communication.py`) that overlap leaves exposed. The closed form of the schedules equals the event by event
simulation of `simulation.py` for even stages and for a busier last one (tested); `predict(..., has_timeline=True)` runs
the simulation too and returns its events for a picture.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from deepseek.distributed.plan import Plan
from deepseek.planning.estimate import communication as collectives
from deepseek.planning.estimate import compute
from deepseek.planning.estimate.columns import (
    FULL,
    SELECTIVE,
    UNFUSED,
    ZERO_BUBBLE,
    Array,
    Columns,
    describe_case,
    describe_operators,
    stack_cases,
)
from deepseek.planning.estimate.memory import measure_memory
from deepseek.planning.estimate.simulation import StageWork, Timeline, simulate
from deepseek.planning.feasibility import validate
from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.machines.software import MODERN, Software
from deepseek.planning.models.model_shape import ModelShape, OperatorList

_SELECTED_MATMULS = 0.25  # of the matmuls, where elementwise results and every other matmul are recomputed
_TENSORS_PER_LAYER = 12.0  # weights and biases of a decoder layer with biases
_COUNTING_WAIT = 0.6  # of a layer's launches cannot be issued before the host knows the experts' token counts
_COMPILED_LAUNCH = 0.3  # host time of a recorded or compiled kernel, relative to one issued from Python
_RECORDED_PARTS = 0.5  # the same where attention and router are replayed and experts issued one by one
TIME_ITEMS = (
    "matmul", "attention", "memory_bound", "recomputation", "launch_wait", "tensor_parallel", "context_parallel",
    "expert_parallel", "sharded_weights", "head", "pipeline_messages", "pipeline_bubble", "data_parallel", "optimizer",
)  # fmt: skip


@dataclass(frozen=True)
class Prediction:
    """One step: seconds and worst-rank bytes, whole and by item; `timeline` holds the pipeline's events on demand."""

    step_time_s: float
    time_items_s: dict[str, float]
    memory_bytes: float
    memory_items_bytes: dict[str, float]
    is_out_of_memory: bool
    timeline: Timeline | None = field(default=None, repr=False)


@dataclass(frozen=True)
class _Layer:
    """One average layer of a stage for one micro-batch: seconds by item, and by pass."""

    items: dict[str, Array]
    forward_s: Array
    backward_s: Array
    weight_gradient_s: Array

    @property
    def both_s(self) -> Array:
        """Forward and backward."""
        return np.asarray(sum(self.items.values()))


@dataclass(frozen=True)
class _Stages:
    """How layers and head are split: on the busiest stage, and altogether."""

    layers: Array
    head_s: Array
    all_head_s: Array
    message_s: Array


def _exposed(c: Columns, communication_s: Array, computation_s: Array) -> Array:
    """Return what is left of communication that runs beside computation."""
    hidden = np.minimum(communication_s, computation_s)
    return communication_s - hidden + c.exposed_fraction * hidden


def _time_tensor_parallel(c: Columns) -> Array:
    """Time both exchanges of one layer's forward pass."""
    num_bytes = compute.count_element_bytes(c) * compute.count_tokens(c) * c.hidden
    group = collectives.form_group(c, c.tp, np.ones_like(c.tp))
    one = np.where(
        c.sequence_parallel > 0,
        2 * collectives.scatter_reduce_s(c, num_bytes, group),
        collectives.all_reduce_s(c, num_bytes, group),
    )
    exposed = np.where(c.overlaps_tensors > 0, c.exposed_fraction, 1.0)
    moe_share = c.moe_layers / c.layers
    return one * exposed * (2.0 - moe_share * (c.etp < c.tp))


def _time_context_parallel(c: Columns) -> Array:
    """Time keys and values of one layer's forward pass from all context ranks."""
    keys = np.where(c.is_latent > 0, c.kv_lora_rank + c.qk_rope_dim, 2.0 * c.kv_heads * c.head_dim / c.tp)
    group = collectives.form_group(c, c.cp, c.tp)
    return collectives.scatter_reduce_s(
        c, compute.count_element_bytes(c) * c.micro_batch_size * c.sequence * keys, group
    )


def _time_expert_parallel(c: Columns) -> Array:
    """Time sending tokens to their experts and back, one layer's forward pass."""
    tokens = compute.count_tokens(c) * c.etp / c.tp
    group = collectives.form_group(c, c.ep, c.etp)
    one_copy, choices = compute.count_element_bytes(c) * tokens * c.hidden * c.capacity_factor, np.maximum(c.top_k, 1.0)
    devices = np.where(c.sends_tokens_once > 0, _count_reached(group.size, choices), choices)
    nodes = _count_reached(group.spread, choices) * (1.0 - 1.0 / group.spread)
    apart = choices * (group.size - group.inside) / group.size
    remote = one_copy * np.where(c.sends_tokens_once > 0, nodes, apart)
    exposed = np.where(c.overlaps_experts > 0, c.exposed_fraction, 1.0)
    return 2 * collectives.all_to_all_s(c, one_copy * devices, group, remote) * exposed * c.moe_layers / c.layers


def _count_reached(targets: Array, choices: Array) -> Array:
    """Count how many of some targets are chosen at least once."""
    return np.asarray(targets * (1.0 - (1.0 - 1.0 / targets) ** choices))


def _count_gradient_bytes(c: Columns) -> Array:
    return np.where(c.has_fp32_gradients > 0, 4.0, 2.0)


def _time_sharded_weights(c: Columns) -> tuple[Array, Array]:
    """Time gathering one layer's weights, and scattering its gradients, under ZeRO 3.

    Tensor by tensor, what arrives is copied out of the receiving buffer with one kernel per rank.
    """
    shared, experts = compute.count_rank_parameters(c)
    layers = np.ceil(c.layers / c.pp)
    ranks = np.where(c.shard_group > 0, c.shard_group, c.dp * c.cp)
    group = collectives.form_group(c, ranks, c.tp)
    pieces = np.where(c.gathers_layers > 0, 1.0, _TENSORS_PER_LAYER)
    weights = (shared + experts) / (layers * pieces)
    copies = np.where(c.gathers_layers > 0, 0.0, ranks * compute.KERNEL_S)
    gather = pieces * (collectives.scatter_reduce_s(c, compute.count_element_bytes(c) * weights, group) + copies)
    scatter = pieces * collectives.reduce_scatter_s(c, _count_gradient_bytes(c) * weights, group)
    is_sharded = c.zero_stage == 3
    return np.where(is_sharded, gather, 0.0), np.where(is_sharded, scatter, 0.0)


def _time_data_parallel(c: Columns) -> tuple[Array, Array]:
    """Time reducing gradients, and gathering weights under ZeRO 1 and 2, once per step, before overlap."""
    shared, experts = compute.count_rank_parameters(c)
    gradient = _count_gradient_bytes(c)
    group = collectives.form_group(c, c.dp * c.cp, c.tp)
    expert_dp = np.maximum(c.tp * c.cp * c.dp / (c.ep * c.etp), 1.0)
    expert_group = collectives.form_group(c, expert_dp, c.ep * c.etp)
    reduce = collectives.all_reduce_s(c, gradient * shared, group)
    reduce = reduce + collectives.all_reduce_s(c, gradient * experts, expert_group)
    pieces = np.where(c.gathers_layers > 0, 1.0, _TENSORS_PER_LAYER * np.ceil(c.layers / c.pp))
    scatter, gather = (
        pieces * exchange(c, element * shared / pieces, group) + exchange(c, element * experts, expert_group)
        for exchange, element in (
            (collectives.reduce_scatter_s, gradient),
            (collectives.scatter_reduce_s, compute.count_element_bytes(c)),
        )
    )
    back = np.where(c.zero_stage == 0, reduce, np.where(c.zero_stage < 3, scatter, _time_shard_copies(c, shared)))
    ahead = np.where((c.zero_stage == 1) | (c.zero_stage == 2), gather, 0.0)
    is_trained = c.frozen_weights == 0
    return back * is_trained, ahead * is_trained


def _time_tied_embedding(c: Columns) -> Array:
    """Time adding up the gradients of an embedding that the first and the last stage of a pipeline share."""
    spread = np.where(c.tp * c.cp * c.dp >= c.scale_up_size, 2.0, 1.0)
    pair = collectives.Group(np.full_like(spread, 2.0), spread)
    seconds = collectives.all_reduce_s(c, _count_gradient_bytes(c) * c.embedding_parameters / c.tp, pair)
    is_shared = (c.pp > 1) & (c.tied_embeddings > 0) & (c.frozen_weights == 0)
    return np.where(is_shared, seconds, 0.0)


def _time_shard_copies(c: Columns, shared: Array) -> Array:
    """Time reducing gradients across the copies of a shard group, where only some of the ranks share the weights."""
    group = np.maximum(c.shard_group, 1.0)
    is_hybrid = (c.shard_group > 0) & (c.shard_group < c.dp)
    copies = collectives.form_group(c, np.where(is_hybrid, c.dp / group, 1.0), c.tp * group)
    return np.where(is_hybrid, collectives.all_reduce_s(c, _count_gradient_bytes(c) * shared / group, copies), 0.0)


def _time_again(c: Columns, layer: compute.LayerTime) -> Array:
    """Time what one layer computes a second time before its backward pass."""
    spared = np.where(c.stops_recomputing > 0, layer.last_matmul_s, 0.0)
    is_of_attention = (c.attention == UNFUSED) | (c.selects_attention > 0)
    light = np.where(is_of_attention, layer.attention_s, layer.memory_s + _SELECTED_MATMULS * layer.matmul_s)
    again = np.where(c.recomputation == FULL, layer.forward_s - spared, 0.0)
    return np.where(c.recomputation == SELECTIVE, light, again)


def _time_stage_layer(c: Columns) -> _Layer:
    """Time one layer with its communication and the host's pace, for one micro-batch."""
    layer = compute.time_layer(c)
    accumulate = compute.time_accumulation(c) / np.ceil(c.layers / c.pp)
    again = _time_again(c, layer)
    tp, cp, ep = _time_tensor_parallel(c), _time_context_parallel(c), _time_expert_parallel(c)
    is_full = np.where(c.recomputation == FULL, 1.0, 0.0)
    cp_forward = _exposed(c, cp, layer.attention_s)
    cp_backward = _exposed(c, 2 * cp, layer.attention_backward_s) + is_full * cp_forward
    forward = layer.forward_s + tp + cp_forward + ep
    beside = _exposed(c, tp, layer.weight_gradient_s)
    tp_backward = is_full * tp + np.where(c.overlaps_input_gradients > 0, beside, tp)
    backward = layer.backward_s + accumulate + again + tp_backward + (1 + is_full) * ep + cp_backward
    shard_forward, shard_backward = _wait_for_shards(c, forward, backward, is_full)
    pace = np.where(c.is_compiled > 0, _COMPILED_LAUNCH, np.where(c.records_layers > 0, _RECORDED_PARTS, 1.0))
    host = pace * layer.kernels * c.launch_s
    behind = np.where((c.counts_tokens > 0) & (c.is_compiled == 0), _COUNTING_WAIT * c.moe_layers / c.layers, 0.0)
    wait_forward = np.maximum(host - forward - shard_forward, behind * host)
    wait_backward = np.maximum((1 + is_full) * host - backward - shard_backward, is_full * behind * host)
    wait_forward = np.where(c.is_host > 0, host, wait_forward)
    wait_backward = np.where(c.is_host > 0, (1 + is_full) * host, wait_backward)
    items = {
        "matmul": layer.matmul_s + layer.matmul_backward_s,
        "attention": layer.attention_s + layer.attention_backward_s,
        "memory_bound": layer.memory_s + layer.memory_backward_s + accumulate,
        "recomputation": again,
        "launch_wait": wait_forward + wait_backward,
        "tensor_parallel": tp + tp_backward,
        "context_parallel": cp_forward + cp_backward,
        "expert_parallel": (2 + is_full) * ep,
        "sharded_weights": shard_forward + shard_backward,
    }
    all_forward = forward + shard_forward + wait_forward
    all_backward = backward + shard_backward + wait_backward
    return _Layer(items, all_forward, all_backward, layer.weight_gradient_s)


def _wait_for_shards(c: Columns, forward: Array, backward: Array, is_full: Array) -> tuple[Array, Array]:
    """Return what ZeRO 3 adds to one layer's passes: prefetched beside the computation, or waited for."""
    gather, scatter = _time_sharded_weights(c)
    is_ahead = c.gathers_layers > 0
    return (
        np.where(is_ahead, _exposed(c, gather, forward), gather),
        np.where(is_ahead, _exposed(c, gather + scatter, backward), gather * (1 + is_full) + scatter),
    )


def _split_stages(c: Columns, layer_s: Array) -> _Stages:
    """Split layers and head over the stages, and return those of the busiest one.

    Where the depth does not divide, the first and last stages have fewer layers. The head is on the last stage, which
    is the busiest if the head costs more than the layers it lacks; programs that balance stages count it as layers.
    """
    head = sum(compute.time_head(c)) + sum(compute.time_embedding(c)) * (c.pp == 1)
    slots = np.ceil(c.layers / (c.pp * c.virtual_stages)) * c.virtual_stages
    in_last = np.maximum(slots - np.ceil((slots * c.pp - c.layers) / 2), 0.0)
    is_last = (c.pp == 1) | (in_last * layer_s + head > slots * layer_s)
    share = (c.layers * layer_s + head) / c.pp
    even = np.maximum(np.ceil(share / layer_s - 1e-9), 1.0)
    is_balanced = (c.balances_stages > 0) & (c.pp > 1)
    layers = np.where(is_balanced, even, np.where(is_last, in_last, slots))
    on_busiest = np.where(is_last & ~is_balanced, head, 0.0)
    return _Stages(layers, on_busiest, np.asarray(head), _time_pipeline_message(c))


def _time_pipeline_message(c: Columns) -> Array:
    """Time passing one micro-batch on and its gradient back, as far as a stage waits for it."""
    num_bytes = (
        compute.count_element_bytes(c) * compute.count_tokens(c) * c.hidden / np.where(c.splits_messages > 0, c.tp, 1.0)
    )
    is_remote = c.tp * c.cp * c.dp >= c.scale_up_size
    one = collectives.send_s(c, num_bytes, is_remote)
    exposed = np.where(c.virtual_stages > 1, c.exposed_fraction, 1.0)
    return np.where(c.pp > 1, 2 * c.virtual_stages * one * exposed, 0.0)


def _time_bubble(c: Columns, layer: _Layer, stages: _Stages, micro_batches: Array) -> Array:
    """Time filling and draining the pipeline: the other stages' share of one micro-batch."""
    busiest = stages.layers * layer.both_s + stages.head_s + stages.message_s
    everything = c.layers * layer.both_s + stages.all_head_s + c.pp * stages.message_s
    bubble = np.maximum(everything - busiest, 0.0) / c.virtual_stages * _count_idle(c)
    weight = np.ceil(c.layers / c.pp) * layer.weight_gradient_s
    saved = np.minimum(2 * (c.pp - 1), micro_batches + c.pp - 2) * weight
    return bubble - np.where(c.schedule == ZERO_BUBBLE, np.clip(saved, 0.0, bubble), 0.0)


def _count_crowd(c: Columns) -> Array:
    """Count ranks for each core, where cores are fewer."""
    return np.asarray(np.maximum(c.num_devices / c.num_cores, 1.0))


def _count_idle(c: Columns) -> Array:
    """Return the share of a bubble that leaves cores idle: where ranks share them, those that work go faster.

    While a pipeline fills and drains, the first j stages work, each at up to the speed of a whole core.
    """
    crowd = _count_crowd(c)
    if np.all(crowd == 1.0):
        return np.ones_like(crowd)
    on_stage = c.num_devices / c.pp
    idle, all_of_it = np.zeros_like(on_stage), np.zeros_like(on_stage)
    for stage in range(1, int(np.max(c.pp))):
        is_filling = stage < c.pp
        busy = stage * on_stage
        faster = np.minimum(c.num_devices / busy, crowd)
        idle = idle + is_filling * np.maximum(1.0 - busy / c.num_cores, 0.0) / faster
        all_of_it = all_of_it + is_filling * (1.0 - stage / c.pp)
    return np.where(crowd > 1.0, idle / np.maximum(all_of_it, 1e-9), 1.0)


def _share_work(c: Columns, layer: _Layer, stages: _Stages) -> Array:
    """Return how long the busiest stage takes, in units of what it takes while all others compute as well.

    Ranks that share cores even out: a stage with more to do goes on when others have ended, at the speed of a core.
    """
    busiest = stages.layers * layer.both_s + stages.head_s + stages.message_s
    average = (c.layers * layer.both_s + stages.all_head_s) / c.pp + stages.message_s
    crowd = _count_crowd(c)
    return np.where(crowd > 1.0, np.maximum(average / busiest, 1.0 / crowd), 1.0)


def predict_times(c: Columns) -> dict[str, Array]:
    """Return seconds of one step by item, for every row; their sum is the step time."""
    layer = _time_stage_layer(c)
    stages = _split_stages(c, layer.both_s)
    micro_batches = np.maximum(c.global_batch / (c.dp * c.micro_batch_size), 1.0)
    passes = micro_batches * _share_work(c, layer, stages)
    items = {name: passes * stages.layers * value for name, value in layer.items.items()}
    items["head"] = passes * stages.head_s
    items["pipeline_messages"] = passes * stages.message_s
    items["pipeline_bubble"] = _time_bubble(c, layer, stages, micro_batches)
    back, ahead = _time_data_parallel(c)
    hidden = _exposed(c, back, stages.layers * layer.backward_s)
    hidden = hidden + _exposed(c, ahead, stages.layers * layer.forward_s)
    items["data_parallel"] = np.where(c.overlaps_gradients > 0, hidden, back + ahead) + _time_tied_embedding(c)
    items["optimizer"] = compute.time_optimizer(c)
    return items


def predict_columns(c: Columns) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Return step seconds, worst-rank bytes and whether those are too many, for every row."""
    seconds = np.sum(np.broadcast_arrays(*predict_times(c).values()), axis=0)
    needed = np.sum(np.broadcast_arrays(*measure_memory(c).values()), axis=0)
    return seconds, needed, needed > c.device_memory_bytes


def predict(
    model: ModelShape | OperatorList,
    cluster: Cluster,
    plan: Plan,
    global_batch: int,
    *,
    software: Software = MODERN,
    is_checked: bool = True,
    has_timeline: bool = False,
) -> Prediction:
    """Time and memory of one step of `model` on `cluster` under `plan`, with `global_batch` sequences.

    `software` holds the traits of the program that runs the plan. Raises `ConfigError` where the plan cannot run;
    `is_checked=False` skips that, for published runs whose stages are uneven. Of unequal devices the slowest and
    smallest count.

    >>> from deepseek.planning.models.model_shape import get_model_shape
    >>> plan = Plan(tp=4, pp=2, dp=1, micro_batch_size=1, sequence_parallel=True)
    >>> predict(get_model_shape("Llama3-8B"), Cluster.of("H100-SXM-80GB"), plan, 8).is_out_of_memory
    False
    """
    if is_checked:
        validate(plan, model, cluster, global_batch)
    if isinstance(model, OperatorList):
        columns = stack_cases([describe_operators(model, cluster, plan, global_batch, software)])
        times, memory = _time_operators(columns, model), _measure_operators(columns, model)
    else:
        columns = stack_cases([describe_case(model, cluster, plan, global_batch, software)])
        times, memory = predict_times(columns), measure_memory(columns)
    seconds = {name: float(value[0]) for name, value in times.items()}
    num_bytes = {name: float(value[0]) for name, value in memory.items()}
    is_over = sum(num_bytes.values()) > float(columns.device_memory_bytes[0])
    timeline = build_timeline(model, cluster, plan, global_batch, software) if has_timeline else None
    return Prediction(sum(seconds.values()), seconds, sum(num_bytes.values()), num_bytes, is_over, timeline)


def _time_operators(c: Columns, model: OperatorList) -> dict[str, Array]:
    """Time a traced list: operations or bytes bound each operator; backward costs twice the forward."""
    rate = c.peak_flops_16 * c.matmul_fraction
    flops = np.array([operator.flops for operator in model.operators])[:, None] * c.micro_batch_size
    moved = np.array([operator.bytes for operator in model.operators])[:, None] * c.micro_batch_size
    is_matmul = np.array([operator.is_matmul for operator in model.operators])[:, None]
    seconds = np.maximum(flops / rate, moved / (c.memory_bandwidth * c.memory_fraction)) + compute.KERNEL_S
    micro_batches = np.maximum(c.global_batch / (c.dp * c.micro_batch_size), 1.0)
    host = len(model.operators) * c.launch_s * np.where(c.is_compiled > 0, _COMPILED_LAUNCH, 1.0)
    total = 3 * np.sum(seconds, axis=0)
    gradient = _count_gradient_bytes(c) * float(model.num_parameters)
    group = collectives.form_group(c, c.dp, np.ones_like(c.dp))
    data = np.where(c.zero_stage == 3, 0.0, collectives.all_reduce_s(c, gradient, group))
    gather = collectives.scatter_reduce_s(c, np.full_like(gradient, 2.0 * model.num_parameters), group)
    scatter = collectives.scatter_reduce_s(c, gradient, group)
    shards = _exposed(c, gather, total / 3) + _exposed(c, gather + scatter, total * 2 / 3)
    held = model.num_parameters / np.where(c.zero_stage > 0, c.dp, 1.0)
    return {
        "matmul": 3 * micro_batches * np.sum(np.where(is_matmul, seconds, 0.0), axis=0),
        "memory_bound": 3 * micro_batches * np.sum(np.where(is_matmul, 0.0, seconds), axis=0),
        "launch_wait": micro_batches * np.where(c.is_host > 0, 2 * host, np.maximum(2 * host - total, 0.0)),
        "sharded_weights": np.where(c.zero_stage == 3, micro_batches * shards, 0.0),
        "data_parallel": np.where(c.overlaps_gradients > 0, _exposed(c, data, total * 2 / 3), data),
        "optimizer": 30.0 * held / (c.memory_bandwidth * c.memory_fraction),
    }


def _measure_operators(c: Columns, model: OperatorList) -> dict[str, Array]:
    parameters = float(model.num_parameters) * np.ones_like(c.dp)
    kept = sum(operator.kept_bytes for operator in model.operators) * c.micro_batch_size
    sharded = [parameters / np.where(c.zero_stage >= stage, c.dp, 1.0) for stage in (1, 2, 3)]
    moving = kept + _count_gradient_bytes(c) * sharded[1]
    return {
        "weights": 2.0 * sharded[2],
        "gradients": _count_gradient_bytes(c) * sharded[1],
        "optimizer": 12.0 * sharded[0],
        "activations": np.asarray(kept),
        "communication_buffers": np.where(c.dp > 1, c.communicator_bytes, 0.0),
        "fragmentation": c.fragmentation_fraction * moving,
    }


def build_timeline(
    model: ModelShape | OperatorList, cluster: Cluster, plan: Plan, global_batch: int, software: Software = MODERN
) -> Timeline | None:
    """Build the pipeline's events of one step, or `None` without one; stages are as uneven as layers and head are.

    >>> from deepseek.planning.models.model_shape import get_model_shape
    >>> plan = Plan(tp=4, pp=2, micro_batch_size=1)
    >>> build_timeline(get_model_shape("Llama3-8B"), Cluster.of("H100-SXM-80GB"), plan, 4).num_stages
    2
    """
    if isinstance(model, OperatorList) or plan.pp == 1:
        return None
    columns = stack_cases([describe_case(model, cluster, plan, global_batch, software)])
    stages = list_stage_work(columns)
    count = plan.count_micro_batches(global_batch)
    return simulate(plan.schedule, stages, count, virtual_stages=plan.virtual_stages)


def list_stage_work(c: Columns) -> list[StageWork]:
    """List work of one chunk of each stage for one micro-batch, of a table with one row."""
    layer = _time_stage_layer(c)
    both = float(layer.both_s[0])
    share = float(layer.forward_s[0]) / both
    stages, chunks = int(c.pp[0]), int(c.virtual_stages[0])
    split = _split_stages(c, layer.both_s)
    message, head = float(split.message_s[0]), float(split.all_head_s[0])
    slots = int(np.ceil(c.layers[0] / (stages * chunks))) * chunks
    missing = slots * stages - int(c.layers[0])
    depths = [slots] * stages
    depths[-1] -= -(-missing // 2)
    depths[0] -= missing // 2
    works = []
    for stage, depth in enumerate(depths):
        seconds = depth * both + message + (head if stage == stages - 1 else 0.0)
        weight = depth * float(layer.weight_gradient_s[0])
        works.append(StageWork(seconds * share / chunks, seconds * (1 - share) / chunks, weight / chunks))
    return works
