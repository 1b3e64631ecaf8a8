"""From the settings and tensor names of another library to ours, for models whose tensors differ in little but names.

A `keymap.py` says which settings ours can follow and which module of theirs is which of ours; the two functions here do
what all of them have in common. Nothing is copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from deepseek.core.errors import ArtifactError, ConfigError

DEFAULT_LABELS = 2  # what transformers takes where a config.json names no labels


def rename(tensors: Mapping[str, Tensor], places: Mapping[str, str], *, noun: str) -> dict[str, Tensor]:
    """Rename the tensors to our names; `places` takes a module of theirs, or a tensor, to ours.

    Raises `ArtifactError` for a tensor that has no place in `noun`.
    """
    return {_place(name, places, noun): tensor for name, tensor in tensors.items()}


def check_settings(values: Mapping[str, Any], followed: Mapping[str, Any], *, noun: str) -> None:
    """Raise `ConfigError` where a setting of theirs has another value than the one ours follows, or is none of them.

    >>> check_settings({"hidden_act": "relu"}, {"hidden_act": "relu", "use_bias": True}, noun="resnet")
    """
    for key, expected in followed.items():
        if values.get(key, expected) != expected:
            raise ConfigError(
                f"this {noun} model has {key}={values[key]!r} and ours follows {expected!r} only; choose another model"
            )


def count_labels(values: Mapping[str, Any]) -> int:
    """Count the classes of a Hugging Face `config.json`, which names them or counts them.

    >>> count_labels({"id2label": {"0": "cat", "1": "dog", "2": "bird"}}), count_labels({})
    (3, 2)
    """
    return len(values["id2label"]) if values.get("id2label") else int(values.get("num_labels", DEFAULT_LABELS))


def _place(name: str, places: Mapping[str, str], noun: str) -> str:
    if name in places:
        return places[name]
    module, _, tensor = name.rpartition(".")
    if module not in places:
        raise ArtifactError(f"tensor {name!r} has no place in {noun}; choose another model")
    return f"{places[module]}.{tensor}"
