"""Keys are found by their path in every format, and edited in the style of the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.compat.migration.findings import apply_edits
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


@pytest.mark.parametrize(
    ("text", "suffix", "after"),
    [
        ("generation: v5.0\nfp16: yes\n", ".yaml", "generation: v5.0\nds_amp_level: O1\n"),
        ("generation: v5.0\nfp16: Off # no\n", ".yaml", "generation: v5.0\nds_amp_level: O0 # no\n"),
        ("gradient_clip: 1\n---\ngradient_clip: 2\n", ".yaml", "ds_grad_clip: 1\n---\nds_grad_clip: 2\n"),
        # A brace in a comment makes no inline section.
        (
            "data_loader:  # {x}\n  buffer_size: 1\n",
            ".yaml",
            "data_loader:  # {x}\n  shard_strategy: hash\n  buffer_size: 1\n",
        ),
        ("gradient_clip: .nan\n", ".yaml", "ds_grad_clip: .nan\n"),
        ("gradient_clip: 1\nother: !custom [1]\n", ".yaml", "ds_grad_clip: 1\nother: !custom [1]\n"),
        ("fp16 = true\n[a]\nfp16 = true\n", ".toml", 'ds_amp_level = "O1"\n[a]\nfp16 = true\n'),
    ],
)
def test_values_are_read_as_their_library_reads_them(text: str, suffix: str, after: str) -> None:
    assert apply_edits(text, config_findings(text, suffix)) == after


@pytest.mark.parametrize(
    ("text", "suffix"),
    [
        ("gradient_clip: 1\nds_grad_clip: 2\n", ".yaml"),
        ("gradient_clip: 1\ngradient_clip: 2\n", ".yaml"),
        ('{"gradient_clip": 1, "ds_grad_clip": 2}', ".json"),
        ('{"gradient_clip": 1, "gradient_clip": 2}', ".json"),
        ("gradient_clip = 1\nds_grad_clip = 2\n", ".toml"),
        ("shared: &shared\n  gradient_clip: 1.0\n<<: *shared\n", ".yaml"),
        ("distributed: &d {tensor_parallel: 2}\nother: *d\n", ".yaml"),
        ("fp16: &x true\nother: *x\n", ".yaml"),
        ("other: &x true\nfp16: *x\n", ".yaml"),
        ("fp16: !!bool 'true'\n", ".yaml"),
        ("data_loader:\n  ? buffer_size\n  : 1\n", ".yaml"),
        ("data_loader: {}\n", ".yaml"),
    ],
)
def test_what_only_a_person_can_settle_is_found_and_left(text: str, suffix: str) -> None:
    findings = config_findings(text, suffix)
    assert findings
    assert all(not finding.edits for finding in findings if finding.rule != "config-generation")


@pytest.mark.parametrize("value", ["v6.0", "v5.0.2", "5.0", "nightly"])
def test_a_generation_that_is_not_older_is_left(value: str) -> None:
    assert config_findings(f"generation: {value}\nds_grad_clip: 1\n") == []


def test_a_patch_release_counts_as_its_generation() -> None:
    assert [each.rule for each in config_findings("generation: v3.5.1\n")] == ["config-generation"]


KEYS = ["gradient_clip", "fp16", "ds_grad_clip", "distributed", "data_loader", "engine", "a: b", "generation", "<<"]
VALUES = st.one_of(
    st.sampled_from(["true", "yes", "v2.0", "pytorch", "x # y", "{", "&a", "*a", "- b"]),
    st.integers(-2, 2),
    st.booleans(),
)
SECTIONS = st.one_of(
    VALUES, st.dictionaries(st.sampled_from([*KEYS, "tensor_parallel", "buffer_size"]), VALUES, max_size=3)
)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.dictionaries(st.sampled_from(KEYS), SECTIONS, min_size=1, max_size=4), min_size=1, max_size=2),
    st.booleans(),
)
def test_an_edited_file_differs_in_the_settings_of_its_rules_alone(documents: list[dict], is_flow: bool) -> None:
    text = yaml.safe_dump_all(documents, default_flow_style=is_flow, sort_keys=False)
    after = apply_edits(text, config_findings(text))
    left = [{key: value for key, value in document.items() if key in ("a: b", "<<")} for document in documents]
    read = list(yaml.safe_load_all(after))
    assert [{key: value for key, value in document.items() if key in ("a: b", "<<")} for document in read] == left
    assert [len(document) for document in read] == [len(document) for document in documents]
    assert not any(finding.edits for finding in config_findings(after))


@pytest.mark.parametrize(
    ("text", "rule", "reason"),
    [
        ("gradient_clip: 1\nds_grad_clip: 1\n", "config-gradient-clip", "ds_grad_clip stands there, too"),
        ("gradient_clip: 1\ngradient_clip: 2\n", "config-gradient-clip", "gradient_clip stands there twice"),
        ("fp16: &on true\nother: *on\n", "config-fp16-on", "an anchor, a merge or a tag is in the way"),
        ("version: v2.0\ngeneration: v5.0\n", "config-version", "generation stands there, too"),
    ],
)
def test_a_setting_that_is_left_says_why(text: str, rule: str, reason: str) -> None:
    findings = [finding for finding in config_findings(text) if finding.rule == rule]
    assert findings
    assert all(finding.is_for_person and reason in finding.why for finding in findings)


def test_keys_that_no_generation_has_in_its_section_are_named() -> None:
    text = "distributed:\n  tensor_parallel: 1\n  backend: nccl\n  zero_stage: 2\n"
    text += "data_loader: {shard_strategy: hash, x: 1}\n"
    found = [finding for finding in config_findings(text) if finding.rule.endswith("-key")]
    assert [(finding.line, finding.why.partition("(")[2].partition(";")[0]) for finding in found] == [
        (3, "distributed.backend"),
        (4, "distributed.zero_stage"),
        (5, "data_loader.x"),
    ]
    assert settle("distributed: {data_parallel: 2}\n", config_findings) == "model_parallel: {data_parallel_size: 2}\n"


@pytest.mark.parametrize("value", ["v5.0", "7", "1.2.3-beta", "mine"])
def test_a_version_that_is_no_older_generation_stays(value: str) -> None:
    assert not [
        finding for finding in config_findings(f"version: {value}\nds_grad_clip: 1\n") if "version" in finding.rule
    ]
