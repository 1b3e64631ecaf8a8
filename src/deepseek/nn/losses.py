"""The loss of language models, as training, evaluation and the comparison of compressed models all take it.

    sum_cross_entropy(logits, targets)                   for whoever has the logits, or needs them for more
    sum_linear_cross_entropy(hidden, weight, targets)    the same loss of the head's inputs, for training

The second never holds the logits of all tokens. It takes some rows at a time: their logits, their loss, and at once
what the loss adds to the gradients of `hidden` and `weight`, so that the backward pass has only to scale these. Tokens
without a target do not go through the head. The usual way holds the logits of N tokens, their softmax and the gradients
of both, N x V each; this one those of some rows. The matmuls are the same; what is saved is memory that is written,
read and, where it is new, mapped. Processor time of head, loss and backward, one
Zen 3 core, FP32, and peak memory:

    2,048 tokens, D 384, V 4,096                      506 -> 395 ms      99 -> 46 MiB
    512 tokens, D 576, V 49,152, the head frozen     1644 -> 1395 ms     189 MiB less
    512 tokens, D 576, V 49,152, the head trained    2154 -> 1830 ms     82 MiB less

Summed and not averaged, because batches hold different numbers of targets: who calls divides by the tokens of all of
them. Computed in float32 at least, whatever the logits are in. Shapes: B rows, T tokens, D hidden, V vocabulary, N
tokens with a target, C of them in a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepseek.nn.plain_linear import matmul_dtype

_CHUNK_ELEMENTS = 1 << 22
"""Logits of a chunk: 16 MiB in float32, about what a cache holds."""
_LEAST_CHUNK_ROWS = 256
"""With fewer rows, adding to the weight's gradient costs more than the matmul that is added."""


def sum_cross_entropy(logits_BTV: Tensor, targets_BT: Tensor, *, ignored_target: int) -> Tensor:
    """Return the () sum over all targets but `ignored_target`, in nats.

    >>> sum_cross_entropy(torch.zeros(1, 2, 4), torch.tensor([[3, -1]]), ignored_target=-1).exp().round().item()
    4.0
    """
    wide_BTV = logits_BTV if logits_BTV.dtype == torch.float64 else logits_BTV.float()
    return F.cross_entropy(wide_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=ignored_target, reduction="sum")


def sum_linear_cross_entropy(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    targets_BT: Tensor,
    *,
    ignored_target: int,
    softcap: float | None = None,
) -> Tensor:
    """Return what `sum_cross_entropy` returns for the logits `hidden @ weight.T`, without holding all of these.

    With a `softcap`, logits are bent to stay below it. Under autocast the matmuls are in its precision.

    >>> hidden, weight, targets = torch.zeros(1, 2, 8), torch.ones(4, 8), torch.tensor([[3, -1]])
    >>> sum_linear_cross_entropy(hidden, weight, targets, ignored_target=-1).exp().round().item()
    4.0
    """
    hidden_ND, targets_N = hidden_BTD.flatten(0, -2), targets_BT.flatten()
    is_target = targets_N != ignored_target
    if not is_target.all():
        hidden_ND, targets_N = hidden_ND[is_target], targets_N[is_target]
    dtype = matmul_dtype(hidden_ND)
    if not torch.is_grad_enabled():
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
    loss: Tensor = _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, softcap, dtype)  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Takes the gradients in the forward pass, while the logits are at hand."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, softcap: float | None, dtype: torch.dtype
    ) -> Tensor:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        narrow_ND, narrow_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        hidden_gradient_ND = torch.empty_like(narrow_ND) if needs_hidden else None
        weight_gradient_VD = torch.zeros_like(weight_VD, dtype=wide) if needs_weight else None
        num_rows = min(max(_LEAST_CHUNK_ROWS, _CHUNK_ELEMENTS // len(weight_VD)), len(targets_N))
        logits_CV = narrow_ND.new_empty((num_rows, len(weight_VD)))
        room_CV = torch.empty_like(logits_CV, dtype=wide)
        loss = room_CV.new_zeros(())
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for start in range(0, len(targets_N), num_rows or 1):
                chunk_CD, targets_C = narrow_ND[start : start + num_rows], targets_N[start : start + num_rows]
                torch.mm(chunk_CD, narrow_VD.t(), out=logits_CV[: len(chunk_CD)])
                loss += _take_loss(logits_CV[: len(chunk_CD)], targets_C, softcap, gradient=room_CV[: len(chunk_CD)])
                gradient_CV = room_CV[: len(chunk_CD)].to(dtype)
                if hidden_gradient_ND is not None:
                    torch.mm(gradient_CV, narrow_VD, out=hidden_gradient_ND[start : start + num_rows])
                if weight_gradient_VD is not None:
                    _add_matmul_(weight_gradient_VD, gradient_CV.t(), chunk_CD)
        ctx.save_for_backward(hidden_gradient_ND, weight_gradient_VD)
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        # In place: the gradient of a large head is a tenth of a gigabyte, and it is wanted once.
        gradients = (
            None if gradient is None else gradient.mul_(factor).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*gradients, None, None, None)


def _take_loss(logits_CV: Tensor, targets_C: Tensor, softcap: float | None, *, gradient: Tensor) -> Tensor:
    """Return the () loss of a chunk, whose gradient is written to `gradient`.

    The largest probability is 1 over the sum of the exponentials of logits below the largest: the logarithm of it
    gives the loss without a pass of its own, and it is never under 1 / V.
    """
    wide_CV = logits_CV.to(gradient.dtype)
    slope_CV = None
    if softcap is not None:
        bent_CV = wide_CV.div(softcap).tanh_()
        wide_CV, slope_CV = bent_CV * softcap, 1 - bent_CV.square()
    target_C1 = targets_C[:, None]
    torch.softmax(wide_CV, dim=1, out=gradient)
    log_sum_C = wide_CV.amax(dim=1) - gradient.amax(dim=1).log()
    loss = (log_sum_C - wide_CV.gather(1, target_C1)[:, 0]).sum()
    gradient.scatter_add_(1, target_C1, gradient.new_full((), -1.0).expand(target_C1.shape))
    if slope_CV is not None:
        gradient.mul_(slope_CV)
    return loss


def _add_matmul_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right` to `total`, which may be wider."""
    if total.dtype == right.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
