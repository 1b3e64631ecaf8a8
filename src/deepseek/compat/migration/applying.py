"""A migrated copy of a project: configs and sources edited in place of their text, checkpoints converted.

The original is never touched; the copy is a new folder that appears whole or not at all. Edits can lead to further
ones (a renamed section whose keys are renamed, too), so a text is edited until nothing more is found; applying to the
copy then changes nothing.
"""

from __future__ import annotations

import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepseek.compat.conversion_steps import identify
from deepseek.compat.headers import read_checkpoint
from deepseek.compat.migration.config_files import check_config
from deepseek.compat.migration.findings import Finding, apply_edits
from deepseek.compat.migration.pickles import SUFFIXES as PICKLE_SUFFIXES
from deepseek.compat.migration.python_files import check_python, decode_python, encode_python
from deepseek.compat.migration.scanning import Scan, list_files, prepare_scan, scan_file
from deepseek.compat.sharded_checkpoints import convert_files
from deepseek.compat.version_converter import VersionConverter
from deepseek.core.errors import ConfigError
from deepseek.core.storage import new_folder

_MAX_ROUNDS = 10


def migrate(
    path: Path,
    out: Path,
    target: str,
    source: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Finding]:
    """Write a migrated copy of the file or folder `path` to the new folder `out`; returns what is left for a person.

    `on_progress` is told files done and in all. Raises `ConfigError` when `out` exists or lies inside `path`.
    """
    if out.exists():
        raise ConfigError(f"{out} exists; a migration never writes over anything, choose another folder")
    if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
        raise ConfigError(f"{out} lies inside {path}, which is to be copied; choose a folder outside")
    prepared, files = prepare_scan(target, source), list_files(path)
    root = path if path.is_dir() else path.parent
    with new_folder(out) as copy:
        if path.is_dir():
            shutil.copytree(path, copy, dirs_exist_ok=True, symlinks=True, ignore=_hollow)
        else:
            shutil.copy2(path, copy / path.name)
        for done, file in enumerate(files, start=1):
            twin = copy / file.relative_to(root)
            # A link out of the folder leads to a file that is not a copy and must not be written.
            if twin.resolve().is_relative_to(copy.resolve()):
                _migrate_file(file, twin, prepared, root, is_named=file == path)
            on_progress(done, len(files))
    is_named = not path.is_dir()
    return [each for file in list_files(out) for each in scan_file(file, prepared, out, is_named=is_named)]


def _hollow(folder: str, names: list[str]) -> set[str]:
    """Links to nothing, pipes and sockets: they hold nothing that could be copied."""
    paths = {name: Path(folder, name) for name in names}
    return {name for name, path in paths.items() if not (path.is_file() or path.is_dir())}


def _migrate_file(file: Path, copy: Path, prepared: Scan, root: Path, *, is_named: bool) -> None:
    findings = scan_file(file, prepared, root, is_named=is_named)
    if any(found.edits for found in findings):
        content = file.read_bytes()
        copy.unlink()
        copy.write_bytes(_edit(content, file.suffix, findings, prepared))
    elif any(found.rule == "checkpoint-layout" for found in findings):
        _convert(file, copy, prepared)
    elif any(found.rule == "checkpoint-pickle" for found in findings) and file.suffix in PICKLE_SUFFIXES:
        _convert_pickle(file, copy, prepared)


def _edit(content: bytes, suffix: str, findings: list[Finding], prepared: Scan) -> bytes:
    if suffix == ".py":
        text = decode_python(content)
        for _ in range(_MAX_ROUNDS):
            text = apply_edits(text, findings)
            findings = check_python(encode_python(text, content), "", prepared.rules.python)
            if not any(found.edits for found in findings):
                break
        return encode_python(text, content)
    text = content.decode("utf-8")
    mark = text[: len(text) - len(text.removeprefix("\ufeff"))]
    text = text.removeprefix("\ufeff")
    for _ in range(_MAX_ROUNDS):
        text = apply_edits(text, findings)
        findings = check_config(text, "", suffix, prepared.rules, prepared.target.name, is_named=True)
        if not any(found.edits for found in findings):
            break
    return (mark + text).encode("utf-8")


def _convert(source: Path, copy: Path, prepared: Scan) -> None:
    """Convert a file or a folder of shards into the place of its copy."""
    generations = identify({name: place.spec for name, place in read_checkpoint(source).items()})
    converter = VersionConverter(generations[-1], prepared.target.name)
    with tempfile.TemporaryDirectory(dir=copy.parent) as folder:
        out = Path(folder) / "converted"
        convert_files(converter, source, out)
        if source.is_dir():
            for old in copy.glob("*.safetensors"):
                old.unlink()
            shutil.copytree(out, copy, dirs_exist_ok=True)
        else:
            _place_file(out, copy)


def _place_file(out: Path, copy: Path) -> None:
    """A single file stays one by its own name; one that was divided becomes the shards beside it."""
    copy.unlink(missing_ok=True)
    files = sorted(out.glob("*"))
    for file in files:
        shutil.move(file, copy if len(files) == 1 else copy.parent / file.name)


def _convert_pickle(source: Path, copy: Path, prepared: Scan) -> None:
    """A pickle that names nothing foreign becomes safetensors; anything but a flat dict of tensors stays as it is."""
    from safetensors.torch import save_file

    weights, target = _load_weights(source), copy.with_suffix(".safetensors")
    if weights is None or target.exists():
        return
    with tempfile.TemporaryDirectory(dir=copy.parent) as folder:
        written = Path(folder) / target.name
        save_file({name: each.contiguous().clone() for name, each in weights.items()}, written, {"format": "pt"})
        if any(found.rule == "checkpoint-layout" for found in scan_file(written, prepared, written.parent)):
            _convert(written, target, prepared)
        else:
            shutil.move(written, target)
    copy.unlink()


def _load_weights(path: Path) -> dict[str, Any] | None:
    """The tensors of a pickle through torch's weights-only reader, which builds tensors and calls nothing else."""
    import torch

    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError):
        # Left in the copy as it is, where the scan that follows names it once more.
        return None
    weights = weights.get("state_dict", weights) if isinstance(weights, dict) else weights
    is_flat = isinstance(weights, dict) and all(isinstance(each, torch.Tensor) for each in weights.values())
    return weights if is_flat and weights else None
