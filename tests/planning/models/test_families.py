"""Every row of the families against the model that transformers builds on the meta device, over sizes and flags."""

import json
import random

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM

from deepseek.core.errors import ConfigError
from deepseek.planning.models.families import FAMILIES
from deepseek.planning.models.model_shape import model_shape_from_config
from deepseek.planning.naming import find_model

ENCODERS = {"bert", "roberta", "camembert", "xlm-roberta", "data2vec-text", "ernie", "eurobert"}
NUM_TRIALS = 4
FLAG_ENDINGS = ("bias", "layernorm", "qk_norm", "post_norm")
FLAGS = {
    "multi_query",
    "parallel_attn",
    "new_decoder_architecture",
    "use_parallel_residual",
    "do_layer_norm_before",
    "tie_word_embeddings",
}
HIDDEN_FEEDFORWARD = {"gpt2", "gptj", "codegen", "gpt_bigcode", "falcon"}  # not among the settings that they list


def vary(kind, source):
    """Small sizes and random flags, under every name that the family's configuration has for them."""
    known = CONFIG_MAPPING[kind]().to_dict()
    heads = source.choice([4, 8])
    hidden, layers, ffn = heads * source.choice([16, 32]), source.choice([2, 3]), source.choice([96, 160])
    names = {
        layers: ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
        hidden: ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"),
        heads: ("num_attention_heads", "n_head", "num_heads", "n_heads"),
        ffn: ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
    }
    settings = {name: value for value, spellings in names.items() for name in spellings}
    settings |= {
        "num_key_value_heads": source.choice([heads, heads // 2]), "head_dim": hidden // heads, "vocab_size": 1000,
        "max_position_embeddings": 64, "n_positions": 64, "max_seq_len": 64, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64, "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "first_k_dense_replace": 1, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
        "v_head_dim": 16, "q_lora_rank": 24, "kv_lora_rank": 32, "rotary_dim": 8, "pad_token_id": 0,
        "expansion_ratio": 2,
    }  # fmt: skip
    flags = sorted(name for name in known if name in FLAGS or (name.endswith(FLAG_ENDINGS) and known[name] is not None))
    settings |= {name: source.choice([True, False]) for name in flags if isinstance(known[name], bool)}
    allowed = known.keys() | ({"n_inner", "ffn_hidden_size"} if kind in HIDDEN_FEEDFORWARD else set())
    chosen = {name: value for name, value in settings.items() if name in allowed}
    if kind in ENCODERS:
        chosen.pop("tie_word_embeddings", None)  # their head is tied by what they are
    if kind == "gpt_neo":
        chosen["attention_types"] = [[["global"], layers]]
    if "layer_types" in known:
        chosen["layer_types"] = None  # as many as there are layers
    return CONFIG_MAPPING[kind](**chosen)


def count_on_meta(kind, config):
    build = AutoModelForMaskedLM if kind in ENCODERS else AutoModelForCausalLM
    with torch.device("meta"):
        return sum(weight.numel() for weight in build.from_config(config).parameters())


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_counts_exactly_the_weights_that_transformers_builds(kind, tmp_path):
    source = random.Random(kind)
    for trial in range(NUM_TRIALS):
        config = vary(kind, source)
        config.save_pretrained(tmp_path / str(trial))
        said = json.loads((tmp_path / str(trial) / "config.json").read_text(encoding="utf-8"))
        shape = model_shape_from_config(said)
        assert shape.num_parameters == count_on_meta(kind, config), said
        assert find_model(str(tmp_path / str(trial))).num_parameters == shape.num_parameters


@pytest.mark.parametrize("kind", ["jamba", "albert", "falcon_mamba", "t5", "qwen3_next", "llamma"])
def test_a_family_that_is_no_row_is_refused(kind):
    config = {"model_type": kind, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
              "intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 64}  # fmt: skip
    with pytest.raises(ConfigError, match=f"unknown model_type '{kind}'"):
        model_shape_from_config(config)
    assert model_shape_from_config({**config, "model_type": "llama"}).layers == 2


def test_a_configuration_that_does_not_say_whether_embeddings_are_tied_means_its_familys_default():
    config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
              "vocab_size": 100, "max_position_embeddings": 64}  # fmt: skip
    assert model_shape_from_config({**config, "model_type": "gemma"}).tied_embeddings
    assert not model_shape_from_config({**config, "model_type": "llama"}).tied_embeddings
    assert not model_shape_from_config({**config, "model_type": "gemma", "tie_word_embeddings": False}).tied_embeddings


@pytest.mark.parametrize(
    ("kind", "more", "words"),
    [
        ("qwen2_moe", {"mlp_only_layers": [0], "num_experts": 4, "num_experts_per_tok": 2}, "keeps some layers dense"),
        ("opt", {"word_embed_proj_dim": 32}, "projects the embeddings"),
        ("gpt2", {"add_cross_attention": True}, "look at an encoder"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 33, "moe_intermediate_size": 32}, "is no multiple of"),
    ],
)
def test_what_a_shape_cannot_say_is_refused_and_not_left_out(kind, more, words):
    config = {"model_type": kind, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
              "intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 64}  # fmt: skip
    with pytest.raises(ConfigError, match=words):
        model_shape_from_config({**config, **more})
