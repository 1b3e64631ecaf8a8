"""The architectures that an artifact can hold: a table from the name in its manifest to the code that rebuilds it.

`decoder` is our own; the vision families come from the zoo by the name of their folder (`resnet`, `vit`, ...), so that
a family that joins the zoo can be stored without a line here; `transformers` is whatever that library defines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from deepseek.core.config import Config
from deepseek.core.errors import ArtifactError
from deepseek.core.registry import Registry
from deepseek.models import zoo
from deepseek.models.decoder.model import Decoder, DecoderConfig
from deepseek.models.transformers_models.model import TransformersModel

DECODER = "decoder"
TRANSFORMERS = "transformers"
OWN = "own:"
"""Begins the architecture of a model whose class is its owner's, and that only the owner can build."""


@dataclass(frozen=True)
class Architecture:
    """A family of models whose shape one config says."""

    name: str
    config: type[Config]
    model: Any
    """The class, which takes the config."""

    def build(self, settings: Mapping[str, Any]) -> nn.Module:
        """Return the model of `settings`."""
        built: nn.Module = self.model(self.config.from_dict(settings))
        return built


@cache
def list_architectures() -> Registry[Architecture]:
    """Return all architectures with a config of ours, by name."""
    known: Registry[Architecture] = Registry("architecture")
    known.add(DECODER, Architecture(DECODER, DecoderConfig, Decoder))
    for name, entry in zoo.MODELS.items():
        family = zoo.family_of(name)
        if family not in known:
            known.add(family, Architecture(family, type(entry.config), entry.assemble))
    return known


def name_architecture(model: nn.Module) -> str:
    """Return the manifest's name for the architecture of `model`. Raises `ArtifactError` if it cannot be rebuilt."""
    if isinstance(model, TransformersModel):
        return TRANSFORMERS
    for name, architecture in list_architectures().items():
        if isinstance(model, architecture.model):
            return name
    known = ", ".join([*list_architectures(), TRANSFORMERS])
    raise ArtifactError(f"save_model writes models of {known} and was given a {type(model).__name__}; pass one of them")


def is_known(model: nn.Module) -> bool:
    """Return whether an artifact of `model` can be opened by its architecture's name."""
    known = (TransformersModel, *(architecture.model for architecture in list_architectures().values()))
    return isinstance(model, known)
