"""Rotary settings against the frequencies that transformers computes; whole models are in test_families.py."""

import math

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from deepseek.core.errors import ConfigError
from deepseek.models.decoder.keymap import LLAMA, export_config, import_config
from deepseek.models.decoder.model import DecoderConfig
from deepseek.models.decoder.rope_settings import DEFAULTS, read_rope, write_rope
from deepseek.nn.rotary import RopeScaling, rotary_table

SHAPE = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 8}
SIZE, LENGTH = 32, 512
factors = st.floats(1.0, 64.0)
lengths = st.integers(16, 400)
rules = st.one_of(
    st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": factors}),
    st.fixed_dictionaries({"rope_type": st.just("dynamic"), "factor": factors}),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("llama3"),
            "factor": factors,
            "low_freq_factor": st.floats(0.5, 2.0),
            "high_freq_factor": st.floats(2.5, 8.0),
            "original_max_position_embeddings": lengths,
        }
    ),
    st.fixed_dictionaries(
        {"rope_type": st.just("yarn"), "factor": factors, "original_max_position_embeddings": lengths},
        optional={
            "beta_fast": st.floats(8.0, 40.0),
            "beta_slow": st.floats(0.5, 4.0),
            "attention_factor": st.floats(0.5, 2.0),
            "truncate": st.booleans(),
        },
    ),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("longrope"),
            "short_factor": st.lists(st.floats(1.0, 4.0), min_size=SIZE // 2, max_size=SIZE // 2),
            "original_max_position_embeddings": lengths,
        },
        optional={"factor": factors, "attention_factor": st.floats(0.5, 2.0)},
    ),
)


@given(rule=rules, theta=st.sampled_from([500.0, 1e4, 5e5]))
@settings(deadline=None, max_examples=80)
def test_angles_are_those_of_transformers_for_any_settings(rule, theta):
    if "short_factor" in rule:
        rule = rule | {"long_factor": [9.0] * (SIZE // 2)}
    theirs = transformers.LlamaConfig(
        **SHAPE, max_position_embeddings=LENGTH, rope_parameters=rule | {"rope_theta": theta}
    )
    config, _ = import_config(theirs.to_dict())
    first = rule.get("original_max_position_embeddings", LENGTH)
    positions = torch.arange(min(first, 40))
    scaling = None if rule["rope_type"] == "dynamic" else config.rope_scaling  # the same, up to the first length
    table = rotary_table(config.max_length, SIZE, theta=config.rope_theta, scaling=scaling)
    for length, first_row in ((None, 0), (first + 1, first)) if "short_factor" in rule else ((None, 0),):
        frequencies, amplitude = ROPE_INIT_FUNCTIONS[rule["rope_type"]](theirs, None, length)
        angles = positions[:, None].double() * frequencies.double()
        expected = torch.cat((angles, angles), dim=-1)
        given = table[:, first_row + positions].double()
        torch.testing.assert_close(given[0], expected.cos() * amplitude, rtol=1e-4, atol=2e-4)
        torch.testing.assert_close(given[1], expected.sin() * amplitude, rtol=1e-4, atol=2e-4)
    again, family = import_config(export_config(config, LLAMA, torch.float32))
    assert family is LLAMA
    assert again.rope_scaling == config.rope_scaling
    assert (again.rope_theta, again.max_length) == (config.rope_theta, config.max_length)


def test_a_text_may_be_as_long_as_the_rule_reaches():
    long = {
        "rope_type": "longrope",
        "short_factor": [1.0],
        "long_factor": [2.0],
        "original_max_position_embeddings": 64,
    }
    read = read_rope({"max_position_embeddings": 256, "rope_scaling": long}, DEFAULTS)
    assert read["max_length"] == 256
    assert read["rope_scaling"]["amplitude"] == pytest.approx(math.sqrt(1 + math.log(4) / math.log(64)))
    assert (read["rope_scaling"]["long_pair_factors"], read["rope_scaling"]["original_length"]) == ((2.0,), 64)
    dynamic = read_rope({"max_position_embeddings": 256, "rope_scaling": {"type": "dynamic", "factor": 4}}, DEFAULTS)
    assert dynamic["max_length"] == 1024
    assert dynamic["rope_scaling"] == {"kind": "dynamic", "factor": 4, "original_length": 256}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    for length, reached in ((64, 256), (100, 256), (512, 512)):
        read = read_rope({"max_position_embeddings": length, "rope_scaling": yarn}, DEFAULTS)
        assert read["max_length"] == reached


def test_layers_with_a_window_may_have_a_wavelength_of_their_own():
    old = read_rope({"rope_theta": 7.0, "rope_local_base_freq": 3.0, "rope_scaling": None}, DEFAULTS)
    kinds = {"full_attention": {"rope_theta": 7.0}, "sliding_attention": {"rope_theta": 3.0}}
    assert old == read_rope({"rope_parameters": kinds}, DEFAULTS)
    assert (old["rope_theta"], old["rope_theta_window"]) == (7.0, 3.0)


def test_names_of_older_files_are_understood():
    scaling = {"type": "su", "short_factor": [1.0, 1.5], "original_max_position_embeddings": 8}
    for model_type, kind in (("phi3", "su"), ("phi3", "yarn"), ("llama", "longrope")):
        values = {"model_type": model_type, "max_position_embeddings": 8, "rope_scaling": scaling | {"type": kind}}
        assert read_rope(values, DEFAULTS)["rope_scaling"] == {
            "kind": "longrope",
            "pair_factors": (1.0, 1.5),
            "amplitude": 1.0,
        }


@pytest.mark.parametrize(
    ("scaling", "reason"),
    [
        ({"rope_type": "spiral"}, "rope_type='spiral' and the decoder follows default, linear, dynamic, llama3"),
        ({"rope_type": "linear"}, "rope_type='linear' comes without 'factor'"),
        ({"rope_type": "longrope"}, "rope_type='longrope' comes without 'short_factor'"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(scaling, reason):
    with pytest.raises(ConfigError, match=reason):
        read_rope({"rope_scaling": scaling}, DEFAULTS)


def test_factors_for_another_number_of_channels_are_refused():
    scaling = RopeScaling(kind="longrope", pair_factors=(1.0,))
    with pytest.raises(ConfigError, match="rope_scaling has 1 pair_factors and 32 pairs of channels are rotated"):
        DecoderConfig(rope_scaling=scaling)


def test_a_decoder_with_learned_positions_has_no_rotary_settings():
    assert write_rope(DecoderConfig(position="learned")) == {}
