"""Seconds of the operators of one layer, by shape: matmuls, attention, elementwise kernels, kernel launches.

A matmul runs in tiles, one per processor at a time. The last wave of tiles is rarely full and each tile pays
`matmul_fill_depth` elements of the contracted dimension before its inner loop is at speed; the library's choice among
tile sizes is the fastest of four. A matmul cannot be faster than its operands arrive from memory. Elementwise kernels
cost their bytes. A device waits for the host where kernels are shorter than it takes to issue them.

Everything is per device, per micro-batch and per layer, on columns (one entry per case).
Sources: Williams et al. 2009 (roofline), NVIDIA's guide to matrix multiplication (tile and wave quantisation),
Korthikanti et al. 2022, arXiv:2205.05198 (which operators a layer has, what is recomputed).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from deepseek.planning.estimate.columns import FLASH, FLASH_3, UNFUSED, Array, Columns

# Rows and columns of an output tile, and its speed relative to the largest (smaller tiles reload operands more often).
_TILES = ((256, 128, 1.0), (128, 128, 0.95), (128, 64, 0.8), (64, 64, 0.6))
BACKWARD_ATTENTION = 2.5  # five matmuls instead of two (Dao et al. 2022)
# Bytes per score: matmul out, softmax in and out, dropout in, out and mask, matmul in; and the same on the way back.
_UNFUSED_SCORE_BYTES, _UNFUSED_SCORE_BYTES_BACKWARD = 13.0, 15.0
_FLASH_1_SPEED = 0.55  # FlashAttention 1 relative to 2 (Dao 2023, arXiv:2307.08691, figures 4 to 7)
_FLASH_3_SPEED = 1.75  # FlashAttention 3 relative to 2 on Hopper (Shah et al. 2024, arXiv:2407.08608)
# Kernels that a decoder layer issues going forward; backward issues about as many from C++ at the same cost a layer.
_KERNELS_FORWARD = 33.0
KERNEL_S = 4e-6  # device time of a kernel that does nothing
_PLAIN_ELEMENTWISE = 1.6  # bytes of one kernel per operator, relative to fused ones
_ROW_BYTES, _GATE_BYTES = 22.0, 2.0  # of a layer's two norms and residuals per channel, of its gate per channel of each
_BACKWARD_ELEMENTWISE = 1.5  # bytes going back, relative to going forward
# What that counts per element for one norm, one residual and one gate of three equal sizes, forward and back.
BYTES_OF_PLAIN_KERNELS = (1 + _BACKWARD_ELEMENTWISE) * _PLAIN_ELEMENTWISE * (_ROW_BYTES / 2 + 3 * _GATE_BYTES)
_LAST_WAVE = 0.4  # of an unfilled last wave's time that is lost: libraries cut the contracted dimension to fill it
_KERNELS_EXPERTS, _KERNELS_CAPACITY = 120.0, 50.0  # routing, counting and permuting; with a fixed capacity
_KERNELS_EACH_EXPERT = 5.0  # two matmuls, a gate and two casts, of each expert that a device holds
_KERNELS_EXCHANGE = 3.0  # host work of one collective, in kernels
_HOST_LINK = 2e10  # bytes/s between a device and the host's memory, where the optimizer may live
_MISALIGNED = 2.3  # cuBLAS on A100: a head of 50257 words against 50304, heads of 108 elements (squared: two operands)
_ALIGNMENT = 8.0  # elements of 16 bit that one vector load takes


@dataclass(frozen=True)
class LayerTime:
    """Device seconds of one layer for one micro-batch; `kernels` counts launches of a forward pass.

    `last_matmul_s` is the part of `matmul_s` whose result only the next layer needs.
    """

    matmul_s: Array
    attention_s: Array
    memory_s: Array
    matmul_backward_s: Array
    attention_backward_s: Array
    memory_backward_s: Array
    weight_gradient_s: Array
    last_matmul_s: Array
    kernels: Array

    @property
    def forward_s(self) -> Array:
        """Seconds of a forward pass."""
        return self.matmul_s + self.attention_s + self.memory_s

    @property
    def backward_s(self) -> Array:
        """Seconds of a backward pass, without recomputation."""
        return self.matmul_backward_s + self.attention_backward_s + self.memory_backward_s

    def mix(self, other: LayerTime, share: Array) -> LayerTime:
        """Return the average layer of a model in which `share` of the layers are `other`."""
        pairs = {item.name: (getattr(self, item.name), getattr(other, item.name)) for item in fields(self)}
        return LayerTime(**{name: (1 - share) * one + share * two for name, (one, two) in pairs.items()})


def count_element_bytes(c: Columns) -> Array:
    """Count bytes of an activation, and of a weight as layers read it: 4 in 32 bits, 2 in all narrower precisions."""
    return np.where(c.operand_bytes > 2, 4.0, 2.0)


def count_tokens(c: Columns) -> Array:
    """Count tokens of one micro-batch on one device."""
    return c.micro_batch_size * c.sequence / c.cp


def multiply_s(
    c: Columns, m: Array, n: Array, k: Array, count: Array | float = 1.0, *, is_narrow: bool = True
) -> Array:
    """Time `count` matmuls of (m, k) by (k, n); `is_narrow` lets the plan's 8 or 4 bit operands be used."""
    element = c.operand_bytes if is_narrow else np.maximum(c.operand_bytes, 2.0)
    peak = np.where(element < 2, c.peak_flops * c.narrow_fraction, c.peak_flops_16 * c.matmul_fraction)
    peak = np.where(element > 2, c.peak_flops * c.matmul_fraction, peak)
    per_processor = peak / c.processors
    best: Array | None = None
    for rows, columns, speed in _TILES:
        tiles = np.ceil(m / rows) * np.ceil(n / columns) * count
        full = tiles / c.processors
        waves = np.where(full > 1, full + _LAST_WAVE * (np.ceil(full - 1e-9) - full), 1.0)
        seconds = waves * (2.0 * rows * columns / speed) * (k + c.matmul_fill_depth) / per_processor
        best = seconds if best is None else np.minimum(best, seconds)
    assert best is not None
    moved = (element * (m * k + k * n) + 2.0 * m * n) * count
    return np.maximum(best, moved / (c.memory_bandwidth * c.memory_fraction)) + KERNEL_S


