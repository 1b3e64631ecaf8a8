"""The engine's decoding step as one recorded CUDA graph per batch size and length, for devices that can record.

    rows (token, position) of the slots -> filled up to a bucket -> GraphedFunction -> logits of the rows that count

One token of a small model is hundreds of kernels that the GPU waits for; a recording starts them as one
(`compiler/runtimes/cuda_graphs.py`). The KV cache stays where it is, so a recording reads and writes it by address.
Recording runs the step a few times, and each time writes the same keys and values to the same places, so that nothing
in the cache has to be kept aside. Rows beyond the decoding sequences write where the engine says that nothing is kept.

A model that decides on the CPU what to compute next (experts that gather tokens) cannot be recorded: the first attempt
says so in the log, once, and steps run as they are from then on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deepseek.compiler.runtimes.cuda_graphs import GraphedFunction, Record, choose_bucket, list_buckets

logger = logging.getLogger(__name__)

Row = tuple[int, int]


class RecordedDecoding:
    """Decodes one token for each row, by `decode(tokens_B1, positions_B1, length)`, recorded or as it is."""

    def __init__(
        self,
        decode: Callable[[Tensor, Tensor, int], Tensor],
        device: torch.device,
        *,
        max_num_seqs: int,
        record: Record | None,
    ) -> None:
        self._decode = decode
        self._device = device
        self._buckets = list_buckets(max_num_seqs)
        self._recorded = GraphedFunction(decode, record=record)
        self.is_recording = True
        """Whether the model could be recorded so far."""

    def num_rows(self, num_decoding: int) -> int:
        """Return how many slots take part where `num_decoding` are decoded."""
        return choose_bucket(num_decoding, self._buckets) if self.is_recording else num_decoding

    def __call__(self, rows: Sequence[Row], length: int) -> Tensor:
        """Return logits (B, 1, V) of all `rows`, the (token, position) of slots 0 and following."""
        tokens_B1 = torch.tensor([[token] for token, _ in rows], device=self._device)
        positions_B1 = torch.tensor([[position] for _, position in rows], device=self._device)
        if self.is_recording:
            try:
                logits_B1V: Tensor = self._recorded(tokens_B1, positions_B1, length)
                return logits_B1V
            except RuntimeError as error:  # what torch raises for a step that waits for the GPU
                self.is_recording = False
                logger.warning(
                    "decoding runs without CUDA graphs, since this model could not be recorded (%s: %s)",
                    type(error).__name__,
                    str(error).partition("\n")[0],
                )
        return self._decode(tokens_B1, positions_B1, length)
