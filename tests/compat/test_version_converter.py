"""Conversions are judged by real models of `transformers`, by float arithmetic and by their own way back."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from deepseek.compat.conversion_steps import FUSE_LLAMA, STEPS, Change, Step, find_path, identify, net_changes
from deepseek.compat.generations import load_table
from deepseek.compat.tensors import describe
from deepseek.compat.version_converter import VersionConverter
from deepseek.core.errors import ArtifactError, ConfigError
from tests.compat.models import build, logits
from tests.compat.torchvision_resnet import ResNet

FAMILIES = ["gpt2", "bert", "llama", "mixtral", "resnet"]
LOSSLESS = ["1.0", "1.3", "2.0", "2.3", "3.0", "3.1", "3.5", "4.0"]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Same names, dtypes and bits."""
    return set(a) == set(b) and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


# --- Real models ---


@pytest.mark.parametrize("version", LOSSLESS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_real_model_comes_back_bit_equal_and_says_the_same(family: str, version: str) -> None:
    model = build(family)
    before, original = logits(model), {name: each.clone() for name, each in model.state_dict().items()}
    there = VersionConverter("5.0", version).convert(original)
    back = VersionConverter(version, "5.0").convert(there)
    assert equal(back, original)
    model.load_state_dict(back)
    assert torch.equal(logits(model), before)


def test_fused_llama_is_what_phi3_reads() -> None:
    llama, phi3 = build("llama"), build("phi3")
    phi3.load_state_dict(VersionConverter("5.0", "3.5").convert(llama.state_dict()))
    torch.testing.assert_close(logits(phi3), logits(llama))


@pytest.mark.parametrize(("family", "version"), [("mixtral", "2.0"), ("bert", "1.0")])
def test_older_names_are_those_that_transformers_still_reads(family: str, version: str, tmp_path: Path) -> None:
    model = build(family)
    weights = VersionConverter("5.0", version).convert(model.state_dict())
    model.config.save_pretrained(tmp_path)
    save_file({name: each.clone() for name, each in weights.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path).eval()), logits(model))


def test_resnet_names_are_those_of_torchvision() -> None:
    ours = build("resnet")
    theirs = ResNet(8, [8, 16, 24, 32], [2, 1, 1, 2], num_classes=5).eval()
    theirs.load_state_dict(VersionConverter("5.0", "2.0").convert(ours.state_dict()))
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(theirs(image), logits(ours))


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


# --- Random weights ---


