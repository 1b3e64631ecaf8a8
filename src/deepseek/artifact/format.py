"""The artifact on disk: one folder that carries a model and the record of how it got there.

    model/
      manifest.json                     this file: who, from what, and the sha256 of every other file
      model.safetensors                 or model-00001-of-0000N.safetensors + model.safetensors.index.json
      config.json                       the Hugging Face config, where the architecture has one there
      tokenizer.json                    as the library `tokenizers` writes it
      1_Pooling/config.json             how a sentence encoder pools, where sentence-transformers has it

`write_artifact` makes one, `open_artifact` verifies and opens it. The manifest carries its own sha256, so one flipped
byte anywhere in the folder is seen. `digest` names the model by its files alone: two folders with one digest hold the
same model, and an artifact made from another one carries the other's digest as its parent.

This file and `read_manifest` need no torch: the hub and the command line read manifests by the thousand.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, Literal

from pydantic import AwareDatetime, Field, JsonValue, field_validator

from deepseek.core.config import Config
from deepseek.core.errors import ConfigError, CorruptArtifactError, UnsupportedSchemaError

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"
ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
TOKENIZER_NAME = "tokenizer.json"
POOLING_NAME = "1_Pooling/config.json"
"""Where sentence-transformers writes how an encoder pools, the one file below the folder."""

_CHECKSUM_KEY = "manifest_sha256"


class FileRecord(Config):
    """Size and checksum of one file when it was written."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Hex SHA-256 of its bytes."""
    num_bytes: int = Field(ge=0)
    """Its length in bytes."""


class Description(Config):
    """The part of a manifest that the writer of an artifact states; the rest is measured."""

    architecture: str
    """Name of the architecture, as models register it: `decoder`."""
    architecture_config: dict[str, JsonValue]
    """The settings that rebuild the architecture, before any weight is read."""
    layout: Literal["deepseek", "huggingface"] = "deepseek"
    """Whose tensor names the weights carry; a `huggingface` artifact also opens with `transformers`."""
    precision: str = "fp32"
    """How the weights are stored: `fp32`, `bf16`, `int8`, ..."""
    plan: dict[str, JsonValue] = Field(default_factory=dict)
    """The parallel plan the model was trained under; empty for one device."""
    parent_digest: str | None = None
    """Digest of the artifact this one was made from; null for a model trained from scratch."""
    config_digest: str | None = None
    """Digest of the run's config; null where no run made it."""
    data_position: dict[str, JsonValue] = Field(default_factory=dict)
    """Where in the data training stopped."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """Measurements of it, by name: `heldout_loss`, in nats per token, ..."""


class Manifest(Description):
    """`manifest.json`: the description, and the table of files that makes it verifiable."""

    schema_version: int = SCHEMA_VERSION
    """Version of this format; a reader refuses a newer one."""
    files: dict[str, FileRecord]
    """Every file of the folder except the manifest, by name."""
    created_at: AwareDatetime
    """When it was written, UTC."""
    deepseek_version: str | None
    """The version of deepseek that wrote it; null for an uninstalled source tree."""

    @field_validator("files")
    @classmethod
    def _names_stay_inside(cls, files: dict[str, FileRecord]) -> dict[str, FileRecord]:
        for name in files:
            if not is_inner_name(name):
                raise ValueError(f"file name {name!r} leaves the artifact's folder; use a plain file name")
        return files

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the file table: the same for the same model, whenever and wherever it was written."""
        return digest_files(self.files)

    def to_json(self) -> bytes:
        """Serialize to the bytes of `manifest.json`, sealed with their own SHA-256."""
        values = self.to_dict()
        return json.dumps({_CHECKSUM_KEY: _checksum(values)} | values, indent=1, allow_nan=False).encode()

    @classmethod
    def from_json(cls, content: bytes, *, source: str) -> Manifest:
        """Read `to_json`'s bytes back; `source` names them in errors.

        Raises `UnsupportedSchemaError` for a newer schema and `CorruptArtifactError` for anything else that is wrong.
        """
        values = _parse(content, source)
        version = values.get("schema_version")
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise UnsupportedSchemaError(
                f"{source} has schema version {version} and this deepseek reads up to {SCHEMA_VERSION}; "
                "upgrade deepseek-engine to open it"
            )
        if values.pop(_CHECKSUM_KEY, None) != _checksum(values):
            raise CorruptArtifactError(
                f"{source} is not what was written (its checksum does not match); copy or write the artifact again"
            )
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise CorruptArtifactError(f"{source} is not a manifest ({error}); write the artifact again") from error


def digest_files(files: Mapping[str, FileRecord]) -> str:
    """Return the hex SHA-256 of a file table, which names the model in these files."""
    return hashlib.sha256(_canonical({name: record.to_dict() for name, record in files.items()})).hexdigest()


def is_plain_name(name: str) -> bool:
    """Return whether `name` is a file directly inside a folder, on any system.

    >>> is_plain_name("model.safetensors"), is_plain_name("../model.safetensors"), is_plain_name("a\\\\b")
    (True, False, False)
    """
    return name not in ("", ".", "..") and PurePath(name).name == name and "\\" not in name and "\0" not in name


def is_inner_name(name: str) -> bool:
    """Return whether an artifact may have a file of that name: directly inside its folder, or `POOLING_NAME`.

    >>> is_inner_name("1_Pooling/config.json"), is_inner_name("../model.safetensors"), is_inner_name("a/b")
    (True, False, False)
    """
    return name == POOLING_NAME or is_plain_name(name)


def _parse(content: bytes, source: str) -> dict[str, Any]:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:  # also bytes that are not UTF-8, and deep nesting
        raise CorruptArtifactError(f"{source} is not valid JSON ({error}); copy or write the artifact again") from error
    if not isinstance(values, dict):
        raise CorruptArtifactError(f"{source} holds a {type(values).__name__}, expected an object; write it again")
    return values


def _checksum(values: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(values)).hexdigest()


def _canonical(values: dict[str, Any]) -> bytes:
    """Serialize a value to one byte string, whatever the order of its keys."""
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
