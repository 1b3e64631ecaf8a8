import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.core.errors import ArtifactError, ConfigError
from deepseek.models.decoder.keymap import (
    FAMILIES,
    GPT2,
    LLAMA,
    MIXTRAL,
    export_config,
    export_tensors,
    find_family,
    import_config,
    import_tensors,
)
from deepseek.models.decoder.model import Decoder, DecoderConfig
from deepseek.nn.masks import MaskConfig
from deepseek.nn.moe import MoEConfig
from tests.models.decoders import EXAMPLES, GPT2_SHAPE, MOE, SMALL, randomize


def stored(model):
    tensors = model.state_dict()
    return {name: each for name, each in tensors.items() if not (model.config.tie_embeddings and name == "head.weight")}


@pytest.mark.parametrize("config", EXAMPLES.values(), ids=EXAMPLES)
def test_transformers_computes_the_same_from_exported_weights(config):
    ours = randomize(Decoder(config))
    family = find_family(config)
    their_config = transformers.AutoConfig.for_model(**export_config(config, family, torch.float32))
    theirs = getattr(transformers, family.class_name)(their_config).eval()
    tensors = {name: each.contiguous() for name, each in export_tensors(stored(ours), family).items()}
    if family is MIXTRAL:
        tensors = fuse_experts(tensors)
    missing, unexpected = theirs.load_state_dict(tensors, strict=False)
    assert unexpected == [] and set(missing) <= {"lm_head.weight"} and (not missing or config.tie_embeddings)
    theirs.tie_weights()
    tokens_BT = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(ours(tokens_BT), theirs(tokens_BT).logits, rtol=1e-5, atol=2e-5)


def fuse_experts(tensors):
    """Mixtral's files have a tensor per expert; its class in transformers 5 keeps gate and up of all experts as one."""
    fused = {name: each for name, each in tensors.items() if ".block_sparse_moe." not in name}
    for layer in range(SMALL["num_layers"]):
        moe, mlp = f"model.layers.{layer}.block_sparse_moe", f"model.layers.{layer}.mlp"
        experts = range(MOE.num_experts)
        gate_up = [
            torch.cat([tensors[f"{moe}.experts.{expert}.{matrix}.weight"] for matrix in ("w1", "w3")])
            for expert in experts
        ]
        fused[f"{mlp}.gate.weight"] = tensors[f"{moe}.gate.weight"]
        fused[f"{mlp}.experts.gate_up_proj"] = torch.stack(gate_up)
        fused[f"{mlp}.experts.down_proj"] = torch.stack([tensors[f"{moe}.experts.{e}.w2.weight"] for e in experts])
    return fused


@pytest.mark.parametrize("config", EXAMPLES.values(), ids=EXAMPLES)
def test_exported_tensors_come_back_bit_for_bit(config):
    tensors = stored(randomize(Decoder(config)))
    family = find_family(config)
    back = import_tensors(export_tensors(tensors, family), family)
    torch.testing.assert_close(back, tensors, rtol=0, atol=0)


@pytest.mark.parametrize("config", EXAMPLES.values(), ids=EXAMPLES)
def test_exported_settings_come_back(config):
    family = find_family(config)
    back, back_family = import_config(export_config(config, family, torch.float32))
    resolved = {"num_kv_heads": config.kv_heads}
    # A mixture has no dense block, so its size is nobody's business.
    ignored = {"ffn_size"} if config.moe else set()
    assert back.override(resolved).model_dump(exclude=ignored) == config.override(resolved).model_dump(exclude=ignored)
    assert back_family is family


def test_each_shape_finds_the_family_that_can_express_it():
    assert {name: find_family(config).model_type for name, config in EXAMPLES.items()} == {
        name: name.partition(" ")[0].rstrip(",") for name in EXAMPLES
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"mask": MaskConfig()},
        {"norm": "layer"},
        {"feedforward": "gelu"},
        {"position": "learned"},
        {"hidden_size": 30, "head_size": 8},
        {"moe": MoEConfig(num_candidates=4)},
        {"moe": MoEConfig(balance_rate=0.1)},
        GPT2_SHAPE | {"num_kv_heads": 2},
        GPT2_SHAPE | {"head_size": 16},
        GPT2_SHAPE | {"attention_bias": False},
    ],
    ids=str,
)
def test_a_shape_that_no_family_can_express_has_no_family(changes):
    assert find_family(DecoderConfig(**(SMALL | changes))) is None


