"""`deepseek quantize`: an int8 version of a model, with what it costs."""

from __future__ import annotations

import math
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

if TYPE_CHECKING:
    from deepseek.data.batching import Batch

_ROW_TOKENS = 128


def quantize(
    model: Path,
    out: Path,
    *,
    text: str = "stdlib",
    max_tokens: Annotated[int, Parameter(validator=Number(gte=1))] = 20_000,
    max_loss_increase: float = 0.02,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Write an int8 version of MODEL to OUT, and say what it costs and brings.

    The loss of both is measured on some text; nothing is written when it rises by more than the bound.

    Example: deepseek quantize runs/decoder_tiny/model runs/decoder_tiny/model-int8 --text notes/

    Parameters
    ----------
    model
        Folder of an artifact, of a Hugging Face model or of a training run, with a tokenizer.
    out
        Folder of the int8 artifact.
    text
        Held-out text to compare on: a folder, glob, text, JSONL or Parquet file or URL, or `stdlib`.
    max_tokens
        Tokens of it to read.
    max_loss_increase
        Largest accepted relative rise of the loss; 0.02 is two percent.
    overwrite
        Replace an artifact that is in OUT.
    json
        Print the report as JSON.
    """
    from deepseek.artifact.reading import find_model_folder
    from deepseek.cli.screen.tables import show_table, working
    from deepseek.compress.quantizing import quantize as run

    model = find_model_folder(model)
    with working("int8, and both models side by side"), heldout_batches(model, text, max_tokens) as batches:
        report = run(model, out, batches, max_loss_increase=max_loss_increase, overwrite=overwrite)
    if json:
        sys.stdout.write(report.model_dump_json() + "\n")
        return
    show_table(
        f"{model} -> {out}",
        ("", "before", "after", "ratio"),
        [
            (
                "weights, MB",
                f"{report.bytes_before / 1e6:.1f}",
                f"{report.bytes_after / 1e6:.1f}",
                f"{report.bytes_ratio:.2f}",
            ),
            (
                "loss, nats per token",
                f"{report.loss_before:.4f}",
                f"{report.loss_after:.4f}",
                f"{1 + report.loss_increase:.4f}",
            ),
            (
                "decoding, tokens/s",
                f"{report.decode_tokens_per_s_before:.0f}",
                f"{report.decode_tokens_per_s_after:.0f}",
                f"{report.decode_speedup:.2f}",
            ),
        ],
    )


@contextmanager
def heldout_batches(model: Path, text: str, max_tokens: int) -> Iterator[Iterator[Batch]]:
    """About `max_tokens` tokens of `text` in the tokens of `model`, in batches; warns of text that is not UTF-8."""
    from deepseek.data.batching import evaluation_batches
    from deepseek.data.config import DataConfig
    from deepseek.data.sources import Corpus
    from deepseek.data.token_cache import CacheReady, build_token_cache, load_token_cache
    from deepseek.data.tokenizing import load_tokenizer
    from deepseek.models.model_sources import read_max_length

    longest = read_max_length(model) or _ROW_TOKENS
    config = DataConfig(sources=(text,), sequence_length=min(_ROW_TOKENS, longest), batch_size=16)
    with tempfile.TemporaryDirectory() as folder:
        for event in build_token_cache(Corpus(config.sources), load_tokenizer(model), Path(folder) / "tokens"):
            if isinstance(event, CacheReady) and event.num_undecodable:
                documents, places = event.num_undecodable_documents, event.num_undecodable
                warnings.warn(f"{places} places in {documents} files are not UTF-8 and became U+FFFD", stacklevel=2)
        cache = load_token_cache(Path(folder) / "tokens", is_verified=True)
        num_batches = math.ceil(max_tokens / (config.sequence_length * config.batch_size))
        yield islice(evaluation_batches(cache, config), num_batches)
