"""Where parallelism takes hold of a decoder: which layers are cut, what a pipeline stage holds, where experts are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.core.errors import ConfigError
from deepseek.distributed.parallel.legality import ModelParts
from deepseek.distributed.parallel.parallel_model import ModelRows
from deepseek.distributed.parallel.pipeline import PipelineStage, Received, TakenOut
from deepseek.distributed.parallel.sequence_ring import AttentionRule, SequenceRing, attend_around_ring
from deepseek.distributed.parallel.tensor_parallel import (
    Style,
    TensorParallel,
    columns,
    divide,
    enter,
    logits,
    rows,
    split,
    spread,
    vocabulary,
    within,
)
from deepseek.models.decoder.model import Decoder, DecoderConfig
from deepseek.nn.attention import Attention
from deepseek.nn.kv_cache import CacheView
from deepseek.nn.masks import Visibility, count_lengths, count_positions


def list_rows(model: Decoder) -> ModelRows:
    """List the rows of a decoder; they depend on its configuration.

    >>> from deepseek.models.decoder.model import DecoderConfig
    >>> rows = list_rows(Decoder(DecoderConfig(vocab_size=8, num_layers=1, hidden_size=8, num_heads=2, ffn_size=8)))
    >>> rows.parts.head_counts
    (('num_heads', 2), ('num_kv_heads', 2))
    """
    config = model.config
    return ModelRows(
        parts=ModelParts(
            name="Decoder",
            num_layers=config.num_layers,
            head_counts=(("num_heads", config.num_heads), ("num_kv_heads", config.kv_heads)),
            num_experts=config.moe.num_experts if config.moe else 0,
            has_tensor_rows=True,
            has_sequence_rows=True,
            has_context_rows=True,
        ),
        tensor=tuple(_list_tensor_rows(config)),
        blocks="layers.*",
        routers="layers.*.feedforward" if config.moe else "",
        keep_stage=keep_stage,
        cut_sequences=cut_sequences,
        head_cost=_measure_head(config),
    )


def _list_tensor_rows(config: DecoderConfig) -> list[tuple[str, Style]]:
    table: list[tuple[str, Style]] = [("embed", vocabulary), ("layers.*.attention", enter)]
    if config.position == "learned":
        table.append(("position_embed", split))
    table += [(f"layers.*.attention.{name}_proj", columns) for name in "qkv"]
    table += [("layers.*.attention.o_proj", rows), ("layers.*.attention", divide_heads)]
    if config.qk_norm:
        table += [("layers.*.attention.q_norm", within), ("layers.*.attention.k_norm", within)]
    if config.moe:
        table.append(("layers.*.feedforward", spread))
    else:
        gates = ["gate_proj", "up_proj"] if config.feedforward in ("swiglu", "geglu") else ["up_proj"]
        table.append(("layers.*.feedforward", enter))
        table += [(f"layers.*.feedforward.{name}", columns) for name in gates]
        table.append(("layers.*.feedforward.down_proj", rows))
    norms = ["attention_norm", "feedforward_norm"]
    norms += ["attention_post_norm", "feedforward_post_norm"] if config.post_norms else []
    return [*table, *((f"layers.*.{name}", spread) for name in norms), ("norm", spread), ("head", logits)]


def divide_heads(module: nn.Module, tensor: TensorParallel) -> None:
    """Give each rank its heads; of local ones, which come first, it has those among its own."""
    heads: Any = module
    divide("num_heads", "num_kv_heads")(module, tensor)
    first = tensor.rank * heads.num_heads
    num_all = heads.num_local_heads
    heads.num_local_heads = min(max(num_all - first, 0), heads.num_heads)
    if heads.far_gate is not None:
        within(heads.far_gate, tensor)
        begin = min(first, num_all)
        heads.far_gate.register_forward_hook(partial(_keep_gates, begin, begin + heads.num_local_heads))


def _keep_gates(first: int, stop: int, module: nn.Module, inputs: Any, gates_BTL: Tensor) -> Tensor:
    return gates_BTL[..., first:stop]


def keep_stage(model: nn.Module, stage: PipelineStage) -> Received | None:
    """Take out of a decoder what `stage` does not hold."""
    assert isinstance(model, Decoder)
    for index in range(len(model.layers)):
        if not stage.holds(index):
            model.layers[index] = TakenOut()
    if not stage.is_last:
        model.norm, model.head = TakenOut(), TakenOut()  # type: ignore[assignment]
        model.config = model.config.model_copy(update={"logits_softcap": None})
    if stage.is_first:
        return None
    received = Received()
    model.embed = received  # type: ignore[assignment]
    model.position_embed, model.embed_scale = None, None  # type: ignore[assignment]
    return received


@dataclass(frozen=True)
class RingVisibility(Visibility):
    """What the tokens of one rank may see of a sequence that lies on several."""

    documents_BS: Tensor | None = None
    """The document of each token of the whole sequence; none is one a row."""


def cut_sequences(model: nn.Module, ring: SequenceRing) -> None:
    """Let a decoder take this rank's part of each sequence, at its places in the whole; the ring shows it the rest."""
    assert isinstance(model, Decoder)
    model.locate = partial(locate_in_ring, model, ring)  # type: ignore[method-assign]
    model.register_forward_pre_hook(_refuse_last_only, with_kwargs=True)
    for index, layer in enumerate(model.layers):
        if isinstance(layer, TakenOut):
            continue
        attention: Any = layer.attention
        attention._attend = partial(_attend_in_ring, attention, ring, model.config, model.config.window_of(index))


