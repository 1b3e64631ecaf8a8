"""Map our decoder to its counterparts at Hugging Face: the same weights and settings under other names, both ways.

    Llama     every tensor has one counterpart; only names differ
    GPT-2     weights are stored (in, out) instead of (out, in), and queries, keys and values are one tensor
    Mixtral   each expert's projections are tensors of their own; ours are stacked, (experts, in, out)

A `Family` is one such counterpart, written as tables: rows of (our name, their name), where `{layer}` is a number and
`{rest}` whatever follows, and rows of (our setting, their setting, their default). `load_model` and `save_model` use
them. Rotary halves are paired as Hugging Face pairs them, so no family needs a permutation. What ours cannot follow
(scaled rotary angles, sliding windows) is refused by name, and a shape that they cannot express has no family.

Shapes: E experts, D hidden, F ffn. Cost: renaming copies nothing; GPT-2 and Mixtral copy what they transpose or stack.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from deepseek.core.errors import ArtifactError, ConfigError
from deepseek.core.names import explain_unknown
from deepseek.models.decoder.model import DecoderConfig

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """One model type of Hugging Face."""

    model_type: str
    """`model_type` in its config.json."""
    class_name: str
    """The class in `transformers` that reads it."""
    settings: tuple[tuple[str, str, Any], ...]
    """(our setting, theirs, their default); a dot goes into a nested config of ours."""
    shared: Mapping[str, Any]
    """Our settings that every member of the family has in common."""
    required: Mapping[str, tuple[Any, ...]]
    """Their settings that change the computation, with the values that ours follows; the first is their default."""
    names: tuple[tuple[str, str], ...]
    """(our tensor, theirs), after `unpack`."""
    unpack: Callable[[Mapping[str, Tensor]], Tensors]
    """Transposes, splits or stacks their tensors until each is one of ours."""
    pack: Callable[[Mapping[str, Tensor]], Tensors]
    """The inverse of `unpack`."""


def find_family(config: DecoderConfig) -> Family | None:
    """Return the family that can express `config`, or None.

    >>> find_family(DecoderConfig()).model_type
    'llama'
    """
    return next((family for family in FAMILIES.values() if _is_member(config, family)), None)


def import_config(values: Mapping[str, Any]) -> tuple[DecoderConfig, Family]:
    """Return our config for a Hugging Face `config.json`, and its family.

    Raises `ConfigError` for another model type and for a setting that our decoder does not follow.
    """
    model_type = str(values.get("model_type"))
    if model_type not in FAMILIES:
        raise ConfigError(explain_unknown("Hugging Face model type", model_type, FAMILIES))
    family = FAMILIES[model_type]
    values = _complete(values)
    for key, followed in family.required.items():
        if values.get(key, followed[0]) not in followed:
            raise ConfigError(
                f"this {model_type} model has {key}={values[key]!r} and the decoder follows "
                f"{' or '.join(map(repr, followed))} only; choose another model"
            )
    ours = {key: values.get(their_key, default) for key, their_key, default in family.settings}
    return DecoderConfig.from_dict(_nest(ours | dict(family.shared))), family


def export_config(config: DecoderConfig, family: Family, dtype: torch.dtype) -> dict[str, Any]:
    """Return the `config.json` of a decoder whose weights are stored as `dtype`."""
    identity = {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        "torch_dtype": str(dtype).removeprefix("torch."),
        # Which tokens begin and end a text is the tokenizer's to say; left out, the family's own defaults would hold.
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return identity | {their_key: _look_up(config, key) for key, their_key, _ in family.settings}


def import_tensors(tensors: Mapping[str, Tensor], family: Family) -> Tensors:
    """Rename Hugging Face tensors to ours. Raises `ArtifactError` for one that our decoder has no parameter for."""
    learned = {name: tensor for name, tensor in tensors.items() if not _COMPUTED.fullmatch(name)}
    table = tuple((theirs, ours) for ours, theirs in family.names)
    return {_translate(name, table, family): tensor for name, tensor in family.unpack(learned).items()}


def export_tensors(tensors: Mapping[str, Tensor], family: Family) -> Tensors:
    """Rename our tensors to Hugging Face names, the inverse of `import_tensors`."""
    return family.pack({_translate(name, family.names, family): tensor for name, tensor in tensors.items()})


def tie_as_stored(config: DecoderConfig, tensors: Mapping[str, Tensor]) -> DecoderConfig:
    """Return `config` with the tying that `tensors`, under our names, have: a file with another head is not tied.

    What a config says about it may be older than the file: a head that was trained on is in the file, a head that is
    the embedding is left out of it.
    """
    head, embedding = tensors.get("head.weight"), tensors.get("embed.weight")
    if embedding is None:
        return config
    is_tied = head is None or (head.shape == embedding.shape and torch.equal(head, embedding))
    return config.override({"tie_embeddings": is_tied})


# ---- settings

# Tables of angles and masks that old files carry beside what was learned.
_COMPUTED = re.compile(r".*(\.rotary_emb\.inv_freq|\.attn\.(masked_)?bias)")


def _complete(values: Mapping[str, Any]) -> dict[str, Any]:
    """Their settings with rotary ones on the top level, wherever their version kept them, and GPT-2's default width."""
    rotary = values.get("rope_parameters") or values.get("rope_scaling") or {}
    completed = dict(values) | rotary | {"rope_type": rotary.get("rope_type", rotary.get("type", "default"))}
    if completed.get("n_inner") is None:
        completed["n_inner"] = 4 * completed.get("n_embd", 768)
    return completed


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"moe.top_k": 2} -> {"moe": {"top_k": 2}}."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        parent, dot, child = key.partition(".")
        if dot:
            nested.setdefault(parent, {})[child] = value
        else:
            nested[key] = value
    return nested


