"""Vision transformers for image classification on one device, under torchvision's state-dict names.

    images -> patches (a convolution that does not overlap) -> [class token, patches] + positions
           -> [norm -> attention -> + -> norm -> MLP -> +] x L -> norm -> class token -> logits

The queries, keys and values of a layer are one matrix, as in `nn.MultiheadAttention`, and attention is the fused kernel
of torch where there is one.

Shapes: B images, C channels, H x W image, T tokens (1 + patches), D hidden, N heads, K classes.
Source: Dosovitskiy et al. 2020, "An Image is Worth 16x16 Words", equations 1 to 4 and table 1.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from deepseek.core.config import Config
from deepseek.core.errors import ConfigError
from deepseek.models.class_labels import check_labels


class ViTConfig(Config):
    """Shape of a vision transformer; the defaults are ViT-B/16."""

    image_size: int = Field(default=224, ge=1)
    """Height and width of an image, in pixels."""
    patch_size: int = Field(default=16, ge=1)
    """Height and width of a patch, in pixels."""
    in_channels: int = Field(default=3, ge=1)
    """Channels of an image: 3 for colour, 1 for grey."""
    num_layers: int = Field(default=12, ge=1)
    """Blocks."""
    num_heads: int = Field(default=12, ge=1)
    """Attention heads."""
    hidden_size: int = Field(default=768, ge=1)
    """Channels between the blocks."""
    mlp_size: int = Field(default=3072, ge=1)
    """Hidden units of an MLP."""
    num_classes: int = Field(default=1000, ge=1)
    """Logits of an image."""
    labels: tuple[str, ...] = ()
    """Names of the classes in their order; none numbers them."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of embeddings and of MLP outputs that is dropped in training."""
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of attention weights that is dropped in training."""
    norm_eps: float = Field(default=1e-6, gt=0)
    """Added to the variance before the root."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_labels(self.labels, self.num_classes)
        if self.hidden_size % self.num_heads:
            choices = [n for n in range(1, self.num_heads * 2 + 1) if self.hidden_size % n == 0]
            raise ConfigError(
                f"num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}; "
                f"choose one of {', '.join(map(str, choices))}"
            )
        if self.image_size % self.patch_size:
            choices = [n for n in range(1, self.patch_size * 2 + 1) if self.image_size % n == 0]
            raise ConfigError(
                f"patch_size={self.patch_size} does not divide image_size={self.image_size}; "
                f"choose one of {', '.join(map(str, choices))}"
            )
        return self

    @property
    def num_tokens(self) -> int:
        """The class token and one token a patch."""
        return 1 + (self.image_size // self.patch_size) ** 2


class SelfAttention(nn.Module):
    """Every token looks at every token."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.attention_dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * config.hidden_size, config.hidden_size))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * config.hidden_size))
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        qkv_BTF = F.linear(x_BTD, self.in_proj_weight, self.in_proj_bias)
        qkv_BTNH = (x_BTD.unflatten(-1, (self.num_heads, -1)) for x_BTD in qkv_BTF.chunk(3, dim=-1))
        q_BNTH, k_BNTH, v_BNTH = (x_BTNH.transpose(1, 2) for x_BTNH in qkv_BTNH)
        dropout = self.dropout if self.training else 0.0
        y_BNTH = F.scaled_dot_product_attention(q_BNTH, k_BNTH, v_BNTH, dropout_p=dropout)
        y_BTD: Tensor = self.out_proj(y_BNTH.transpose(1, 2).flatten(2))
        return y_BTD


class Block(nn.Module):
    """Attention and an MLP, each behind a norm and beside a residual."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attention = SelfAttention(config)
        self.dropout = nn.Dropout(config.dropout)
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = nn.Sequential(
            nn.Linear(config.hidden_size, config.mlp_size),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.mlp_size, config.hidden_size),
            nn.Dropout(config.dropout),
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.dropout(self.self_attention(self.ln_1(x_BTD)))
        y_BTD: Tensor = x_BTD + self.mlp(self.ln_2(x_BTD))
        return y_BTD


class Encoder(nn.Module):
    """Positions, the blocks, and a last norm."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.empty(1, config.num_tokens, config.hidden_size))
        self.dropout = nn.Dropout(config.dropout)
        blocks = {f"encoder_layer_{layer}": Block(config) for layer in range(config.num_layers)}
        self.layers = nn.Sequential(OrderedDict(blocks))
        self.ln = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTD: Tensor = self.ln(self.layers(self.dropout(x_BTD + self.pos_embedding)))
        return y_BTD


class ViT(nn.Module):
    """Class logits for images.

    (B, in_channels, image_size, image_size) in, (B, num_classes) out; another size raises `ConfigError`.

    >>> model = ViT(ViTConfig(image_size=32, num_layers=1, num_heads=2, hidden_size=16, mlp_size=32, num_classes=10))
    >>> model(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        patch = config.patch_size
        self.conv_proj = nn.Conv2d(config.in_channels, config.hidden_size, patch, patch)
        self.encoder = Encoder(config)
        self.heads = nn.Sequential(OrderedDict(head=nn.Linear(config.hidden_size, config.num_classes)))
        initialize_(self)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        size, expected = tuple(images_BCHW.shape[-2:]), (self.config.image_size,) * 2
        if size != expected:
            raise ConfigError(f"the images are {size} and this model was made for {expected}; resize them")
        patches_BTD = self.conv_proj(images_BCHW).flatten(2).transpose(1, 2)
        class_token_B1D = self.class_token.expand(patches_BTD.shape[0], -1, -1)
        x_BTD = self.encoder(torch.cat([class_token_B1D, patches_BTD], dim=1))
        logits_BK: Tensor = self.heads(x_BTD[:, 0])
        return logits_BK


def initialize_(model: ViT) -> None:
    """Weights that keep the size of what passes them; biases at zero, positions and head small.

    torchvision starts the head at zero; a small one lets an untrained model distinguish images, in a measurement say.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, SelfAttention):
            nn.init.xavier_uniform_(module.in_proj_weight)
    fan_in = model.conv_proj.weight[0].numel()
    nn.init.trunc_normal_(model.conv_proj.weight, std=math.sqrt(1 / fan_in))
    nn.init.normal_(model.encoder.pos_embedding, std=0.02)
    nn.init.normal_(model.heads.get_parameter("head.weight"), std=0.02)
