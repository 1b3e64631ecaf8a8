"""Map our decoder to its counterparts at Hugging Face: the same weights and settings under other names, both ways.

    Llama     every tensor has one counterpart; only names differ
    GPT-2     weights are stored (in, out) instead of (out, in), and queries, keys and values are one tensor
    Mixtral   each expert's projections are tensors of their own; ours are stacked, (experts, in, out)
    Phi-3     queries, keys and values are one tensor, and so are gate and up projection
    Mistral, Qwen 2 and 3, Gemma 1 to 3   as Llama, with more settings

A `Family` is one such counterpart, written as tables: rows of (our name, their name), where `{layer}` is a number and
`{rest}` whatever follows, and rows of (our setting, their setting, their default). `load_model` and `save_model` use
them. Rotary halves are paired as Hugging Face pairs them, so no family needs a permutation. What ours cannot follow is
refused by name, and a shape that they cannot express has no family. Rotary settings are in `rope_settings.py`.

Shapes: E experts, D hidden, F ffn. Cost: renaming copies nothing; GPT-2 and Mixtral copy what they transpose or stack.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from deepseek.core.errors import ArtifactError, ConfigError, first_line
from deepseek.core.names import explain_unknown
from deepseek.models.decoder.model import DecoderConfig
from deepseek.models.decoder.rope_settings import DEFAULTS, RopeDefaults, read_rope, write_rope

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Window:
    """The way a family marks its layers with a sliding window."""

    size: int | None
    """Their default of `sliding_window`."""
    full_every: int | None = None
    """Every so many layers one sees all tokens, where `layer_types` does not say; none leaves the window to all."""
    has_switch: bool = False
    """Whether `use_sliding_window` has to be set, and the layers below `max_window_layers` see all tokens (Qwen)."""


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
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Their linear layers that are several of ours, side by side: the last part of the names."""
    prefix: str = ""
    """What `pack` puts before every name except the head's."""
    rope: RopeDefaults = DEFAULTS
    """Their defaults of rotary settings."""
    window: Window | None = None
    """How their config says which layers see all tokens; none where there are no sliding windows."""


def find_family(config: DecoderConfig, preferred: str | None = None) -> Family | None:
    """Return the family that can express `config`, or None; of several the `preferred` model type, else the first.

    >>> find_family(DecoderConfig()).model_type, find_family(DecoderConfig(), "phi3").model_type
    ('llama', 'phi3')
    """
    families = sorted(FAMILIES.values(), key=lambda family: family.model_type != preferred)
    return next((family for family in families if _is_member(config, family)), None)


def import_config(values: Mapping[str, Any]) -> tuple[DecoderConfig, Family]:
    """Return our config for a Hugging Face `config.json`, and its family.

    Raises `ConfigError` for another model type and for a setting that our decoder does not follow.
    """
    model_type = str(values.get("model_type"))
    if model_type not in FAMILIES:
        raise ConfigError(explain_unknown("Hugging Face model type", model_type, FAMILIES))
    family = FAMILIES[model_type]
    values = _complete(values, family)
    for key, followed in family.required.items():
        if values.get(key, followed[0]) not in followed:
            raise ConfigError(
                f"this {model_type} model has {key}={values[key]!r} and the decoder follows "
                f"{' or '.join(map(repr, followed))} only; choose another model"
            )
    ours = {key: values.get(their_key, default) for key, their_key, default in family.settings}
    if not isinstance(ours["num_layers"], int | float):
        raise ConfigError(f"this {model_type} model has {ours['num_layers']!r} layers; copy its config.json again")
    ours |= _read_window(values, family, int(ours["num_layers"]))
    if family.shared["position"] == "rotary":
        try:
            rope = read_rope(values, family.rope)
        except (TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"this {model_type} model has rotary settings that cannot be read ({first_line(error)}); "
                "copy its config.json again from its origin"
            ) from error
        ours |= {key: value for key, value in rope.items() if key not in family.shared}
        _require_default(rope, family)
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
        "pad_token_id": None,
    }
    settings = {their_key: _look_up(config, key) for key, their_key, _ in family.settings}
    if "num_key_value_heads" in settings:
        settings["num_key_value_heads"] = config.kv_heads
    if (scalar := settings.get("query_pre_attn_scalar")) is not None and scalar == int(scalar):
        settings["query_pre_attn_scalar"] = int(scalar)
    if settings.get("head_dim", 0) is None:  # what some classes take for a size
        del settings["head_dim"]
        if any(key == "head_size" and default is not None for key, _, default in family.settings):
            settings["head_dim"] = config.size_of_head
    if config.position == "rotary":
        settings["max_position_embeddings"] = config.max_length
    return identity | settings | write_rope(config) | _write_window(config, family)


