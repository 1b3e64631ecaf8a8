"""Conversions are judged by real models of `transformers`, by float arithmetic and by their own way back."""

from __future__ import annotations

import collections
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from deepseek.compat.conversion_steps import is_half_converted
from deepseek.compat.tensors import TensorSpec
from deepseek.compat.version_converter import VersionConverter
from deepseek.core.errors import ArtifactError, ConfigError
from tests.compat.architectures import describe_forms, list_classes
from tests.compat.conversions import AT, FAMILIES, LOSSLESS, equal, llama_attention
from tests.compat.models import build, logits
from tests.compat.torchvision_resnet import ResNet


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


def test_a_dtype_that_the_destination_cannot_hold_is_cast_and_reported() -> None:
    weights = VersionConverter("5.0", "2.0").convert({"w": torch.ones(2, dtype=torch.bfloat16)})
    assert weights["w"].dtype is torch.float32
    assert weights.report.cast[0].sources == ("w",)


def test_a_cast_can_be_asked_for_and_integers_stay() -> None:
    weights = VersionConverter("2.0", "3.5", dtype="bf16").convert({"w": torch.ones(2), "n": torch.tensor(3)})
    assert (weights["w"].dtype, weights["n"].dtype) == (torch.bfloat16, torch.int64)


def test_the_report_says_what_was_done() -> None:
    weights = VersionConverter("2.0", "3.5").convert(
        VersionConverter("5.0", "2.0").convert(build("mixtral").state_dict())
    )
    report = weights.report
    assert report.path == ("2.0", "3.5")
    assert report.renamed["model.layers.0.block_sparse_moe.gate.weight"] == "model.layers.0.mlp.gate.weight"
    assert len(report.merged) == 2 * 3  # Q, K, V; gate and up of the experts; down of the experts; in two layers
    assert report.split == report.cast == report.dropped == ()


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


def test_an_unknown_generation_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"unknown generation 'v9'.*3\.5"):
        VersionConverter(src_version="v2.0", dst_version="v9")


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


def rows(**sizes: int) -> dict[str, torch.Tensor]:
    return {f"{AT}{part}_proj.weight": torch.randn(size, 8) for part, size in sizes.items()}


BIASES = {f"{AT}{part}_proj.bias": torch.randn(8) for part in "qv"}
CONSOLIDATED = {f"layers.0.attention.{part}.weight": torch.randn(8, 8) for part in ("wq", "wk", "wv", "wo")} | {
    "tok_embeddings.weight": torch.randn(9, 8),
    "layers.0.attention_norm.weight": torch.randn(8),
    "layers.0.ffn_norm.weight": torch.randn(8),
}
GPT_J = {f"transformer.h.0.attn.{part}_proj.weight": torch.randn(8, 8) for part in ("q", "k", "v", "out")}
MODERN_BERT = {
    "model.embeddings.tok_embeddings.weight": torch.randn(9, 8),
    "model.layers.0.attn.Wqkv.weight": torch.randn(24, 8),
}
ADAPTER = rows(q=8, k=8, v=8, o=8) | {f"{AT}q_proj.lora_A.default.weight": torch.randn(2, 8)}
FP8 = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in rows(q=8, k=8, v=8, o=8).items()}
SCALES = {f"{AT}{part}_proj.weight_scale_inv": torch.ones(1, 1) for part in "qkvo"}
SHARED_KV = rows(q=8, k=8, v=8, o=8) | {
    f"layers.1.self_attn.{part}_proj.weight": torch.randn(8, 8) for part in ("q", "o")
}


@pytest.mark.parametrize("version", ["1.0", "2.0", "3.5"])
@pytest.mark.parametrize(
    "weights",
    [
        rows(q=8, k=8, v=8, o=8) | BIASES,
        rows(q=8, k=4, v=2, o=8),
        rows(q=16, k=4, v=4, o=8),
        CONSOLIDATED,
        GPT_J,
        MODERN_BERT,
        ADAPTER,
        FP8 | SCALES,
        FP8,
        SHARED_KV,
    ],
    ids=["bias", "unequal", "gated", "consolidated", "gptj", "modernbert", "lora", "scales", "fp8", "shared"],
)
@pytest.mark.filterwarnings("ignore:the names and groups of the weights are left as they are:UserWarning")
@pytest.mark.filterwarnings("ignore:the weights already have the form of generation:UserWarning")
def test_a_family_that_is_not_known_goes_round_unchanged(weights: dict[str, torch.Tensor], version: str) -> None:
    there = VersionConverter("5.0", version).convert(weights)
    back = VersionConverter(version, "5.0").convert(there)
    assert set(back) == set(weights)
    assert all(torch.equal(back[name].float(), weights[name].float()) for name in weights)
    # Nor does it become another one on the way up, where it is taken for an old checkpoint.
    up = VersionConverter(version, "5.0").convert(weights)
    assert set(up) == set(weights)


def test_weights_that_are_left_alone_are_named() -> None:
    with pytest.warns(UserWarning, match=r"left as they are: layers\.0\.self_attn\.k_proj\.weight would come back as"):
        VersionConverter("2.0", "3.5").convert(rows(q=8, k=4, v=2, o=8))


