"""Converting a checkpoint on disk, tensor group by tensor group, in memory that does not grow with the model.

    convert_files(VersionConverter("v2.0", "v5.0"), Path("old"), Path("new"))

The plan gives names, dtypes and shapes of all results before the first byte is read, so the headers of the new files
are written first and every tensor goes straight to its position. What is in memory at any time is one group: a layer's
projections, or a layer's experts. The new folder appears whole or not at all (`core.storage.new_folder`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek.compat.headers import INDEX_NAME, read_checkpoint, read_model_type
from deepseek.compat.tensors import ITEM_BYTES, TensorSpec
from deepseek.compat.version_converter import ConversionReport, VersionConverter
from deepseek.core.errors import ConfigError
from deepseek.core.storage import new_folder

if TYPE_CHECKING:
    from torch import Tensor

MAX_SHARD_BYTES = 2_000_000_000
# A manifest holds checksums of the files it stands beside, which are new here.
_NOT_COPIED = ("manifest.json", INDEX_NAME)


def convert_files(
    converter: VersionConverter,
    source: Path,
    target: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_progress: Callable[[int, int], None] = lambda done_bytes, all_bytes: None,
) -> ConversionReport:
    """Write the checkpoint in `source` (a safetensors file, or a folder) to the new folder `target`, converted.

    The destination's layout decides between one file and shards of at most `max_shard_bytes` with an index; other files
    of a source folder are copied. `on_progress` receives bytes done and in all. Raises `ConfigError` when `target`
    exists, `ArtifactError` for what cannot be converted, and `StorageError` for what the disk refuses.
    """
    if target.exists():
        raise ConfigError(f"{target} exists; a conversion never writes over anything, choose another folder")
    stored = read_checkpoint(source)
    plan, report = converter.plan({name: tensor.spec for name, tensor in stored.items()}, read_model_type(source))
    layout = converter.target.layout
    is_single = layout is not None and layout.container == "single"
    shards = _divide(plan.specs, None if is_single else max_shard_bytes)
    all_bytes, done_bytes = sum(spec.num_bytes for spec in plan.specs.values()), 0
    with new_folder(target) as folder:
        owners: dict[str, _Shard] = {}
        for file, specs in shards.items():
            owners |= dict.fromkeys(specs, _Shard(folder / file, specs))
        for name, tensor in plan.run(lambda name: stored[name].read()):
            owners[name].write(name, tensor)
            done_bytes += plan.specs[name].num_bytes
            on_progress(done_bytes, all_bytes)
        if len(shards) > 1:
            _write_index(folder, shards, all_bytes)
        _copy_others(source, folder)
    return report


class _Shard:
    """A safetensors file whose header is written and whose tensors come in any order."""

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        # Wide elements first keeps each aligned to its size, as readers that map the file need it.
        ordered = sorted(specs.items(), key=lambda item: -ITEM_BYTES[item[1].dtype])
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for name, spec in ordered:
            end = begin + spec.num_bytes
            header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [begin, end]}
            begin = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.path = path
        self.path.write_bytes(len(text).to_bytes(8, "little") + text)
        data_start = 8 + len(text)
        self.starts = {name: data_start + header[name]["data_offsets"][0] for name in specs}

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor at its position."""
        import torch

        with self.path.open("r+b") as file:
            file.seek(self.starts[name])
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _divide(specs: Mapping[str, TensorSpec], max_shard_bytes: int | None) -> dict[str, dict[str, TensorSpec]]:
    """File name to what goes into it, in order; a tensor larger than a shard gets one of its own."""
    shards: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for name, spec in specs.items():
        if max_shard_bytes is not None and shards[-1] and filled + spec.num_bytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = spec
        filled += spec.num_bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, start=1)
    }


def _write_index(folder: Path, shards: Mapping[str, Mapping[str, TensorSpec]], total_bytes: int) -> None:
    weight_map = {name: file for file, specs in shards.items() for name in specs}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _copy_others(source: Path, folder: Path) -> None:
    if not source.is_dir():
        return
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name not in _NOT_COPIED:
            shutil.copy2(path, folder / path.name)
