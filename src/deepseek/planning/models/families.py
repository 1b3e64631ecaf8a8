"""Families of models, as rows: how a `model_type` writes its sizes, and which weights it has beside a plain decoder's.

`ModelShape` counts attention, MLPs, experts, embeddings and one scale per norm. What a family adds is small (biases,
norms of queries and keys, the head of an encoder) or takes away (norms without weights), so a row is a sum of terms,
each a formula over the sizes. Every row is held against the model that transformers builds on the meta device, over
varied sizes and flags (`tests/planning/models/test_families.py`). A family that is no row is counted by building it
(`built_families.py`) or refused: a count that is off by half would make every plan wrong in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from deepseek.core.errors import ConfigError

Config = Mapping[str, Any]


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model that terms read, by the names that `ModelShape` gives them."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    gated: bool
    vocabulary: int
    sequence: int
    experts: int
    expert_ffn: int
    shared_experts: int
    moe_layers: int
    is_latent: bool
    q_lora_rank: int
    kv_lora_rank: int
    qk_rope_dim: int


Term = Callable[[Config, ModelSizes], int]


def _qkv_bias(_: Config, shape: ModelSizes) -> int:
    return shape.layers * shape.head_dim * (shape.heads + 2 * shape.kv_heads)


def _out_bias(_: Config, shape: ModelSizes) -> int:
    return shape.layers * shape.hidden


def _mlp_bias(_: Config, shape: ModelSizes) -> int:
    return shape.layers * (shape.ffn * (1 + shape.gated) + shape.hidden)


def _norm_bias(_: Config, shape: ModelSizes) -> int:
    return (2 * shape.layers + 1) * shape.hidden


def _layer_norms(count: int) -> Term:
    """Count `count` more norms of the hidden size in every layer."""
    return lambda _, shape: count * shape.layers * shape.hidden


def _final_norms(count: int) -> Term:
    """Count `count` more norms of the hidden size in the model."""
    return lambda _, shape: count * shape.hidden


def _head_norms(count: int = 2) -> Term:
    """Count norms of queries and keys, one scale per channel of a head."""
    return lambda _, shape: count * shape.layers * shape.head_dim


def _whole_norms(_: Config, shape: ModelSizes) -> int:
    """Count norms of queries and keys over all their heads."""
    return shape.layers * shape.head_dim * (shape.heads + shape.kv_heads)


def _latent_norms(_: Config, shape: ModelSizes) -> int:
    return shape.layers * (shape.q_lora_rank + shape.kv_lora_rank) if shape.is_latent else 0


def _latent_bias(_: Config, shape: ModelSizes) -> int:
    """Count the biases of the projections into the latent space and of the output."""
    return shape.layers * (shape.q_lora_rank + shape.kv_lora_rank + shape.qk_rope_dim + shape.hidden)


def _expert_mlp_bias(_: Config, shape: ModelSizes) -> int:
    """Count the biases of dense MLPs and of shared experts; routed experts have none."""
    shared = (
        shape.moe_layers * (2 * shape.shared_experts * shape.expert_ffn + shape.hidden) * (shape.shared_experts > 0)
    )
    return (shape.layers - shape.moe_layers) * (2 * shape.ffn + shape.hidden) + shared


def _router_bias(_: Config, shape: ModelSizes) -> int:
    return shape.moe_layers * shape.experts


def _vocabulary_bias(_: Config, shape: ModelSizes) -> int:
    return shape.vocabulary


def _positions(offset: int = 0, keys: tuple[str, ...] = ("max_position_embeddings", "n_positions")) -> Term:
    """Count learned positions as many as the model has, where training sequences may be shorter."""

    def count(config: Config, shape: ModelSizes) -> int:
        longest = next((int(config[key]) for key in keys if config.get(key)), shape.sequence)
        return (longest + offset - shape.sequence) * shape.hidden

    return count


def _when(key: str, *terms: Term, default: bool = False) -> Term:
    """Count `terms` where the configuration switches `key` on."""

    def count(config: Config, shape: ModelSizes) -> int:
        return sum(term(config, shape) for term in terms) if config.get(key, default) else 0

    return count


def _unless(key: str, *terms: Term, default: bool = False) -> Term:
    def count(config: Config, shape: ModelSizes) -> int:
        return 0 if config.get(key, default) else sum(term(config, shape) for term in terms)

    return count


def _encoder_head(config: Config, shape: ModelSizes) -> int:
    """Count what a masked language model adds: token types, and a head with a transformation, a norm and a bias.

    The norm of the embeddings counts as the final norm that a decoder has and an encoder has not.
    """
    types = int(config.get("type_vocab_size", 2)) * shape.hidden
    transform = shape.hidden * (shape.hidden + 1) + 2 * shape.hidden
    return types + transform + shape.vocabulary


@dataclass(frozen=True)
class ModelFamily:
    """How one family writes its sizes; `keys` names a field's own key, `fixed` what no configuration says.

    `is_tied` is what a configuration means that does not say whether embedding and head are one.
    """

    terms: tuple[Term, ...] = ()
    is_gated: bool = True
    is_tied: bool = False
    has_positions: bool = False
    keys: Mapping[str, str] = field(default_factory=dict)
    adjust: Callable[[Config, dict[str, Any]], None] | None = None

    def count_extra(self, config: Config, shape: ModelSizes) -> int:
        """Count the weights that the sizes of `shape` do not imply."""
        return sum(term(config, shape) for term in self.terms)


def _read_falcon(config: Config, values: dict[str, Any]) -> None:
    if config.get("new_decoder_architecture"):
        values["kv_heads"] = config.get("num_kv_heads") or values["heads"]
    else:
        values["kv_heads"] = 1 if config.get("multi_query", True) else values["heads"]


def _read_bigcode(config: Config, values: dict[str, Any]) -> None:
    values["kv_heads"] = 1 if config.get("multi_query", True) else values["heads"]


def _read_qwen_experts(config: Config, values: dict[str, Any]) -> None:
    """Read the shared expert of Qwen2-MoE, which has a width of its own, as several of the usual width."""
    if config.get("mlp_only_layers"):
        raise ConfigError("mlp_only_layers keeps some layers dense, which a ModelShape cannot say; plan without them")
    shared, width = int(config.get("shared_expert_intermediate_size") or 0), int(values.get("expert_ffn") or 0)
    if shared and (not width or shared % width):
        raise ConfigError(
            f"shared_expert_intermediate_size={shared} is no multiple of moe_intermediate_size={width}; "
            "describe the model as a ModelShape"
        )
    values["shared_experts"] = shared // width if shared else 0


def _read_mpt(config: Config, values: dict[str, Any]) -> None:
    attention = config.get("attn_config") or {}
    values["kv_heads"] = attention.get("kv_n_heads") or values["heads"]
    values["ffn"] = 4 * values["hidden"]  # transformers does not read expansion_ratio


def _refuse_projection(config: Config, values: dict[str, Any]) -> None:
    if config.get("word_embed_proj_dim") not in (None, values["hidden"]):
        raise ConfigError("word_embed_proj_dim projects the embeddings, which a ModelShape cannot say; trace the model")


_BIASES = (_qkv_bias, _out_bias)
_LLAMA = (_when("attention_bias", *_BIASES), _when("mlp_bias", _mlp_bias))
_LATENT = (_latent_norms, _when("attention_bias", _latent_bias))
_PLAIN_BIASES = (*_BIASES, _mlp_bias, _norm_bias)
_BERT = (*_PLAIN_BIASES, _encoder_head, _positions())

FAMILIES: dict[str, ModelFamily] = {
    "llama": ModelFamily(_LLAMA),
    "mistral": ModelFamily(),
    "ministral3": ModelFamily(),
    "mixtral": ModelFamily(),
    "cwm": ModelFamily((_when("mlp_bias", _mlp_bias),)),
    "ernie4_5": ModelFamily((_when("use_bias", *_BIASES, _mlp_bias),), is_tied=True),
    "eurobert": ModelFamily((*_LLAMA, _when("mlp_bias", _vocabulary_bias))),
    "exaone4": ModelFamily((_head_norms(),)),
    "granite": ModelFamily(_LLAMA),
    "granitemoe": ModelFamily(_LLAMA[:1]),
    "helium": ModelFamily((_when("attention_bias", _qkv_bias), _when("mlp_bias", _mlp_bias))),
    "hyperclovax": ModelFamily((*_LLAMA, _when("use_post_norm", _layer_norms(2), default=True))),
    "iquestcoder": ModelFamily(_LLAMA),
    "smollm3": ModelFamily(_LLAMA, is_tied=True),
    "seed_oss": ModelFamily(
        (
            _when("attention_bias", _qkv_bias, default=True),
            _when("attention_out_bias", _out_bias),
            _when("mlp_bias", _mlp_bias),
        )
    ),
    "arcee": ModelFamily(_LLAMA, is_gated=False),
    "nemotron": ModelFamily((*_LLAMA, _norm_bias), is_gated=False),
    "olmo": ModelFamily((_LLAMA[0], lambda _, shape: -(2 * shape.layers + 1) * shape.hidden)),
    "olmo2": ModelFamily((_LLAMA[0], _whole_norms)),
    "olmo3": ModelFamily((_LLAMA[0], _whole_norms)),
    "olmoe": ModelFamily((_LLAMA[0], _whole_norms)),
    "gemma": ModelFamily(_LLAMA[:1], is_tied=True),
    "gemma2": ModelFamily((_LLAMA[0], _layer_norms(2)), is_tied=True),
    "gemma3_text": ModelFamily((_LLAMA[0], _layer_norms(2), _head_norms()), is_tied=True),
    "qwen2": ModelFamily((_qkv_bias,)),
    "qwen2_moe": ModelFamily(
        (_when("qkv_bias", _qkv_bias, default=True), lambda _, shape: shape.moe_layers * shape.hidden),
        adjust=_read_qwen_experts,
    ),
    "qwen3": ModelFamily((_LLAMA[0], _head_norms())),
    "qwen3_moe": ModelFamily((_LLAMA[0], _head_norms()), adjust=_read_qwen_experts),
    "glm": ModelFamily((_when("attention_bias", _qkv_bias, default=True),)),
    "glm4": ModelFamily((_when("attention_bias", _qkv_bias, default=True), _layer_norms(2))),
    "glm4_moe": ModelFamily((_when("attention_bias", _qkv_bias), _when("use_qk_norm", _head_norms()))),
    "cohere": ModelFamily((_LLAMA[0], _layer_norms(-1), _when("use_qk_norm", _whole_norms)), is_tied=True),
    "cohere2": ModelFamily((_LLAMA[0], _layer_norms(-1)), is_tied=True),
    "phi": ModelFamily(
        (*_PLAIN_BIASES, _layer_norms(-2), _vocabulary_bias, _when("qk_layernorm", _head_norms(4))), is_gated=False
    ),
    "phi3": ModelFamily(),
    "phimoe": ModelFamily((_LLAMA[0], _norm_bias, _when("lm_head_bias", _vocabulary_bias))),
    "stablelm": ModelFamily(
        (
            _norm_bias,
            _when("use_qkv_bias", _qkv_bias),
            _when("use_parallel_residual", _layer_norms(-2)),
            _when("qk_layernorm", _whole_norms),
        )
    ),
    "starcoder2": ModelFamily(
        (_norm_bias, _when("use_bias", *_BIASES, _mlp_bias, default=True)), is_gated=False, is_tied=True
    ),
    "gpt2": ModelFamily((*_PLAIN_BIASES, _positions()), is_gated=False, is_tied=True, has_positions=True),
    "gpt_bigcode": ModelFamily(
        (*_PLAIN_BIASES, _positions()), is_gated=False, is_tied=True, has_positions=True, adjust=_read_bigcode
    ),
    "gpt_neo": ModelFamily(
        (_out_bias, _mlp_bias, _norm_bias, _positions()), is_gated=False, is_tied=True, has_positions=True
    ),
    "gpt_neox": ModelFamily((_when("attention_bias", *_BIASES, default=True), _mlp_bias, _norm_bias), is_gated=False),
    "gptj": ModelFamily((_mlp_bias, _norm_bias, _layer_norms(-2), _vocabulary_bias), is_gated=False),
    "codegen": ModelFamily((_mlp_bias, _norm_bias, _layer_norms(-2), _vocabulary_bias), is_gated=False),
    "falcon": ModelFamily(
        (
            _norm_bias,
            _when("bias", *_BIASES, _mlp_bias),
            _unless("new_decoder_architecture", _when("parallel_attn", _layer_norms(-2), default=True)),
        ),
        is_gated=False,
        is_tied=True,
        keys={"ffn": "ffn_hidden_size"},
        adjust=_read_falcon,
    ),
    "persimmon": ModelFamily((*_PLAIN_BIASES, _when("qk_layernorm", _head_norms(4), default=True)), is_gated=False),
    "bloom": ModelFamily((*_PLAIN_BIASES, _final_norms(2)), is_gated=False, is_tied=True),
    "mpt": ModelFamily((), is_gated=False, is_tied=True, adjust=_read_mpt),
    "opt": ModelFamily(
        (
            _when("enable_bias", *_BIASES, _mlp_bias, default=True),
            _norm_bias,
            _positions(2),
            _unless("do_layer_norm_before", _final_norms(-2), default=True),
        ),
        is_gated=False,
        is_tied=True,
        has_positions=True,
        adjust=_refuse_projection,
    ),
    "deepseek_v2": ModelFamily((*_LATENT, _when("mlp_bias", _expert_mlp_bias))),
    "deepseek_v3": ModelFamily(_LATENT),
    "minicpm3": ModelFamily((*_LATENT, _LLAMA[1]), is_tied=True),
    "gpt_oss": ModelFamily(
        (
            _when("attention_bias", *_BIASES, default=True),
            lambda _, shape: shape.layers * shape.heads,  # a sink in every head
            _router_bias,
            lambda _, shape: shape.moe_layers * shape.experts * (2 * shape.expert_ffn + shape.hidden),
        )
    ),
    "minimax_m2": ModelFamily((_whole_norms,)),
    "bert": ModelFamily(_BERT, is_gated=False, is_tied=True, has_positions=True),
    "roberta": ModelFamily(_BERT, is_gated=False, is_tied=True, has_positions=True),
    "camembert": ModelFamily(_BERT, is_gated=False, is_tied=True, has_positions=True),
    "xlm-roberta": ModelFamily(_BERT, is_gated=False, is_tied=True, has_positions=True),
    "data2vec-text": ModelFamily(_BERT, is_gated=False, is_tied=True, has_positions=True),
    "ernie": ModelFamily(_BERT, is_gated=False, is_tied=True, has_positions=True),
}
"""`model_type` -> its row."""
