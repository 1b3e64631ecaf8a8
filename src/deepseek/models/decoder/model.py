"""A decoder-only transformer on one device: embed, a stack of blocks, norm, head.

    tokens -> embed (+ learned positions) -> [norm -> attention -> + -> norm -> feed-forward -> +] x L -> norm -> logits

The options of `DecoderConfig` span the shapes in use: GPT-2 is layer norm, learned positions and a GELU MLP with
biases; Llama is RMS norm, rotary positions, grouped queries and SwiGLU; Qwen adds biases or norms to queries and keys,
Mistral and Phi a sliding window, Gemma more norms and bent scores; a mixture of experts replaces the feed-forward
blocks; the dynamic local/global mask closes some heads. Nothing here knows of parallelism, precision or compilation:
those are applied from outside.

Shapes: B batch, T tokens, D hidden, V vocabulary, H head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from deepseek.core.config import Config
from deepseek.core.errors import ConfigError
from deepseek.nn.attention import Attention
from deepseek.nn.centered_norm import CenteredRMSNorm
from deepseek.nn.feedforward import MLP, GeGLU, SwiGLU
from deepseek.nn.kv_cache import CacheView, KVCache, LayerCache
from deepseek.nn.masks import MaskConfig, Visibility, count_lengths, count_positions, see
from deepseek.nn.moe import MoEConfig, MoERouter, SwiGLUExperts
from deepseek.nn.rotary import RopeScaling, dynamic_rows, rotary_table


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
    norm: Literal["rms", "rms_centered", "layer"] = "rms"
    """Root-mean-square norm (Llama), one whose weight counts from one (Gemma), or layer norm (GPT-2)."""
    post_norms: bool = False
    """Whether what attention and feed-forward blocks add is normed as well (Gemma 2)."""
    qk_norm: bool = False
    """Whether queries and keys are normed, head by head (Qwen 3)."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Added to the variance before the root."""
    feedforward: Literal["swiglu", "geglu", "gelu"] = "swiglu"
    """Feed-forward blocks: gated with SiLU (Llama) or GELU (Gemma), or plain (GPT-2)."""
    position: Literal["rotary", "learned"] = "rotary"
    """Rotary angles on queries and keys, or a learned vector per position."""
    rope_theta: float = Field(default=10000.0, gt=0)
    """Longest rotary wavelength over 2 pi, in tokens."""
    rope_theta_window: float | None = Field(default=None, gt=0)
    """The same in layers with a sliding window, whose angles are not scaled then; none is as in all layers."""
    rope_scaling: RopeScaling | None = None
    """How rotary angles are slowed down for long texts; none leaves them as they are."""
    rope_fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of each head's channels that are rotated."""
    sliding_window: int | None = Field(default=None, ge=1)
    """How many tokens a layer sees, the newest among them; none sees all."""
    full_layers: tuple[int, ...] = ()
    """Layers (counted from 0) that see all tokens although there is a sliding window."""
    query_scalar: float | None = Field(default=None, gt=0)
    """Scores are divided by its root; none is the head size."""
    attention_softcap: float | None = Field(default=None, gt=0)
    """Scores of attention are bent to stay below it; none leaves them as they are."""
    logits_softcap: float | None = Field(default=None, gt=0)
    """Logits are bent to stay below it; none leaves them as they are."""
    scale_embeddings: bool = False
    """Whether embeddings are multiplied by the root of hidden_size (Gemma)."""
    tie_embeddings: bool = True
    """Whether the head shares the weights of the embedding."""
    attention_bias: bool = False
    """Bias on the query, key, value and output projections."""
    output_bias: bool | None = None
    """Bias on the output projection alone; none is as `attention_bias` (Qwen 2 has none there)."""
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
        if self.mask and self.sliding_window:
            raise ConfigError("a sliding window and the local/global mask both cut what a head sees; leave one out")
        if self.rope_scaling and self.rope_scaling.kind == "longrope":
            num_pairs = self.num_rotated // 2
            for name in ("pair_factors", "long_pair_factors"):
                num_factors = len(getattr(self.rope_scaling, name))
                if num_factors != num_pairs and (num_factors or name == "pair_factors"):
                    raise ConfigError(
                        f"rope_scaling has {num_factors} {name} and {num_pairs} pairs of channels are rotated; "
                        "give one for each"
                    )
        if self.moe and self.feedforward_bias:
            raise ConfigError("mixture-of-experts blocks have no biases, and feedforward_bias is set; leave it out")
        if self.moe and self.feedforward != "swiglu":
            raise ConfigError(
                f"mixture-of-experts blocks are gated, and feedforward is {self.feedforward!r}; choose 'swiglu'"
            )
        return self

    @property
    def kv_heads(self) -> int:
        """Key and value heads, resolved."""
        return self.num_kv_heads or self.num_heads

    @property
    def size_of_head(self) -> int:
        """Channels of one head, resolved."""
        return self.head_size or self.hidden_size // self.num_heads

    @property
    def num_rotated(self) -> int:
        """Channels of one head that rotary positions turn."""
        return int(self.size_of_head * self.rope_fraction)

    @property
    def reread_length(self) -> int | None:
        """Length beyond which a text has other angles at all positions, so that a cache of it must be made again."""
        scaling = self.rope_scaling
        return scaling.original_length if scaling and scaling.long_pair_factors else None

    def window_of(self, layer: int) -> int | None:
        """Return how many tokens `layer` (counted from 0) sees, or none for all."""
        return None if layer in self.full_layers else self.sliding_window


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
            output_bias=config.attention_bias if config.output_bias is None else config.output_bias,
            num_local_heads=config.mask.num_local_heads(config.num_heads, layer) if config.mask else 0,
            is_dynamic=config.mask.is_dynamic if config.mask else True,
            scale=None if config.query_scalar is None else config.query_scalar**-0.5,
            softcap=config.attention_softcap,
            has_window=config.window_of(layer) is not None,
            q_norm=build_norm(config, config.size_of_head) if config.qk_norm else None,
            k_norm=build_norm(config, config.size_of_head) if config.qk_norm else None,
        )
        self.feedforward_norm = build_norm(config)
        self.feedforward = build_feedforward(config)
        self.attention_post_norm = build_norm(config) if config.post_norms else None
        self.feedforward_post_norm = build_norm(config) if config.post_norms else None

    def forward(
        self, x_BTD: Tensor, table_2BTH: Tensor | None, visibility: Visibility, cache: LayerCache | None = None
    ) -> Tensor:
        added_BTD = self.attention(self.attention_norm(x_BTD), table_2BTH, visibility, cache)
        x_BTD = x_BTD + (added_BTD if self.attention_post_norm is None else self.attention_post_norm(added_BTD))
        added_BTD = self.feedforward(self.feedforward_norm(x_BTD))
        y_BTD: Tensor = x_BTD + (
            added_BTD if self.feedforward_post_norm is None else self.feedforward_post_norm(added_BTD)
        )
        return y_BTD