def locate_in_ring(
    model: Decoder,
    ring: SequenceRing,
    tokens_BT: Tensor,
    positions_BT: Tensor | None,
    cache: CacheView | None,
    lengths: Tensor | None,
    documents_BT: Tensor | None,
) -> tuple[Tensor | None, Visibility]:
    """Return what `Decoder.locate` does, for the tokens of this rank."""
    if any(given is not None for given in (positions_BT, cache, lengths)):
        raise ConfigError(
            f"cp={ring.size} decides which tokens a rank has, for training; leave positions_BT, cache and lengths_B1 "
            "out, or use cp=1"
        )
    num_local = tokens_BT.shape[1]
    model.check_length(num_local * ring.size)
    here = ring.positions(num_local, tokens_BT.device)
    positions_BT, lengths, documents_BS = here[None], torch.full_like(here[None, :1], num_local * ring.size), None
    if documents_BT is not None:
        documents_BS = ring.gather(documents_BT)
        positions_BT, lengths = count_positions(documents_BS)[:, here], count_lengths(documents_BS)[:, here]
    openness = model.mask_openness if model.config.mask else None
    return lengths, RingVisibility(positions_BT, None, None, openness, documents_BS=documents_BS)


def _refuse_last_only(model: nn.Module, inputs: Any, named: dict[str, Any]) -> None:
    if named.get("last_only"):
        raise ConfigError("last_only asks for one token and cp spreads them over ranks; leave it out, or use cp=1")


def _attend_in_ring(
    attention: Attention,
    ring: SequenceRing,
    config: DecoderConfig,
    window: int | None,
    x_BTD: Tensor,
    q_BNTH: Tensor,
    k_BKTH: Tensor,
    v_BKTH: Tensor,
    visibility: RingVisibility,
) -> Tensor:
    """Compute what `Attention` does, with the keys of all ranks."""
    far_BNT = _find_far_bias(attention, x_BTD, visibility) if config.mask is not None else None
    rule = AttentionRule(
        scale=attention.head_size**-0.5 if attention.scale is None else attention.scale,
        softcap=attention.softcap,
        window=window,
        local_distance=None if config.mask is None else config.mask.local_distance,
        documents_BT=visibility.documents_BS,
    )
    return attend_around_ring(q_BNTH, k_BKTH.to(q_BNTH.dtype), v_BKTH.to(q_BNTH.dtype), ring, rule, far_BNT)


def _find_far_bias(attention: Attention, x_BTD: Tensor, visibility: Visibility) -> Tensor:
    """(B, N, T) what each head adds to scores beyond the local distance: local heads come first, others add nothing."""
    num_local_heads, num_global = attention.num_local_heads, attention.num_heads - attention.num_local_heads
    if attention.far_gate is None:
        hidden_BNT = torch.full((x_BTD.shape[0], num_local_heads, x_BTD.shape[1]), -torch.inf, device=x_BTD.device)
        return F.pad(hidden_BNT, (0, 0, 0, num_global))
    return F.pad(visibility.far_bias(attention.far_gate(x_BTD)), (0, 0, 0, num_global))


def _measure_head(config: DecoderConfig) -> float:
    """Return the multiply-adds of a token in the head over those in a layer."""
    per_head = config.size_of_head * (2 * config.num_heads + 2 * config.kv_heads)
    num_matrices = 3 if config.feedforward in ("swiglu", "geglu") else 2
    ffn_size = config.moe.ffn_size * config.moe.top_k if config.moe else config.ffn_size
    return config.vocab_size / (per_head + num_matrices * ffn_size)
