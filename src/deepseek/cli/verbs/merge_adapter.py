"""`deepseek merge-adapter`: an adapter and its base as one model, which needs neither of them any more."""

from __future__ import annotations

import sys
from pathlib import Path


def merge_adapter(
    adapter: Path,
    out: Path,
    *,
    base: Path | None = None,
    precision: str | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Write ADAPTER and its base to OUT as one artifact.

    ADAPTER is the folder of a training run with `adapter`, or one that `peft` wrote. An int8 base becomes float, since
    int8 weights cannot hold the corrections; `deepseek quantize` makes the result int8 again. The tokenizer goes along.

    Example: deepseek merge-adapter runs/lora merged

    Parameters
    ----------
    adapter
        Folder of the adapter, or of the run that trained it.
    out
        New folder for the artifact.
    base
        Folder of the model that the adapter was trained on; left out, where the adapter says.
    precision
        `fp32`, `bf16` or `fp16`; left out, that of the base in memory, which is fp32.
    overwrite
        Replace an artifact that is in OUT.
    json
        Print the manifest of OUT as JSON.
    """
    from deepseek.artifact.format import TOKENIZER_NAME
    from deepseek.artifact.reading import find_model_folder, is_adapter, is_artifact, read_manifest
    from deepseek.cli.screen.tables import show_table
    from deepseek.core.errors import ConfigError
    from deepseek.core.units import format_bytes
    from deepseek.data.tokenizing import load_tokenizer
    from deepseek.models.adapters import open_adapter
    from deepseek.models.loading import save_model
    from deepseek.models.weight_loading import dtype_of
    from deepseek.nn.lora import merge_lora_
    from deepseek.nn.quantized import widen_

    dtype_of(precision)
    folder = find_model_folder(adapter)
    if not is_adapter(folder):
        raise ConfigError(f"{folder} is no adapter; give a folder with an adapter_config.json")
    start = open_adapter(folder, base)
    with_tokenizer = next((path for path in (folder, start.folder) if path and (path / TOKENIZER_NAME).is_file()), None)
    manifest = save_model(
        merge_lora_(widen_(start.model)),
        out,
        tokenizer=None if with_tokenizer is None else load_tokenizer(with_tokenizer),
        precision=precision,  # type: ignore[arg-type]
        metrics=read_manifest(folder).metrics if is_artifact(folder) else None,
        parent_digest=read_manifest(folder).digest if is_artifact(folder) else start.parent_digest,
        origin=None if start.source.weights else start.folder,
        overwrite=overwrite,
    )
    if json:
        sys.stdout.write(manifest.model_dump_json() + "\n")
        return
    show_table(
        f"{folder} on {start.source.name} -> {out}",
        ("", ""),
        [
            ("architecture", manifest.architecture),
            ("precision", manifest.precision),
            ("digest", manifest.digest),
            *((name, format_bytes(file.num_bytes)) for name, file in manifest.files.items()),
        ],
    )
