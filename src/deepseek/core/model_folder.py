"""The settings that a Hugging Face model folder holds beside its weights, read in one place.

    config.json              the shape, and (in old folders) which tokens begin and end a text
    generation_config.json   which tokens end a text; chat models name several
    tokenizer_config.json    special tokens by name, the chat template
    special_tokens_map.json  special tokens by name again, in old folders

Files disagree with each other, so the rules for that stand here: every token that any of them calls the end of a text
ends one, and for the name of a special token the newer file wins. Only what is needed to read JSON is imported, so
that whoever opens a folder can ask. Files are read up to a limit, and nothing but a regular file is opened.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from deepseek.core.errors import DataError

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
TOKENIZER_SETTINGS_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
MAX_SETTINGS_BYTES = 64 << 20  # tokenizer_config.json of models with many added tokens reaches a few megabytes


@dataclass(frozen=True, eq=False)
class ModelFolder:
    """The settings in a model folder; a file that is not there is an empty mapping."""

    path: Path

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """`config.json`."""
        return read_settings(self.path / CONFIG_FILE)

    @cached_property
    def generation(self) -> Mapping[str, Any]:
        """`generation_config.json`."""
        return read_settings(self.path / GENERATION_FILE)

    @cached_property
    def tokenizer(self) -> Mapping[str, Any]:
        """`tokenizer_config.json`."""
        return read_settings(self.path / TOKENIZER_SETTINGS_FILE)

    @cached_property
    def special_tokens(self) -> Mapping[str, str]:
        """Special tokens by name: `eos_token`, `bos_token`, `pad_token`, and names of the folder's own."""
        named = {**read_settings(self.path / SPECIAL_TOKENS_FILE), **self.tokenizer}
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


def read_settings(file: Path) -> dict[str, Any]:
    """Read the object in a JSON file, or an empty one where there is no file; raises `DataError` for anything else.

    >>> read_settings(Path("no such file"))
    {}
    """
    if not file.exists():
        return {}
    if not file.is_file():
        raise DataError(f"{file} is no regular file; expected JSON settings, remove it or copy it again")
    if (size := file.stat().st_size) > MAX_SETTINGS_BYTES:
        raise DataError(
            f"{file} has {size} bytes, and settings have at most {MAX_SETTINGS_BYTES}; copy it again from its origin"
        )
    try:
        settings = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read as JSON ({error}); mend it or remove it") from error
    if not isinstance(settings, dict):
        raise DataError(f"{file} holds a JSON {type(settings).__name__}; expected an object with settings")
    return settings


def _token_text(value: Any) -> str | None:
    """Return a special token, which is written as text or as an object around it."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None
