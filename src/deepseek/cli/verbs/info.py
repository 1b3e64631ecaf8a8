"""`deepseek info`: what a model folder holds, verified."""

from __future__ import annotations

import sys
from pathlib import Path


def info(path: Path, *, verify: bool = True, json: bool = False) -> None:
    """Say what the artifact in PATH holds, after comparing every file with its checksum.

    Example: deepseek info runs/quickstart/model

    Parameters
    ----------
    path
        Folder of an artifact.
    verify
        Compare the files with the manifest; reads all of them.
    json
        Print the whole manifest as JSON.
    """
    from deepseek.artifact.reading import open_artifact, read_manifest
    from deepseek.cli.screen.tables import show_table
    from deepseek.core.units import format_bytes

    manifest = open_artifact(path).manifest if verify else read_manifest(path)
    if json:
        sys.stdout.write(manifest.model_dump_json() + "\n")
        return
    show_table(
        str(path),
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
