"""The settings of every task, one class each; `kind` in a config says which of them it is."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from deepseek.core.config import Config


class CausalLMSettings(Config):
    """Predict each next token of a text."""

    kind: Literal["causal_lm"] = "causal_lm"
    """Name of the task."""


def _name_alone(value: Any) -> Any:
    """A task without settings may be written as its name."""
    return {"kind": value} if isinstance(value, str) else value


TaskSettings = Annotated[CausalLMSettings, BeforeValidator(_name_alone)]
"""The settings of any task."""
