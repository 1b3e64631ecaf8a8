"""A decoder-only transformer on one device: embed, a stack of blocks, norm, head.

    tokens -> embed (+ learned positions) -> [norm -> attention -> + -> norm -> feed-forward -> +] x L -> norm -> logits

The options of `DecoderConfig` span the shapes in use: GPT-2 is layer norm, learned positions and a GELU MLP with
biases; Llama is RMS norm, rotary positions, grouped queries and SwiGLU; a mixture of experts replaces the feed-forward
blocks; the dynamic local/global mask closes some heads. Nothing here knows of parallelism, precision or compilation:
those are applied from outside.

Shapes: B batch, T tokens, D hidden, V vocabulary, H head size.
"""

from __future__ import annotations

import math
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from deepseek.core.config import Config
from deepseek.core.errors import ConfigError
from deepseek.nn.attention import Attention
from deepseek.nn.feedforward import MLP, SwiGLU
from deepseek.nn.kv_cache import CacheView, KVCache, LayerCache
from deepseek.nn.masks import MaskConfig, Visibility, see
from deepseek.nn.moe import MoEConfig, MoERouter, SwiGLUExperts
from deepseek.nn.rotary import rotary_table


class DecoderConfig(Config):
    """Shape of a decoder."""

    vocab_size: int = Field(default=4096, ge=1)
    """Tokens in the vocabulary."""
    num_layers: int = Field(default=4, ge=1)
    """Blocks."""
    hidden_size: int = Field(default=256, ge=1)
    """Channels between the blocks."""
    num_heads: int = Field(default=4, ge=1)
    """Query heads."""
    num_kv_heads: int | None = Field(default=None, ge=1)
    """Key and value heads, each shared by several query heads; none gives every query head its own."""
    head_size: int | None = Field(default=None, ge=1)
    """Channels of one head; none is hidden_size / num_heads."""
    ffn_size: int = Field(default=768, ge=1)
    """Hidden units of a dense feed-forward block."""
    max_length: int = Field(default=1024, ge=1)
    """Longest sequence, in tokens."""
    norm: Literal["rms", "layer"] = "rms"
    """Root-mean-square norm (Llama) or layer norm (GPT-2)."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Added to the variance before the root."""
    feedforward: Literal["swiglu", "gelu"] = "swiglu"
    """Gated (Llama) or plain (GPT-2) feed-forward blocks."""
    position: Literal["rotary", "learned"] = "rotary"
    """Rotary angles on queries and keys, or a learned vector per position."""
    rope_theta: float = Field(default=10000.0, gt=0)
    """Longest rotary wavelength over 2 pi, in tokens."""
    tie_embeddings: bool = True
    """Whether the head shares the weights of the embedding."""
    attention_bias: bool = False
    """Bias on the query, key, value and output projections."""
    feedforward_bias: bool = False
    """Bias in the feed-forward projections."""
    moe: MoEConfig | None = None
    """Experts instead of dense feed-forward blocks."""
    mask: MaskConfig | None = None
    """The dynamic local/global attention mask; none is plain causal."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.head_size is None and self.hidden_size % self.num_heads:
            choices = [n for n in range(1, self.num_heads * 2 + 1) if self.hidden_size % n == 0]
            raise ConfigError(
                f"num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}; "
                f"choose one of {', '.join(map(str, choices))}, or set head_size"
            )
        if self.num_heads % self.kv_heads:
            choices = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            raise ConfigError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}; "
                f"choose one of {', '.join(map(str, choices))}"
            )
        if self.position == "rotary" and self.size_of_head % 2:
            raise ConfigError(
                f"rotary positions pair channels and head_size={self.size_of_head} is odd; choose an even one"
            )
        if self.moe and self.feedforward_bias:
            raise ConfigError("mixture-of-experts blocks have no biases, and feedforward_bias is set; leave it out")
        if self.moe and self.feedforward != "swiglu":
            raise ConfigError("mixture-of-experts blocks are gated, and feedforward is 'gelu'; choose 'swiglu'")
        return self

    @property
    def kv_heads(self) -> int:
        """Key and value heads, resolved."""
        return self.num_kv_heads or self.num_heads

    @property
    def size_of_head(self) -> int:
        """Channels of one head, resolved."""
        return self.head_size or self.hidden_size // self.num_heads


class Block(nn.Module):
    """Attention and a feed-forward part, each behind a norm and beside a residual."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = build_norm(config)
        self.attention = Attention(
            config.hidden_size,
            config.num_heads,
            config.kv_heads,
            config.size_of_head,
            bias=config.attention_bias,
            output_bias=config.attention_bias,
            num_local_heads=config.mask.num_local_heads(config.num_heads, layer) if config.mask else 0,
            is_dynamic=config.mask.is_dynamic if config.mask else True,
        )
        self.feedforward_norm = build_norm(config)
        self.feedforward = build_feedforward(config)

    def forward(
        self, x_BTD: Tensor, table_2BTH: Tensor | None, visibility: Visibility, cache: LayerCache | None = None
    ) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), table_2BTH, visibility, cache)
        y_BTD: Tensor = x_BTD + self.feedforward(self.feedforward_norm(x_BTD))
        return y_BTD


