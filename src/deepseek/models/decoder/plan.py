"""Where parallelism takes hold of a decoder: which layers are cut, what a pipeline stage holds, where experts are."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from deepseek.distributed.parallel.legality import ModelParts
from deepseek.distributed.parallel.parallel_model import ModelRows
from deepseek.distributed.parallel.pipeline import PipelineStage, Received, TakenOut
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
        ),
        tensor=tuple(_list_tensor_rows(config)),
        blocks="layers.*",
        routers="layers.*.feedforward" if config.moe else "",
        keep_stage=keep_stage,
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


def _measure_head(config: DecoderConfig) -> float:
    """Return the multiply-adds of a token in the head over those in a layer."""
    per_head = config.size_of_head * (2 * config.num_heads + 2 * config.kv_heads)
    num_matrices = 3 if config.feedforward in ("swiglu", "geglu") else 2
    ffn_size = config.moe.ffn_size * config.moe.top_k if config.moe else config.ffn_size
    return config.vocab_size / (per_head + num_matrices * ffn_size)
