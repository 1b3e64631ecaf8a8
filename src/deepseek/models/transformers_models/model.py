"""Any model of the library `transformers` as a module that takes tensors in a fixed order and gives one tensor.

`transformers` answers with records of many fields and takes keywords; compilers, runtimes and quantizers want tensors
in and out. `TransformersModel` is the wrapper: `input_names` in their order, and of the answer the field that matters
(`logits`, else `last_hidden_state`). BERT, RoBERTa, DistilBERT, ELECTRA, T5 and whatever else the installed library
knows load through it; a decoder that ours can be is a `Decoder` instead.

Only classes of the installed library are built. Code that a folder brings along (`auto_map`) is never run, and weights
are read from safetensors only.

Shapes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deepseek.artifact.format import CONFIG_NAME
from deepseek.compiler.runtimes.backends.interface import quiet as hold_back
from deepseek.core.caller_warnings import warn_caller
from deepseek.core.errors import ArtifactError, ConfigError, first_line
from deepseek.core.extras import require
from deepseek.core.names import explain_unknown
from deepseek.models.weight_loading import PRECISIONS, main_dtype, strip_wrappers

Purpose = Literal[
    "causal_lm",
    "masked_lm",
    "sequence_classification",
    "token_classification",
    "question_answering",
    "hidden_states",
    "image_classification",
]
"""What a model of `transformers` can be trained for; the library has a class with a head of its own for each."""
# The library's tables of classes, by what they are for.
_CLASS_TABLES: dict[Purpose, str] = {
    "causal_lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked_lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "sequence_classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token_classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "question_answering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "hidden_states": "MODEL_MAPPING_NAMES",
    "image_classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}
_ANSWERS = ("logits", "last_hidden_state", "start_logits")
_POOLER = "pooler."  # models that were trained without one are common, and a classifier's may need it
_TEXT_INPUTS = ("input_ids", "attention_mask")


class TransformersModel(nn.Module):
    """A model of `transformers`, called with tensors in the order of `input_names`; answers with one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def config(self) -> dict[str, Any]:
        """Its `config.json`, with the class that reads it."""
        values: dict[str, Any] = json.loads(self._settings.to_json_string(use_diff=False))
        return values | {"architectures": [type(self.model).__name__]}

    @property
    def input_names(self) -> tuple[str, ...]:
        """Its inputs, in the order of a call; those after the first may be left out, except a decoder's."""
        main = str(getattr(self.model, "main_input_name", "input_ids"))
        if main != "input_ids":
            return (main,)
        if getattr(self._settings, "is_encoder_decoder", False):
            return (*_TEXT_INPUTS, "decoder_input_ids")
        has_segments = (getattr(self._settings, "type_vocab_size", 0) or 0) > 1
        return (*_TEXT_INPUTS, "token_type_ids") if has_segments else _TEXT_INPUTS

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """Return logits, or hidden states (B, T, D) of a model without a head."""
        if len(inputs) > len(self.input_names):
            raise ConfigError(f"{len(inputs)} inputs were given and the model takes {', '.join(self.input_names)}")
        given = dict(zip(self.input_names, inputs, strict=False)) | named
        answer = self.model(**given)
        for name in _ANSWERS:
            if getattr(answer, name, None) is not None:
                return getattr(answer, name)  # type: ignore[no-any-return]
        raise ConfigError(f"{type(self.model).__name__} answers with none of {', '.join(_ANSWERS)}; load another class")

    def draw_inputs(self, batch_size: int, sequence_length: int) -> tuple[Tensor, ...]:
        """Draw random inputs of that many rows and tokens, always the same; images have the size of the config."""
        generator = torch.Generator().manual_seed(0)
        return tuple(self._draw(name, batch_size, sequence_length, generator) for name in self.input_names)

    @property
    def is_text(self) -> bool:
        """Whether it takes tokens."""
        return self.input_names[0] == "input_ids"

    @property
    def has_head(self) -> bool:
        """Whether it answers something else than the hidden states of its tokens."""
        return self.model.base_model is not self.model

    @property
    def predicts_tokens(self) -> bool:
        """Whether its answers are one score for each token of the vocabulary."""
        model: Any = self.model
        return model.get_output_embeddings() is not None

    @property
    def max_length(self) -> int | None:
        """Tokens that its table of positions has room for; `None` where there is no such table.

        RoBERTa and its relatives begin to count behind the number of their padding.
        """
        for name, table in self.model.named_modules():
            if name.endswith("position_embeddings") and isinstance(table, nn.Embedding):
                return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
        longest: int | None = getattr(self._settings, "max_position_embeddings", None)
        return longest

    @property
    def pad_id(self) -> int:
        """The token that fills short rows up; what it is does not matter where a mask hides it."""
        return int(getattr(self._settings, "pad_token_id", None) or 0)

    def encode(self, *inputs: Tensor) -> Tensor:
        """Return the hidden states (B, T, D) of the tokens, without the head and any decoder behind the encoder."""
        given = dict(zip(self.input_names, inputs, strict=False))
        is_pair = getattr(self._settings, "is_encoder_decoder", False)
        model: Any = self.model
        hidden: Tensor = (model.get_encoder() if is_pair else model.base_model)(**given).last_hidden_state
        return hidden

    @property
    def _settings(self) -> Any:
        return self.model.config

    def _draw(self, name: str, batch_size: int, length: int, generator: torch.Generator) -> Tensor:
        if name == "pixel_values":
            size = getattr(self._settings, "image_size", 224)
            size = size if isinstance(size, int) else size[-1]
            channels = getattr(self._settings, "num_channels", 3)
            return torch.randn(batch_size, channels, size, size, generator=generator)
        longest = getattr(self._settings, "max_position_embeddings", None) or length
        shape = (batch_size, min(length, longest))
        if name == "attention_mask":
            return torch.ones(shape, dtype=torch.int64)
        if name == "token_type_ids":
            return torch.zeros(shape, dtype=torch.int64)
        return torch.randint(0, self._settings.vocab_size, shape, generator=generator)