def _look_up(config: DecoderConfig, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _is_member(config: DecoderConfig, family: Family) -> bool:
    """Whether the family's settings say all there is to say about `config`."""
    is_split_evenly = config.hidden_size % config.num_heads == 0  # transformers insists, whatever the head size
    if not is_split_evenly or any(_look_up(config, key) != value for key, value in family.shared.items()):
        return False
    if family.model_type == "gpt2":
        return config.kv_heads == config.num_heads and config.size_of_head * config.num_heads == config.hidden_size
    if family.model_type == "mixtral":
        return config.moe is not None and config.moe.num_candidates is None and config.moe.balance_rate == 0
    return True


# ---- names


@cache
def _compile(template: str) -> re.Pattern[str]:
    pattern = re.escape(template).replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{rest\}", r"(?P<rest>.+)")
    return re.compile(pattern)


def _translate(name: str, table: tuple[tuple[str, str], ...], family: Family) -> str:
    for source, target in table:
        match = _compile(source).fullmatch(name)
        if match:
            return target.format(**match.groupdict())
    raise ArtifactError(f"tensor {name!r} has no place in a {family.model_type} decoder; choose another model")


# ---- GPT-2

_PREFIX = "transformer."
_QKV = ("q_proj", "k_proj", "v_proj")
_CONV1D = re.compile(r"h\.\d+\.(attn|mlp)\..+\.weight")  # stored (in, out)


def _unpack_gpt2(tensors: Mapping[str, Tensor]) -> Tensors:
    unpacked: Tensors = {}
    for full_name, stored in tensors.items():
        name = full_name.removeprefix(_PREFIX)
        tensor = stored.t().contiguous() if _CONV1D.fullmatch(name) else stored
        if ".c_attn." in name:
            parts = zip(_QKV, tensor.chunk(3), strict=True)
            unpacked |= {name.replace("c_attn", projection): part for projection, part in parts}
        else:
            unpacked[name] = tensor
    return unpacked


def _pack_gpt2(tensors: Mapping[str, Tensor]) -> Tensors:
    joined: Tensors = {}
    for name, tensor in tensors.items():
        if ".q_proj." in name:
            parts = [tensors[name.replace("q_proj", projection)] for projection in _QKV]
            joined[name.replace("q_proj", "c_attn")] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:  # they went with q_proj
            joined[name] = tensor
    return {
        name if name.startswith("lm_head.") else _PREFIX + name: tensor.t() if _CONV1D.fullmatch(name) else tensor
        for name, tensor in joined.items()
    }


# ---- Mixtral

_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<matrix>w[123])\.weight")
_GATE, _BIAS = ".block_sparse_moe.gate.weight", ".block_sparse_moe.balance_bias_E"
_MATRICES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def _unpack_mixtral(tensors: Mapping[str, Tensor]) -> Tensors:
    unpacked: Tensors = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _EXPERT.fullmatch(name)
        if match:
            stack = experts.setdefault(f"{match['experts']}.{_MATRICES[match['matrix']]}", {})
            stack[int(match["number"])] = tensor.t()
            continue
        unpacked[name] = tensor
        if name.endswith(_GATE):
            unpacked[name.replace(_GATE, _BIAS)] = torch.zeros(tensor.shape[0])  # Mixtral has none
    return unpacked | {
        name: torch.stack([stack[number] for number in sorted(stack)]) for name, stack in experts.items()
    }


def _pack_mixtral(tensors: Mapping[str, Tensor]) -> Tensors:
    packed: Tensors = {}
    matrices = {ours: theirs for theirs, ours in _MATRICES.items()}
    for name, tensor in tensors.items():
        experts, _, projection = name.rpartition(".")
        if experts.endswith(".experts"):
            for number, weight_IO in enumerate(tensor):
                packed[f"{experts}.{number}.{matrices[projection]}.weight"] = weight_IO.t()
        elif name.endswith(_BIAS):
            if tensor.any():
                raise ArtifactError("a balancing bias steers these experts and Mixtral has none; use our own layout")
        else:
            packed[name] = tensor
    return packed