def _time_linear(c: Columns, m: Array, n: Array, k: Array, count: Array | float = 1.0) -> tuple[Array, Array, Array]:
    """Time a linear layer: forward, gradient of the input, gradient of the weight."""
    forward = multiply_s(c, m, n, k, count)
    return forward, multiply_s(c, m, k, n, count), multiply_s(c, n, k, m, count)


def _sum(matmuls: list[tuple[Array, Array, Array]]) -> tuple[Array, Array, Array]:
    forward, inputs, weights = (np.sum(np.broadcast_arrays(*passes), axis=0) for passes in zip(*matmuls, strict=True))
    return forward, inputs, weights


def _move_s(c: Columns, num_bytes: Array, kernels: float) -> Array:
    return num_bytes / (c.memory_bandwidth * c.memory_fraction) + kernels * KERNEL_S


def _time_projections(c: Columns, tokens: Array) -> tuple[Array, Array, Array]:
    query, key = c.heads * c.head_dim / c.tp, c.kv_heads * c.head_dim / np.minimum(c.tp, c.kv_heads)
    plain = _sum([_time_linear(c, tokens, query + 2 * key, c.hidden), _time_linear(c, tokens, c.hidden, query)])
    if not np.any(c.is_latent):
        return plain
    heads, up = c.heads / c.tp, c.qk_nope_dim + c.qk_rope_dim
    low = np.where(c.q_lora_rank > 0, c.q_lora_rank, heads * up)
    latent = _sum(
        [
            _time_linear(c, tokens, low + c.kv_lora_rank + c.qk_rope_dim, c.hidden),
            _time_linear(c, tokens, heads * up, np.maximum(c.q_lora_rank, 1.0), np.where(c.q_lora_rank > 0, 1.0, 1e-9)),
            _time_linear(c, tokens, heads * (c.qk_nope_dim + c.v_head_dim), np.maximum(c.kv_lora_rank, 1.0)),
            _time_linear(c, tokens, c.hidden, heads * np.maximum(c.v_head_dim, 1.0)),
        ]
    )
    a, b, d = (np.where(c.is_latent > 0, one, two) for one, two in zip(latent, plain, strict=True))
    return a, b, d


def count_score_dims(c: Columns) -> tuple[Array, Array]:
    """Count elements of a head that scores and results are made of."""
    query = np.where(c.is_latent > 0, c.qk_nope_dim + c.qk_rope_dim, c.head_dim)
    return query, np.where(c.is_latent > 0, c.v_head_dim, c.head_dim)


