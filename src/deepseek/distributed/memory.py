"""Bytes on the fullest rank, by item.

Model state follows ZeRO (Rajbhandari et al. 2020): 2 bytes of weights, 2 or 4 of gradients, 12 of Adam's state per
parameter, divided by the data ranks from the stage on that shards each. Activations follow Korthikanti et al. 2022
(arXiv:2205.05198), Table 2: what a layer keeps for its backward pass by recomputation, tensor and sequence parallelism,
times the micro-batches that the schedule holds on the first stage.
"""

from __future__ import annotations

import numpy as np

from deepseek.distributed import cost
from deepseek.distributed.columns import Array, Columns

MEMORY_ITEMS = (
    "weights", "gradients", "optimizer", "activations", "logits", "communication_buffers", "context", "fragmentation",
)  # fmt: skip
_CONTEXT_BYTES = 1.2e9  # driver context and loaded kernels
_CHANNEL_BYTES = 0.4e9  # buffers of one communicator's channels
_FRAGMENTATION = 0.03
_GPIPE, _INTERLEAVED = 0.0, 2.0


def _divide(c: Columns, value: Array, stage: int, ranks: Array) -> Array:
    return value / np.where(c.zero_stage >= stage, ranks, 1.0)


def _count_in_flight(c: Columns) -> Array:
    """Micro-batches whose activations the first stage holds, in whole stages."""
    micro_batches = np.maximum(c.global_batch / (c.dp * c.micro_batch_size), 1.0)
    held = np.where(
        c.schedule == _INTERLEAVED, c.pp * (1 + (c.pp - 1) / (c.pp * c.virtual_stages)), c.pp
    )
    return np.where(c.schedule == _GPIPE, micro_batches, np.minimum(held, micro_batches))


def _measure_layer(c: Columns) -> tuple[Array, Array]:
    """Bytes that one layer keeps for one micro-batch: all of it, and its input alone."""
    tokens = cost.count_tokens(c)
    cut = np.where(c.sequence_parallel > 0, c.tp, 1.0)
    query = np.where(c.is_latent > 0, (c.qk_nope_dim + c.qk_rope_dim), c.head_dim) * c.heads
    keys = np.where(c.is_latent > 0, query, c.kv_heads * c.head_dim)
    dropout = np.where(c.attention > 0, 0.0, 1.0)
    rows = (8.0 + 2.0 * dropout) * tokens * c.hidden / cut
    core = tokens * (2.0 * query + 4.0 * keys + 2.0 * query) / c.tp
    moe = c.moe_layers / c.layers
    routed = c.top_k * c.etp / c.tp * c.expert_ffn + c.shared_experts * c.expert_ffn / c.tp
    width = (1 - moe) * c.ffn / c.tp + moe * routed
    wide = tokens * width * np.where(c.gated > 0, 8.0, 4.0) + moe * 4.0 * tokens * c.top_k * c.etp / c.tp * c.hidden
    scores = 5.0 * c.micro_batch_size * c.heads / c.tp * (c.sequence / c.cp) * c.sequence
    kept = np.where((c.attention > 0) | (c.recomputation > 0), 0.0, scores)
    return rows + core + wide + kept, 2.0 * tokens * c.hidden / cut


def measure_memory(c: Columns) -> dict[str, Array]:
    """Bytes of the fullest rank by item, for every row."""
    shared, experts = cost.count_rank_parameters(c)
    ranks = np.where(c.shard_group > 0, c.shard_group, c.dp * c.cp)
    expert_ranks = np.maximum(c.tp * c.cp * c.dp / (c.ep * c.etp), 1.0)
    gradient = np.where(c.has_fp32_gradients > 0, 4.0, 2.0)
    layers = np.ceil(c.layers / c.pp)
    whole, entry = _measure_layer(c)
    is_full = c.recomputation == 2
    in_flight = _count_in_flight(c)
    activations = layers * in_flight * np.where(is_full, entry, whole) + np.where(is_full, whole, 0.0)
    tokens = cost.count_tokens(c)
    logits = np.where(c.pp == 1, 8.0, 0.0) * tokens * c.vocabulary / c.tp
    gathered = np.where(c.zero_stage == 3, 2 * 2.0 * (shared + experts) / layers, 0.0)
    exchanged = 2.0 * tokens * c.hidden * (np.where(c.tp > 1, 2.0, 0.0) + np.where(c.pp > 1, 2.0, 0.0))
    items = {
        "weights": 2.0 * (_divide(c, shared, 3, ranks) + _divide(c, experts, 3, expert_ranks)),
        "gradients": gradient * (_divide(c, shared, 2, ranks) + _divide(c, experts, 2, expert_ranks)),
        "optimizer": 12.0 * (_divide(c, shared, 1, ranks) + _divide(c, experts, 1, expert_ranks)),
        "activations": activations,
        "logits": logits,
        "communication_buffers": gathered + exchanged + np.where(c.num_devices > 1, _CHANNEL_BYTES, 0.0),
        "context": np.full_like(tokens, _CONTEXT_BYTES),
    }
    items["fragmentation"] = _FRAGMENTATION * (items["activations"] + items["logits"])
    return items
