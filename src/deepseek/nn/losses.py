"""The loss of language models, as training, evaluation and the comparison of compressed models all take it.

Summed and not averaged, because batches hold different numbers of targets: who calls divides by the tokens of all of
them. Computed in float32 at least, whatever the logits are in. Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sum_cross_entropy(logits_BTV: Tensor, targets_BT: Tensor, *, ignored_target: int) -> Tensor:
    """Return the () sum over all targets but `ignored_target`, in nats.

    >>> sum_cross_entropy(torch.zeros(1, 2, 4), torch.tensor([[3, -1]]), ignored_target=-1).exp().round().item()
    4.0
    """
    wide_BTV = logits_BTV if logits_BTV.dtype == torch.float64 else logits_BTV.float()
    return F.cross_entropy(wide_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=ignored_target, reduction="sum")