def _attend_s(c: Columns, tokens: Array) -> tuple[Array, Array]:
    """Time scores, softmax and weighted sum, forward and backward: fused where the program does so."""
    query, value = count_score_dims(c)
    heads = c.heads / c.tp
    flops = 2.0 * tokens * c.sequence * heads * (query + value)
    kernel = np.where(c.attention == FLASH, _FLASH_1_SPEED, 1.0)
    kernel = np.where((c.attention == FLASH_3) & (c.has_asynchronous_matmul > 0), _FLASH_3_SPEED, kernel)
    peak = np.where(c.operand_bytes > 2, c.peak_flops, c.peak_flops_16)
    speed = peak * c.matmul_fraction * c.attention_fraction * kernel
    fused = 0.5 * flops / speed  # half of the scores lie above the diagonal and are skipped
    sequences = c.micro_batch_size * heads
    length = c.sequence / c.cp
    matmuls = _count_misfit(query) ** 2 * (
        multiply_s(c, length, c.sequence, query, sequences, is_narrow=False)
        + multiply_s(c, length, value, c.sequence, sequences, is_narrow=False)
    )
    scores = sequences * length * c.sequence
    unfused = matmuls + _move_s(c, _UNFUSED_SCORE_BYTES * scores, 3)
    unfused_backward = 2 * matmuls + _move_s(c, _UNFUSED_SCORE_BYTES_BACKWARD * scores, 3)
    is_fused = c.attention != UNFUSED
    forward = np.where(is_fused, fused + KERNEL_S, unfused)
    return forward, np.where(is_fused, BACKWARD_ATTENTION * fused + KERNEL_S, unfused_backward)


def _count_misfit(row: Array) -> Array:
    """Return how much slower a matmul gets per operand whose rows do not fill whole vector loads."""
    return np.where(np.round(row) % _ALIGNMENT == 0, 1.0, _MISALIGNED)


def _shared_rows(c: Columns, tokens: Array) -> Array:
    """Return rows on which norms, residuals and dropout work: cut by sequence parallelism."""
    return np.where(c.sequence_parallel > 0, tokens / c.tp, tokens)


def _cast_bytes(c: Columns, elements: Array) -> Array:
    """Return bytes of casting matrix operands down to 8 or 4 bit."""
    return np.where(c.operand_bytes < 2, elements * 3.0, 0.0)


def time_dense_layer(c: Columns) -> LayerTime:
    """Time one layer with a dense MLP."""
    tokens = count_tokens(c)
    ffn = np.maximum(c.ffn, 1.0) / c.tp
    last = _time_linear(c, tokens, c.hidden, ffn)
    mlp = _sum([_time_linear(c, tokens, ffn * (1 + c.gated), c.hidden), last])
    return _assemble(c, tokens, mlp, tokens * ffn * (1 + c.gated), tokens * ffn, last[0])


def time_expert_layer(c: Columns) -> LayerTime:
    """Time one layer with experts: the router, the matmuls of the local experts, the shared experts."""
    tokens = count_tokens(c)
    rows = tokens * c.top_k * c.capacity_factor * c.etp / c.tp
    local = np.maximum(c.experts / c.ep, 1.0)
    ffn = np.maximum(c.expert_ffn, 1.0) / c.etp
    rows_each = rows / local
    shared = c.shared_experts * np.maximum(c.expert_ffn, 1.0) / c.tp
    always = np.where(shared > 0, 1.0, 1e-9)
    last = _time_linear(c, rows_each, c.hidden, ffn, local)
    mlp = _sum(
        [
            _time_linear(c, rows_each, ffn * (1 + c.gated), c.hidden, local),
            last,
            _time_linear(c, tokens, np.maximum(shared, 1.0) * (1 + c.gated), c.hidden, always),
            _time_linear(c, tokens, c.hidden, np.maximum(shared, 1.0), always),
            _time_linear(c, tokens, np.maximum(c.experts, 1.0), c.hidden),
        ]
    )
    middle = rows * ffn + tokens * shared
    layer = _assemble(c, tokens, mlp, middle * (1 + c.gated), middle, last[0])
    permuted = _move_s(c, 12.0 * rows * c.hidden, 6)
    between = _GATE_BYTES * (2 + c.gated) * rows * ffn + _cast_bytes(c, rows * ffn)
    spared = np.where(c.fuses_experts > 0, _move_s(c, between, 0), 0.0)
    return LayerTime(
        layer.matmul_s,
        layer.attention_s,
        layer.memory_s + permuted - spared,
        layer.matmul_backward_s,
        layer.attention_backward_s,
        layer.memory_backward_s + permuted - _BACKWARD_ELEMENTWISE * spared,
        layer.weight_gradient_s,
        layer.last_matmul_s,
        layer.kernels
        + np.where(c.counts_tokens > 0, _KERNELS_EXPERTS, _KERNELS_CAPACITY)
        + _KERNELS_EACH_EXPERT * local,
    )


