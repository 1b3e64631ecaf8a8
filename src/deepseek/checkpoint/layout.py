"""Checkpoints on disk: one folder per step inside the run's checkpoint folder.

    checkpoints/
      step-00000400/
      step-00000500/
        state.safetensors     every tensor of the state, once
        state.json            the step, and the nested state with names instead of tensors
        checksums.json        sha256 and size of the two, and of this table

Folders appear whole, by a rename. A kill leaves hidden neighbors behind, which the next save removes: a
`.step-00000600.1a2b3c4d.tmp` on its way in, or an `.old` that was being replaced, which counts as a checkpoint while
its successor is not there. Any number of processes may read while one saves.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

from deepseek.artifact.format import FileRecord
from deepseek.core.errors import ConfigError, CorruptArtifactError, UnsupportedSchemaError
from deepseek.core.storage import explained_storage

SCHEMA_VERSION = 1
STATE_NAME = "state.json"
TENSORS_NAME = "state.safetensors"
CHECKSUMS_NAME = "checksums.json"
_MAX_CHECKSUMS_BYTES = 100_000

# A checkpoint, and the names that `core.storage.new_folder` gives to a folder on its way in and to the one it replaces.
_STEP = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"\.(step-\d{8,})\.[0-9a-f]{8}\.(tmp|old)")


def step_folder(folder: Path, step: int) -> Path:
    """Return the folder of one step's checkpoint.

    >>> str(step_folder(Path("checkpoints"), 500))
    'checkpoints/step-00000500'
    """
    if step < 0:
        raise ConfigError(f"step is {step}; give the number of steps done, 0 or more")
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """Return the step that a folder's name says it holds; None for a folder that is no checkpoint.

    >>> step_of(Path("step-00000500")), step_of(Path(".step-00000500.1a2b3c4d.old")), step_of(Path("notes"))
    (500, 500, None)
    """
    leftover = _LEFTOVER.fullmatch(path.name)
    name = leftover[1] if leftover and leftover[2] == "old" else path.name
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def list_checkpoints(folder: Path) -> dict[int, Path]:
    """List checkpoints by step, oldest first, whether their bytes hold or not."""
    if not folder.is_dir():
        return {}
    # A name with a dot sorts first, so that a checkpoint supersedes the one it replaced.
    named = [(step_of(path), path) for path in sorted(folder.iterdir()) if path.is_dir()]
    return dict(sorted({step: path for step, path in named if step is not None}.items()))


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed save left, and put back a checkpoint that was killed while it was being replaced."""
    if not folder.is_dir():
        return
    with explained_storage(folder):
        for path in sorted(folder.iterdir()):
            match = _LEFTOVER.fullmatch(path.name)
            if match is None:
                continue
            target = folder / match[1]
            if match[2] == "old" and not target.exists():
                path.rename(target)
            else:
                shutil.rmtree(path)


def write_checksums(path: Path, records: dict[str, FileRecord]) -> None:
    """Write the file table of a checkpoint."""
    table = {name: record.to_dict() for name, record in records.items()}
    values = {"schema_version": SCHEMA_VERSION, "files": table}
    path.write_text(json.dumps({"sha256": _digest(values)} | values, indent=1), encoding="utf-8")


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_checksums(path: Path) -> dict[str, FileRecord]:
    """Read the file table of a checkpoint; `CorruptArtifactError` where it is damaged or does not list both files."""
    try:
        if path.stat().st_size > _MAX_CHECKSUMS_BYTES:
            raise CorruptArtifactError(f"{path} holds {path.stat().st_size} bytes, more than a table of two files")
        values: dict[str, Any] = json.loads(path.read_bytes())
        # Checkpoints from before 0.2 have no digest of the table itself.
        if values.pop("sha256", None) not in (None, _digest(values)):
            raise CorruptArtifactError(f"{path} is damaged (its own checksum does not match)")
        version, table = int(values["schema_version"]), dict(values["files"])
        records = {name: FileRecord.from_dict(record) for name, record in table.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptArtifactError(f"{path} is missing or damaged ({error})") from error
    if version > SCHEMA_VERSION:
        raise UnsupportedSchemaError(
            f"{path} has schema version {version} and this deepseek reads up to {SCHEMA_VERSION}; "
            "upgrade deepseek-engine to resume from it"
        )
    if set(values) != {"schema_version", "files"}:
        raise CorruptArtifactError(f"{path} is damaged (it holds {sorted(values)})")
    if set(records) != {STATE_NAME, TENSORS_NAME}:
        raise CorruptArtifactError(f"{path} lists {sorted(records)}, expected {[STATE_NAME, TENSORS_NAME]}")
    return records
