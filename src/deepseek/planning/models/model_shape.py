"""The planner's description of a model: the sizes that decide bytes, operations and messages, and nothing else.

`ModelShape` describes decoders (grouped or latent attention, gated or plain MLP, dense or with experts).
`OperatorList` describes any other network by the cost of each traced operator, convolutional nets for instance. Both
are frozen values; they come from `model_shapes.csv` by name, from a configuration in the Hugging Face layout, or from
a trace.

Parameter counts are exact for the standard layouts and reproduce the published totals within 3 % (tested).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib.resources import files
from typing import Any

from deepseek.core.errors import ConfigError
from deepseek.core.names import explain_unknown
from deepseek.planning.models.families import FAMILIES, ModelFamily, ModelSizes


@dataclass(frozen=True)
class ModelShape:
    """ModelSizes of a decoder; `sequence` is in tokens, every other size in elements.

    `ffn` is the width of a dense MLP, `expert_ffn` that of one expert (0: `ffn`). `first_dense_layers` layers have no
    experts, and of the others every `moe_every`-th has. Latent attention (DeepSeek-V2) is on when `kv_lora_rank` is
    not 0. `mtp_layers` are extra prediction layers that exist in training only. `capacity_factor` is how many tokens
    an expert has room for, relative to an equal share: room is computed whether tokens fill it or not.
    `extra_parameters` are the weights that no other size implies: biases, further norms, an encoder's head
    (`families.py`). `frozen_weights` trains small adapters only (LoRA): no gradients, no optimizer state and no
    data-parallel exchange for the weights.

    >>> round(ModelShape(layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocabulary=128256,
    ...                  sequence=8192).num_parameters / 1e9, 2)
    8.03
    """

    layers: int
    hidden: int
    heads: int
    ffn: int
    vocabulary: int
    sequence: int
    kv_heads: int = 0
    head_dim: int = 0
    gated: bool = True
    experts: int = 0
    top_k: int = 0
    expert_ffn: int = 0
    shared_experts: int = 0
    first_dense_layers: int = 0
    moe_every: int = 1
    tied_embeddings: bool = False
    learned_positions: bool = False
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    qk_nope_dim: int = 0
    qk_rope_dim: int = 0
    v_head_dim: int = 0
    mtp_layers: int = 0
    capacity_factor: float = 1.0
    frozen_weights: bool = False
    extra_parameters: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        """Fill what follows from the rest, refuse what cannot be."""
        for name in ("layers", "hidden", "heads", "vocabulary", "sequence"):
            _check_positive(name, getattr(self, name))
        _set(self, "kv_heads", self.kv_heads or self.heads)
        _set(self, "head_dim", self.head_dim or self.hidden // self.heads)
        _set(self, "expert_ffn", (self.expert_ffn or self.ffn) if self.experts else 0)
        _check_positive("head_dim", self.head_dim)
        _check_positive("expert_ffn" if self.experts else "ffn", self.expert_ffn if self.experts else self.ffn)
        if self.heads % self.kv_heads:
            raise ConfigError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}; choose a divisor")
        if self.experts and not 1 <= self.top_k <= self.experts:
            raise ConfigError(
                f"top_k={self.top_k} is not between 1 and experts={self.experts}; set it to the active experts"
            )
        if not 0 < self.capacity_factor < math.inf:
            raise ConfigError(
                f"capacity_factor={self.capacity_factor!r} leaves experts no room; use 1 for none to spare"
            )

    @property
    def is_latent(self) -> bool:
        """Whether keys and values are stored as one low-rank vector (multi-head latent attention)."""
        return self.kv_lora_rank > 0

    @property
    def moe_layers(self) -> int:
        """Layers with experts."""
        return (self.layers - self.first_dense_layers) // self.moe_every if self.experts else 0

    @property
    def attention_parameters(self) -> int:
        """Weights of one attention block."""
        if self.is_latent:
            return _count_latent_attention(self)
        return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    @property
    def dense_mlp_parameters(self) -> int:
        """Weights of one dense MLP."""
        return (3 if self.gated else 2) * self.hidden * self.ffn

    @property
    def expert_parameters(self) -> int:
        """Weights of one expert."""
        return (3 if self.gated else 2) * self.hidden * self.expert_ffn

    @property
    def embedding_parameters(self) -> int:
        """Weights of the token embedding and the output head, once if tied, with learned positions."""
        positions = self.sequence * self.hidden if self.learned_positions else 0
        return self.vocabulary * self.hidden * (1 if self.tied_embeddings else 2) + positions

    @property
    def num_parameters(self) -> int:
        """All weights, all experts included, without the extra prediction layers."""
        moe = self.moe_layers
        sparse = self.hidden * self.experts + (self.experts + self.shared_experts) * self.expert_parameters
        dense = (self.layers - moe) * self.dense_mlp_parameters
        norms = (2 * self.layers + 1) * self.hidden
        layers = self.layers * self.attention_parameters + dense + moe * sparse + norms
        return layers + self.embedding_parameters + self.extra_parameters

    @property
    def num_active_parameters(self) -> int:
        """Weights that one token meets."""
        idle = self.moe_layers * (self.experts - self.top_k) * self.expert_parameters
        return self.num_parameters - idle

    def with_sequence(self, sequence: int) -> ModelShape:
        """Return the same model on sequences of `sequence` tokens."""
        return replace(self, sequence=sequence)


def _count_latent_attention(shape: ModelShape) -> int:
    query = shape.heads * (shape.qk_nope_dim + shape.qk_rope_dim)
    queries = shape.q_lora_rank * (shape.hidden + query) if shape.q_lora_rank else shape.hidden * query
    keys = shape.hidden * (shape.kv_lora_rank + shape.qk_rope_dim)
    values = shape.kv_lora_rank * shape.heads * (shape.qk_nope_dim + shape.v_head_dim)
    return queries + keys + values + shape.heads * shape.v_head_dim * shape.hidden


@dataclass(frozen=True)
class OperatorCost:
    """One traced operator for one sample: operations, bytes read and written, weights, activation kept for backward."""

    name: str
    flops: float
    bytes: float
    parameters: int = 0
    kept_bytes: float = 0.0
    is_matmul: bool = True


@dataclass(frozen=True)
class OperatorList:
    """A network as the list of its traced operators, in the order in which they run.

    >>> OperatorList("two", (OperatorCost("a", 10.0, 4.0, 3), OperatorCost("b", 5.0, 2.0))).num_parameters
    3
    """

    name: str
    operators: tuple[OperatorCost, ...]

    def __post_init__(self) -> None:
        """An empty list has no cost to predict."""
        if not self.operators:
            raise ConfigError("an operator list without operators has nothing to predict; trace a model first")

    @property
    def num_parameters(self) -> int:
        """All weights."""
        return sum(operator.parameters for operator in self.operators)

    @property
    def flops(self) -> float:
        """Operations of one forward pass of one sample."""
        return sum(operator.flops for operator in self.operators)


def _set(value: object, name: str, to: int) -> None:
    object.__setattr__(value, name, to)


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}={value!r} is not a positive whole number; give the model's {name.replace('_', ' ')}")


# Field of a shape -> the keys under which configurations of decoders store it, the first found wins.
_CONFIG_KEYS: dict[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "layers"),
    "hidden": ("hidden_size", "n_embd", "d_model", "dim", "hidden"),
    "heads": ("num_attention_heads", "num_heads", "n_head", "n_heads", "heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads"),
    "head_dim": ("head_dim",),
    "ffn": ("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim", "d_ff", "ffn"),
    "vocabulary": ("vocab_size", "vocabulary"),
    "sequence": ("sequence_length", "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "sequence"),
    "experts": ("n_routed_experts", "num_local_experts", "num_experts", "experts"),
    "top_k": ("num_experts_per_tok", "experts_per_token", "top_k"),
    "expert_ffn": ("moe_intermediate_size", "expert_ffn"),
    "shared_experts": ("n_shared_experts", "shared_experts"),
    "first_dense_layers": ("first_k_dense_replace", "first_dense_layers"),
    "moe_every": ("decoder_sparse_step", "moe_layer_freq", "moe_every"),
    "q_lora_rank": ("q_lora_rank",),
    "kv_lora_rank": ("kv_lora_rank",),
    "qk_nope_dim": ("qk_nope_head_dim", "qk_nope_dim"),
    "qk_rope_dim": ("qk_rope_head_dim", "qk_rope_dim"),
    "v_head_dim": ("v_head_dim",),
    "mtp_layers": ("num_nextn_predict_layers", "mtp_layers"),
    "capacity_factor": ("capacity_factor",),
    "tied_embeddings": ("tie_word_embeddings", "tied_embeddings"),
}
_NEEDED = ("layers", "hidden", "heads", "vocabulary", "sequence")
USUAL_SEQUENCE = 2048  # of families that learn no positions and may leave the longest one out


def model_shape_from_config(config: Mapping[str, Any], *, sequence: int | None = None) -> ModelShape:
    """Read the shape out of a decoder's configuration (Hugging Face `config.json`, or one of ours).

    `sequence` is the training length in tokens; without it the configuration's longest position is taken. A
    `model_type` that is no row of `families.py` is refused.

    >>> model_shape_from_config({"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257,
    ...                          "n_positions": 1024}).num_parameters
    124439808
    """
    kind = str(config.get("model_type") or "")
    family = _find_family(kind)
    if config.get("add_cross_attention"):
        raise ConfigError("add_cross_attention adds layers that look at an encoder, which a ModelShape cannot say")
    own = {field: (key, *_CONFIG_KEYS[field]) for field, key in family.keys.items()}
    found = {field: _find(config, keys) for field, keys in {**_CONFIG_KEYS, **own}.items()}
    if sequence is not None or (not found["sequence"] and kind and not family.has_positions):
        found["sequence"] = USUAL_SEQUENCE if sequence is None else sequence
    missing = [field for field in _NEEDED if not found[field]]
    if missing:
        known = " or ".join(_CONFIG_KEYS[missing[0]][:3])
        raise ConfigError(f"the configuration gives no {missing[0]}; expected the key {known}")
    is_gated = family.is_gated and config.get("gated") is not False
    found["ffn"] = found["ffn"] or (0 if is_gated or found["experts"] else 4 * int(found["hidden"]))
    said = next((config[key] for key in _CONFIG_KEYS["tied_embeddings"] if config.get(key) is not None), family.is_tied)
    found["tied_embeddings"] = bool(said)
    if family.adjust is not None:
        family.adjust(config, found)
    values = {field: value for field, value in found.items() if value}
    positions = family.has_positions or bool(config.get("learned_positions"))
    if "ffn" not in values and not values.get("expert_ffn"):
        raise ConfigError("the configuration gives no ffn; expected the key intermediate_size")
    shape = ModelShape(**{"ffn": 0, **values}, gated=is_gated, learned_positions=positions, name=kind)
    sizes = ModelSizes(**{size.name: getattr(shape, size.name) for size in fields(ModelSizes)})
    return replace(shape, extra_parameters=family.count_extra(config, sizes))


def _find_family(kind: str) -> ModelFamily:
    """Find the row of a `model_type`; without one, sizes are those of a plain decoder."""
    if not kind:
        return ModelFamily()
    if kind not in FAMILIES:
        raise ConfigError(
            explain_unknown("model_type", kind, FAMILIES) + "; describe it as a ModelShape, or trace it with "
            "planning.models.from_module"
        )
    return FAMILIES[kind]


def _find(config: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((config[key] for key in keys if config.get(key) is not None), 0)


@cache
def load_model_shapes() -> dict[str, ModelShape]:
    """Return every named shape of `model_shapes.csv`, with its usual training length."""
    text = files("deepseek.planning.models").joinpath("model_shapes.csv").read_text(encoding="utf-8")
    return {row["name"]: _read_row(row) for row in csv.DictReader(text.splitlines())}


def _read_row(row: Mapping[str, str]) -> ModelShape:
    flags = {"gated", "tied_embeddings", "learned_positions"}
    skipped = {"name", "parameters_billion", "source"}
    values = {key: int(text) for key, text in row.items() if text and key not in skipped}
    return ModelShape(**{**values, **{key: bool(values.get(key)) for key in flags}}, name=row["name"])  # type: ignore[arg-type]


def get_model_shape(name: str) -> ModelShape:
    """Return the shape called `name`; an unknown name lists the nearest known ones.

    >>> get_model_shape("DeepSeek-V3").experts
    256
    """
    known = load_model_shapes()
    if name not in known:
        raise ConfigError(explain_unknown("model", name, known))
    return known[name]