@st.composite
def state_dicts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Decoders with grouped heads, experts or dense layers, odd sizes, extra tensors, in three dtypes."""
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    hidden, ffn, kv = draw(st.integers(1, 6)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    num_query_rows = draw(st.integers(1, 7))
    prefix = draw(st.sampled_from(["", "model.", "module.model."]))
    seed = draw(st.integers(0, 2**32))
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        bits = torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int16)
        return bits.view(torch.bfloat16 if dtype is torch.float32 else dtype).to(dtype).nan_to_num(1, 2, 3)

    weights = {f"{prefix}embed_tokens.weight": random(3, hidden), f"{prefix}steps": torch.tensor(7)}
    for layer in range(draw(st.integers(1, 3))):
        at = f"{prefix}layers.{layer}."
        for part, rows in (("q", num_query_rows), ("k", kv), ("v", kv)):
            weights[f"{at}self_attn.{part}_proj.weight"] = random(rows, hidden)
            if draw(st.booleans()) and part == "q":
                for each, size in (("q", num_query_rows), ("k", kv), ("v", kv)):
                    weights[f"{at}self_attn.{each}_proj.bias"] = random(size)
        weights[f"{at}self_attn.o_proj.weight"] = random(hidden, num_query_rows)
        num_experts = draw(st.integers(0, 3))
        for expert in range(num_experts):
            for name, shape in (("w1", (ffn, hidden)), ("w3", (ffn, hidden)), ("w2", (hidden, ffn))):
                weights[f"{at}block_sparse_moe.experts.{expert}.{name}.weight"] = random(*shape)
        if not num_experts:
            weights[f"{at}mlp.gate_proj.weight"] = random(ffn, hidden)
            weights[f"{at}mlp.up_proj.weight"] = random(ffn, hidden)
    return weights


@settings(deadline=None, max_examples=200)
@given(state_dicts(), st.sampled_from(["3.0", "3.1", "3.5", "4.0"]))
def test_moves_are_lossless_both_ways(weights: dict[str, torch.Tensor], version: str) -> None:
    there = VersionConverter("2.0", version).convert(weights)
    back = VersionConverter(version, "2.0").convert(there)
    assert set(back) == set(weights)
    assert all(torch.equal(back[name].float(), weights[name].float()) for name in weights)
    assert sum(each.numel() for each in there.values()) == sum(each.numel() for each in weights.values())
    assert all(torch.equal(there[name], weights[name]) for name in there.keys() & weights.keys())
    # 2.0 holds float32 and float16, so a bfloat16 model passes through it as float32.
    if next(iter(weights.values())).dtype is not torch.bfloat16:
        assert all(back[name].dtype == weights[name].dtype for name in weights)


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


# --- Casts, reports, optimizers ---


def test_a_dtype_that_the_destination_cannot_hold_is_cast_and_reported() -> None:
    weights = VersionConverter("5.0", "2.0").convert({"w": torch.ones(2, dtype=torch.bfloat16)})
    assert weights["w"].dtype is torch.float32
    assert weights.report.cast[0].sources == ("w",)


def test_a_cast_can_be_asked_for_and_integers_stay() -> None:
    weights = VersionConverter("2.0", "3.5", dtype="bf16").convert({"w": torch.ones(2), "n": torch.tensor(3)})
    assert (weights["w"].dtype, weights["n"].dtype) == (torch.bfloat16, torch.int64)


def test_a_cast_that_would_overflow_is_refused() -> None:
    with pytest.raises(ArtifactError, match="beyond the range of F16; choose bf16"):
        VersionConverter("2.0", "3.5", dtype="fp16").convert({"w": torch.tensor([1e6])})


def test_the_report_says_what_was_done() -> None:
    weights = VersionConverter("2.0", "3.5").convert(
        VersionConverter("5.0", "2.0").convert(build("mixtral").state_dict())
    )
    report = weights.report
    assert report.path == ("2.0", "3.5")
    assert report.renamed["model.layers.0.block_sparse_moe.gate.weight"] == "model.layers.0.mlp.gate.weight"
    assert len(report.merged) == 2 * 3  # Q, K, V; gate and up of the experts; down of the experts; in two layers
    assert report.split == report.cast == report.dropped == ()


def test_buffers_that_newer_models_compute_are_dropped_with_a_warning() -> None:
    weights = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2), "w": torch.ones(1)}
    with pytest.warns(UserWarning, match="inv_freq"):
        converted = VersionConverter("2.0", "3.5").convert(weights)
    assert list(converted) == ["w"]
    assert converted.report.dropped == ("model.layers.0.self_attn.rotary_emb.inv_freq",)


def trained(family: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    model = build(family).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, get_optimizer_state_dict(model, optimizer)


def test_adam_moments_follow_their_parameters_there_and_back() -> None:
    model, state = trained("llama")
    there = VersionConverter("5.0", "3.5").convert(model.state_dict(), optimizer=state)
    at = "model.layers.0.self_attn."
    parts = [state["state"][f"{at}{each}_proj.weight"]["exp_avg"] for each in "qkv"]
    assert torch.equal(there.optimizer["state"][f"{at}qkv_proj.weight"]["exp_avg"], torch.cat(parts))
    assert f"{at}qkv_proj.weight" in there.optimizer["param_groups"][0]["params"]
    back = VersionConverter("3.5", "5.0").convert(there, optimizer=there.optimizer).optimizer
    assert set(back["state"]) == set(state["state"])
    for name, entry in state["state"].items():
        assert all(torch.equal(back["state"][name][key], value) for key, value in entry.items())


def test_optimizer_state_that_cannot_follow_is_dropped_with_a_warning() -> None:
    model, state = trained("llama")
    state["state"]["model.layers.0.self_attn.k_proj.weight"]["step"] += 1
    with pytest.warns(UserWarning, match=r"k_proj\.weight.*starts anew"):
        there = VersionConverter("5.0", "3.5").convert(model.state_dict(), optimizer=state)
    assert "model.layers.0.self_attn.qkv_proj.weight" not in there.optimizer["state"]
    assert "model.layers.1.self_attn.qkv_proj.weight" in there.optimizer["state"]


def test_an_optimizer_keyed_by_position_is_refused_with_the_way_out() -> None:
    model = build("llama")
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ArtifactError, match="get_optimizer_state_dict"):
        VersionConverter("5.0", "3.5").convert(model.state_dict(), optimizer=optimizer.state_dict())


# --- Paths and layouts ---


def test_paths_are_the_shortest() -> None:
    """Against Floyd and Warshall over the same edges."""
    names = sorted({name for step in STEPS for name in (step.source, step.target)})
    far = {(a, b): 0 if a == b else 99 for a in names for b in names}
    far |= {pair: 1 for step in STEPS for pair in ((step.source, step.target), (step.target, step.source))}
    for via, a, b in itertools.product(names, repeat=3):
        far[a, b] = min(far[a, b], far[a, via] + far[via, b])
    for a, b in itertools.product(names, repeat=2):
        path = find_path(a, b)
        assert len(path) == far[a, b]
        assert [step.source for step in path[1:]] == [step.target for step in path[:-1]]


def test_every_way_to_a_generation_makes_the_same_changes() -> None:
    """2.0 -> 3.5 directly, and 2.0 -> 2.3 -> 3.0 -> 3.1 -> 3.5."""
    direct = net_changes(find_path("2.0", "3.5"))
    long = [net_changes(find_path(a, b)) for a, b in itertools.pairwise(["2.0", "2.3", "3.0", "3.1", "3.5"])]
    assert [c for step in direct for c in step] == [c for path in long for step in path for c in step]


def test_the_steps_produce_the_layouts_of_the_table() -> None:
    aspects = {
        "normalization renames": "norms",
        "position and embedding renames": "positions",
        "int8 weights": "quantized",
    }
    aspects |= {
        "ResNet names of torchvision": "vision",
        "the router": "experts",
        "buffers that are computed anew": "buffers",
    }
    aspects |= {"Q, K, V of GPT-2": "attention"}
    layouts = {each.name: each.layout.to_dict() for each in load_table().generations if each.layout}
    for step in STEPS:
        changed = {aspects[c.transform.name] for c in step.changes if c.transform.name in aspects}
        before, after = layouts[step.source], layouts[step.target]
        differ = {key for key in aspects.values() if before[key] != after[key]}
        # 5.0 holds projections as each family does natively, which for GPT-2 is what 4.0 does.
        assert differ - {"attention"} == changed - {"attention"}, step


@pytest.mark.parametrize("version", ["6.0", "3.2"])
def test_a_generation_without_checkpoints_names_the_reachable_ones(version: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"no conversion leads from generation 2\.0 to {version}; reachable are: 1\.0,"
    ):
        VersionConverter("v2.0", version)


def test_an_unknown_generation_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"unknown generation 'v9'.*3\.5"):
        VersionConverter(src_version="v2.0", dst_version="v9")


IDENTIFIED = [
    ("llama", "5.0", ("2.0", "2.3", "5.0")),
    ("llama", "3.5", ("3.0", "3.1", "3.5", "4.0")),
    ("gpt2", "5.0", ("3.0", "3.1", "3.5", "4.0", "5.0")),
    ("gpt2", "1.3", ("1.3",)),
    ("bert", "1.0", ("1.0",)),
    ("bert", "1.0-quant", ("1.0-quant",)),
    ("mixtral", "5.0", ("5.0",)),
    ("mixtral", "2.0", ("2.0", "2.3")),
    ("resnet", "5.0", ("5.0",)),
    ("resnet", "2.0", ("1.0", "1.3", "2.0", "2.3", "3.0", "3.1", "3.5", "4.0")),
]


@pytest.mark.parametrize(("family", "version", "generations"), IDENTIFIED)
def test_names_tell_the_generations_a_checkpoint_can_be_of(
    family: str, version: str, generations: tuple[str, ...]
) -> None:
    weights = VersionConverter("5.0", version).convert(build(family).state_dict())
    found = identify({name: describe(name, each) for name, each in weights.items()})
    assert tuple(sorted(found)) == generations


# --- Bad weights ---

AT = "layers.0.self_attn."


def llama_attention() -> dict[str, torch.Tensor]:
    return {f"{AT}{each}_proj.weight": torch.ones(2, 2) for each in "qkvo"}


def test_a_missing_part_is_half_converted() -> None:
    weights = llama_attention()
    del weights[f"{AT}v_proj.weight"]
    with pytest.raises(ArtifactError, match=r"half converted.*v_proj\.weight is missing"):
        VersionConverter("2.0", "3.5").convert(weights)


def test_both_forms_at_once_are_half_converted() -> None:
    with pytest.raises(ArtifactError, match=r"half converted.*qkv_proj\.weight is there too"):
        VersionConverter("2.0", "3.5").convert(llama_attention() | {f"{AT}qkv_proj.weight": torch.ones(6, 2)})


def test_one_change_made_and_another_not_is_half_converted() -> None:
    with pytest.raises(ArtifactError, match=r"half converted: gate and up.* as in 2\.0, Q, K, V of Llama as in 3\.5"):
        VersionConverter("2.0", "3.5").convert(
            {f"{AT}qkv_proj.weight": torch.ones(6, 2), f"{AT}o_proj.weight": torch.ones(2, 2)}
            | {f"layers.0.mlp.{each}_proj.weight": torch.ones(3, 2) for each in ("gate", "up")}
        )


def test_converting_twice_warns_and_changes_nothing() -> None:
    once = VersionConverter("2.0", "3.5").convert(llama_attention())
    with pytest.warns(UserWarning, match="already have the form of generation 3"):
        twice = VersionConverter("2.0", "3.5").convert(once)
    assert equal(twice, once)


def test_a_tensor_that_two_steps_claim_names_both() -> None:
    greedy = Step("2.0", "3.5", (Change(FUSE_LLAMA, "forward"), Change(FUSE_LLAMA, "forward")))
    with pytest.raises(ArtifactError, match="claimed by two steps"):
        VersionConverter("2.0", "3.5", steps=(greedy,)).convert(llama_attention())


def test_names_that_collide_are_refused() -> None:
    both = {"encoder.LayerNorm.gamma": torch.ones(2), "encoder.LayerNorm.weight": torch.ones(2)}
    with pytest.raises(ArtifactError, match="half converted"):
        VersionConverter("1.0", "1.3").convert(both)


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
