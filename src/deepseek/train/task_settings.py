"""The settings of every task, one class each; `kind` in a config says which of them it is."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from deepseek.core.config import Config, name_kind


class AnyTaskSettings(Config):
    """What the settings of all tasks have."""

    data_kinds: ClassVar[tuple[str, ...]] = ("text",)
    """Kinds of data that the task learns from; the first is taken where a config names none."""


class CausalLMSettings(AnyTaskSettings):
    """Predict each next token of a text."""

    kind: Literal["causal_lm"] = "causal_lm"
    """Name of the task."""


class ImageClassificationSettings(AnyTaskSettings):
    """Choose the class of an image."""

    data_kinds: ClassVar[tuple[str, ...]] = ("images",)

    kind: Literal["image_classification"] = "image_classification"
    """Name of the task."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Share of the target that is spread over all classes."""
    mixup: float = Field(default=0.0, ge=0)
    """Blends each batch with itself in another order, by a share from the beta distribution with this parameter; 0
    blends nothing."""


TaskSettings = Annotated[
    CausalLMSettings | ImageClassificationSettings,
    Field(discriminator="kind"),
    BeforeValidator(name_kind("causal_lm")),
]
"""The settings of any task; a task without settings of its own may be written as its name."""
