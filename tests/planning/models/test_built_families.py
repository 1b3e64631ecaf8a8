"""Families that are no row: all weights of the model that transformers builds, or a sentence that says why not."""

import json

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from deepseek.core.errors import ConfigError
from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.models.families import FAMILIES
from deepseek.planning.naming import find_model
from deepseek.planning.search.planner import plan

SMALL = {
    "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 160, "vocab_size": 1000, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip


def write(folder, config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    return str(folder)


def build(kind, **settings):
    known = CONFIG_MAPPING[kind]().to_dict()
    return CONFIG_MAPPING[kind](**{name: value for name, value in settings.items() if name in known})


def count(config):
    with torch.device("meta"):
        return sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())


@pytest.mark.parametrize("kind", ["apertus", "bitnet", "diffllama", "biogpt"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_a_decoder_that_is_no_row_has_all_the_weights_of_the_model(tmp_path, kind, is_tied):
    assert kind not in FAMILIES
    config = build(kind, **SMALL, tie_word_embeddings=is_tied)
    shape = find_model(write(tmp_path / kind, config), sequence=32)
    assert (shape.num_parameters, shape.layers, shape.sequence, shape.name) == (count(config), 2, 32, kind)


def test_of_a_model_with_images_the_text_model_is_planned_and_named(tmp_path):
    text = build("llama", **SMALL)
    config = CONFIG_MAPPING["llava"](text_config=text, vision_config=CONFIG_MAPPING["clip_vision_model"]())
    shape = find_model(write(tmp_path / "llava", config))
    assert (shape.num_parameters, shape.name) == (count(text), "the text model of llava")
    assert plan(shape, Cluster.of("T4", gpus_per_node=1), global_batch=8).best.plan.num_devices == 1


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("t5", "t5 is an encoder-decoder"),
        ("whisper", "whisper is an encoder-decoder"),
        ("jamba", r"jamba has \d+ parameters, and a plain decoder of its sizes \d+"),
        ("mamba", "mamba is no plain decoder"),
        ("vit", "transformers builds no decoder of vit"),
    ],
)
def test_what_is_no_plain_decoder_is_refused_by_its_name(tmp_path, kind, said):
    with pytest.raises(ConfigError, match=f"^{said}.*describe it as a ModelShape, or trace it"):
        find_model(write(tmp_path / kind, CONFIG_MAPPING[kind]()))


def test_a_family_that_nobody_knows_is_named_with_the_nearest(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "lama", **SMALL}))
    with pytest.raises(ConfigError, match="unknown model_type 'lama'; did you mean 'llama'"):
        find_model(str(tmp_path))
