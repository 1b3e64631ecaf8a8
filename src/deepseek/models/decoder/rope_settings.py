"""Read and write what Hugging Face configs say about rotary positions, wherever their version keeps it.

    rope_theta, rope_scaling                     up to transformers 4
    rope_parameters                              from transformers 5 on, for Gemma 3 by kind of layer
    original_max_position_embeddings             beside them or inside, for Phi 3

How long a text may be: `max_position_embeddings`, or what the rule reaches where the config keeps the length of the
first training there, as `dynamic` always does and `yarn` by the advice of Qwen's model cards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deepseek.core.errors import ConfigError
from deepseek.models.decoder.model import DecoderConfig

FOLLOWED = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_RENAMED = {"su": "longrope"}
_LAYER_KINDS = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class RopeDefaults:
    """Values that a family takes where its config gives none."""

    theta: float = 10000.0
    """`rope_theta`."""
    window_theta: float | None = None
    """`rope_theta` of layers with a sliding window, where these have one of their own."""
    length: int = 2048
    """`max_position_embeddings`."""


DEFAULTS = RopeDefaults()


def read_rope(values: Mapping[str, Any], defaults: RopeDefaults) -> dict[str, Any]:
    """Return the rotary settings of a config as ours: theta, scaling, fraction and the longest text.

    Raises `ConfigError` for a rule that the decoder does not follow.
    """
    parameters, window = _find_parameters(values)
    kind = str(parameters.get("rope_type", parameters.get("type", "default")))
    kind = _RENAMED.get(kind, kind)
    if kind == "yarn" and values.get("model_type") == "phi3":  # what Phi-3 called longrope at first
        kind = "longrope"
    if kind not in FOLLOWED:
        raise ConfigError(
            f"rope_type={kind!r} and the decoder follows {', '.join(FOLLOWED)} only; choose another model"
        )
    window_kind = window.get("rope_type", window.get("type", "default"))
    if window_kind != "default":
        raise ConfigError(
            f"rope_type={window_kind!r} in the layers with a sliding window, where the decoder follows 'default' only; "
            "choose another model"
        )
    length = int(values.get("max_position_embeddings", defaults.length))
    original = _first(parameters, values, "original_max_position_embeddings")
    settings: dict[str, Any] = {
        "rope_theta": float(_first(parameters, values, "rope_theta") or defaults.theta),
        "rope_fraction": float(_first(parameters, values, "partial_rotary_factor") or 1.0),
        "rope_theta_window": _first(window, values, "rope_local_base_freq", "rope_theta") or defaults.window_theta,
        "max_length": length,
        "rope_scaling": None,
    }
    if kind == "dynamic" or (kind == "yarn" and original):
        settings["max_length"] = max(
            length, int((original if kind == "yarn" else length) * (parameters.get("factor") or 1))
        )
    if kind != "default":
        try:
            settings["rope_scaling"] = _READERS[kind](parameters, length, int(original or length))
        except KeyError as error:
            raise ConfigError(
                f"rope_type={kind!r} comes without {error}; copy config.json again from its origin"
            ) from error
    return settings


def write_rope(config: DecoderConfig) -> dict[str, Any]:
    """Return the rotary settings of `config` under the names that every version of transformers reads."""
    if config.position != "rotary":
        return {}
    values: dict[str, Any] = {"rope_theta": config.rope_theta}
    if config.rope_theta_window is not None:
        values["rope_local_base_freq"] = config.rope_theta_window
    if config.rope_fraction != 1:
        values["partial_rotary_factor"] = config.rope_fraction
    scaling = config.rope_scaling
    if scaling is None:
        return values
    written: dict[str, Any] = {"rope_type": scaling.kind}
    if scaling.kind == "dynamic":
        values["max_position_embeddings"] = scaling.original_length
    if scaling.kind != "longrope":
        written["factor"] = scaling.factor
    if scaling.kind in ("llama3", "yarn"):
        written["original_max_position_embeddings"] = scaling.original_length
    if scaling.kind == "llama3":
        written["low_freq_factor"] = scaling.low_frequency_factor
        written["high_freq_factor"] = scaling.high_frequency_factor
    elif scaling.kind == "yarn":
        written |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.is_rounded}
        written["attention_factor"] = scaling.amplitude
    elif scaling.kind == "longrope":
        # Where only the factors for short texts are known, the longest text is the original length.
        factors, long_factors = list(scaling.pair_factors), list(scaling.long_pair_factors)
        original = scaling.original_length if long_factors else config.max_length
        written |= {"short_factor": factors, "long_factor": long_factors or factors}
        written |= {"attention_factor": scaling.amplitude, "original_max_position_embeddings": original}
        values["original_max_position_embeddings"] = original
    return values | {"rope_scaling": written}


def _find_parameters(values: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the rotary parameters of layers that see all tokens, and of those with a sliding window."""
    parameters = values.get("rope_parameters") or {}
    if any(isinstance(parameters.get(kind), Mapping) for kind in _LAYER_KINDS):
        full, window = (parameters.get(kind) or {} for kind in _LAYER_KINDS)
        return full, window
    scaling = values.get("rope_scaling") or {}
    return {**parameters, **scaling}, {}


def _first(first: Mapping[str, Any], second: Mapping[str, Any], *names: str) -> Any:
    """Return the first value there is: of the last name in `first`, else of the first name in `second`."""
    return first[names[-1]] if first.get(names[-1]) is not None else second.get(names[0])


def _read_linear(parameters: Mapping[str, Any], length: int, original: int) -> dict[str, Any]:
    return {"kind": "linear", "factor": parameters["factor"]}


def _read_dynamic(parameters: Mapping[str, Any], length: int, original: int) -> dict[str, Any]:
    return {"kind": "dynamic", "factor": parameters["factor"], "original_length": length}


def _read_llama3(parameters: Mapping[str, Any], length: int, original: int) -> dict[str, Any]:
    return {
        "kind": "llama3",
        "factor": parameters["factor"],
        "original_length": original,
        "low_frequency_factor": parameters["low_freq_factor"],
        "high_frequency_factor": parameters["high_freq_factor"],
    }


def _read_yarn(parameters: Mapping[str, Any], length: int, original: int) -> dict[str, Any]:
    factor = parameters.get("factor") or length / original
    amplitude = parameters.get("attention_factor")
    if amplitude is None:
        above, below = parameters.get("mscale"), parameters.get("mscale_all_dim")
        amplitude = _sharpen(factor, above) / _sharpen(factor, below) if above and below else _sharpen(factor, 1.0)
    return {
        "kind": "yarn",
        "factor": factor,
        "original_length": original,
        "beta_fast": parameters.get("beta_fast") or 32.0,
        "beta_slow": parameters.get("beta_slow") or 1.0,
        "is_rounded": parameters.get("truncate", True),
        "amplitude": amplitude,
    }


def _sharpen(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _read_longrope(parameters: Mapping[str, Any], length: int, original: int) -> dict[str, Any]:
    factor = parameters.get("factor") or length / original
    amplitude = parameters.get("attention_factor")
    if amplitude is None:
        amplitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    settings: dict[str, Any] = {"kind": "longrope", "pair_factors": tuple(parameters["short_factor"])}
    settings["amplitude"] = amplitude
    if length > original:
        settings |= {"long_pair_factors": tuple(parameters["long_factor"]), "original_length": original}
    return settings


_READERS = {
    "linear": _read_linear,
    "dynamic": _read_dynamic,
    "llama3": _read_llama3,
    "yarn": _read_yarn,
    "longrope": _read_longrope,
}
