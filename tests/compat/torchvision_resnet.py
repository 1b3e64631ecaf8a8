"""The basic-block ResNet of torchvision with torchvision's names, to load converted weights into."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_out)
        self.downsample = None
        if stride != 1 or num_in != num_out:
            self.downsample = nn.Sequential(nn.Conv2d(num_in, num_out, 1, stride, bias=False), nn.BatchNorm2d(num_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(x)) + shortcut)


class ResNet(nn.Module):
    def __init__(self, num_stem: int, sizes: list[int], depths: list[int], num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, num_stem, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(num_stem)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        num_in = num_stem
        for stage, (size, depth) in enumerate(zip(sizes, depths, strict=True), start=1):
            stride = 1 if stage == 1 else 2
            blocks = [Block(num_in if each == 0 else size, size, stride if each == 0 else 1) for each in range(depth)]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
            num_in = size
        self.fc = nn.Linear(num_in, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.fc(x.mean(dim=(2, 3)))
