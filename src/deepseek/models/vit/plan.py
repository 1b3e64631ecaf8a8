"""Where parallelism takes hold of a vision transformer.

Queries, keys and values are one matrix here, so each rank keeps all of it and computes with the rows of its heads; the
MLPs, which hold two thirds of the weights, and the output projections are cut.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.core.errors import ConfigError
from deepseek.distributed.parallel.legality import ModelParts
from deepseek.distributed.parallel.parallel_model import ModelRows
from deepseek.distributed.parallel.pipeline import PipelineStage, Received, TakenOut
from deepseek.distributed.parallel.tensor_parallel import TensorParallel, columns, enter, leave, outputs, rows
from deepseek.models.vit.model import SelfAttention, ViT, ViTConfig

_BLOCKS = "encoder.layers.*"


def list_rows(model: ViT) -> ModelRows:
    """List the rows of a vision transformer."""
    config = model.config
    return ModelRows(
        parts=ModelParts(
            name="ViT",
            num_layers=config.num_layers,
            head_counts=(("num_heads", config.num_heads),),
            has_tensor_rows=True,
        ),
        tensor=(
            (f"{_BLOCKS}.self_attention", enter),
            (f"{_BLOCKS}.self_attention.out_proj", rows),
            (f"{_BLOCKS}.self_attention", divide_heads),
            (f"{_BLOCKS}.mlp", enter),
            (f"{_BLOCKS}.mlp.0", columns),
            (f"{_BLOCKS}.mlp.3", rows),
            ("heads.head", outputs),
        ),
        blocks=_BLOCKS,
        keep_stage=keep_stage,
        embed_cost=_measure_embedding(config),
        head_cost=config.num_classes / (config.num_tokens * _measure_layer(config)),
    )


def _measure_layer(config: ViTConfig) -> int:
    """Return the multiply-adds of a token in a block, over its channels."""
    return 4 * config.hidden_size + 2 * config.mlp_size


def _measure_embedding(config: ViTConfig) -> float:
    """Return the multiply-adds of cutting an image into patches over those of a block."""
    share = (config.num_tokens - 1) / config.num_tokens
    return share * config.in_channels * config.patch_size**2 / _measure_layer(config)


def divide_heads(module: nn.Module, tensor: TensorParallel) -> None:
    """Let a rank compute its heads, with its rows of the one matrix of queries, keys and values."""
    assert isinstance(module, SelfAttention)
    size = tensor.mesh.size()
    if module.num_heads % size:
        raise ConfigError(f"tp={size} does not divide num_heads={module.num_heads}; choose a divisor")
    tensor.partial_parameters.extend([module.in_proj_weight, module.in_proj_bias])
    module.register_forward_pre_hook(leave)
    count = module.num_heads // size
    module.forward = partial(_attend, module, tensor.rank * count, count)  # type: ignore[method-assign]


def _attend(module: SelfAttention, first: int, count: int, x_BTD: Tensor) -> Tensor:
    weight_3NHD = module.in_proj_weight.view(3, module.num_heads, -1, x_BTD.shape[-1])[:, first : first + count]
    bias_3NH = module.in_proj_bias.view(3, module.num_heads, -1)[:, first : first + count]
    qkv_BTF = F.linear(x_BTD, weight_3NHD.flatten(0, 2), bias_3NH.flatten())
    q_BNTH, k_BNTH, v_BNTH = qkv_BTF.unflatten(-1, (3, count, -1)).permute(2, 0, 3, 1, 4)
    dropout = module.dropout if module.training else 0.0
    y_BNTH = F.scaled_dot_product_attention(q_BNTH, k_BNTH, v_BNTH, dropout_p=dropout)
    return cast("Tensor", module.out_proj(y_BNTH.transpose(1, 2).flatten(2)))


class NoPatches(nn.Module):
    """Stands where a later stage has no patches to embed: zeros of their shape."""

    def __init__(self, embed: nn.Conv2d) -> None:
        super().__init__()
        self.num_channels, self.patch_size = embed.out_channels, embed.kernel_size

    def forward(self, images_BCHW: Tensor) -> Tensor:
        height, width = (size // patch for size, patch in zip(images_BCHW.shape[-2:], self.patch_size, strict=True))
        return images_BCHW.new_zeros(len(images_BCHW), self.num_channels, height, width)


class AllTokens(nn.Module):
    """Stands for the last norm in an earlier stage, behind which the class token is picked: it hands all tokens on."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD[:, None]


def keep_stage(model: nn.Module, stage: PipelineStage) -> Received | None:
    """Take out of a vision transformer what `stage` does not hold."""
    assert isinstance(model, ViT)
    for index in range(stage.num_layers):
        if not stage.holds(index):
            setattr(model.encoder.layers, f"encoder_layer_{index}", TakenOut())
    if not stage.is_last:
        model.encoder.ln, model.heads = AllTokens(), TakenOut()  # type: ignore[assignment]
    if stage.is_first:
        return None
    received = Received()
    zeros_11D = model.class_token.detach().clone().zero_()
    del model.class_token, model.encoder.pos_embedding
    model.class_token, model.encoder.pos_embedding = zeros_11D, zeros_11D  # type: ignore[assignment]
    model.conv_proj = NoPatches(model.conv_proj)  # type: ignore[assignment]
    model.encoder.dropout = received  # type: ignore[assignment]
    return received
