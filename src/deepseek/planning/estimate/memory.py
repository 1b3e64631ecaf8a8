"""Bytes on the fullest rank, by item.

Model state follows ZeRO (Rajbhandari et al. 2020): 2 bytes of weights, 2 or 4 of gradients, 12 of Adam's state per
parameter, divided by the data ranks from the stage on that shards each; shards that are narrowed only when they are
gathered have no 2 bytes of their own. Activations follow Korthikanti et al. 2022
(arXiv:2205.05198), Table 2, extended by gated MLPs, fused attention, experts and 8 bit operands: what a layer keeps for
its backward pass, times the layers and micro-batches that the schedule holds on the first stage.
"""

from __future__ import annotations

import numpy as np

from deepseek.planning.estimate import compute
from deepseek.planning.estimate.columns import FULL, GPIPE, INTERLEAVED, SELECTIVE, UNFUSED, Array, Columns, Flags

MEMORY_ITEMS = (
    "weights", "gradients", "optimizer", "activations", "logits", "communication_buffers", "context", "fragmentation",
)  # fmt: skip
_CONTEXT_BYTES = 0.8e9  # driver context and loaded kernels
_SELECTED_SHARE = 0.42  # kept where elementwise results and every other matmul are recomputed


def _divide(c: Columns, value: Array, stage: int, ranks: Array) -> Array:
    return value / np.where(c.zero_stage >= stage, ranks, 1.0)


def count_in_flight(c: Columns) -> Array:
    """Count micro-batches whose activations the first stage holds, in whole stages."""
    micro_batches = np.maximum(c.global_batch / (c.dp * c.micro_batch_size), 1.0)
    interleaved = c.pp * (1 + (c.pp - 1) / (c.pp * c.virtual_stages))
    held = np.where(c.schedule == INTERLEAVED, interleaved, c.pp)
    return np.where(c.schedule == GPIPE, micro_batches, np.minimum(held, micro_batches))


def measure_layer(c: Columns) -> Array:
    """Measure bytes that one layer keeps for one micro-batch without recomputation."""
    tokens = compute.count_tokens(c)
    cut = np.where(c.sequence_parallel > 0, c.tp, 1.0)
    is_fused = (c.fuses_elementwise > 0) | (c.is_compiled > 0)
    stored = np.where(c.fuses_elementwise > 0, c.operand_bytes, 2.0)  # only fused casts keep what they made
    operand = np.minimum(np.maximum(stored, 1.0), 2.0)
    in_16_bits = (
        _measure_rows(c, tokens, cut, operand)
        + _measure_attention(c, tokens, operand, is_fused)
        + _measure_mlp(c, tokens, operand, is_fused)
    )
    return np.asarray(in_16_bits * compute.count_element_bytes(c) / 2.0)


def _measure_rows(c: Columns, tokens: Array, cut: Array, operand: Array) -> Array:
    """Measure norms and residuals: two 2 byte inputs, two results that are operands of matmuls, two dropout masks."""
    gathered = np.where((c.sequence_parallel > 0) & (c.regathers_inputs == 0), 1.0, cut)
    dropout = np.where(c.attention != UNFUSED, 0.0, 2.0 / cut)
    return tokens * c.hidden * (4.0 / cut + 2 * operand / gathered + dropout)


def _measure_attention(c: Columns, tokens: Array, operand: Array, is_fused: Flags) -> Array:
    query, value = compute.count_score_dims(c)
    keys = np.where(c.is_latent > 0, c.heads, c.kv_heads) * (query + value)
    rotated = np.where(is_fused, 0.0, 2.0 * c.heads * query * (c.attention != UNFUSED))
    vectors = tokens * (2.0 * c.heads * query + 2.0 * keys + operand * c.heads * value + rotated) / c.tp
    scores = 5.0 * c.micro_batch_size * c.heads / c.tp * (c.sequence / c.cp) * c.sequence
    return vectors + np.where((c.attention != UNFUSED) | (c.recomputation == SELECTIVE), 0.0, scores)


def _measure_width(c: Columns) -> Array:
    """Measure channels of the MLP that one token passes through on one rank, of the average layer."""
    moe = c.moe_layers / c.layers
    routed = c.top_k * c.capacity_factor * c.etp / c.tp * c.expert_ffn + c.shared_experts * c.expert_ffn / c.tp
    return (1 - moe) * c.ffn / c.tp + moe * routed