def _assemble(
    c: Columns, tokens: Array, mlp: tuple[Array, Array, Array], wide: Array, narrow: Array, last: Array
) -> LayerTime:
    attention = _time_projections(c, tokens)
    forward, inputs, weights = (one + two for one, two in zip(attention, mlp, strict=True))
    score, score_backward = _attend_s(c, tokens)
    query, _ = count_score_dims(c)
    elementwise = _ROW_BYTES * _shared_rows(c, tokens) * c.hidden + _GATE_BYTES * (wide + narrow)
    elementwise = (elementwise + 4.0 * tokens * c.heads * query / c.tp) * count_element_bytes(c) / 2.0
    operands = _cast_bytes(c, 2 * tokens * c.hidden + tokens * c.heads * query / c.tp + narrow)
    fused = np.where((c.is_compiled > 0) | (c.fuses_elementwise > 0), 1.0, _PLAIN_ELEMENTWISE)
    return LayerTime(
        matmul_s=forward,
        attention_s=score,
        memory_s=_move_s(c, fused * elementwise + operands, 8),
        matmul_backward_s=inputs + np.where(c.frozen_weights > 0, 0.0, weights),
        attention_backward_s=score_backward,
        memory_backward_s=_move_s(c, _BACKWARD_ELEMENTWISE * (fused * elementwise + operands), 12),
        weight_gradient_s=weights,
        last_matmul_s=last,
        kernels=_KERNELS_FORWARD + 2 * _KERNELS_EXCHANGE * (c.tp > 1) + _KERNELS_EXCHANGE * (c.zero_stage == 3),
    )


def time_layer(c: Columns) -> LayerTime:
    """Time the average layer of the model."""
    dense = time_dense_layer(c)
    if not np.any(c.moe_layers):
        return dense
    return dense.mix(time_expert_layer(c), c.moe_layers / c.layers)


def time_head(c: Columns) -> tuple[Array, Array]:
    """Time logits and loss of one micro-batch, forward and backward."""
    tokens = count_tokens(c)
    words = c.vocabulary / c.tp
    wide = c.with_columns(operand_bytes=np.maximum(c.operand_bytes, 2.0))
    misfit = _count_misfit(words)
    forward, inputs, weights = (misfit * seconds for seconds in _time_linear(wide, tokens, words, c.hidden))
    weights = np.where(c.frozen_weights > 0, 0.0, weights)
    return forward + _move_s(c, 16.0 * tokens * words, 6), inputs + weights + _move_s(c, 12.0 * tokens * words, 4)


def time_embedding(c: Columns) -> tuple[Array, Array]:
    """Time looking up tokens, forward and backward."""
    tokens = count_tokens(c)
    moved = 8.0 * tokens * c.hidden
    return _move_s(c, moved, 3), _move_s(c, moved, 3)


def count_rank_parameters(c: Columns) -> tuple[Array, Array]:
    """Count weights of the fullest rank: those copied over all data ranks, and those of its experts."""
    per_stage = np.ceil(c.layers / c.pp)
    moe_share = c.moe_layers / c.layers
    sparse = c.hidden * c.experts + c.shared_experts * c.expert_parameters
    dense = (1 - moe_share) * c.dense_mlp_parameters
    layer = (c.attention_parameters + dense + moe_share * sparse) / c.tp + 2 * c.hidden
    shared = per_stage * layer + c.embedding_parameters / c.tp * np.where(
        (c.pp > 1) & (c.tied_embeddings == 0), 0.5, 1.0
    )
    shared = shared + c.extra_parameters / (c.tp * c.pp)
    experts = per_stage * moe_share * c.experts * c.expert_parameters / (c.ep * c.etp)
    return shared, experts


def time_optimizer(c: Columns) -> Array:
    """Time Adam on the rank's share of the weights: moments, master copy and gradient in and out, weight out."""
    shared, experts = count_rank_parameters(c)
    expert_dp = np.maximum(c.tp * c.cp * c.dp / (c.ep * c.etp), 1.0)
    is_sharded = c.zero_stage > 0
    group = np.where(c.shard_group > 0, c.shard_group, c.dp * c.cp)
    held = shared / np.where(is_sharded, group, 1.0) + experts / np.where(is_sharded, expert_dp, 1.0)
    touched = held * 30.0 + (shared + experts) * np.where(c.has_fp32_gradients > 0, 4.0, 2.0)
    on_device = _move_s(c, touched, 10)
    return np.where(c.frozen_weights > 0, 0.0, np.where(c.offloads_optimizer > 0, held * 16.0 / _HOST_LINK, on_device))


def time_accumulation(c: Columns) -> Array:
    """Time adding one micro-batch's weight gradients to the step's, per layer."""
    shared, experts = count_rank_parameters(c)
    element = np.where(c.has_fp32_gradients > 0, 4.0, 2.0)
    moved = np.where(c.fuses_accumulation > 0, element, 2.0 + 2 * element)
    is_repeated = (c.global_batch > c.dp * c.micro_batch_size) & (c.zero_stage < 3) & (c.frozen_weights == 0)
    return np.where(is_repeated, (shared + experts) * moved / (c.memory_bandwidth * c.memory_fraction), 0.0)
