"""Vision transformers of Hugging Face (`ViTForImageClassification`) under torchvision's names.

In their files, and in ours, a block is

    vit.encoder.layer.L.layernorm_before                    encoder.layers.encoder_layer_L.ln_1
    vit.encoder.layer.L.attention.attention.{query, ...}    ....self_attention.in_proj: three in one
    vit.encoder.layer.L.attention.output.dense              ....self_attention.out_proj
    vit.encoder.layer.L.layernorm_after                     ....ln_2
    vit.encoder.layer.L.{intermediate, output}.dense        ....mlp.{0, 3}

Since transformers 5, a model in memory has shorter names than its file; both are read. So are the names that
torchvision's own files had before version 0.13, `mlp.linear_1` for `mlp.0`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deepseek.core.errors import ArtifactError
from deepseek.models.key_tables import check_settings, count_labels, rename
from deepseek.models.vit.model import ViTConfig

FOLLOWED = {
    "model_type": "vit",
    "hidden_act": "gelu",
    "qkv_bias": True,
}
SETTINGS = (
    ("image_size", "image_size", 224),
    ("patch_size", "patch_size", 16),
    ("in_channels", "num_channels", 3),
    ("num_layers", "num_hidden_layers", 12),
    ("num_heads", "num_attention_heads", 12),
    ("hidden_size", "hidden_size", 768),
    ("mlp_size", "intermediate_size", 3072),
    ("dropout", "hidden_dropout_prob", 0.0),
    ("attention_dropout", "attention_probs_dropout_prob", 0.0),
    ("norm_eps", "layer_norm_eps", 1e-12),
)
FILE_LAYER, MEMORY_LAYER = "vit.encoder.layer", "vit.layers"
# (module of a layer in a file, in memory, in ours)
LAYER_PLACES = (
    ("layernorm_before", "layernorm_before", "ln_1"),
    ("attention.attention.query", "attention.q_proj", "self_attention.q"),
    ("attention.attention.key", "attention.k_proj", "self_attention.k"),
    ("attention.attention.value", "attention.v_proj", "self_attention.v"),
    ("attention.output.dense", "attention.o_proj", "self_attention.out_proj"),
    ("layernorm_after", "layernorm_after", "ln_2"),
    ("intermediate.dense", "mlp.fc1", "mlp.0"),
    ("output.dense", "mlp.fc2", "mlp.3"),
)
PLACES = {
    "vit.embeddings.cls_token": "class_token",
    "vit.embeddings.position_embeddings": "encoder.pos_embedding",
    "vit.embeddings.patch_embeddings.projection": "conv_proj",
    "vit.layernorm": "encoder.ln",
    "classifier": "heads.head",
}
_QUERY = re.compile(r"(?P<attention>.+\.self_attention)\.q\.(?P<tensor>weight|bias)")
_OLD_MLP = re.compile(r"\.mlp\.linear_(?P<number>[12])\.")
_MLP_POSITIONS = {"1": 0, "2": 3}


def import_config(values: Mapping[str, Any]) -> ViTConfig:
    """Return our config for a Hugging Face `config.json`. Raises `ConfigError` for a setting that ours does not follow.

    >>> import_config({"hidden_size": 192, "num_attention_heads": 3}).norm_eps
    1e-12
    """
    check_settings(values, FOLLOWED, noun="vit")
    settings = {ours: values.get(theirs, default) for ours, theirs, default in SETTINGS}
    return ViTConfig(num_classes=count_labels(values), **settings)


def import_tensors(tensors: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """Hugging Face tensors under torchvision's names; queries, keys and values become one matrix.

    Raises `ArtifactError` for a tensor that has no place and for a layer without keys or values.
    """
    renamed = rename(tensors, find_places(config), noun="a vision transformer")
    joined = {name: tensor for name, tensor in renamed.items() if not re.search(r"\.self_attention\.[qkv]\.", name)}
    for name in renamed:
        query = _QUERY.fullmatch(name)
        if query:
            attention, tensor = query["attention"], query["tensor"]
            joined[f"{attention}.in_proj_{tensor}"] = _join(renamed, attention, tensor)
    return joined


def import_weights(tensors: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """Rename tensors of Hugging Face, or of an old file of torchvision, to torchvision's names of today."""
    if any(_OLD_MLP.search(name) for name in tensors):
        return modernize(tensors)
    return import_tensors(tensors, config)


def modernize(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors of an old file of torchvision to the names of today.

    >>> list(modernize({"encoder.layers.encoder_layer_0.mlp.linear_2.bias": torch.zeros(1)}))
    ['encoder.layers.encoder_layer_0.mlp.3.bias']
    """

    def rewrite(match: re.Match[str]) -> str:
        return f".mlp.{_MLP_POSITIONS[match['number']]}."

    return {_OLD_MLP.sub(rewrite, name): tensor for name, tensor in tensors.items()}


def find_places(config: ViTConfig) -> dict[str, str]:
    """Map modules and tensors at Hugging Face to ours."""
    places = dict(PLACES)
    for layer in range(config.num_layers):
        for in_file, in_memory, ours in LAYER_PLACES:
            place = f"encoder.layers.encoder_layer_{layer}.{ours}"
            places |= {f"{FILE_LAYER}.{layer}.{in_file}": place, f"{MEMORY_LAYER}.{layer}.{in_memory}": place}
    return places


def _join(renamed: Mapping[str, Tensor], attention: str, tensor: str) -> Tensor:
    names = [f"{attention}.{projection}.{tensor}" for projection in "qkv"]
    missing = [name for name in names if name not in renamed]
    if missing:
        raise ArtifactError(f"the weights have queries but no {', '.join(missing)}; download them again")
    return torch.cat([renamed[name] for name in names])
