"""Keys and values stand where the libraries read them, and broken texts are refused with a place."""

from __future__ import annotations

import contextlib
import json
import tomllib
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.compat.migration.settings import SettingsError, read_entries, read_values

SCALARS = st.one_of(st.integers(-9, 9), st.booleans(), st.text("aé ]}#\"'=.:,\\\n\t", max_size=6))


TREES = st.recursive(
    SCALARS,
    lambda each: st.one_of(
        st.lists(each, max_size=3), st.dictionaries(st.text("ab .é'\"-1", max_size=4), each, max_size=3)
    ),
    max_leaves=8,
)


def mapping_paths(tree: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if not isinstance(tree, dict):
        return {}
    paths = {(*path, key): value for key, value in tree.items()}
    return paths | {p: v for key, value in tree.items() for p, v in mapping_paths(value, (*path, key)).items()}


def to_inline_toml(value: Any) -> str:
    if isinstance(value, dict):
        return (
            "{ "
            + ", ".join(
                f"{json.dumps(key, ensure_ascii=False)} = {to_inline_toml(each)}" for key, each in value.items()
            )
            + " }"
        )
    if isinstance(value, list):
        return "[\n" + ", # ] }\n".join(to_inline_toml(each) for each in value) + "]"
    return json.dumps(value, ensure_ascii=False)


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(st.text("ab .é'\"-1", min_size=1, max_size=4), TREES, max_size=4))
def test_every_key_is_found_where_the_libraries_read_it(tree: dict[str, Any]) -> None:
    expected = mapping_paths(tree)
    toml = "\n".join(
        f"{json.dumps(key, ensure_ascii=False)} = {to_inline_toml(value)} # c" for key, value in tree.items()
    )
    texts = [
        (".json", json.dumps(tree, indent="\t", ensure_ascii=False)),
        (".yaml", yaml.safe_dump(tree, allow_unicode=True)),
    ]
    for suffix, text in [*texts, (".toml", toml)]:
        entries = read_entries(text, suffix)
        assert {each.path for each in entries} == set(expected)
        for entry in entries:
            if entry.value and suffix != ".yaml":
                raw = text[slice(*entry.value)]
                read = json.loads(raw) if suffix == ".json" else tomllib.loads(f"x = {raw}")["x"]
                assert read == expected[entry.path]


@pytest.mark.parametrize(
    ("text", "suffix"),
    [
        ("[" * 100_000, ".json"),
        ("[" * 100_000, ".yaml"),
        ("- " * 50_000, ".yaml"),
        ("a=" + "[" * 100_000, ".toml"),
        ("a: b: c\n\tx", ".yaml"),
        ("{'a': 1}", ".json"),
        ("a = \n", ".toml"),
        ("a: &a [*a, *b]", ".yaml"),
        ("a: \x00", ".yaml"),
    ],
)
def test_broken_settings_are_refused_with_a_place(text: str, suffix: str) -> None:
    with pytest.raises(SettingsError) as error:
        read_entries(text, suffix)
    assert error.value.line >= 1


def test_anchors_that_multiply_are_walked_once() -> None:
    laughs = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{l: *a{n - 1}, r: *a{n - 1}}}\n" for n in range(1, 60))
    assert len(read_entries(laughs, ".yaml")) < 1000


@settings(deadline=None, max_examples=200)
@given(st.text("ab:-[]{}\"'#&*!|> \n\t=.,é\\0", max_size=60), st.sampled_from([".yaml", ".json", ".toml"]))
def test_no_text_makes_the_settings_reader_crash(text: str, suffix: str) -> None:
    with contextlib.suppress(SettingsError):
        for entry in read_entries(text, suffix):
            assert 0 <= entry.start <= entry.end <= len(text)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": "\\ud83d\\ude00", "b": 1}',
        '{"a": "\\ud800"}',
        '{"' + "k" * 3000 + '": 1}',
        '{"a"\n:\n1}',
        '{"a": "x\x7fy", "b": "\u2028"}',
        '{"a": NaN, "b": -Infinity, "c": 1e5}',
        '{"a": {"b": {}, "c": []}, "d": [{"a": 1}], "e": ""}',
        '{"a": 1, "a": 2}',
        "[]",
        "3",
        ' \t\r\n{ }\n',
    ],
)  # fmt: skip
def test_json_that_is_no_yaml_is_read_as_json(text: str) -> None:
    entries = read_entries(text, ".json")
    value = json.loads(text)
    pairs = list(_pairs(value, ()))
    assert {entry.path for entry in entries} == {path for path, _ in pairs}
    for entry in entries:
        assert json.loads(text[entry.start : entry.end]) == entry.path[-1]
        if entry.value is not None and [other.path for other in entries].count(entry.path) == 1:
            assert repr(json.loads(text[slice(*entry.value)])) == repr(dict(pairs)[entry.path])


def _pairs(value: Any, path: tuple[str, ...]) -> Any:
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield (*path, key), inner
        yield from _pairs(inner, (*path, key))


def test_aliases_that_multiply_are_not_written_out() -> None:
    text = "a0: &a0 [x, y]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
    with pytest.raises(ValueError, match="more than 1000000 values"):
        read_values(text, ".yaml")
    merges = "b0: &b0 {x: 1}\n" + "".join(
        f"b{n}: &b{n}\n  <<: [{', '.join([f'*b{n - 1}'] * 9)}]\n" for n in range(1, 20)
    )
    assert ("b19", "x") in {entry.path for entry in read_entries(merges, ".yaml")}
    with pytest.raises(ValueError, match="more than 1000000 values"):
        read_values(merges, ".yaml")
