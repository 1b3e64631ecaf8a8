"""MobileNetV3 for image classification on one device, under torchvision's state-dict names.

    images -> 3x3 stride 2 -> inverted residuals -> 1x1 -> mean over the image -> linear -> hardswish -> linear
    inverted residual:  x -> [1x1 widen] -> depthwise -> [squeeze and excite] -> 1x1 narrow -> (+ x)

The table of a variant has a row per inverted residual, as the tables of the paper have. torchvision counts the parts of
a block by position, and so do we: `features.4.block.2.fc1.weight` is the squeeze of the fifth feature.

Shapes: B images, C channels, H x W image, K classes.
Source: Howard et al. 2019, "Searching for MobileNetV3", tables 1 and 2, figure 4 and section 5.2.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from deepseek.core.config import Config
from deepseek.models.class_labels import check_labels


class BlockSpec(NamedTuple):
    """One inverted residual."""

    kernel: int
    """Edge of the depthwise convolution, in pixels."""
    num_inner: int
    """Channels between widening and narrowing."""
    num_out: int
    """Channels that leave the block."""
    has_squeeze: bool
    """Whether channels are weighed by what the whole image holds."""
    activation: Literal["relu", "hardswish"]
    stride: int


TABLES = {
    "large": (
        BlockSpec(3, 16, 16, False, "relu", 1),
        BlockSpec(3, 64, 24, False, "relu", 2),
        BlockSpec(3, 72, 24, False, "relu", 1),
        BlockSpec(5, 72, 40, True, "relu", 2),
        BlockSpec(5, 120, 40, True, "relu", 1),
        BlockSpec(5, 120, 40, True, "relu", 1),
        BlockSpec(3, 240, 80, False, "hardswish", 2),
        BlockSpec(3, 200, 80, False, "hardswish", 1),
        BlockSpec(3, 184, 80, False, "hardswish", 1),
        BlockSpec(3, 184, 80, False, "hardswish", 1),
        BlockSpec(3, 480, 112, True, "hardswish", 1),
        BlockSpec(3, 672, 112, True, "hardswish", 1),
        BlockSpec(5, 672, 160, True, "hardswish", 2),
        BlockSpec(5, 960, 160, True, "hardswish", 1),
        BlockSpec(5, 960, 160, True, "hardswish", 1),
    ),
    "small": (
        BlockSpec(3, 16, 16, True, "relu", 2),
        BlockSpec(3, 72, 24, False, "relu", 2),
        BlockSpec(3, 88, 24, False, "relu", 1),
        BlockSpec(5, 96, 40, True, "hardswish", 2),
        BlockSpec(5, 240, 40, True, "hardswish", 1),
        BlockSpec(5, 240, 40, True, "hardswish", 1),
        BlockSpec(5, 120, 48, True, "hardswish", 1),
        BlockSpec(5, 144, 48, True, "hardswish", 1),
        BlockSpec(5, 288, 96, True, "hardswish", 2),
        BlockSpec(5, 576, 96, True, "hardswish", 1),
        BlockSpec(5, 576, 96, True, "hardswish", 1),
    ),
}
HEAD_WIDTHS = {"large": 1280, "small": 1024}
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "hardswish": nn.Hardswish}
NUM_STEM = 16
NUM_LAST_OVER_BLOCK = 6
SQUEEZE = 4
CHANNEL_STEP = 8


class MobileNetV3Config(Config):
    """Shape of a MobileNetV3."""

    variant: Literal["large", "small"] = "large"
    """Which table of the paper."""
    width_multiple: float = Field(default=1.0, gt=0)
    """Factor on the channels of every layer, which are then rounded to multiples of 8."""
    in_channels: int = Field(default=3, ge=1)
    """Channels of an image: 3 for colour, 1 for grey."""
    num_classes: int = Field(default=1000, ge=1)
    """Logits of an image."""
    labels: tuple[str, ...] = ()
    """Names of the classes in their order; none numbers them."""
    dropout: float = Field(default=0.2, ge=0, lt=1)
    """Share of the classifier's inputs that is dropped in training."""
    norm_eps: float = Field(default=1e-3, gt=0)
    """Added to the variance before the root."""
    norm_momentum: float = Field(default=0.01, gt=0, le=1)
    """Share of a batch in the running statistics."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_labels(self.labels, self.num_classes)
        return self

    def scale(self, num_channels: int) -> int:
        """Scale a number of channels by the width."""
        return round_channels(num_channels * self.width_multiple)


class ConvNorm(nn.Sequential):
    """Convolution without bias, batch norm, and an activation if one is named: parts 0, 1 and 2."""

    def __init__(
        self,
        config: MobileNetV3Config,
        num_in: int,
        num_out: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        activation: str | None = None,
    ) -> None:
        parts: list[nn.Module] = [
            nn.Conv2d(num_in, num_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(num_out, eps=config.norm_eps, momentum=config.norm_momentum),
        ]
        if activation is not None:
            parts.append(ACTIVATIONS[activation]())
        super().__init__(*parts)


class SqueezeExcitation(nn.Module):
    """Each channel times a factor in [0, 1] that the means of all channels decide."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        num_squeezed = round_channels(num_channels // SQUEEZE)
        self.fc1 = nn.Conv2d(num_channels, num_squeezed, 1)
        self.fc2 = nn.Conv2d(num_squeezed, num_channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        mean_BC11 = F.adaptive_avg_pool2d(x_BCHW, 1)
        factor_BC11 = F.hardsigmoid(self.fc2(F.relu(self.fc1(mean_BC11))))
        return x_BCHW * factor_BC11


class InvertedResidual(nn.Module):
    """Widen, look around in each channel, weigh the channels, narrow."""

    def __init__(self, config: MobileNetV3Config, num_in: int, row: BlockSpec) -> None:
        super().__init__()
        num_inner, num_out = config.scale(row.num_inner), config.scale(row.num_out)
        self.has_residual = row.stride == 1 and num_in == num_out
        parts: list[nn.Module] = []
        if num_inner != num_in:
            parts.append(ConvNorm(config, num_in, num_inner, activation=row.activation))
        parts.append(
            ConvNorm(config, num_inner, num_inner, row.kernel, row.stride, num_inner, activation=row.activation)
        )
        if row.has_squeeze:
            parts.append(SqueezeExcitation(num_inner))
        parts.append(ConvNorm(config, num_inner, num_out))
        self.block = nn.Sequential(*parts)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW: Tensor = self.block(x_BCHW)
        return x_BCHW + y_BCHW if self.has_residual else y_BCHW


class MobileNetV3(nn.Module):
    """Class logits for images.

    (B, in_channels, H, W) in, (B, num_classes) out; any H and W of 32 or more.

    >>> model = MobileNetV3(MobileNetV3Config(variant="small", width_multiple=0.5, num_classes=10)).eval()
    >>> model(torch.zeros(2, 3, 64, 64)).shape
    torch.Size([2, 10])
    """

    def __init__(self, config: MobileNetV3Config) -> None:
        super().__init__()
        self.config = config
        num_features = config.scale(TABLES[config.variant][-1].num_out) * NUM_LAST_OVER_BLOCK
        self.features = build_features(config, num_features)
        num_hidden = config.scale(HEAD_WIDTHS[config.variant])
        self.classifier = nn.Sequential(
            nn.Linear(num_features, num_hidden),
            nn.Hardswish(),
            nn.Dropout(config.dropout),
            nn.Linear(num_hidden, config.num_classes),
        )
        initialize_(self)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BCHW = self.features(images_BCHW)
        logits_BK: Tensor = self.classifier(torch.flatten(F.adaptive_avg_pool2d(x_BCHW, 1), 1))
        return logits_BK


def build_features(config: MobileNetV3Config, num_features: int) -> nn.Sequential:
    """Build the stem, the rows of the table, and a last 1x1 convolution."""
    rows, num_stem = TABLES[config.variant], config.scale(NUM_STEM)
    sizes = [num_stem, *(config.scale(row.num_out) for row in rows)]
    return nn.Sequential(
        ConvNorm(config, config.in_channels, num_stem, kernel=3, stride=2, activation="hardswish"),
        *(InvertedResidual(config, num_in, row) for num_in, row in zip(sizes, rows, strict=False)),
        ConvNorm(config, sizes[-1], num_features, activation="hardswish"),
    )


def round_channels(num_channels: float) -> int:
    """Return the nearest multiple of 8 that is not more than a tenth below.

    >>> [round_channels(channels) for channels in (3, 18, 30, 100.8)]
    [8, 24, 32, 104]
    """
    rounded = max(CHANNEL_STEP, int(num_channels + CHANNEL_STEP / 2) // CHANNEL_STEP * CHANNEL_STEP)
    return rounded + CHANNEL_STEP if rounded < 0.9 * num_channels else rounded


def initialize_(model: MobileNetV3) -> None:
    """Random weights by the number of outgoing connections, a narrow classifier, and no biases."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # A group is a convolution of its own; counted over all groups, depthwise ones would start near zero.
            num_out = module.weight[0, 0].numel() * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2 / num_out))
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
