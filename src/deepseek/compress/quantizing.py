"""From a float artifact to an int8 one, with a report, and a refusal when it got too much worse.

    report = quantize("runs/train/model", "runs/train/model-int8", batches)

Every linear layer, expert and embedding goes to int8 weights with dynamic int8 activations (`nn/quantized.py` says how
and why that variant); routers and gates of the attention mask stay in float, since they are small and decide. The new
artifact names the original as its parent. Nothing is written when the held-out loss rises by more than the bound.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

from deepseek.artifact.format import TOKENIZER_NAME
from deepseek.artifact.reading import is_artifact, read_manifest
from deepseek.compress.quality import Comparison, compare
from deepseek.core.errors import ArtifactError, ConfigError, PermanentError
from deepseek.data.batching import Batch
from deepseek.data.tokenizing import load_tokenizer
from deepseek.models.loading import count_stored_bytes, load_decoder, make_int8_, save_model
from deepseek.nn.packed import pack_

MAX_LOSS_INCREASE = 0.02


def quantize(
    source: str | Path,
    target: str | Path,
    batches: Iterable[Batch],
    *,
    max_loss_increase: float = MAX_LOSS_INCREASE,
    overwrite: bool = False,
) -> Comparison:
    """Write the int8 version of `source`, an artifact or a Hugging Face folder, to `target` and say what it costs.

    `batches` are held-out text in the model's own tokens. Writes nothing and raises `ConfigError` when `source` is int8
    already or is `target` itself, `ArtifactError` when `target` is there already, and `PermanentError` when the loss
    rises by more than `max_loss_increase` (relative).
    """
    source, target = Path(source), Path(target)
    original = read_manifest(source) if is_artifact(source) else None  # a Hugging Face folder has none
    if original is not None and original.precision == "int8":
        raise ConfigError(f"{source} is int8 already; give the float model that it came from")
    if target.resolve() == source.resolve():
        raise ConfigError(f"{target} is the float model itself, which is kept; give another folder for the int8 one")
    if is_artifact(target) and not overwrite:
        raise ArtifactError(f"{target} holds an artifact already; give another folder, or ask for it to be overwritten")
    model = load_decoder(source, precision="fp32")
    quantized = make_int8_(copy.deepcopy(model))
    comparison = compare(
        pack_(copy.deepcopy(model)),
        pack_(copy.deepcopy(quantized)),
        batches,
        bytes_before=count_stored_bytes(model),
        bytes_after=count_stored_bytes(quantized),
    )
    if not comparison.loss_increase <= max_loss_increase:  # also where either is not a number
        raise PermanentError(
            f"int8 raises the held-out loss by {comparison.loss_increase:.1%}, and at most {max_loss_increase:.1%} was "
            "allowed; nothing was written: keep the float model, or raise the bound"
        )
    save_model(
        quantized,
        target,
        tokenizer=load_tokenizer(source) if (source / TOKENIZER_NAME).is_file() else None,
        metrics={"heldout_loss": comparison.loss_after},
        parent_digest=original.digest if original else None,
        config_digest=original.config_digest if original else None,
        overwrite=overwrite,
    )
    return comparison
