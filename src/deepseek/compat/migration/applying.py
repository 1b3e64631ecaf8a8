"""A migrated copy of a project: configs and sources edited in place of their text, checkpoints converted.

The original is never touched; the copy is a new folder that appears whole or not at all. No file of it is worse than
its original: an edit is made where the result was read again and is right, a checkpoint is converted where every tensor
of it is known, and everything else is copied as it is, with its mode and its links, and reported.
"""

from __future__ import annotations

import pickle
import shutil
import stat
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepseek.compat.conversion_steps import identify
from deepseek.compat.headers import INDEX_NAME, read_checkpoint
from deepseek.compat.migration.findings import Finding, apply_edits
from deepseek.compat.migration.python_files import decode_python, encode_python
from deepseek.compat.migration.scanning import Scan, list_files, prepare_scan, scan_file, show
from deepseek.compat.migration.settings import decode_settings
from deepseek.compat.sharded_checkpoints import MAX_SHARD_BYTES, convert_files
from deepseek.compat.version_converter import VersionConverter
from deepseek.core.errors import ArtifactError, ConfigError
from deepseek.core.storage import new_folder


def migrate(
    path: Path,
    out: Path,
    target: str,
    source: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    on_change: Callable[[Path, str], None] = lambda file, what: None,
    exclude: Sequence[str] = (),
) -> list[Finding]:
    """Write a migrated copy of the file or folder `path` to the new folder `out`; return what is left for a person.

    `on_progress` receives files done and in all, `on_change` every file of the copy that differs and what was done to
    it. Files that `exclude` names are copied as they are. Raises `ConfigError` when `out` exists or lies inside `path`.
    """
    if out.exists():
        raise ConfigError(f"{out} exists; a migration never writes over anything, choose another folder")
    if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
        raise ConfigError(f"{out} lies inside {path}, which is to be copied; choose a folder outside")
    files = list_files(path, exclude)
    root = path if path.is_dir() else path.parent
    prepared = prepare_scan(target, source, files, root)
    reasons: dict[str, str] = {}
    with new_folder(out) as copy:
        if path.is_dir():
            shutil.copytree(path, copy, dirs_exist_ok=True, symlinks=True, ignore=_list_special_files)
        else:
            shutil.copy2(path, copy / path.name)
        for done, file in enumerate(files, start=1):
            counterpart = copy / file.relative_to(root)
            # What a link leads to is either a file of the copy, which is migrated itself, or not ours to write.
            if not _is_behind_link(counterpart, copy):
                try:
                    what = _migrate_file(file, counterpart, prepared, root, is_named=file == path)
                except ArtifactError as error:  # the copy is as the original
                    reasons[show(file, root)] = str(error)
                else:
                    if what:
                        on_change(file.relative_to(root), what)
            on_progress(done, len(files))
    is_named = not path.is_dir()
    left = list_files(out, exclude)
    again = prepare_scan(target, source, left, out)
    found = [finding for file in left for finding in scan_file(file, again, out, is_named=is_named)]
    return [_leave(finding, reasons) if finding.is_fixable else finding for finding in found]


def _leave(finding: Finding, reasons: Mapping[str, str]) -> Finding:
    """Return a finding that was to be settled and was not, with the reason."""
    if finding.rule == "checkpoint-pickle":
        why = reasons.get(finding.path, "it holds more than plain tensors by their names")
        return finding.for_person(why, "save its tensors with safetensors.torch.save_file, and the rest apart")
    return finding.for_person(reasons.get(finding.path, "left as it was"))


def _list_special_files(folder: str, names: list[str]) -> set[str]:
    """Return the pipes, sockets and devices of a folder: they hold nothing that could be copied."""
    modes = {name: Path(folder, name).lstat().st_mode for name in names}
    return {
        name for name, mode in modes.items() if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode))
    }


def _is_behind_link(file: Path, copy: Path) -> bool:
    return any(part.is_symlink() for part in (file, *file.parents) if part.is_relative_to(copy) and part != copy)