class Decoder(nn.Module):
    """Next-token logits for sequences of tokens.

    >>> model = Decoder(DecoderConfig(vocab_size=32, hidden_size=16, num_layers=1, num_heads=2, ffn_size=32))
    >>> model(torch.zeros(2, 8, dtype=torch.long)).shape
    torch.Size([2, 8, 32])
    """

    rotary_2LH: Tensor
    mask_openness: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embed = (
            nn.Embedding(config.max_length, config.hidden_size) if config.position == "learned" else None
        )
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = build_norm(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        table = rotary_table(config.max_length, config.size_of_head, theta=config.rope_theta)
        self.register_buffer("rotary_2LH", table if config.position == "rotary" else None, persistent=False)
        self.register_buffer("mask_openness", torch.ones(()), persistent=False)
        self.apply(self._initialize)

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        cache: CacheView | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits (B, T, V), or (B, 1, V) of the last token with `last_only`.

        With a `cache`, the tokens at `positions_BT` are added to it and see what it holds, for one slot per row.
        """
        if positions_BT is None:
            positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        num_keys = tokens_BT.shape[1] if cache is None else cache.length
        longest = max(num_keys, tokens_BT.shape[1])
        if longest > self.config.max_length:
            raise ConfigError(
                f"the sequence has {longest} tokens and this model was made for {self.config.max_length}; "
                "shorten it, or make the model with a larger max_length"
            )
        visibility = see(
            positions_BT,
            num_keys,
            is_whole=cache is None,
            local_distance=self.config.mask.local_distance if self.config.mask else None,
            openness=self.mask_openness if self.config.mask else None,
        )
        x_BTD = self.embed(tokens_BT)
        if self.position_embed is not None:
            x_BTD = x_BTD + self.position_embed(positions_BT)
        table_2BTH = None if self.rotary_2LH is None else self.rotary_2LH[:, positions_BT]
        for index, layer in enumerate(self.layers):
            x_BTD = layer(x_BTD, table_2BTH, visibility, cache.layers[index] if cache else None)
        if last_only:
            x_BTD = x_BTD[:, -1:]
        logits_BTV: Tensor = self.head(self.norm(x_BTD))
        return logits_BTV

    def new_cache(self, num_slots: int, max_length: int | None = None) -> KVCache:
        """Room for the keys and values of `num_slots` sequences, in the dtype and on the device of the weights."""
        config, weight = self.config, next(self.norm.parameters())
        length = max_length or config.max_length
        return KVCache(
            config.num_layers,
            num_slots,
            config.kv_heads,
            length,
            config.size_of_head,
            weight.dtype,
            weight.device,
        )

    def set_step(self, step: int) -> None:
        """Tell the mask how far training has come; a model that is not being trained needs no call."""
        if self.config.mask:
            self.mask_openness.fill_(self.config.mask.openness_at(step))

    def _initialize(self, module: nn.Module) -> None:
        """Normal weights of GPT-2's width; what feeds the residual stream shrinks with depth (Radford et al. 2019)."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, SwiGLUExperts):
            for weight in module.parameters():
                nn.init.normal_(weight, std=0.02)
        for residual in (getattr(module, "o_proj", None), getattr(module, "down_proj", None)):
            if residual is not None:
                nn.init.normal_(getattr(residual, "weight", residual), std=0.02 / math.sqrt(2 * self.config.num_layers))


def build_norm(config: DecoderConfig) -> nn.Module:
    """RMS norm or layer norm over the hidden channels."""
    norms: dict[str, type[nn.RMSNorm | nn.LayerNorm]] = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}
    return norms[config.norm](config.hidden_size, eps=config.norm_eps)


def build_feedforward(config: DecoderConfig) -> nn.Module:
    """Experts, a gated block or a plain one."""
    if config.moe is not None:
        return MoERouter(
            SwiGLUExperts(config.moe.num_experts, config.hidden_size, config.moe.ffn_size),
            config.moe.top_k,
            hidden_size=config.hidden_size,
            capacity_factor=config.moe.capacity_factor,
            balance_rate=config.moe.balance_rate,
            num_candidates=config.moe.num_candidates,
        )
    blocks = {"swiglu": SwiGLU, "gelu": MLP}
    return blocks[config.feedforward](config.hidden_size, config.ffn_size, bias=config.feedforward_bias)


def count_parameters(model: nn.Module) -> int:
    """Parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