def fit_prefix(tensors: Mapping[str, Tensor], family: Family) -> Tensors:
    """Return `tensors` under the names that `family` begins with, where a file has a prefix more or lacks theirs.

    The embedding says which: `language_model.model.embed_tokens.weight`, or `embed_tokens.weight` of a bare model.

    >>> list(fit_prefix({"embed_tokens.weight": torch.ones(1), "lm_head.weight": torch.ones(1)}, LLAMA))
    ['model.embed_tokens.weight', 'lm_head.weight']
    """
    anchor, head = (_theirs(family, ours) for ours in ("embed.weight", "head.weight"))
    last = ".".join(anchor.split(".")[-2:])
    found = [name for name in tensors if f".{name}".endswith(f".{last}")]
    if len(found) != 1 or found[0] == anchor:
        return dict(tensors)
    seen = found[0]
    if anchor.endswith("." + seen):
        lacking = anchor.removesuffix(seen)
        return {name if name == head else lacking + name: tensor for name, tensor in tensors.items()}
    if seen.endswith("." + anchor):
        return {name.removeprefix(seen.removesuffix(anchor)): tensor for name, tensor in tensors.items()}
    return dict(tensors)


def _theirs(family: Family, ours: str) -> str:
    return next(theirs for name, theirs in family.names if name == ours)


def import_tensors(tensors: Mapping[str, Tensor], family: Family) -> Tensors:
    """Rename Hugging Face tensors to ours. Raises `ArtifactError` for one that our decoder has no parameter for."""
    learned = {name: tensor for name, tensor in tensors.items() if not _COMPUTED.fullmatch(name)}
    table = tuple((theirs, ours) for ours, theirs in family.names)
    return {_translate(name, table, family): tensor for name, tensor in family.unpack(learned).items()}


def export_tensors(tensors: Mapping[str, Tensor], family: Family) -> Tensors:
    """Rename our tensors to Hugging Face names, the inverse of `import_tensors`."""
    return family.pack({_translate(name, family.names, family): tensor for name, tensor in tensors.items()})


def name_module(path: str, family: Family) -> str:
    """Return their name for the linear layer `path` of ours, or for the one that it is a part of.

    >>> name_module("layers.3.attention.k_proj", GPT2), name_module("head", GPT2)
    ('transformer.h.3.attn.c_attn', 'lm_head')
    """
    theirs = _translate(f"{path}.weight", family.names, family).removesuffix(".weight")
    parent, dot, last = theirs.rpartition(".")
    last = next((name for name, parts in family.fused.items() if last in parts), last)
    return f"{'' if path == 'head' else family.prefix}{parent}{dot}{last}"


def find_modules(theirs: str, family: Family) -> list[str]:
    """Return the layers of ours that their linear layer `theirs` is, in order.

    >>> find_modules("model.layers.3.self_attn.qkv_proj", PHI3)[1]
    'layers.3.attention.k_proj'
    """
    parent, dot, last = theirs.removeprefix(family.prefix).rpartition(".")
    table = tuple((other, ours) for ours, other in family.names)
    parts = family.fused.get(last, (last,))
    return [_translate(f"{parent}{dot}{part}.weight", table, family).removesuffix(".weight") for part in parts]


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