class TokenEmbedding(nn.Embedding):
    """A table of rows by token; texts, which `embed` of text encoders takes, are refused with the way out."""

    def forward(self, tokens_BT: Tensor | str | Sequence[str]) -> Tensor:
        if not isinstance(tokens_BT, Tensor):
            raise ConfigError(
                "`embed` of a decoder is its table of tokens and gives no vector for a text; load a text encoder, or a "
                "decoder whose folder says how texts are pooled (modules.json and 1_Pooling/config.json)"
            )
        return super().forward(tokens_BT)


class Decoder(nn.Module):
    """Next-token logits for sequences of tokens.

    >>> model = Decoder(DecoderConfig(vocab_size=32, hidden_size=16, num_layers=1, num_heads=2, ffn_size=32))
    >>> model(torch.zeros(2, 8, dtype=torch.long)).shape
    torch.Size([2, 8, 32])
    """

    rotary_2LH: Tensor
    window_rotary_2LH: Tensor
    embed_scale: Tensor
    mask_openness: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.position_embed = (
            nn.Embedding(config.max_length, config.hidden_size) if config.position == "learned" else None
        )
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = build_norm(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        scale = torch.tensor(config.hidden_size**0.5) if config.scale_embeddings else None
        for name, table in (build_rotary_tables(config) | {"embed_scale": scale}).items():
            if table is None:
                setattr(self, name, None)  # torch.export counts a buffer that is None, and loses it
            else:
                self.register_buffer(name, table, persistent=False)
        self.register_buffer("mask_openness", torch.ones(()), persistent=False)
        self.apply(self._initialize)

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        cache: CacheView | None = None,
        lengths_B1: Tensor | None = None,
        last_only: bool = False,
        documents_BT: Tensor | None = None,
        without_head: bool = False,
    ) -> Tensor:
        """Return logits (B, T, V), or (B, 1, V) of the last token with `last_only`.

        With `without_head` these are the (B, T, D) inputs of the head, for a loss that never holds all logits.

        With a `cache`, the tokens at `positions_BT` are added to it and see what it holds, for one slot per row.
        `lengths_B1` are those of the whole texts, for rotary angles that depend on them, where these tokens are not
        the last ones.

        Without a cache, rows may hold several documents side by side: `documents_BT` numbers them, each token sees
        those of its own number alone, and positions count from its document's first token, so that every document has
        the logits that it has in a row of its own. Experts with a capacity are the exception, in training: what they
        drop depends on all the tokens of a batch.
        """
        if documents_BT is not None and any(given is not None for given in (cache, positions_BT, lengths_B1)):
            raise ConfigError(
                "documents_BT decides positions and lengths and goes with no cache; leave cache, positions_BT and "
                "lengths_B1 out"
            )
        lengths, visibility = self.locate(tokens_BT, positions_BT, cache, lengths_B1, documents_BT)
        positions_BT = visibility.positions_BT
        x_BTD = self.embed(tokens_BT)
        if self.embed_scale is not None:
            x_BTD = x_BTD * self.embed_scale.to(x_BTD.dtype)
        if self.position_embed is not None:
            x_BTD = x_BTD + self.position_embed(positions_BT)
        table_2BTH = self._index_rotary(positions_BT, lengths)
        window_table_2BTH = table_2BTH if self.window_rotary_2LH is None else self.window_rotary_2LH[:, positions_BT]
        for index, layer in enumerate(self.layers):
            table = table_2BTH if self.config.window_of(index) is None else window_table_2BTH
            x_BTD = layer(x_BTD, table, visibility, cache.layers[index] if cache else None)
        if last_only:
            x_BTD = x_BTD[:, -1:]
        hidden_BTD: Tensor = self.norm(x_BTD)
        if without_head:
            return hidden_BTD
        logits_BTV: Tensor = self.head(hidden_BTD)
        if self.config.logits_softcap is not None:
            logits_BTV = self.config.logits_softcap * (logits_BTV / self.config.logits_softcap).tanh()
        return logits_BTV

    def locate(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None,
        cache: CacheView | None,
        lengths: Tensor | None,
        documents_BT: Tensor | None,
    ) -> tuple[Tensor | None, Visibility]:
        """Return how long the texts of the tokens are, where it matters, with their positions and what they see."""
        if documents_BT is not None:
            positions_BT, lengths = count_positions(documents_BT), count_lengths(documents_BT)
        if positions_BT is None:
            positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        num_keys = tokens_BT.shape[1] if cache is None else cache.length
        self.check_length(max(num_keys, tokens_BT.shape[1]))
        visibility = see(
            positions_BT,
            num_keys,
            is_whole=cache is None,
            local_distance=self.config.mask.local_distance if self.config.mask else None,
            openness=self.mask_openness if self.config.mask else None,
            window=self.config.sliding_window,
            documents_BT=documents_BT,
        )
        return lengths, visibility

    def check_length(self, longest: int) -> None:
        """Raise a `ConfigError` for a sequence of more tokens than the model was made for."""
        if longest > self.config.max_length:
            raise ConfigError(
                f"the sequence has {longest} tokens and this model was made for {self.config.max_length}; "
                "shorten it, or make the model with a larger max_length"
            )

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
        """Report the progress of training to the mask; a model that is not being trained needs no call."""
        if self.config.mask:
            self.mask_openness.fill_(self.config.mask.openness_at(step))

    def _index_rotary(self, positions_BT: Tensor, lengths: Tensor | None) -> Tensor | None:
        """Return the angles of tokens at `positions_BT`, in texts that end there unless `lengths` says otherwise.

        `lengths` are (B, 1), or (B, T) where each token has its own.
        """
        scaling = self.config.rope_scaling
        if self.config.position == "rotary" and scaling and scaling.is_length_dependent:
            if lengths is None:
                lengths = positions_BT.amax(dim=1, keepdim=True) + 1
            if scaling.kind == "dynamic":
                size, theta = self.config.num_rotated, self.config.rope_theta
                return dynamic_rows(positions_BT, lengths, size, theta=theta, scaling=scaling)
            positions_BT = positions_BT + (lengths > scaling.original_length) * scaling.original_length
        return None if self.rotary_2LH is None else self.rotary_2LH[:, positions_BT]

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


