"""From hidden states of tokens to one vector per text, as sentence encoders are read.

    hidden_BTD = model(tokens_BT, mask_BT)
    vectors_BD = pool_mean(hidden_BTD, mask_BT)

The mean over the tokens that are text, of length one, is what all-MiniLM and most of its family were trained for
(Reimers and Gurevych 2019, "Sentence-BERT"). Two such vectors are compared by their dot product. Other encoders were
trained for their first token (`cls`), the largest value of each channel (`max`) or their last token; `POOLINGS` has
them under the names that `sentence-transformers` writes into `1_Pooling/config.json`.

Shapes: B texts, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

POOLING_CONFIG_NAME = "1_Pooling/config.json"
"""Where `sentence-transformers` writes how tokens become a vector; a folder with it is of a text encoder."""


def pool_mean(hidden_BTD: Tensor, mask_BT: Tensor, *, normalize: bool = True) -> Tensor:
    """Average the tokens whose mask is 1, (B, D); of length one with `normalize`.

    >>> pool_mean(torch.tensor([[[3.0, 0.0], [9.0, 9.0]]]), torch.tensor([[1, 0]]))
    tensor([[1., 0.]])
    """
    weights_BT1 = mask_BT.unsqueeze(-1).to(hidden_BTD.dtype)
    sums_BD = (hidden_BTD * weights_BT1).sum(1)
    means_BD = sums_BD / weights_BT1.sum(1).clamp(min=1e-9)
    return F.normalize(means_BD, dim=-1) if normalize else means_BD


def pool_first(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Take the first token of each text, (B, D)."""
    return hidden_BTD[torch.arange(len(mask_BT)), mask_BT.argmax(dim=1)]


def pool_last(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Take the last token of each text, (B, D).

    >>> pool_last(torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[1, 1, 0]]))
    tensor([[2.]])
    """
    positions_BT = torch.arange(mask_BT.shape[1]) * mask_BT
    return hidden_BTD[torch.arange(len(mask_BT)), positions_BT.argmax(dim=1)]


def pool_max(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Take the largest value of each channel over the tokens whose mask is 1, (B, D)."""
    return hidden_BTD.masked_fill(mask_BT.unsqueeze(-1) == 0, float("-inf")).amax(dim=1)


POOLINGS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": partial(pool_mean, normalize=False),
    "cls": pool_first,
    "max": pool_max,
    "lasttoken": pool_last,
}