def build_transformers(values: Mapping[str, Any]) -> TransformersModel:
    """Build the model of a `config.json`, with random weights, in evaluation mode."""
    kind, config = _find_class(values)
    with quiet():
        return TransformersModel(kind(config)).eval()


def read_transformers(folder: Path, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TransformersModel:
    """Read the model in the Hugging Face folder `folder`, in evaluation mode.

    `values` are those of its `config.json` and `tensors` what its files hold. The weights have the dtype that most of
    them are stored in, whatever the config says. Raises `ArtifactError` where weights are missing or of another shape,
    and `ConfigError` where `transformers` cannot build the model; weights that are left over are warned about.
    """
    kind, config = _find_class(values)
    plain = strip_wrappers(tensors, (), source=folder)
    is_as_stored = plain.keys() == tensors.keys()
    floats = {
        name: tensor for name, tensor in plain.items() if tensor.dtype in PRECISIONS and tensor.is_floating_point()
    }
    with quiet():
        try:
            model, report = kind.from_pretrained(
                str(folder) if is_as_stored else None,
                config=config,
                dtype=main_dtype(floats) if floats else "auto",
                state_dict=None if is_as_stored else plain,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # the report names them
            )
        except (
            Exception
        ) as error:  # whatever its checks and torch raise for a config or weights that do not go together
            raise ConfigError(
                f"transformers cannot build the {kind.__name__} in {folder} ({first_line(error)}); "
                f"mend its {CONFIG_NAME} or download it again"
            ) from error
    _check_report(report, folder)
    return TransformersModel(model).eval()


def start_transformers(
    values: Mapping[str, Any],
    tensors: Mapping[str, Tensor] | None,
    purpose: str,
    num_outputs: int | None,
    labels: Sequence[str] = (),
    *,
    entries: Mapping[str, Any] | None = None,
    source: Path | str,
) -> tuple[TransformersModel, tuple[str, ...]]:
    """Build the model of a `config.json` to be trained for `purpose`, in training mode and in float32.

    What `tensors` lack of its head is new, drawn from torch's global generator and returned by name; all is without
    tensors. `entries` go into its `config.json`. Raises `ConfigError` where the library has no such class, and
    `ArtifactError` for weights that do not fit.
    """
    name = _find_class_name(values, purpose, source)
    values = dict(values) | {"architectures": [name]} | dict(entries or {})
    if num_outputs is not None:
        known = values.get("id2label")
        if known is None or len(known) != num_outputs:
            values = {key: value for key, value in values.items() if key not in ("id2label", "label2id")}
            values["num_labels"] = num_outputs
    if labels:
        values |= {"id2label": dict(enumerate(labels)), "label2id": {name: index for index, name in enumerate(labels)}}
    kind, config = _find_class(values)
    with quiet():
        if tensors is None:
            model = TransformersModel(kind(config).float()).train()
            return model, tuple(model.state_dict())
        try:
            model, report = kind.from_pretrained(
                None,
                config=config,
                dtype=torch.float32,
                state_dict={name: tensor.clone() for name, tensor in tensors.items()},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except Exception as error:  # whatever its checks and torch raise
            raise ConfigError(
                f"transformers cannot build the {kind.__name__} of {source} ({first_line(error)}); "
                f"mend its {CONFIG_NAME} or download it again"
            ) from error
    new = sorted({str(key) for key in report["missing_keys"]} | {_first_of(key) for key in report["mismatched_keys"]})
    prefix = f"{model.base_model_prefix}."
    lacking = [key for key in new if key.startswith(prefix) and _POOLER not in key]
    if lacking or (model.base_model is model and any(_POOLER not in key for key in new)):
        raise ArtifactError(
            f"the weights of {source} come without {', '.join((lacking or new)[:3])}, or with other shapes there; "
            f"download them again or mend the {CONFIG_NAME}"
        )
    return TransformersModel(model).train(), tuple(f"model.{key}" for key in new)


def _find_class_name(values: Mapping[str, Any], purpose: str, source: Path | str) -> str:
    """Return the library's class for a model type and a purpose."""
    tables = _require_transformers().models.auto.modeling_auto
    model_type = str(values.get("model_type"))
    table = getattr(tables, _CLASS_TABLES[purpose]) if purpose in _CLASS_TABLES else {}
    if model_type not in table:
        raise ConfigError(
            f"{source} is a {model_type} model, and transformers has none of that type for {purpose}; "
            "choose another model or another task"
        )
    name = table[model_type]
    return str(name[0] if isinstance(name, list | tuple) else name)


def _first_of(key: Any) -> str:
    """Return the name of a tensor of another shape, which some versions list together with the shapes."""
    return str(key[0] if isinstance(key, tuple) else key)


def is_transformers_class(name: str) -> bool:
    """Return whether the installed library has a model class of that name."""
    transformers = _require_transformers()
    with quiet():
        kind = getattr(transformers, name, None)
    return isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)


def list_settings(model_type: str) -> list[str]:
    """Return the names of the settings that a config of this model type has."""
    transformers = _require_transformers()
    return sorted(transformers.AutoConfig.for_model(model_type).to_dict())


def _find_class(values: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the class of `transformers` that a `config.json` names, and its config."""
    transformers = _require_transformers()
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    model_type = str(values.get("model_type"))
    if values.get("auto_map") and model_type not in known:
        raise ConfigError(
            f"{CONFIG_NAME} asks to run code of its own (auto_map), which is never done; choose another model"
        )
    if model_type not in known:
        raise ConfigError(explain_unknown("Hugging Face model type", model_type, known))
    names = values.get("architectures") or []
    if not (isinstance(names, list) and names and is_transformers_class(str(names[0]))):
        raise ConfigError(
            f"{CONFIG_NAME} has architectures={names!r}, which names no model class of transformers "
            f"{transformers.__version__}; mend it"
        )
    settings = {key: value for key, value in values.items() if key not in ("model_type", "auto_map")}
    try:
        return getattr(transformers, str(names[0])), transformers.AutoConfig.for_model(model_type, **settings)
    except Exception as error:  # its own checks raise several kinds
        raise ConfigError(
            f"{CONFIG_NAME} is not what transformers takes for {model_type} ({first_line(error)}); "
            "copy it again from its origin"
        ) from error


def _check_report(report: Any, folder: Path) -> None:
    missing = sorted(str(key) for key in report["missing_keys"])
    shapes = sorted(str(key) for key in report["mismatched_keys"])
    if missing or shapes:
        problem = f"without {', '.join(missing[:3])}" if missing else f"with other shapes in {', '.join(shapes[:3])}"
        raise ArtifactError(f"the weights in {folder} come {problem}; download it again or mend its {CONFIG_NAME}")
    unused = sorted(str(key) for key in report["unexpected_keys"])
    if unused:
        warn_caller(f"{folder} holds weights that its model has no place for: {', '.join(unused[:3])}")


def _require_transformers() -> Any:
    """Import the library quietly, without the warnings of others that it looks for."""
    with hold_back():
        return require("transformers", extra="models")


@contextmanager
def quiet() -> Iterator[None]:
    """`transformers` shows no progress bars and logs errors only inside; what was set before is set again after."""
    logging = _require_transformers().utils.logging
    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with hold_back():
            yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