def build_rotary_tables(config: DecoderConfig) -> dict[str, Tensor | None]:
    """Build the rotary table of all layers, and that of layers with a sliding window where they have another.

    A rule with angles for each length has no table.
    """
    if config.position != "rotary":
        return {"rotary_2LH": None, "window_rotary_2LH": None}
    theta, size, scaling = config.rope_theta_window, config.num_rotated, config.rope_scaling
    has_table = scaling is None or scaling.kind != "dynamic"
    return {
        "rotary_2LH": rotary_table(config.max_length, size, theta=config.rope_theta, scaling=scaling)
        if has_table
        else None,
        "window_rotary_2LH": None if theta is None else rotary_table(config.max_length, size, theta=theta),
    }


def build_norm(config: DecoderConfig, size: int | None = None) -> nn.Module:
    """Build a norm over the hidden channels, or over `size` ones."""
    norms: dict[str, type[nn.RMSNorm | CenteredRMSNorm | nn.LayerNorm]] = {
        "rms": nn.RMSNorm,
        "rms_centered": CenteredRMSNorm,
        "layer": nn.LayerNorm,
    }
    return norms[config.norm](size or config.hidden_size, eps=config.norm_eps)


def build_feedforward(config: DecoderConfig) -> nn.Module:
    """Build experts, a gated block or a plain one."""
    if config.moe is not None:
        return MoERouter(
            SwiGLUExperts(config.moe.num_experts, config.hidden_size, config.moe.ffn_size),
            config.moe.top_k,
            hidden_size=config.hidden_size,
            capacity_factor=config.moe.capacity_factor,
            balance_rate=config.moe.balance_rate,
            num_candidates=config.moe.num_candidates,
        )
    blocks = {"swiglu": SwiGLU, "geglu": GeGLU, "gelu": MLP}
    return blocks[config.feedforward](config.hidden_size, config.ffn_size, bias=config.feedforward_bias)


def count_parameters(model: nn.Module) -> int:
    """Count parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