# ---- the families

_ROTARY_SETTINGS = (
    ("vocab_size", "vocab_size", 32000),
    ("num_layers", "num_hidden_layers", 32),
    ("hidden_size", "hidden_size", 4096),
    ("num_heads", "num_attention_heads", 32),
    ("head_size", "head_dim", None),
    ("tie_embeddings", "tie_word_embeddings", False),
)
_ROTARY_REQUIRED = {
    "hidden_act": ("silu", "swish"),
    "rope_type": ("default",),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (None,),
}
_ROTARY_NAMES = (
    ("embed.weight", "model.embed_tokens.weight"),
    ("layers.{layer}.attention_norm.weight", "model.layers.{layer}.input_layernorm.weight"),
    ("layers.{layer}.attention.{rest}", "model.layers.{layer}.self_attn.{rest}"),
    ("layers.{layer}.feedforward_norm.weight", "model.layers.{layer}.post_attention_layernorm.weight"),
    ("norm.weight", "model.norm.weight"),
    ("head.weight", "lm_head.weight"),
)

LLAMA = Family(
    model_type="llama",
    class_name="LlamaForCausalLM",
    settings=(
        *_ROTARY_SETTINGS,
        ("num_kv_heads", "num_key_value_heads", None),
        ("ffn_size", "intermediate_size", 11008),
        ("max_length", "max_position_embeddings", 2048),
        ("norm_eps", "rms_norm_eps", 1e-6),
        ("rope_theta", "rope_theta", 10000.0),
        ("attention_bias", "attention_bias", False),
        ("feedforward_bias", "mlp_bias", False),
    ),
    shared={"norm": "rms", "feedforward": "swiglu", "position": "rotary", "moe": None, "mask": None},
    required=_ROTARY_REQUIRED,
    names=(*_ROTARY_NAMES, ("layers.{layer}.feedforward.{rest}", "model.layers.{layer}.mlp.{rest}")),
    unpack=dict,
    pack=dict,
)

GPT2 = Family(
    model_type="gpt2",
    class_name="GPT2LMHeadModel",
    settings=(
        ("vocab_size", "vocab_size", 50257),
        ("num_layers", "n_layer", 12),
        ("hidden_size", "n_embd", 768),
        ("num_heads", "n_head", 12),
        ("ffn_size", "n_inner", None),
        ("max_length", "n_positions", 1024),
        ("norm_eps", "layer_norm_epsilon", 1e-5),
        ("tie_embeddings", "tie_word_embeddings", True),
    ),
    shared={
        "norm": "layer",
        "feedforward": "gelu",
        "position": "learned",
        "attention_bias": True,
        "feedforward_bias": True,
        "moe": None,
        "mask": None,
    },
    required={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "quantization_config": (None,),
    },
    names=(
        ("embed.weight", "wte.weight"),
        ("position_embed.weight", "wpe.weight"),
        ("layers.{layer}.attention_norm.{rest}", "h.{layer}.ln_1.{rest}"),
        ("layers.{layer}.attention.o_proj.{rest}", "h.{layer}.attn.c_proj.{rest}"),
        ("layers.{layer}.attention.{rest}", "h.{layer}.attn.{rest}"),
        ("layers.{layer}.feedforward_norm.{rest}", "h.{layer}.ln_2.{rest}"),
        ("layers.{layer}.feedforward.up_proj.{rest}", "h.{layer}.mlp.c_fc.{rest}"),
        ("layers.{layer}.feedforward.down_proj.{rest}", "h.{layer}.mlp.c_proj.{rest}"),
        ("norm.{rest}", "ln_f.{rest}"),
        ("head.weight", "lm_head.weight"),
    ),
    unpack=_unpack_gpt2,
    pack=_pack_gpt2,
)

MIXTRAL = Family(
    model_type="mixtral",
    class_name="MixtralForCausalLM",
    settings=(
        *_ROTARY_SETTINGS,
        ("num_kv_heads", "num_key_value_heads", 8),
        ("moe.num_experts", "num_local_experts", 8),
        ("moe.top_k", "num_experts_per_tok", 2),
        ("moe.ffn_size", "intermediate_size", 14336),
        ("max_length", "max_position_embeddings", 131072),
        ("norm_eps", "rms_norm_eps", 1e-5),
        ("rope_theta", "rope_theta", 1000000.0),
    ),
    shared={
        "norm": "rms",
        "feedforward": "swiglu",
        "position": "rotary",
        "attention_bias": False,
        "feedforward_bias": False,
        "mask": None,
    },
    required=_ROTARY_REQUIRED | {"sliding_window": (None,)},
    names=(*_ROTARY_NAMES, ("layers.{layer}.feedforward.{rest}", "model.layers.{layer}.block_sparse_moe.{rest}")),
    unpack=_unpack_mixtral,
    pack=_pack_mixtral,
)

FAMILIES = {family.model_type: family for family in (LLAMA, GPT2, MIXTRAL)}
