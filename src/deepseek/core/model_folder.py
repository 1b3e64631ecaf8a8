"""The settings that a Hugging Face model folder holds beside its weights, read in one place.

    config.json              the shape, and (in old folders) which tokens begin and end a text
    generation_config.json   which tokens end a text; chat models name several
    tokenizer_config.json    special tokens by name, the chat template
    special_tokens_map.json  special tokens by name again, in old folders

Files disagree with each other, so the rules for that stand here: every token that any of them calls the end of a text
ends one, and for the name of a special token the newer file wins. Only what is needed to read JSON is imported, so
that whoever opens a folder can ask. Files are read up to a limit, nothing but a regular file is opened, and sizes that
no model has are refused before anybody allocates them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from deepseek.core.caller_warnings import warn_caller
from deepseek.core.errors import ConfigError, CorruptArtifactError, DataError, PermanentError

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
TOKENIZER_SETTINGS_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
MAX_SETTINGS_BYTES = 64 << 20  # tokenizer_config.json of models with many added tokens reaches a few megabytes
MAX_LAYERS = 10_000
MAX_SIZE = (1 << 31) - 1


@dataclass(frozen=True, eq=False)
class ModelFolder:
    """The settings in a model folder; a file that is not there is an empty mapping."""

    path: Path
    listed: Collection[str] | None = None
    """The files that its manifest lists, where it has one; another one is not used, and is named in a warning."""

    def find(self, name: str) -> Path | None:
        """Return the file of that name, or none where it is not there or not listed."""
        file = self.path / name
        if not file.exists():
            return None
        if self.listed is not None and name not in self.listed:
            warn_caller(f"{file} is not used, since the manifest beside it does not list it; remove it")
            return None
        return file

    def _read(self, name: str) -> dict[str, Any]:
        file = self.find(name)
        return {} if file is None else read_settings(file)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """`config.json`, with sizes within bounds."""
        file = self.find(CONFIG_FILE)
        if file is None:
            return {}
        settings = read_settings(file, error=CorruptArtifactError)
        check_sizes(settings, str(file))
        return settings

    @cached_property
    def generation(self) -> Mapping[str, Any]:
        """`generation_config.json`."""
        return self._read(GENERATION_FILE)

    @cached_property
    def tokenizer(self) -> Mapping[str, Any]:
        """`tokenizer_config.json`."""
        return self._read(TOKENIZER_SETTINGS_FILE)

    @cached_property
    def special_tokens(self) -> Mapping[str, str]:
        """Special tokens by name: `eos_token`, `bos_token`, `pad_token`, and names of the folder's own."""
        named = {**self._read(SPECIAL_TOKENS_FILE), **self.tokenizer}
        extra = named.get("extra_special_tokens")
        if isinstance(extra, Mapping):  # names of the folder's own, such as `image_token`
            named = {**extra, **named}
        tokens = {name: _token_text(value) for name, value in named.items() if name.endswith("_token")}
        return {name: text for name, text in tokens.items() if text is not None}

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Numbers of all tokens that `generation_config.json` or `config.json` calls the end of a text, in order."""
        ids: dict[int, None] = {}
        for settings in (self.generation, self.config):
            value = settings.get("eos_token_id")
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int) and not isinstance(number, bool):
                    ids[number] = None
        return tuple(ids)


def read_settings(file: Path, *, error: type[PermanentError] = DataError) -> dict[str, Any]:
    """Read the object in a JSON file, or an empty one where there is no file; raises `error` for anything else.

    >>> read_settings(Path("no such file"))
    {}
    """
    if not file.exists():
        return {}
    try:
        settings = json.loads(read_text(file, error=error))
    except (ValueError, RecursionError) as problem:
        raise error(f"{file} is not JSON ({problem}); mend it or remove it") from problem
    if not isinstance(settings, dict):
        raise error(f"{file} holds a JSON {type(settings).__name__}; expected an object with settings")
    return settings


def read_text(file: Path, *, error: type[PermanentError] = DataError) -> str:
    """Read a text of a model folder: UTF-8 with or without a byte order mark, of a regular file, up to the limit."""
    if not file.is_file():
        raise error(f"{file} is no regular file; expected settings, remove it or copy it again")
    if (size := file.stat().st_size) > MAX_SETTINGS_BYTES:
        raise error(
            f"{file} has {size} bytes, and settings have at most {MAX_SETTINGS_BYTES}; copy it again from its origin"
        )
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as problem:
        raise error(f"{file} cannot be read as text ({problem}); mend it or remove it") from problem


# Names of settings as configs of `transformers` have them, by the values that they can have.
_LAYERS = re.compile(r"(num|n)_(\w+_)?layers?|(\w+_)?(encoder|decoder)_layers|num_\w*layers")
_COUNTS = re.compile(
    r"(num|n)_\w*(heads?|experts|positions)|(\w+_)?(hidden|vocab|intermediate|ffn|embed|embedding|image|patch|head)_"
    r"(size|dim)|d_model|d_ff|d_kv|n_embd|n_inner|n_ctx|max_position_embeddings|max_length|max_seq_len(gth)?|max_sequence_length|"
    r"ffn_dim|encoder_ffn_dim|decoder_ffn_dim"
)
_FRACTIONS = re.compile(r"\w*(_eps|_epsilon|rope_theta|rotary_emb_base|base_freq|softcapping|query_pre_attn_scalar)")
_NESTED_LEVELS = 8


def check_sizes(config: Mapping[str, Any], source: str, *, level: int = 0) -> None:
    """Raise `ConfigError` where a number of layers, a size or a small constant of `config` is none that a model has.

    >>> check_sizes({"num_hidden_layers": 1_000_000_000}, "config.json")
    Traceback (most recent call last):
    deepseek.core.errors.ConfigError: config.json: num_hidden_layers is 1000000000; expected a whole number up to 10000, copy the file again from its origin
    """  # noqa: E501
    for name, value in config.items():
        if isinstance(value, Mapping):
            if level < _NESTED_LEVELS:
                check_sizes(value, source, level=level + 1)
        elif value is not None and not isinstance(value, list) and (expected := _expect(name, value)):
            raise ConfigError(
                f"{source}: {name} is {value!r}; expected {expected}, copy the file again from its origin"
            )


def _expect(name: str, value: Any) -> str | None:
    """Return what the setting `name` should be, or `None` where `value` is that."""
    if (is_layers := _LAYERS.fullmatch(name) is not None) or _COUNTS.fullmatch(name):
        largest = MAX_LAYERS if is_layers else MAX_SIZE
        is_whole = (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and math.isfinite(value)
            and value == int(value)
        )
        return None if is_whole and 0 <= value <= largest else f"a whole number up to {largest}"
    if _FRACTIONS.fullmatch(name):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return None if is_number and math.isfinite(value) and value >= 0 else "a finite number"
    return None


def _token_text(value: Any) -> str | None:
    """Return a special token, which is written as text or as an object around it."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None
