"""Single changes against float arithmetic, their own way back, and weights they must refuse."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.compat.version_converter import VersionConverter
from deepseek.core.errors import ArtifactError
from tests.compat.conversions import AT, LOSSLESS
from tests.compat.models import build


def test_separate_gpt2_projections_compute_what_the_fused_one_does() -> None:
    weights = build("gpt2").state_dict()
    apart = VersionConverter("5.0", "2.0").convert(weights)
    x = torch.randn(3, 16)
    prefix = "transformer.h.0.attn."
    fused = x @ weights[prefix + "c_attn.weight"] + weights[prefix + "c_attn.bias"]
    parts = [x @ apart[f"{prefix}{each}_proj.weight"] + apart[f"{prefix}{each}_proj.bias"] for each in "qkv"]
    torch.testing.assert_close(torch.cat(parts, dim=-1), fused)


def test_fused_rows_lead_to_the_same_projections() -> None:
    weights = build("bert").state_dict()
    fused = VersionConverter("5.0", "3.0").convert(weights)
    prefix = "bert.encoder.layer.1.attention.self."
    x = torch.randn(3, 16, dtype=torch.float64)
    q, k, v = (x @ fused[prefix + "query_key_value.weight"].double().T).chunk(3, dim=-1)
    for name, part in (("query", q), ("key", k), ("value", v)):
        torch.testing.assert_close(part, x @ weights[f"{prefix}{name}.weight"].double().T)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32))
def test_quantised_values_survive_a_round_trip_and_are_within_half_a_step(rows: int, columns: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10 ** (seed % 7 - 3)
    weight[0] = 0
    packed = VersionConverter("1.0", "1.0-quant").convert({"fc.weight": weight})
    assert packed["fc.weight"].dtype is torch.int8
    floating = VersionConverter("1.0-quant", "1.0").convert(packed)
    half_step = weight.double().abs().amax(1, keepdim=True) / 127 / 2
    assert bool(((floating["fc.weight"].double() - weight.double()).abs() <= half_step * (1 + 1e-5)).all())
    again = VersionConverter("1.0", "1.0-quant").convert(floating)
    assert torch.equal(again["fc.weight"], packed["fc.weight"])
    torch.testing.assert_close(again["fc.weight_scale"], packed["fc.weight_scale"], rtol=2e-7, atol=0)


def test_a_cast_that_would_overflow_is_refused() -> None:
    with pytest.raises(ArtifactError, match="beyond the range of F16; choose bf16"):
        VersionConverter("2.0", "3.5", dtype="fp16").convert({"w": torch.tensor([1e6])})


def test_buffers_that_newer_models_compute_are_dropped_with_a_warning() -> None:
    weights = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2), "w": torch.ones(1)}
    with pytest.warns(UserWarning, match="inv_freq"):
        converted = VersionConverter("2.0", "3.5").convert(weights)
    assert list(converted) == ["w"]
    assert converted.report.dropped == ("model.layers.0.self_attn.rotary_emb.inv_freq",)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"model": {"w": torch.ones(1)}}, "model is a dict; expected a torch tensor: give a flat state dict"),
        ({"w": torch.ones(1, dtype=torch.complex64)}, "dtype complex64"),
        ({f"{AT}qkv_proj.weight": torch.ones(6, 2)}, "cannot be split without"),
        ({f"{AT}qkv_proj.weight": torch.ones(5, 2), f"{AT}o_proj.weight": torch.ones(2, 2)}, "do not divide into 3"),
        ({f"{AT}qkv_proj.weight": torch.ones(2, 2), f"{AT}o_proj.weight": torch.ones(2, 9)}, "do not divide into 3"),
        ({f"{AT}qkv_proj.weight": torch.tensor(1.0), f"{AT}o_proj.weight": torch.ones(2, 9)}, "single number"),
        ({"mlp.experts.gate_up_proj": torch.ones(2, 3, 4)}, r"expected \(experts, 2 x rows, columns\)"),
    ],
)
def test_bad_weights_are_refused_with_their_name(weights: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        VersionConverter("3.5", "2.0").convert(weights)


def test_experts_of_different_sizes_cannot_be_stacked() -> None:
    weights = {f"block_sparse_moe.experts.{e}.w{w}.weight": torch.ones(2 + e, 2) for e in range(2) for w in (1, 3)}
    with pytest.raises(ArtifactError, match="not matrices of one shape"):
        VersionConverter("2.0", "3.5").convert(weights)


def test_weights_that_are_not_finite_are_not_quantised() -> None:
    with pytest.raises(ArtifactError, match="not finite"):
        VersionConverter("1.0", "1.0-quant").convert({"fc.weight": torch.full((2, 2), torch.inf)})


NAMES = [f"{AT}{each}_proj.weight" for each in ("q", "k", "v", "o", "qkv")] + [
    "mlp.experts.gate_up_proj",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "h.0.attn.c_attn.bias",
    "h.0.attn.bias",
    "block_sparse_moe.experts.1.w1.weight",
    "block_sparse_moe.experts.0.w3.weight",
    "LayerNorm.gamma",
    "ln_1.beta",
    "conv1.weight",
    "layer1.0.conv1.weight",
    "fc.weight",
    "fc.weight_scale",
]


@settings(deadline=None, max_examples=200)
@given(
    st.dictionaries(st.sampled_from(NAMES), st.lists(st.integers(0, 3), max_size=3), max_size=6),
    st.sampled_from([torch.float32, torch.int8]),
    st.sampled_from([*LOSSLESS, "1.0-quant", "5.0"]),
    st.sampled_from([*LOSSLESS, "1.0-quant", "5.0"]),
)
def test_no_weights_make_it_crash(shapes: dict[str, list[int]], dtype: torch.dtype, source: str, target: str) -> None:
    with warnings.catch_warnings(), contextlib.suppress(ArtifactError):
        warnings.simplefilter("ignore")
        VersionConverter(source, target).convert({name: torch.ones(shape).to(dtype) for name, shape in shapes.items()})
