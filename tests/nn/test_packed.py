"""A packed model computes what the model computed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from deepseek.models.decoder.model import Decoder, DecoderConfig
from deepseek.models.loading import make_int8_
from deepseek.nn.masks import MaskConfig
from deepseek.nn.moe import MoEConfig
from deepseek.nn.packed import PackedLinear, pack_
from tests.processors import needs_avx512

SHAPES = {
    "llama": DecoderConfig(vocab_size=96, num_layers=2, hidden_size=64, num_heads=4, num_kv_heads=2, ffn_size=96),
    "gpt2": DecoderConfig(
        vocab_size=96,
        num_layers=2,
        hidden_size=64,
        num_heads=4,
        ffn_size=128,
        norm="layer",
        feedforward="gelu",
        position="learned",
        attention_bias=True,
        feedforward_bias=True,
    ),
    "moe": DecoderConfig(
        vocab_size=96,
        num_layers=2,
        hidden_size=64,
        num_heads=4,
        moe=MoEConfig(num_experts=4, ffn_size=64),
        mask=MaskConfig(),
    ),
}


def make_model(shape: str) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(SHAPES[shape]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_packed_model_gives_the_logits_of_the_model(shape: str) -> None:
    model = make_model(shape)
    tokens = torch.randint(0, 96, (2, 20))
    packed = pack_(copy.deepcopy(model))
    assert any(isinstance(module, PackedLinear) for module in packed.modules())
    torch.testing.assert_close(packed(tokens), model.double()(tokens).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_packed_int8_model_gives_the_logits_of_the_int8_model(shape: str) -> None:
    model = make_int8_(make_model(shape))
    tokens = torch.randint(0, 96, (2, 20))
    torch.testing.assert_close(pack_(copy.deepcopy(model))(tokens), model(tokens), rtol=1e-4, atol=1e-4)


@needs_avx512
@torch.no_grad()
def test_packed_bf16_layer_is_as_close_as_bf16_allows() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(256, 128).bfloat16()
    x = torch.randn(3, 5, 256).bfloat16()
    exact = linear.double()(x.double())
    torch.testing.assert_close(PackedLinear(linear.bfloat16())(x).double(), exact, rtol=2e-2, atol=2e-2)


@torch.no_grad()
def test_a_model_in_bf16_runs_packed_on_every_processor() -> None:
    model = make_model("llama").bfloat16()
    tokens = torch.randint(0, 96, (2, 20))
    expected = copy.deepcopy(model)(tokens)
    torch.testing.assert_close(pack_(model)(tokens), expected, rtol=5e-2, atol=5e-2)


@torch.no_grad()
def test_packing_twice_changes_nothing() -> None:
    packed = pack_(make_model("llama"))
    tokens = torch.randint(0, 96, (1, 8))
    before = packed(tokens)
    assert torch.equal(pack_(packed)(tokens), before)