def _complete(values: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return their settings with those resolved that have a second name or depend on others."""
    completed = dict(values)
    if completed.get("n_inner") is None:
        completed["n_inner"] = 4 * completed.get("n_embd", 768)
    if completed.get("hidden_activation") is None and "hidden_activation" in family.required:
        completed["hidden_activation"] = family.required["hidden_activation"][0]
    return completed


def _read_window(values: Mapping[str, Any], family: Family, num_layers: int) -> dict[str, Any]:
    """Return our settings of sliding windows."""
    window = family.window
    size = None if window is None else values.get("sliding_window", window.size)
    if window is None or size is None or (window.has_switch and not values.get("use_sliding_window", False)):
        return {"sliding_window": None, "full_layers": ()}
    kinds = values.get("layer_types")
    if not (window.has_switch or window.full_every):
        if kinds is not None and set(kinds) != {"sliding_attention"}:  # transformers does not read it here
            raise ConfigError(
                f"this {family.model_type} model has a sliding window in some of its layers only (layer_types), where "
                f"its class in transformers gives it to all; set layer_types to null if that is meant, or choose "
                "another model"
            )
        full: tuple[int, ...] = ()
    elif kinds is not None:
        full = tuple(layer for layer, kind in enumerate(kinds) if kind == "full_attention")
    elif window.has_switch:
        full = tuple(range(min(int(values.get("max_window_layers", 28)), num_layers)))
    else:
        every = values.get("sliding_window_pattern", window.full_every)
        full = tuple(layer for layer in range(num_layers) if every and (layer + 1) % every == 0)
    if len(full) == num_layers:
        return {"sliding_window": None, "full_layers": ()}
    return {"sliding_window": size, "full_layers": full}


def _write_window(config: DecoderConfig, family: Family) -> dict[str, Any]:
    """Return their settings of sliding windows."""
    if family.window is None:
        return {}
    values: dict[str, Any] = {"sliding_window": config.sliding_window}
    if family.window.has_switch:
        values["use_sliding_window"] = config.sliding_window is not None
    if family.window.has_switch or family.window.full_every:
        windows = [config.window_of(layer) for layer in range(config.num_layers)]
        values["layer_types"] = ["full_attention" if size is None else "sliding_attention" for size in windows]
    return values


def _require_default(rope: Mapping[str, Any], family: Family) -> None:
    """Raise `ConfigError` for a rotary setting that the family's own class does not have."""
    for key in ("rope_fraction", "rope_theta_window"):
        if key in family.shared and rope[key] != family.shared[key]:
            raise ConfigError(
                f"this {family.model_type} model has {key}={rope[key]!r} and the decoder follows "
                f"{family.shared[key]!r} only; choose another model"
            )


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
    """Return whether the family's settings say all there is to say about `config`."""
    is_split_evenly = config.hidden_size % config.num_heads == 0  # transformers insists, whatever the head size
    if not is_split_evenly or any(_look_up(config, key) != value for key, value in family.shared.items()):
        return False
    if family.window is None and config.sliding_window is not None:
        return False
    if family.window is not None and not (family.window.has_switch or family.window.full_every) and config.full_layers:
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


# ---- Phi-3

_QKV_TENSOR, _GATE_UP_TENSOR = ".self_attn.qkv_proj.weight", ".mlp.gate_up_proj.weight"


def _unpack_phi3(tensors: Mapping[str, Tensor]) -> Tensors:
    unpacked: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith(_QKV_TENSOR):
            num_queries = tensors[name.replace("qkv_proj", "o_proj")].shape[1]
            num_keys = (tensor.shape[0] - num_queries) // 2
            parts = zip(_QKV, tensor.split((num_queries, num_keys, num_keys)), strict=True)
            unpacked |= {name.replace("qkv_proj", projection): part for projection, part in parts}
        elif name.endswith(_GATE_UP_TENSOR):
            gate, up = tensor.chunk(2)
            unpacked |= {name.replace("gate_up_proj", "gate_proj"): gate, name.replace("gate_up_proj", "up_proj"): up}
        else:
            unpacked[name] = tensor
    return unpacked


def _pack_phi3(tensors: Mapping[str, Tensor]) -> Tensors:
    packed: Tensors = {}
    for name, tensor in tensors.items():
        if ".q_proj." in name:
            parts = [tensors[name.replace("q_proj", projection)] for projection in _QKV]
            packed[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
        elif ".gate_proj." in name:
            packed[name.replace("gate_proj", "gate_up_proj")] = torch.cat(
                (tensor, tensors[name.replace("gate_proj", "up_proj")])
            )
        elif not any(f".{projection}_proj." in name for projection in ("k", "v", "up")):  # they went with the first
            packed[name] = tensor
    return packed


# ---- the families

# What a decoder has beyond Llama, as Llama has it; families with more override rows.
_PLAIN: dict[str, Any] = {
    "norm": "rms",
    "post_norms": False,
    "qk_norm": False,
    "feedforward": "swiglu",
    "position": "rotary",
    "rope_fraction": 1.0,
    "rope_theta_window": None,
    "query_scalar": None,
    "attention_softcap": None,
    "logits_softcap": None,
    "scale_embeddings": False,
    "attention_bias": False,
    "output_bias": None,
    "feedforward_bias": False,
    "moe": None,
    "mask": None,
}

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

_LLAMA_NAMES = (*_ROTARY_NAMES, ("layers.{layer}.feedforward.{rest}", "model.layers.{layer}.mlp.{rest}"))

LLAMA = Family(
    model_type="llama",
    class_name="LlamaForCausalLM",
    settings=(
        *_ROTARY_SETTINGS,
        ("num_kv_heads", "num_key_value_heads", None),
        ("ffn_size", "intermediate_size", 11008),
        ("norm_eps", "rms_norm_eps", 1e-6),
        ("attention_bias", "attention_bias", False),
        ("feedforward_bias", "mlp_bias", False),
    ),
    shared={key: value for key, value in _PLAIN.items() if key not in ("attention_bias", "feedforward_bias")},
    required=_ROTARY_REQUIRED,
    names=_LLAMA_NAMES,
    unpack=dict,
    pack=dict,
)


def _describe_dense(
    num_kv_heads: int | None, ffn_size: int, norm_eps: float = 1e-6
) -> tuple[tuple[str, str, Any], ...]:
    """Return the settings of a dense family, with its defaults."""
    return (
        *_ROTARY_SETTINGS,
        ("num_kv_heads", "num_key_value_heads", num_kv_heads),
        ("ffn_size", "intermediate_size", ffn_size),
        ("norm_eps", "rms_norm_eps", norm_eps),
    )


def _replace_defaults(settings: tuple[tuple[str, str, Any], ...], **defaults: Any) -> tuple[tuple[str, str, Any], ...]:
    """Return `settings` with other defaults for some of our names."""
    return tuple((ours, theirs, defaults.get(ours, default)) for ours, theirs, default in settings)


MISTRAL = Family(
    model_type="mistral",
    class_name="MistralForCausalLM",
    settings=_describe_dense(8, 14336),
    shared=_PLAIN,
    required=_ROTARY_REQUIRED,
    names=_LLAMA_NAMES,
    unpack=dict,
    pack=dict,
    rope=RopeDefaults(length=131072),
    window=Window(size=4096),
)

_QWEN_SETTINGS = _replace_defaults(_describe_dense(32, 22016), vocab_size=151936)

QWEN2 = Family(
    model_type="qwen2",
    class_name="Qwen2ForCausalLM",
    settings=_QWEN_SETTINGS,
    shared=_PLAIN | {"attention_bias": True, "output_bias": False},
    required=_ROTARY_REQUIRED,
    names=_LLAMA_NAMES,
    unpack=dict,
    pack=dict,
    rope=RopeDefaults(length=32768),
    window=Window(size=4096, has_switch=True),
)

QWEN3 = Family(
    model_type="qwen3",
    class_name="Qwen3ForCausalLM",
    settings=(*_replace_defaults(_QWEN_SETTINGS, head_size=128), ("attention_bias", "attention_bias", False)),
    shared={key: value for key, value in _PLAIN.items() if key != "attention_bias"} | {"qk_norm": True},
    required=_ROTARY_REQUIRED,
    names=_LLAMA_NAMES,
    unpack=dict,
    pack=dict,
    rope=RopeDefaults(length=32768),
    window=Window(size=4096, has_switch=True),
)

PHI3 = Family(
    model_type="phi3",
    class_name="Phi3ForCausalLM",
    settings=_replace_defaults(
        tuple(row for row in _describe_dense(None, 8192, 1e-5) if row[0] != "head_size"),
        vocab_size=32064,
        hidden_size=3072,
    ),
    shared={key: value for key, value in _PLAIN.items() if key != "rope_fraction"} | {"head_size": None},
    required=_ROTARY_REQUIRED,
    names=_LLAMA_NAMES,
    unpack=_unpack_phi3,
    pack=_pack_phi3,
    fused={"qkv_proj": _QKV, "gate_up_proj": ("gate_proj", "up_proj")},
    rope=RopeDefaults(length=4096),
    window=Window(size=None),
)

_GEMMA_SETTINGS = _replace_defaults(
    (*_describe_dense(16, 24576), ("attention_bias", "attention_bias", False)),
    vocab_size=256000,
    num_layers=28,
    hidden_size=3072,
    num_heads=16,
    head_size=256,
    tie_embeddings=True,
)
_GEMMA_SHARED = {key: value for key, value in _PLAIN.items() if key != "attention_bias"} | {
    "norm": "rms_centered",
    "feedforward": "geglu",
    "scale_embeddings": True,
}
_GEMMA_REQUIRED = {"quantization_config": (None,), "use_bidirectional_attention": (None, False)}
_GELU = ("gelu_pytorch_tanh", "gelu")  # old files say gelu and mean its approximation

GEMMA = Family(
    model_type="gemma",
    class_name="GemmaForCausalLM",
    settings=_GEMMA_SETTINGS,
    shared=_GEMMA_SHARED,
    required=_GEMMA_REQUIRED | {"hidden_act": _GELU},
    names=_LLAMA_NAMES,
    unpack=dict,
    pack=dict,
    rope=RopeDefaults(length=8192),
)

_GEMMA2_SETTINGS = (
    *_replace_defaults(
        _GEMMA_SETTINGS, num_layers=26, hidden_size=2304, num_heads=8, num_kv_heads=4, ffn_size=9216, head_size=256
    ),
    ("query_scalar", "query_pre_attn_scalar", 256),
    ("attention_softcap", "attn_logit_softcapping", 50.0),
    ("logits_softcap", "final_logit_softcapping", 30.0),
)
_GEMMA2_SHARED = {key: value for key, value in _GEMMA_SHARED.items() if not key.endswith(("softcap", "query_scalar"))}
_GEMMA2_NAMES = (
    *(row for row in _LLAMA_NAMES if "feedforward_norm" not in row[0]),
    ("layers.{layer}.attention_post_norm.weight", "model.layers.{layer}.post_attention_layernorm.weight"),
    ("layers.{layer}.feedforward_norm.weight", "model.layers.{layer}.pre_feedforward_layernorm.weight"),
    ("layers.{layer}.feedforward_post_norm.weight", "model.layers.{layer}.post_feedforward_layernorm.weight"),
)

GEMMA2 = Family(
    model_type="gemma2",
    class_name="Gemma2ForCausalLM",
    settings=_GEMMA2_SETTINGS,
    shared=_GEMMA2_SHARED | {"post_norms": True},
    required=_GEMMA_REQUIRED | {"hidden_activation": _GELU[:1]},
    names=_GEMMA2_NAMES,
    unpack=dict,
    pack=dict,
    rope=RopeDefaults(length=8192),
    window=Window(size=4096, full_every=2),
)

GEMMA3 = Family(
    model_type="gemma3_text",
    class_name="Gemma3ForCausalLM",
    settings=_replace_defaults(
        tuple(row for row in _GEMMA2_SETTINGS if row[0] != "attention_softcap"), vocab_size=262208, logits_softcap=None
    ),
    shared={key: value for key, value in _GEMMA2_SHARED.items() if key != "rope_theta_window"}
    | {"post_norms": True, "qk_norm": True, "attention_softcap": None},
    required=_GEMMA_REQUIRED | {"hidden_activation": _GELU[:1], "attn_logit_softcapping": (None,)},
    names=_GEMMA2_NAMES,
    unpack=dict,
    pack=dict,
    rope=RopeDefaults(theta=1000000.0, window_theta=10000.0, length=131072),
    window=Window(size=4096, full_every=6),
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
    shared=_PLAIN
    | {
        "norm": "layer",
        "feedforward": "gelu",
        "position": "learned",
        "attention_bias": True,
        "feedforward_bias": True,
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
    fused={"c_attn": _QKV},
    prefix=_PREFIX,
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
        ("norm_eps", "rms_norm_eps", 1e-5),
    ),
    shared={key: value for key, value in _PLAIN.items() if key != "moe"},
    required=_ROTARY_REQUIRED,
    names=(*_ROTARY_NAMES, ("layers.{layer}.feedforward.{rest}", "model.layers.{layer}.block_sparse_moe.{rest}")),
    unpack=_unpack_mixtral,
    pack=_pack_mixtral,
    rope=RopeDefaults(theta=1000000.0, length=131072),
    window=Window(size=None),
)

_ALL = (LLAMA, GPT2, MIXTRAL, MISTRAL, QWEN2, QWEN3, PHI3, GEMMA, GEMMA2, GEMMA3)
FAMILIES = {family.model_type: family for family in _ALL}