def _measure_mlp(c: Columns, tokens: Array, operand: Array, is_fused: Flags) -> Array:
    moe = c.moe_layers / c.layers
    gated = np.where(is_fused, 4.0, 6.0) + operand
    dispatched = moe * tokens * c.top_k * c.capacity_factor * c.etp / c.tp * c.hidden * (2.0 + operand)
    return tokens * _measure_width(c) * np.where(c.gated > 0, gated, 2.0 + operand) + dispatched


def _measure_activations(c: Columns, logits: Array) -> Array:
    """Measure what all layers keep, and what the first of them to run backward takes besides.

    It computes again what it did not keep. Where every operator is a kernel of its own, gradients pass through its MLP
    as tensors: of the block's output, of the norm's result from both projections, and of the wide results; fused
    kernels write them over what they read. Logits are gone by then and leave their room to gradients.
    """
    layers = np.ceil(c.layers / c.pp)
    whole = measure_layer(c)
    tokens = compute.count_tokens(c)
    entry = compute.count_element_bytes(c) * tokens * c.hidden / np.where(c.sequence_parallel > 0, c.tp, 1.0)
    selected = np.where(c.attention != UNFUSED, _SELECTED_SHARE, 1.0) * whole
    kept = np.where(c.recomputation == FULL, entry, np.where(c.recomputation == SELECTIVE, selected, whole))
    is_plain = (c.fuses_elementwise == 0) & (c.is_compiled == 0)
    gradients = (
        compute.count_element_bytes(c) * tokens * is_plain * (3 * c.hidden + _measure_width(c) * (2 + (c.gated > 0)))
    )
    again = np.where(c.recomputation == FULL, whole, 0.0)
    return np.asarray(layers * count_in_flight(c) * kept + again + np.maximum(gradients - logits, 0.0))


def measure_memory(c: Columns) -> dict[str, Array]:
    """Measure bytes of the fullest rank by item, for every row."""
    shared, experts = compute.count_rank_parameters(c)
    ranks = np.where(c.shard_group > 0, c.shard_group, c.dp * c.cp)
    expert_ranks = np.maximum(c.tp * c.cp * c.dp / (c.ep * c.etp), 1.0)
    gradient = np.where(c.has_fp32_gradients > 0, 4.0, 2.0) * (c.frozen_weights == 0)
    adam = np.where((c.offloads_optimizer > 0) | (c.frozen_weights > 0), 0.0, _count_adam_bytes(c))
    tokens = compute.count_tokens(c)
    has_only_shards = (c.zero_stage == 3) & (c.narrows_shards > 0) & (c.frozen_weights == 0)
    is_narrow = c.operand_bytes <= 2
    weight = np.where(has_only_shards & is_narrow, 0.0, compute.count_element_bytes(c))
    groups = (c.tp > 1) + 1.0 * (c.pp > 1) + (c.dp * c.cp > 1) + (c.ep > 1)
    logits = np.where(c.pp == 1, c.logit_bytes, 0.0) * tokens * c.vocabulary / c.tp
    items = {
        "weights": weight * (_divide(c, shared, 3, ranks) + _divide(c, experts, 3, expert_ranks)),
        "gradients": gradient * (_divide(c, shared, 2, ranks) + _divide(c, experts, 2, expert_ranks)),
        "optimizer": adam * (_divide(c, shared, 1, ranks) + _divide(c, experts, 1, expert_ranks)),
        "activations": _measure_activations(c, logits),
        "logits": logits,
        "communication_buffers": _measure_buffers(c, tokens, shared + experts) + groups * c.communicator_bytes,
        "context": np.full_like(tokens, _CONTEXT_BYTES),
    }
    moving = items["activations"] + items["logits"] + items["gradients"]
    items["fragmentation"] = c.fragmentation_fraction * moving
    return items


def _count_adam_bytes(c: Columns) -> Array:
    """Count master weight and two moments, 4 bytes each; with scaled fp16 gradients, as before 2022, one more copy.

    Weights in 32 bits are their own master.
    """
    has_copies = (c.has_fp32_gradients == 0) & (c.zero_stage < 3) & (c.attention == UNFUSED)
    return np.where(c.operand_bytes > 2, 8.0, np.where(has_copies, 16.0, 12.0))


def _measure_buffers(c: Columns, tokens: Array, parameters: Array) -> Array:
    element = compute.count_element_bytes(c)
    of_layer = element * (1.0 + c.gathers_layers) * parameters / np.ceil(c.layers / c.pp)
    gathered = np.where(c.zero_stage == 3, of_layer, 0.0)
    exchanged = element * tokens * c.hidden * (np.where(c.tp > 1, 2.0, 0.0) + np.where(c.pp > 1, 2.0, 0.0))
    return np.asarray(gathered + exchanged)
