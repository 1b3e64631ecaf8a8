"""From hidden states of tokens to one vector per text, as sentence encoders are read.

    hidden_BTD = model(tokens_BT, mask_BT)
    vectors_BD = pool_mean(hidden_BTD, mask_BT)

The mean over the tokens that are text, of length one, is what all-MiniLM and most of its family were trained for
(Reimers and Gurevych 2019, "Sentence-BERT"). Two such vectors are compared by their dot product.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def pool_mean(hidden_BTD: Tensor, mask_BT: Tensor, *, normalize: bool = True) -> Tensor:
    """The mean of the tokens whose mask is 1, (B, D); of length one with `normalize`.

    >>> import torch
    >>> pool_mean(torch.tensor([[[3.0, 0.0], [9.0, 9.0]]]), torch.tensor([[1, 0]]))
    tensor([[1., 0.]])
    """
    weights_BT1 = mask_BT.unsqueeze(-1).to(hidden_BTD.dtype)
    sums_BD = (hidden_BTD * weights_BT1).sum(1)
    means_BD = sums_BD / weights_BT1.sum(1).clamp(min=1e-9)
    return F.normalize(means_BD, dim=-1) if normalize else means_BD