def _migrate_file(file: Path, copy: Path, prepared: Scan, root: Path, *, is_named: bool) -> str:
    """Migrate one file of the copy; return what was done, nothing where it stays as it is."""
    findings = scan_file(file, prepared, root, is_named=is_named)
    rules = {found.rule for found in findings if found.is_fixable}
    if any(found.edits for found in findings):
        content = file.read_bytes()
        mode = copy.stat().st_mode
        copy.unlink()
        copy.write_bytes(_edit(content, file.suffix, findings))
        copy.chmod(mode)
        return ", ".join(sorted(rules))
    if "checkpoint-layout" in rules:
        return _convert(file, copy, prepared)
    return _convert_pickle(file, copy, prepared) if "checkpoint-pickle" in rules else ""


def _edit(content: bytes, suffix: str, findings: list[Finding]) -> bytes:
    if suffix == ".py":
        return encode_python(apply_edits(decode_python(content), findings), content)
    decoded = decode_settings(content)
    return decoded.encode(apply_edits(decoded.text, findings))


def _convert(source: Path, copy: Path, prepared: Scan) -> str:
    """Convert a file, or a folder of shards, over its copy."""
    stored = read_checkpoint(source)
    generations = identify({name: tensor.spec for name, tensor in stored.items()})
    converter = VersionConverter(generations[-1], prepared.target.name)
    with tempfile.TemporaryDirectory(dir=copy.parent) as folder:
        out = Path(folder) / "converted"
        # A file stays one file by its own name, since configs and code name it.
        convert_files(converter, source, out, max_shard_bytes=MAX_SHARD_BYTES if source.is_dir() else 1 << 62)
        if source.is_dir():
            # Only what the index lists is replaced: other weights beside it are not of this checkpoint.
            for old in {tensor.path.name for tensor in stored.values()}:
                (copy / old).unlink()
            (copy / INDEX_NAME).unlink(missing_ok=True)
            for new in out.iterdir():
                if new.suffix == ".safetensors" or new.name == INDEX_NAME:
                    shutil.move(new, copy / new.name)
        else:
            (converted,) = out.glob("*.safetensors")
            _replace_file(converted, copy)
    return f"converted from {generations[-1]} to {prepared.target.name}"


def _replace_file(new: Path, old: Path) -> None:
    mode = old.stat().st_mode
    old.unlink()
    shutil.move(new, old)
    old.chmod(mode)


def _convert_pickle(source: Path, copy: Path, prepared: Scan) -> str:
    """Write a pickle that is a flat dict of plain tensors as safetensors; any other one stays as it is."""
    from safetensors.torch import save_file

    weights, target = _load_weights(source), copy.with_suffix(".safetensors")
    if weights is None or target.exists():
        return ""
    what = f"read as weights only and written as {target.name}"
    try:
        save_file({name: tensor.contiguous().clone() for name, tensor in weights.items()}, target, {"format": "pt"})
        found = scan_file(target, prepared, target.parent)
        if any(finding.rule == "checkpoint-layout" and finding.is_fixable for finding in found):
            what += f", {_convert(target, target, prepared)}"
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    target.chmod(copy.stat().st_mode)
    copy.unlink()
    return what


def _load_weights(path: Path) -> dict[str, Any] | None:
    """Read the tensors of a pickle through torch's weights-only reader, which builds tensors and calls nothing else.

    `None` where it holds anything beside them, such as the state of an optimizer, which safetensors could not carry.
    """
    import torch

    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError):
        return None
    weights = weights["state_dict"] if isinstance(weights, dict) and set(weights) == {"state_dict"} else weights
    is_flat = isinstance(weights, dict) and all(isinstance(name, str) for name in weights)
    is_plain = is_flat and all(
        isinstance(tensor, torch.Tensor)
        and tensor.layout is torch.strided
        and not (tensor.is_quantized or tensor.is_complex() or tensor.is_meta)
        for tensor in weights.values()
    )
    return {name: tensor.detach() for name, tensor in weights.items()} if is_plain and weights else None
