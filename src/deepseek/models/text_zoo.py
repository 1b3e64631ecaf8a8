"""The text models by name, as shapes: BERT, GPT-2, T5 and Llama, with random weights until others are loaded.

A row is a name and either the config of our own decoder (GPT-2, Llama) or a `config.json` of `transformers` (BERT, T5).
The shapes are those that were published: Devlin et al. 2018 (BERT), Radford et al. 2019 (GPT-2), Raffel et al. 2020
(T5), Touvron et al. 2023 (Llama; 8b is Llama 3, 135m and 360m are SmolLM2's, 1.1b is TinyLlama's).

`build` asks first whether the weights fit into this machine's memory: a model that does not is refused with its size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from deepseek.core.errors import ConfigError
from deepseek.core.machine import describe_machine
from deepseek.core.names import explain_unknown
from deepseek.core.registry import Registry
from deepseek.models.decoder.model import Decoder, DecoderConfig
from deepseek.models.transformers_models.model import TransformersModel, build_transformers, list_settings
from deepseek.models.weight_loading import build_without_values

_BYTES_PER_WEIGHT = 4


def _llama(
    num_layers: int, hidden_size: int, num_heads: int, num_kv_heads: int, ffn_size: int, **other: Any
) -> DecoderConfig:
    settings: dict[str, Any] = {"vocab_size": 32000, "max_length": 4096, "tie_embeddings": False} | other
    return DecoderConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        ffn_size=ffn_size,
        **settings,
    )


_SMOL = {"vocab_size": 49152, "max_length": 8192, "rope_theta": 1e5, "tie_embeddings": True}
_BERT = {"model_type": "bert", "architectures": ["BertModel"]}

MODELS: Registry[DecoderConfig | Mapping[str, Any]] = Registry("model")
_PUBLISHED: dict[str, DecoderConfig | Mapping[str, Any]] = {
    "bert-base": _BERT,
    "bert-large": _BERT
    | {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "gpt2": DecoderConfig(
        vocab_size=50257,
        num_layers=12,
        hidden_size=768,
        num_heads=12,
        ffn_size=3072,
        max_length=1024,
        norm="layer",
        feedforward="gelu",
        position="learned",
        attention_bias=True,
        feedforward_bias=True,
    ),
    "t5-small": {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 2048,
        "num_layers": 6,
        "num_heads": 8,
        "vocab_size": 32128,
        "decoder_start_token_id": 0,
    },
    "llama-135m": _llama(30, 576, 9, 3, 1536, **_SMOL),
    "llama-360m": _llama(32, 960, 15, 5, 2560, **_SMOL),
    "llama-1.1b": _llama(22, 2048, 32, 4, 5632, max_length=2048),
    "llama-7b": _llama(32, 4096, 32, 32, 11008),
    "llama-8b": _llama(32, 4096, 32, 8, 14336, vocab_size=128256, max_length=8192, rope_theta=5e5),
    "llama-13b": _llama(40, 5120, 40, 40, 13824),
    "llama-70b": _llama(80, 8192, 64, 8, 28672),
}
for _name, _shape in _PUBLISHED.items():
    MODELS.add(_name, _shape)

NAMES = tuple(sorted(MODELS))


def build(name: str, **overrides: JsonValue) -> nn.Module:
    """Build the model `name` with random weights, in evaluation mode on the CPU; `overrides` set its config.

    Raises `ConfigError` for an unknown name or setting, and for a model that is larger than this machine's memory.

    >>> model = build("gpt2", num_layers=1, hidden_size=24, ffn_size=48, vocab_size=64)
    >>> model(torch.zeros(1, 4, dtype=torch.long)).shape
    torch.Size([1, 4, 64])
    """
    config = configure(name, **overrides)
    if isinstance(config, DecoderConfig):
        _refuse_too_large(name, build_without_values(lambda: Decoder(config)))
        return Decoder(config).eval()
    return build_transformers(config)


def configure(name: str, **overrides: JsonValue) -> DecoderConfig | dict[str, Any]:
    """Return the settings of the model `name`, changed by `overrides`."""
    config = MODELS[name]
    if isinstance(config, DecoderConfig):
        return config.override(overrides)
    return dict(config) | _known_settings(str(config["model_type"]), overrides)


def draw_tokens(model: nn.Module, batch_size: int, sequence_length: int) -> tuple[Tensor, ...]:
    """Sample inputs to try a text model with, the same in every call."""
    if isinstance(model, TransformersModel):
        return model.draw_inputs(batch_size, sequence_length)
    assert isinstance(model, Decoder)
    shape = (batch_size, min(sequence_length, model.config.max_length))
    return (torch.randint(0, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0)),)


def _known_settings(model_type: str, overrides: Mapping[str, JsonValue]) -> dict[str, Any]:
    known = list_settings(model_type)
    for name in overrides:
        if name not in known:
            raise ConfigError(explain_unknown(f"setting of {model_type}", name, known))
    return dict(overrides)


def _refuse_too_large(name: str, model: nn.Module) -> None:
    needed = sum(parameter.numel() for parameter in model.parameters()) * _BYTES_PER_WEIGHT
    memory = int(describe_machine()["memory_bytes"])
    if needed > memory:
        raise ConfigError(
            f"{name} has {needed / 1e9:.0f} GB of weights in fp32 and this machine has {memory / 1e9:.0f} GB; "
            "load trained weights in bf16 from a folder, or lower num_layers by overrides"
        )
