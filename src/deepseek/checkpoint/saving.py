"""Saving a training state so that a kill at any moment leaves a checkpoint to resume from.

The training loop calls `save` every so many steps. The new checkpoint is written beside its final name, hashed, flushed
to the device and renamed; only then are older ones removed. So the disk needs room for `keep` + 1 checkpoints, and a
full one costs the newest checkpoint and never the one before.

Cost: the state is written once and read back once for its checksums, while training waits.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek.artifact.verifying import has_sizes, measure_files
from deepseek.artifact.writing import write_tensor_file
from deepseek.checkpoint.layout import (
    CHECKSUMS_NAME,
    STATE_NAME,
    TENSORS_NAME,
    clear_leftovers,
    list_checkpoints,
    read_checksums,
    step_folder,
    write_checksums,
)
from deepseek.checkpoint.structure import flatten
from deepseek.core.errors import ArtifactError, CheckpointError, ConfigError
from deepseek.core.storage import explained_storage, new_folder


def save(folder: str | Path, step: int, state: Mapping[str, Any], *, keep: int = 2) -> Path:
    """Write `state` as the checkpoint of `step` and remove all but the newest `keep`; return the new folder.

    `state` is nested dicts, lists and tuples of tensors, numbers, strings and None. A checkpoint of the same step is
    replaced; ones of later steps are left alone. Raises `CheckpointError` for a value that cannot be kept and
    `StorageError` for what the disk refuses; either way the older checkpoints are as they were.
    """
    if keep < 1:
        raise ConfigError(f"keep is {keep}; keep at least 1 checkpoint")
    folder = Path(folder)
    target = step_folder(folder, step)
    structure, tensors = flatten(state)
    clear_leftovers(folder)
    with new_folder(target) as temporary:
        try:
            write_tensor_file(temporary / TENSORS_NAME, tensors)
        except ArtifactError as error:
            raise CheckpointError(f"{target} was not written: {error}") from error
        text = json.dumps({"step": step, "state": structure}, allow_nan=False)
        (temporary / STATE_NAME).write_text(text, encoding="utf-8")
        write_checksums(temporary / CHECKSUMS_NAME, measure_files(temporary))
    _prune(folder, step, keep)
    return target


def _prune(folder: Path, newest_step: int, keep: int) -> None:
    """Remove checkpoints older than the newest `keep` whole ones, of which the one of `newest_step` is the first."""
    older = {step: path for step, path in list_checkpoints(folder).items() if step < newest_step}
    kept = [newest_step, *(step for step in reversed(older) if _is_whole(older[step]))][:keep]
    if len(kept) < keep:
        return
    with explained_storage(folder):
        for step, path in older.items():
            if step < kept[-1]:
                shutil.rmtree(path)


def _is_whole(path: Path) -> bool:
    """Return whether all files have their sizes; hashing each old checkpoint at each save would double the cost."""
    try:
        return has_sizes(path, read_checksums(path / CHECKSUMS_NAME))
    except ArtifactError:
        return False
