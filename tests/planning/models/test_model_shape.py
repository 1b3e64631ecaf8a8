import csv
from importlib.resources import files

import pytest

from deepseek.core.errors import ConfigError
from deepseek.planning.models.model_shape import (
    ModelShape,
    OperatorCost,
    OperatorList,
    get_model_shape,
    load_model_shapes,
    model_shape_from_config,
)

ROWS = list(
    csv.DictReader(files("deepseek.planning.models").joinpath("model_shapes.csv").read_text("utf-8").splitlines())
)


@pytest.mark.parametrize("row", [row for row in ROWS if row["parameters_billion"]], ids=lambda row: row["name"])
def test_parameter_counts_reproduce_the_published_totals(row):
    published = float(row["parameters_billion"])
    assert get_model_shape(row["name"]).num_parameters / 1e9 == pytest.approx(published, rel=0.03)


@pytest.mark.parametrize(
    ("name", "billions"), [("DeepSeek-V3", 37), ("Mixtral-8x7B", 12.9), ("Qwen3-235B-A22B", 22), ("DeepSeek-V2", 21)]
)
def test_active_parameters_reproduce_the_published_ones(name, billions):
    assert get_model_shape(name).num_active_parameters / 1e9 == pytest.approx(billions, rel=0.04)


def test_megatron_formula_gives_the_same_count_up_to_biases():
    shape = get_model_shape("SP-530B")
    h, layers, words = shape.hidden, shape.layers, shape.vocabulary
    formula = 12 * layers * h**2 * (1 + 13 / (12 * h) + (words + shape.sequence) / (12 * layers * h))
    assert shape.num_parameters == pytest.approx(formula, rel=2e-4)


def test_hugging_face_configs_become_the_shapes_that_are_shipped():
    config = {
        "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 131072,
    }  # fmt: skip
    shape = model_shape_from_config(config, sequence=8192)
    assert shape.num_parameters == get_model_shape("Llama3-8B").num_parameters
    assert shape.sequence == 8192


def test_a_latent_attention_config_is_read():
    config = {
        "model_type": "deepseek_v3", "num_hidden_layers": 61, "hidden_size": 7168, "num_attention_heads": 128,
        "num_key_value_heads": 128, "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256,
        "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "vocab_size": 129280,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    shape = model_shape_from_config(config)
    assert shape.extra_parameters == 61 * (1536 + 512)  # the norms of the latent vectors, which the table leaves out
    assert shape.num_parameters - shape.extra_parameters == get_model_shape("DeepSeek-V3").num_parameters


def test_a_config_without_layers_says_which_key_is_missing():
    with pytest.raises(ConfigError, match="no layers; expected the key num_hidden_layers"):
        model_shape_from_config({"hidden_size": 8, "num_attention_heads": 2, "vocab_size": 9, "n_positions": 4})


@pytest.mark.parametrize("name", ["layers", "hidden", "heads", "vocabulary", "sequence", "ffn"])
@pytest.mark.parametrize("value", [0, -3, 1.5, True])
def test_a_size_that_is_no_positive_whole_number_is_refused(name, value):
    sizes = {"layers": 2, "hidden": 64, "heads": 4, "ffn": 128, "vocabulary": 100, "sequence": 32}
    with pytest.raises(ConfigError, match=f"{name}={value!r} is not a positive whole number"):
        ModelShape(**{**sizes, name: value})


def test_more_active_experts_than_experts_are_refused():
    with pytest.raises(ConfigError, match="top_k=5 is not between 1 and experts=4"):
        ModelShape(layers=2, hidden=64, heads=4, ffn=128, vocabulary=100, sequence=32, experts=4, top_k=5)


def test_an_unknown_model_names_the_nearest_known_one():
    with pytest.raises(ConfigError, match="did you mean 'Llama3-8B'"):
        get_model_shape("Lama3-8B")


def test_every_shipped_shape_has_a_source():
    assert all(row["source"] for row in ROWS)
    assert len(load_model_shapes()) == len(ROWS)


def test_an_operator_list_adds_up():
    traced = OperatorList(
        "net", (OperatorCost("conv", 2e9, 1e6, 1000), OperatorCost("relu", 1e6, 2e6, is_matmul=False))
    )
    assert (traced.num_parameters, traced.flops) == (1000, 2e9 + 1e6)
    with pytest.raises(ConfigError, match="trace a model first"):
        OperatorList("empty", ())
