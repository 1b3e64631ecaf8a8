"""Small models with what makes real ones hard: shared activations, residuals, dicts in and objects out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


class SmallResNet(nn.Module):
    """Two residual blocks that call one ReLU object five times; (B, 3, 16, 16) to (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32))
        self.first = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32))
        self.second = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32))
        self.relu = nn.ReLU()
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        x = self.relu(x + self.first(x))
        x = self.relu(x + self.second(x))
        return self.head(x.mean((2, 3)))


class SmallMLP(nn.Module):
    """(B, 64) to (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Tagger(nn.Module):
    """Keywords in, a dict out, with a flag among the inputs and a text among the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, *, tokens: Tensor, mask: Tensor, is_scaled: bool = False) -> dict[str, object]:
        hidden = self.table(tokens) * mask[..., None]
        scores = self.head(hidden)
        return {"scores": scores * 2 if is_scaled else scores, "hidden": (hidden, tokens), "kind": "tags"}


@dataclass
class Pictures:
    """A model with samples."""

    model: nn.Module
    samples: Tensor


def small_resnet(batch_size: int = 4) -> Pictures:
    """A settled small ResNet: its norms have seen data, as in a trained one."""
    torch.manual_seed(0)
    model = SmallResNet()
    samples = torch.randn(batch_size, 3, 16, 16)
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(16, 3, 16, 16))
    return Pictures(model.eval(), samples)


def small_mlp(batch_size: int = 4) -> Pictures:
    """An MLP and rows for it."""
    torch.manual_seed(0)
    return Pictures(SmallMLP().eval(), torch.randn(batch_size, 64))
