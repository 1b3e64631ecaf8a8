"""Removing from a trained YOLOv7 what only training needs.

    convolution, norm                 ->  convolution with a bias
    RepConv: 3x3 + 1x1 (+ input)      ->  one 3x3: a 1x1, and the input itself, is a 3x3 of which only the middle counts
    head: factor * conv(x + offset)   ->  convolution

The sums are done in float64, so that what changes in the answers is the rounding of the new weights. Called before a
trained model is deployed; 37.6 million parameters become 36.9.

Source: Ding et al. 2021, "RepVGG", section 3.3.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.core.errors import ConfigError
from deepseek.models.yolov7.model import ConvNorm, Head, RepConv, YOLOv7


def fold_(model: YOLOv7) -> YOLOv7:
    """Fold `model` in place and return it; its answers stay the same but for rounding.

    Raises `ConfigError` for a model in training mode: its norms follow each batch, and a convolution cannot.

    >>> from deepseek.models.yolov7.model import YOLOv7Config
    >>> model = fold_(YOLOv7(YOLOv7Config(width_multiple=0.125)).eval())
    >>> any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    False
    """
    if model.training:
        raise ConfigError("a model in training mode cannot be folded, since its norms follow each batch; call .eval()")
    with torch.no_grad():
        for module in list(model.modules()):
            if isinstance(module, ConvNorm):
                fold_conv_(module)
            elif isinstance(module, RepConv):
                fold_branches_(module)
            elif isinstance(module, Head):
                fold_head_(module)
    model.config = model.config.override({"is_folded": True})
    return model


def fold_conv_(layer: ConvNorm) -> None:
    """Move the norm into the convolution."""
    if layer.bn is not None:
        layer.conv, layer.bn = _replace(layer.conv, *_fold_norm(layer.conv.weight, layer.bn)), None


def fold_branches_(layer: RepConv) -> None:
    """Add the branches up."""
    if layer.rbr_dense is None or layer.rbr_1x1 is None:
        return
    dense, dense_norm = cast("tuple[nn.Conv2d, nn.BatchNorm2d]", tuple(layer.rbr_dense))
    point, point_norm = cast("tuple[nn.Conv2d, nn.BatchNorm2d]", tuple(layer.rbr_1x1))
    branches = [_fold_norm(dense.weight, dense_norm), _fold_norm(F.pad(point.weight, [1, 1, 1, 1]), point_norm)]
    if layer.rbr_identity is not None:
        branches.append(_fold_norm(nn.init.dirac_(torch.empty_like(dense.weight)), layer.rbr_identity))
    weights, biases = zip(*branches, strict=True)
    layer.rbr_reparam = _replace(dense, torch.stack(weights).sum(0), torch.stack(biases).sum(0))
    layer.rbr_identity = layer.rbr_dense = layer.rbr_1x1 = None


def fold_head_(head: Head) -> None:
    """Move the learned offset and factor into the convolutions."""
    if head.is_folded:
        return
    for level, module in enumerate(head.m):
        conv = cast("nn.Conv2d", module)
        offset_C = head.ia[level].get_parameter("implicit").double().flatten()
        factor_O = head.im[level].get_parameter("implicit").double().flatten()
        weight_OC11 = conv.weight.double()
        bias_O = cast("Tensor", conv.bias).double() + weight_OC11.flatten(1) @ offset_C
        head.m[level] = _replace(conv, weight_OC11 * factor_O.view(-1, 1, 1, 1), bias_O * factor_O)
    head.drop_implicit_()


def _fold_norm(weight_OIHW: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return the weight and bias, in float64, of a convolution that does what one with `weight_OIHW` and `norm` do."""
    mean_O, variance_O = cast("Tensor", norm.running_mean).double(), cast("Tensor", norm.running_var).double()
    factor_O = norm.weight.double() / (variance_O + norm.eps).sqrt()
    return weight_OIHW.double() * factor_O.view(-1, 1, 1, 1), norm.bias.double() - mean_O * factor_O


def _replace(conv: nn.Conv2d, weight_OIHW: Tensor, bias_O: Tensor) -> nn.Conv2d:
    """Return a convolution like `conv`, in evaluation mode, with these weights."""
    folded = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        cast("tuple[int, int]", conv.kernel_size),
        cast("tuple[int, int]", conv.stride),
        cast("tuple[int, int]", conv.padding),
        device="meta",
    )
    folded.weight = nn.Parameter(torch.empty_like(conv.weight).copy_(weight_OIHW))  # in its dtype, place and layout
    folded.bias = nn.Parameter(bias_O.to(conv.weight.dtype))
    return folded.eval()
