"""`deepseek convert`: a model folder as an artifact, which `transformers` opens too where it knows the model."""

from __future__ import annotations

import sys
from pathlib import Path


def convert(
    model: Path, out: Path, *, precision: str | None = None, overwrite: bool = False, json: bool = False
) -> None:
    """Write MODEL, a Hugging Face folder, an artifact or a training run's folder, to OUT as an artifact.

    Families of Hugging Face keep their names, `config.json` and settings of generation, so that `transformers` opens
    OUT as well. The tokenizer goes along. MODEL stays as it is.

    Example: deepseek convert downloads/qwen my-model --precision bf16

    Parameters
    ----------
    model
        Folder of a Hugging Face model, of an artifact, or of a training run.
    out
        New folder for the artifact.
    precision
        `fp32`, `bf16` or `fp16`; left out, weights stay as they are stored.
    overwrite
        Replace an artifact that is in OUT.
    json
        Print the manifest of OUT as JSON.
    """
    from deepseek.artifact.format import TOKENIZER_NAME
    from deepseek.artifact.reading import find_model_folder, is_artifact, read_manifest
    from deepseek.cli.screen.tables import show_table
    from deepseek.core.errors import ConfigError
    from deepseek.core.units import format_bytes
    from deepseek.data.tokenizing import load_tokenizer
    from deepseek.models.loading import load_model, save_model
    from deepseek.models.weight_loading import dtype_of

    dtype_of(precision)
    folder = find_model_folder(model)
    if out.resolve() == folder.resolve():
        raise ConfigError(f"{out} is the model itself, which is kept; give another folder for the artifact")
    original = read_manifest(folder) if is_artifact(folder) else None
    module = load_model(folder, precision=precision).module
    if module is None:
        raise ConfigError(f"{folder} is run as it is and has no weights that could be written; give a model of PyTorch")
    manifest = save_model(
        module,
        out,
        tokenizer=load_tokenizer(folder) if (folder / TOKENIZER_NAME).exists() else None,
        metrics=original.metrics if original else None,
        parent_digest=original.digest if original else None,
        config_digest=original.config_digest if original else None,
        origin=folder,
        overwrite=overwrite,
    )
    if json:
        sys.stdout.write(manifest.model_dump_json() + "\n")
        return
    show_table(
        f"{folder} -> {out}",
        ("", ""),
        [
            ("architecture", manifest.architecture),
            ("precision", manifest.precision),
            ("layout", manifest.layout),
            ("digest", manifest.digest),
            *((name, format_bytes(file.num_bytes)) for name, file in manifest.files.items()),
        ],
    )
