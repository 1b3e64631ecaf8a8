"""Settings of a model folder, as folders of several ages write them."""

import json
import os

import pytest

from deepseek.core import model_folder
from deepseek.core.errors import ConfigError, DataError
from deepseek.core.model_folder import ModelFolder, read_settings


def write(folder, **files):
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    return ModelFolder(folder)


def test_an_empty_folder_says_nothing(tmp_path):
    folder = ModelFolder(tmp_path)
    assert (folder.config, folder.generation, folder.special_tokens, folder.end_ids) == ({}, {}, {}, ())


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config": {"eos_token_id": 2}}, (2,)),
        ({"config": {"eos_token_id": [2, 5]}}, (2, 5)),
        ({"config": {"eos_token_id": 2}, "generation_config": {"eos_token_id": [7, 2]}}, (7, 2)),
        ({"config": {"eos_token_id": None}, "generation_config": {"eos_token_id": 0}}, (0,)),
        ({"config": {"eos_token_id": True}, "generation_config": {"eos_token_id": "</s>"}}, ()),
    ],
    ids=str,
)
def test_all_files_together_say_which_tokens_end_a_text(tmp_path, files, expected):
    assert write(tmp_path, **files).end_ids == expected


def test_special_tokens_come_from_both_files_and_the_newer_one_wins(tmp_path):
    folder = write(
        tmp_path,
        special_tokens_map={"eos_token": "old", "unk_token": {"content": "<unk>", "lstrip": False}, "pad_token": None},
        tokenizer_config={
            "eos_token": {"content": "new"},
            "add_bos_token": True,
            "extra_special_tokens": {"image_token": "<image>"},
        },
    )
    assert folder.special_tokens == {"eos_token": "new", "unk_token": "<unk>", "image_token": "<image>"}


def test_a_byte_order_mark_is_no_part_of_the_settings(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + b'{"eos_token_id": 3}')
    assert ModelFolder(tmp_path).end_ids == (3,)


@pytest.mark.parametrize("content", ["{", "[1]", '"text"', "[" * 100_000, "\xff"])
def test_what_is_no_object_of_settings_is_refused_by_name(tmp_path, content):
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match=r"config\.json"):
        read_settings(tmp_path / "config.json")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(DataError, match="no regular file"):
        read_settings(tmp_path / "config.json")


def test_a_file_beyond_the_limit_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(model_folder, "MAX_SETTINGS_BYTES", 10)
    (tmp_path / "config.json").write_text('{"vocab_size": 5}', encoding="utf-8")
    with pytest.raises(DataError, match="has 17 bytes, and settings have at most 10"):
        read_settings(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", 1_000_000_000),
        ("num_hidden_layers", -2),
        ("num_hidden_layers", 2.5),
        ("num_hidden_layers", "2"),
        ("num_hidden_layers", True),
        ("n_layer", float("nan")),
        ("encoder_layers", 10**6),
        ("vocab_size", 10**12),
        ("hidden_size", -64),
        ("intermediate_size", float("inf")),
        ("max_position_embeddings", 10**12),
        ("max_position_embeddings", "many"),
        ("num_attention_heads", 10**10),
        ("rms_norm_eps", float("nan")),
        ("layer_norm_eps", float("inf")),
        ("rope_theta", "abc"),
        ("rope_theta", -1),
    ],
)
@pytest.mark.parametrize("is_nested", [False, True], ids=["outside", "nested"])
def test_a_size_that_no_model_has_is_refused_by_name(tmp_path, name, value, is_nested):
    folder = write(tmp_path, config={"text_config": {name: value}} if is_nested else {name: value})
    with pytest.raises(ConfigError, match=rf"config\.json: {name} is .*; expected a "):
        folder.config  # noqa: B018


def test_sizes_of_real_configs_are_within_bounds(tmp_path):
    real = {
        "num_hidden_layers": 126,
        "hidden_size": 16384,
        "vocab_size": 262144.0,
        "max_position_embeddings": 10485760,
        "head_dim": None,
        "depths": [2, 2, 6, 2],
        "image_size": [224, 224],
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000,
        "time_step_limit": [0.0, float("inf")],
        "num_experts_per_tok": 8,
    }
    assert write(tmp_path, config=real).config == real


def test_a_file_that_the_manifest_does_not_list_is_named_and_not_used(tmp_path):
    write(tmp_path, config={"eos_token_id": 2}, generation_config={"eos_token_id": 7})
    folder = ModelFolder(tmp_path, listed={"config.json"})
    with pytest.warns(UserWarning, match=r"generation_config\.json is not used, since the manifest .* remove it"):
        assert folder.end_ids == (2,)
