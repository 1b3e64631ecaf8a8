"""Residual networks for image classification on one device, under torchvision's state-dict names.

    images -> stem -> stage 1 -> ... -> stage S -> mean over the image -> logits
    block:  x -> [conv -> bn -> relu] ... conv -> bn -> (+ x) -> relu

Stage i has width * 2**i channels in its 3x3 convolutions; a bottleneck block has four times as many outside. The stride
stands in the 3x3 convolution, as torchvision has it (in the first paper it stood in the 1x1 before it). The `cifar`
stem keeps a small image at its size: one 3x3 convolution instead of a 7x7 with stride 2 and a pooling.

Every activation is a call of its own and never in place, because graph quantizers refuse a module that is called twice
and captured graphs are simpler without mutation.

Shapes: B images, C channels, H x W image, K classes.
Sources: He et al. 2015, "Deep Residual Learning", table 1; Goyal et al. 2017, section 5.1, for the zero-init residual.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from deepseek.core.config import Config
from deepseek.core.errors import ConfigError
from deepseek.models.class_labels import check_labels

EXPANSIONS = {"basic": 1, "bottleneck": 4}


class ResNetConfig(Config):
    """Shape of a residual network; the defaults are ResNet-50."""

    block: Literal["basic", "bottleneck"] = "bottleneck"
    """Two 3x3 convolutions a block, or 1x1, 3x3, 1x1."""
    depths: tuple[int, ...] = (3, 4, 6, 3)
    """Blocks of each stage; every stage after the first halves the image and doubles the channels."""
    width: int = Field(default=64, ge=1)
    """Channels of the stem and of the first stage."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """7x7 with stride 2 and a pooling, for images of 224; or 3x3 with stride 1, for images of 32."""
    in_channels: int = Field(default=3, ge=1)
    """Channels of an image: 3 for colour, 1 for grey."""
    num_classes: int = Field(default=1000, ge=1)
    """Logits of an image."""
    labels: tuple[str, ...] = ()
    """Names of the classes in their order; none numbers them."""
    zero_init_residual: bool = False
    """Whether every block starts as the identity, which helps with large batches."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_labels(self.labels, self.num_classes)
        if not self.depths or min(self.depths) < 1:
            raise ConfigError(f"depths={self.depths} has a stage without blocks; give each stage one block or more")
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels inside the blocks of each stage."""
        return tuple(self.width * 2**stage for stage in range(len(self.depths)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, num_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = build_shortcut(num_in, width, stride)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        shortcut = x_BCHW if self.downsample is None else self.downsample(x_BCHW)
        y_BCHW = F.relu(self.bn1(self.conv1(x_BCHW)))
        return F.relu(self.bn2(self.conv2(y_BCHW)) + shortcut)


class Bottleneck(nn.Module):
    """A 3x3 convolution between two of 1x1, beside a shortcut."""

    def __init__(self, num_in: int, width: int, stride: int) -> None:
        super().__init__()
        num_out = width * EXPANSIONS["bottleneck"]
        self.conv1 = nn.Conv2d(num_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, num_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(num_out)
        self.downsample = build_shortcut(num_in, num_out, stride)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        shortcut = x_BCHW if self.downsample is None else self.downsample(x_BCHW)
        y_BCHW = F.relu(self.bn1(self.conv1(x_BCHW)))
        y_BCHW = F.relu(self.bn2(self.conv2(y_BCHW)))
        return F.relu(self.bn3(self.conv3(y_BCHW)) + shortcut)


class ResNet(nn.Module):
    """Class logits for images.

    (B, in_channels, H, W) in, (B, num_classes) out; any H and W of 32 or more, or of 2 ** (stages - 1) with the `cifar`
    stem. Weights start as He et al. 2015, "Delving Deep into Rectifiers", section 2.2, has them for outgoing channels.

    >>> model = ResNet(ResNetConfig(block="basic", depths=(1, 1), width=8, stem="cifar", in_channels=1, num_classes=10))
    >>> model(torch.zeros(2, 1, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.config = config
        self.conv1 = build_stem(config)
        self.bn1 = nn.BatchNorm2d(config.width)
        sizes = [config.width, *(width * EXPANSIONS[config.block] for width in config.widths)]
        self.stages = [f"layer{number}" for number in range(1, len(sizes))]
        for index, (num_in, num_out) in enumerate(pairwise(sizes)):
            self.add_module(self.stages[index], build_stage(config, index, num_in, num_out))
        self.fc = nn.Linear(sizes[-1], config.num_classes)
        initialize_(self)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BCHW = F.relu(self.bn1(self.conv1(images_BCHW)))
        if self.config.stem == "imagenet":
            x_BCHW = F.max_pool2d(x_BCHW, 3, 2, padding=1)
        for stage in self.stages:
            x_BCHW = getattr(self, stage)(x_BCHW)
        logits_BK: Tensor = self.fc(torch.flatten(F.adaptive_avg_pool2d(x_BCHW, 1), 1))
        return logits_BK


def build_stem(config: ResNetConfig) -> nn.Conv2d:
    """Build the first convolution, for large or for small images."""
    if config.stem == "cifar":
        return nn.Conv2d(config.in_channels, config.width, 3, padding=1, bias=False)
    return nn.Conv2d(config.in_channels, config.width, 7, 2, padding=3, bias=False)


def build_stage(config: ResNetConfig, index: int, num_in: int, num_out: int) -> nn.Sequential:
    """Build the blocks of stage `index`, of which the first changes the size."""
    block = {"basic": BasicBlock, "bottleneck": Bottleneck}[config.block]
    stride = 1 if index == 0 else 2
    rest = (block(num_out, config.widths[index], 1) for _ in range(config.depths[index] - 1))
    return nn.Sequential(block(num_in, config.widths[index], stride), *rest)


def build_shortcut(num_in: int, num_out: int, stride: int) -> nn.Sequential | None:
    """Build a projection where a block changes the size, and none where it does not."""
    if stride == 1 and num_in == num_out:
        return None
    return nn.Sequential(nn.Conv2d(num_in, num_out, 1, stride, bias=False), nn.BatchNorm2d(num_out))


def initialize_(model: ResNet) -> None:
    """Random convolutions that keep the size of the gradient, and norms that begin as the identity."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if model.config.zero_init_residual and isinstance(module, BasicBlock | Bottleneck):
            last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
            nn.init.zeros_(last.weight)