def test_their_defaults_are_the_ones_of_transformers():
    for family in FAMILIES.values():
        bare, _ = import_config({"model_type": family.model_type})
        full, _ = import_config(transformers.AutoConfig.for_model(family.model_type).to_dict())
        resolved = {"num_kv_heads": full.kv_heads, "head_size": full.size_of_head}
        assert bare.override(resolved) == full.override(resolved)
        assert bare.size_of_head == full.size_of_head and bare.kv_heads == full.kv_heads


@given(layer=st.integers(0, 200), name=st.sampled_from([ours for ours, _ in LLAMA.names if "{rest}" not in ours]))
@settings(max_examples=30)
def test_layer_numbers_of_any_length_survive(layer, name):
    tensors = {name.format(layer=layer): torch.zeros(1)}
    assert import_tensors(export_tensors(tensors, LLAMA), LLAMA) == tensors


def test_experts_are_stacked_in_the_order_of_their_numbers():
    prefix = "model.layers.0.block_sparse_moe.experts"
    tensors = {f"{prefix}.{number}.w1.weight": torch.full((2, 3), float(number)) for number in (10, 2, 0, 1)}
    stacked = import_tensors(tensors, MIXTRAL)["layers.0.feedforward.experts.gate_proj"]
    assert stacked.shape == (4, 3, 2)
    assert stacked[:, 0, 0].tolist() == [0, 1, 2, 10]


def test_files_of_the_first_gpt2_load_without_prefix_and_with_mask_tables():
    tensors = {
        "wte.weight": torch.zeros(4, 2),
        "h.0.attn.bias": torch.ones(1, 1, 8, 8),
        "h.0.attn.masked_bias": torch.tensor(-1e4),
        "h.0.attn.c_attn.bias": torch.arange(6.0),
    }
    assert {name: each.flatten().tolist() for name, each in import_tensors(tensors, GPT2).items()} == {
        "embed.weight": [0] * 8,
        "layers.0.attention.q_proj.bias": [0, 1],
        "layers.0.attention.k_proj.bias": [2, 3],
        "layers.0.attention.v_proj.bias": [4, 5],
    }


def test_tables_of_angles_in_old_llama_files_are_left_out():
    assert import_tensors({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}, LLAMA) == {}


@pytest.mark.parametrize(
    "rope", [{"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}]
)
def test_rotary_settings_are_found_where_each_version_keeps_them(rope):
    assert import_config({"model_type": "llama"} | rope)[0].rope_theta == 5e5


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"model_type": "lama"}, r"unknown Hugging Face model type 'lama'; did you mean 'llama'\?"),
        ({}, "unknown Hugging Face model type"),
        ({"model_type": "llama", "hidden_act": "relu"}, "hidden_act='relu'"),
        ({"model_type": "llama", "rope_scaling": {"type": "spiral", "factor": 2}}, "rope_type='spiral'"),
        (
            {"model_type": "llama", "rope_parameters": {"rope_type": "llama3"}},
            "rope_type='llama3' comes without 'factor'",
        ),
        ({"model_type": "llama", "rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_fraction=0.5"),
        ({"model_type": "gemma", "hidden_act": "silu"}, "hidden_act='silu'"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, "quantization_config="),
        ({"model_type": "gpt2", "activation_function": "gelu"}, "activation_function='gelu'"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"model_type": "llama", "num_attention_heads": 7}, "num_heads=7 does not divide"),
        (
            {"model_type": "mistral", "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
            "in some of its layers only",
        ),
        (
            {"model_type": "phi3", "sliding_window": 8, "layer_types": ["full_attention"] * 2},
            "in some of its layers only",
        ),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 5.0}, "attn_logit_softcapping=5.0"),
        ({"model_type": "gemma2", "hidden_activation": "gelu"}, "hidden_activation='gelu'"),
        ({"model_type": "gemma3_text", "hidden_activation": "gelu"}, "hidden_activation='gelu'"),
        (
            {
                "model_type": "gemma3_text",
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
                },
            },
            "rope_type='linear' in the layers with a sliding window",
        ),
    ],
)
def test_what_the_decoder_cannot_follow_is_refused_by_name(values, reason):
    with pytest.raises(ConfigError, match=reason):
        import_config(values)


def test_a_tensor_without_a_place_is_named():
    with pytest.raises(ArtifactError, match=r"'model\.vision\.weight' has no place in a llama decoder"):
        import_tensors({"model.vision.weight": torch.zeros(1)}, LLAMA)


def test_a_balancing_bias_is_not_dropped_in_silence():
    model = Decoder(EXAMPLES["mixtral"])
    model.layers[0].feedforward.balance_bias_E += 1
    with pytest.raises(ArtifactError, match="balancing bias"):
        export_tensors(model.state_dict(), MIXTRAL)
