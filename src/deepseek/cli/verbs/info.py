"""`deepseek info`: what a model folder holds, verified."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any


def info(path: Path, *, verify: bool = True, json: bool = False) -> None:
    """Say what the model in PATH is and which files it has, after comparing every file with its checksum.

    A Hugging Face folder has no checksums; its weights are opened, so that a file that is cut short is found. Of a
    training run's folder it is the model that is meant.

    Example: deepseek info runs/quickstart/model

    Parameters
    ----------
    path
        Folder of an artifact, of a Hugging Face model, or of a training run.
    verify
        Compare the files with the manifest; reads all of them.
    json
        Print the whole manifest as JSON.
    """
    from deepseek.artifact.format import CONFIG_NAME
    from deepseek.artifact.reading import find_model_folder, is_artifact, open_artifact, read_manifest
    from deepseek.cli.screen.tables import show_table
    from deepseek.core.units import format_bytes, format_count

    folder = find_model_folder(path)
    if not is_artifact(folder) and (folder / CONFIG_NAME).is_file():
        facts = describe_huggingface(folder)
        if json:
            from json import dumps

            sys.stdout.write(dumps(facts) + "\n")
            return
        rows = [
            ("architecture", facts["architecture"]),
            ("parameters", format_count(facts["num_parameters"])),
            ("precision", ", ".join(facts["dtypes"])),
            *((name, format_bytes(num_bytes)) for name, num_bytes in facts["files"].items()),
            ("files", "weights are whole; no checksums"),
        ]
        show_table(str(folder), ("", ""), rows)
        return
    manifest = open_artifact(folder).manifest if verify else read_manifest(folder)
    if json:
        sys.stdout.write(manifest.model_dump_json() + "\n")
        return
    show_table(
        str(folder),
        ("", ""),
        [
            ("architecture", manifest.architecture),
            ("precision", manifest.precision),
            ("layout", manifest.layout),
            ("digest", manifest.digest),
            ("parent", manifest.parent_digest or "none"),
            *((name, f"{value:.4f}") for name, value in manifest.metrics.items()),
            *((name, format_bytes(file.num_bytes)) for name, file in manifest.files.items()),
            ("files", "verified" if verify else "not verified"),
        ],
    )


def describe_huggingface(folder: Path) -> dict[str, Any]:
    """The architecture that the config names, and what is in the weight files; tied weights count once."""
    from deepseek.artifact.reading import read_tensors
    from deepseek.core.model_folder import ModelFolder
    from deepseek.models.model_sources import find_weight_files

    config = ModelFolder(folder).config
    tensors = read_tensors(find_weight_files(folder))
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    architectures = config.get("architectures") or [config.get("model_type") or "unknown"]
    return {
        "architecture": ", ".join(map(str, architectures)),
        "num_parameters": sum(tensor.numel() for tensor in tensors.values()),
        "dtypes": [dtype for dtype, _ in dtypes.most_common()],
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()},
    }
