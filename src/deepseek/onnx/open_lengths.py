"""Importing an ONNX file whose weights or attributes ask for lengths that its inputs leave open, by trying some.

An input of shape (batch, length) that is multiplied with a matrix of 32 rows must have 32 columns, though the file does
not say so. Where the usual lengths do not run, others are tried: the numbers that stand in the operator that failed
(shapes of its weights, `k`, sums and products of them) and usual image sizes, for one open length after the other and
for the last two (height and width) together. Lengths with which more operators can be translated are kept. A try ends
at the first operator that fails, and nothing is computed in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

from torch import Tensor, fx

from deepseek.onnx.files import UnsupportedOperatorError
from deepseek.onnx.importing import import_onnx

_IMAGE_SIZES = (224, 256, 299, 512, 28, 32, 8, 1)
_MAX_TRIES = 200

Draw = Callable[[Mapping[str, int]], Sequence[Tensor]]


def import_with_lengths(
    model: Any, symbols: Sequence[str], draw: Draw, *, source: str, in_float32: bool
) -> tuple[fx.GraphModule, dict[str, int]]:
    """Return the module, and lengths for those of `symbols` that the usual ones do not fit.

    `draw` gives sample inputs for such lengths. Raises `UnsupportedOperatorError` where nothing that was tried runs.
    """
    lengths: dict[str, int] = {}
    num_tries = 0
    failure: UnsupportedOperatorError | None = None
    while True:
        attempts = _list_attempts(symbols, lengths, failure)
        for attempt in islice(attempts, _MAX_TRIES - num_tries):
            num_tries += 1
            try:
                module = import_onnx(model, sample_inputs=draw(attempt), source=source, in_float32=in_float32)
                return module, attempt
            except UnsupportedOperatorError as error:
                if failure is None or error.position > failure.position:
                    failure, lengths = error, attempt
                    break
        else:
            assert failure is not None
            raise UnsupportedOperatorError(
                f"{failure}; if its open lengths ({', '.join(symbols)}) are why, give lengths that fit, by shapes"
            ) from failure
        if not symbols or not failure.numbers:
            raise failure


def _list_attempts(
    symbols: Sequence[str], lengths: Mapping[str, int], failure: UnsupportedOperatorError | None
) -> list[dict[str, int]]:
    if failure is None:
        return [dict(lengths)]
    alone = [{**lengths, symbol: number} for number in failure.numbers for symbol in symbols]
    images = [{**lengths, **dict.fromkeys(symbols[-2:], size)} for size in _IMAGE_SIZES]
    together = [{**lengths, **dict.fromkeys(symbols[-2:], number)} for number in failure.numbers]
    return images + alone + together if len(symbols) > 2 else alone + together + images
