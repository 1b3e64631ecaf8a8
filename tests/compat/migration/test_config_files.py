"""Keys are found by their path in every format, and edited in the style of the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compat.migration.checks import (
    config_findings,
    found,
    settle,
)


def test_toml_sections_and_dotted_keys_are_found() -> None:
    text = '# c\n[distributed]\ntensor_parallel = 2 # two\n[distributed.more]\nx = """\n[no]\n"""\n[[list]]\na.b = 1\n'
    after = settle(text, lambda each: config_findings(each, ".toml"))
    assert after == text.replace("distributed", "model_parallel").replace("tensor_parallel =", "tensor_parallel_size =")


@pytest.mark.parametrize(
    ("text", "suffix", "after"),
    [
        (
            '{\n\t"data_loader": {\n\t\t"buffer_size": 1\n\t}\n}',
            ".json",
            '{\n\t"data_loader": {\n\t\t"shard_strategy": "hash",\n\t\t"buffer_size": 1\n\t}\n}',
        ),
        (
            '{"data_loader": {"buffer_size": 1}}',
            ".json",
            '{"data_loader": {"shard_strategy": "hash", "buffer_size": 1}}',
        ),
        ("data_loader: {buffer_size: 1}\n", ".yaml", "data_loader: {shard_strategy: hash, buffer_size: 1}\n"),
        (
            "data_loader:\r\n  # big\r\n  buffer_size: 1\r\n",
            ".yaml",
            "data_loader:\r\n  # big\r\n  shard_strategy: hash\r\n  buffer_size: 1\r\n",
        ),
        ("[data_loader]\nbuffer_size = 1\n", ".toml", '[data_loader]\nshard_strategy = "hash"\nbuffer_size = 1\n'),
        (
            "data_loader = { buffer_size = 1 }\n",
            ".toml",
            'data_loader = { shard_strategy = "hash", buffer_size = 1 }\n',
        ),
    ],
)
def test_a_key_is_added_in_the_style_of_its_section(text: str, suffix: str, after: str) -> None:
    assert settle(text, lambda each: config_findings(each, suffix)) == after


def test_a_config_in_a_folder_is_known_by_its_keys(tmp_path: Path) -> None:
    (tmp_path / "compose.yaml").write_text("distributed: {tensor_parallel: 2}\nservices: {}\n")
    (tmp_path / "ours.yaml").write_text("distributed: {tensor_parallel: 2}\nprecision: fp16\n")
    assert {each.path for each in found(tmp_path)} == {"ours.yaml"}
    assert found(tmp_path / "compose.yaml")


def test_the_generation_is_renamed_wherever_one_comes_from(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("generation: v4.2\n")
    assert [each.rule for each in found(tmp_path, "v5.0", "v4.0")] == ["config-generation"]
    assert found(tmp_path, "v4.0") == []