WAYS = [
    *(("5.0", version) for version in ("1.0", "2.0", "3.5", "4.0")),
    *((version, "5.0") for version in ("1.0", "2.0", "4.0")),
    *(("1.3", "2.0"), ("2.0", "3.5"), ("3.5", "2.0")),
]
CONVERTERS = {way: VersionConverter(*way) for ends in WAYS for way in (ends, ends[::-1])}


def explain_unlike(specs: dict[str, TensorSpec], way: tuple[str, str]) -> tuple[str | None, str | None]:
    """What is wrong with converting a whole model, and the reason for which it was left alone, if it was."""
    try:
        plan, report = CONVERTERS[way].plan(specs)
    except ArtifactError as error:
        reason = str(error)
        return (reason if "half converted" in reason else None), reason
    kept = {name: spec.shape for name, spec in specs.items() if name not in report.dropped}
    if not report.of_kind("merged", "split", "renamed"):
        here = {name: spec.shape for name, spec in plan.specs.items()}
        notes = [note for note in report.notes if "left as they are" in note]
        return (None if here == kept else "changed without a move"), (notes[0] if notes else None)
    back, _ = CONVERTERS[way[::-1]].plan(plan.specs)
    came = {name: spec.shape for name, spec in back.specs.items()}
    return (None if came == kept else f"comes back with other tensors: {sorted(kept.items() ^ came.items())[:3]}"), None


# Each stands for a kind: plain, gated, compressed keys, K without a bias, experts, joined in the library itself, mixed
# joined and apart in one layer, unequal columns, a tower with joined projections, no gate.
SAMPLE = (
    *("llama", "gpt2", "bert", "gptj", "phi3", "modernbert", "whisper", "bart", "opt", "clip", "mixtral", "minimax"),
    *("qwen3_moe", "qwen3_next", "deepseek_v3", "glm4", "apertus", "mobilebert", "perceiver", "falcon", "gemma3n_text"),
)


@pytest.mark.parametrize("model_type", SAMPLE)
def test_an_architecture_of_transformers_goes_round_or_is_left_alone(model_type: str) -> None:
    forms = list(describe_forms(list_classes()[model_type]))
    assert forms
    for specs in forms:
        for way in WAYS:
            problem, _ = explain_unlike(specs, way)
            assert problem is None, (model_type, way)
        assert not is_half_converted(specs)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_architecture_of_transformers_goes_round_or_is_left_alone() -> None:
    problems, reasons, num_forms = [], collections.Counter(), 0
    for model_type, name in sorted(list_classes().items()):
        for specs in describe_forms(name):
            num_forms += 1
            for way in WAYS:
                problem, reason = explain_unlike(specs, way)
                problems += [] if problem is None else [(model_type, way, problem)]
                reasons[model_type, *way, None if reason is None else reason[:160]] += 1
            problems += [(model_type, "half converted")] if is_half_converted(specs) else []
    for (model_type, source, target, reason), _ in sorted(reasons.items(), key=str):
        if reason is not None:
            print(f"{model_type:24} {source} -> {target}  {reason}")
    assert not problems
    assert num_forms > 500


def _build_phi3(**sizes: int) -> transformers.PreTrainedModel:
    settings = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2} | sizes
    config = transformers.Phi3Config(**settings, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    return transformers.Phi3ForCausalLM(config)


@pytest.mark.parametrize(
    ("vocab_size", "is_plain", "model_type"), [(64, False, None), (64, True, "phi3"), (32064, True, None)]
)
@pytest.mark.parametrize(("source", "target"), [("4.0", "5.0"), ("3.0", "5.0"), ("3.5", "2.0")])
def test_a_phi3_is_left_alone_and_that_is_said(
    source: str, target: str, vocab_size: int, is_plain: bool, model_type: str | None
) -> None:
    weights = _build_phi3(vocab_size=vocab_size, intermediate_size=16).state_dict()
    given = dict(weights) if is_plain else weights
    with pytest.warns(
        UserWarning, match=r"left as they are: transformers holds .*(qkv|gate_up)_proj.weight of phi3 joined"
    ):
        converted = VersionConverter(source, target).convert(given, model_type=model_type)
    assert list(converted) == list(weights)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in converted.items())


_LAYERS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
_BART = _LAYERS | {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
_OPT = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 16}


@pytest.mark.parametrize(("kind", "sizes"), [("opt", _OPT), ("bart", _BART), ("whisper", _BART)])
@pytest.mark.filterwarnings("ignore:the (names and groups|weights)")
def test_values_of_other_families_come_back_bit_by_bit_from_every_generation(kind: str, sizes: dict[str, int]) -> None:
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = transformers.AutoConfig.for_model(kind, vocab_size=64, max_position_embeddings=32, **sizes, **ids)
    torch.manual_seed(0)
    state = transformers.AutoModel.from_config(config).state_dict()
    weights = {name: torch.randn_like(tensor) for name, tensor in state.items()}
    for source, target in itertools.permutations(["1.0", "1.3", "2.0", "3.0", "3.5", "4.0", "5.0"], 2):
        there = VersionConverter(source, target).convert(weights)
        back = VersionConverter(target, source).convert(there)
        assert set(back) == set(weights)
        assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())
