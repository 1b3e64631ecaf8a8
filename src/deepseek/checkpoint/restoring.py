"""Find the newest checkpoint that can be trusted, and read it.

A run that starts calls `newest_valid`: every file is hashed before it is believed, a damaged checkpoint is skipped with
a warning that names it, and the one before it is used. Nothing there means a fresh start; only damaged ones is an
error, because starting over in silence would throw a run away.

Tensors are copied out of the file: the folder may be pruned while they live, and memory at the file's odd addresses
can change the last bit of a sum, which would break bit-equal resuming.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek.artifact.reading import read_tensor_file
from deepseek.artifact.verifying import verify_files
from deepseek.checkpoint.layout import (
    CHECKSUMS_NAME,
    STATE_NAME,
    TENSORS_NAME,
    list_checkpoints,
    read_checksums,
    step_of,
)
from deepseek.checkpoint.structure import unflatten
from deepseek.core.errors import ArtifactError, CheckpointError, CorruptArtifactError, UnsupportedSchemaError

_MAX_STATE_BYTES = 512 << 20  # numbers and names; tensors are in a file of their own


class DamagedCheckpointWarning(UserWarning):
    """A checkpoint is not what was written and was skipped."""


@dataclass(frozen=True)
class Checkpoint:
    """A training state as it was after `step` steps."""

    step: int
    state: dict[str, Any]
    path: Path


def newest_valid(folder: str | Path) -> Checkpoint | None:
    """Read the newest checkpoint in `folder` whose checksums hold; None where there are no checkpoints.

    Warns with `DamagedCheckpointWarning` for each that is skipped. Raises `CheckpointError` when all are damaged, and
    `UnsupportedSchemaError` for one of a newer deepseek, which is not damaged and must not be skipped.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give the folder that holds the checkpoints")
    found = list_checkpoints(folder)
    for path in reversed(found.values()):
        try:
            return load(path)
        except CheckpointError as error:
            warnings.warn(f"skipping a damaged checkpoint: {error}", DamagedCheckpointWarning, stacklevel=2)
    if found:
        raise CheckpointError(
            f"all {len(found)} checkpoints in {folder} are damaged; restore one from a copy or start in a new folder"
        )
    return None


def load(path: str | Path) -> Checkpoint:
    """Read the checkpoint in the folder `path`, verified; `CheckpointError` names the file that is damaged."""
    path = Path(path)
    try:
        verify_files(path, read_checksums(path / CHECKSUMS_NAME))
        tensors = {name: tensor.clone() for name, tensor in read_tensor_file(path / TENSORS_NAME).items()}
        if (size := (path / STATE_NAME).stat().st_size) > _MAX_STATE_BYTES:
            raise CorruptArtifactError(f"{path / STATE_NAME} has {size} bytes, expected at most {_MAX_STATE_BYTES}")
        values = json.loads((path / STATE_NAME).read_bytes())
        checkpoint = Checkpoint(values["step"], unflatten(values["state"], tensors), path)
    except UnsupportedSchemaError:
        raise
    except (ArtifactError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be used: {error}") from error
    if step_of(path) not in (checkpoint.step, None):
        raise CheckpointError(f"checkpoint {path} holds step {checkpoint.step}; rename its folder to match")
    return checkpoint
