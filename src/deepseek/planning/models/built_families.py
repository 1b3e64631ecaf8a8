"""Shapes of families that are no row of `families.py`: counted on the model that transformers builds on meta.

    read_by_building({"model_type": "apertus", ...})     a ModelShape with all the weights of that model

The sizes are read as those of a plain decoder, gated or not, whichever comes nearer; what the model has more or less is
counted as extra weights, as a row of `families.py` would. A model that is off by more than a tenth is no plain decoder
(state spaces, layers of several kinds), and a plan for one would be wrong in its times as well: it is refused with both
numbers, and so are encoder-decoders. Linear attention within that tenth is timed as attention. Of a model with images
or sound it is the text model that is planned, and named.
Cost: a second or two, no memory for weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from deepseek.core.errors import ConfigError
from deepseek.core.extras import has_library, require
from deepseek.planning.models.families import FAMILIES
from deepseek.planning.models.model_shape import USUAL_SEQUENCE, ModelShape, model_shape_from_config

_MOST_EXTRA = 0.1
"""Share of the weights that may be other ones than those of a plain decoder."""
_MOST_LAYERS = 1000
"""Every layer is built; a file that asks for more is no model's."""
_MOST_SAID = 200
"""Characters of the reason; some configurations have a list where others have a number."""
_ADVICE = "describe it as a ModelShape, or trace it with planning.models.from_module"


def read_by_building(config: Mapping[str, Any], *, sequence: int | None = None) -> ModelShape | None:
    """Return the shape of a family that transformers has a class for, `None` where it has none.

    Raises `ConfigError` for an encoder-decoder and for what is no decoder of one kind of layers.
    """
    kind = str(config.get("model_type") or "")
    if not has_library("transformers"):
        return None
    transformers = require("transformers", extra="models")
    if kind not in transformers.CONFIG_MAPPING:
        return None
    if config.get("is_encoder_decoder") or config.get("encoder_layers"):
        raise ConfigError(f"{kind} is an encoder-decoder, whose two stacks a ModelShape cannot say; {_ADVICE}")
    whole = transformers.CONFIG_MAPPING[kind].from_dict(dict(config))
    text = whole.get_text_config()
    values = text.to_dict()
    total = _count_on_meta(transformers, text, kind)
    readings = [values]
    if text.model_type not in FAMILIES:
        plain = values | {"model_type": None, "tie_word_embeddings": bool(text.tie_word_embeddings)}
        readings = [plain | {"gated": gated} for gated in (True, False)]
        sequence = sequence or values.get("max_position_embeddings") or USUAL_SEQUENCE
    try:
        candidates = [model_shape_from_config(reading, sequence=sequence) for reading in readings]
    except ConfigError as error:
        raise ConfigError(f"{kind} is no plain decoder ({str(error)[:_MOST_SAID]}); {_ADVICE}") from error
    shape = min(candidates, key=lambda candidate: abs(candidate.num_parameters - total))
    difference = total - shape.num_parameters
    if abs(difference) > _MOST_EXTRA * total:
        raise ConfigError(
            f"{kind} has {total} parameters, and a plain decoder of its sizes {shape.num_parameters}: its layers are "
            f"of other kinds, which a ModelShape cannot say; {_ADVICE}"
        )
    name = kind if text is whole else f"the text model of {kind}"
    return replace(shape, extra_parameters=shape.extra_parameters + difference, name=name)


def _count_on_meta(transformers: Any, text: Any, kind: str) -> int:
    torch = require("torch", extra="models")
    if text.num_hidden_layers > _MOST_LAYERS:
        raise ConfigError(f"{kind} says num_hidden_layers={text.num_hidden_layers}; give a model's configuration")
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(text)
    except (AttributeError, ImportError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0][:_MOST_SAID]
        raise ConfigError(f"transformers builds no decoder of {kind} ({reason}); {_ADVICE}") from error
    return sum(weight.numel() for weight in model.parameters())
