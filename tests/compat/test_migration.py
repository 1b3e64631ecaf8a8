"""Every rule both ways, exact places, formatting kept, and nothing that a file holds is ever run."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import pickle
import tomllib
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from deepseek.cli.verbs.migrate import migrate as run
from deepseek.compat.migration.applying import migrate
from deepseek.compat.migration.config_files import check_config
from deepseek.compat.migration.findings import Finding, apply_edits
from deepseek.compat.migration.pickles import read_pickle
from deepseek.compat.migration.python_files import check_python
from deepseek.compat.migration.rules import ConfigRule, PythonRule, load_rules
from deepseek.compat.migration.scanning import scan
from deepseek.compat.migration.settings import SettingsError, read_entries
from deepseek.compat.version_converter import VersionConverter
from deepseek.core.errors import ConfigError, CorruptArtifactError
from tests.compat.models import build

RULES = load_rules()


def config_findings(text: str, suffix: str = ".yaml", rules: Any = RULES) -> list[Finding]:
    return check_config(text, "x", suffix, rules, "5.0", is_named=True)


def python_findings(text: str) -> list[Finding]:
    return check_python(text.encode(), "x.py", RULES.python)


def settle(text: str, check: Any) -> str:
    """Apply until nothing is left to apply, as `--apply` does."""
    for _ in range(10):
        changed = apply_edits(text, check(text))
        if changed == text:
            break
        text = changed
    return text


def found(path: Path, target: str = "v5.0", source: str | None = None) -> list[Finding]:
    return [each for scanned in scan(path, target, source) for each in scanned.findings]


# --- Rules, both ways ---


@pytest.mark.parametrize("rule", RULES.config, ids=lambda rule: rule.id)
def test_config_rules_find_before_and_not_after(rule: ConfigRule) -> None:
    before = config_findings(rule.before)
    assert rule.id in [each.rule for each in before]
    if before[0].edits:
        assert settle(rule.before, config_findings) == rule.after
    assert config_findings(rule.after) == []


def to_toml(value: dict[str, Any]) -> str:
    lines = [f"{key} = {json.dumps(each)}" for key, each in value.items() if not isinstance(each, dict)]
    for key, each in value.items():
        lines += [f"[{key}]", to_toml(each)] if isinstance(each, dict) else []
    return "\n".join(lines)


@pytest.mark.parametrize(
    "rule", [each for each in RULES.config if each.rename_to or each.set_value], ids=lambda r: r.id
)
@pytest.mark.parametrize(
    ("suffix", "write", "read"), [(".json", json.dumps, json.loads), (".toml", to_toml, tomllib.loads)]
)
def test_config_rules_hold_in_json_and_toml(rule: ConfigRule, suffix: str, write: Any, read: Any) -> None:
    before = write(yaml.safe_load(rule.before))
    after = settle(before, lambda text: config_findings(text, suffix))
    assert read(after) == yaml.safe_load(rule.after)
    assert config_findings(after, suffix) == []


@pytest.mark.parametrize("rule", RULES.python, ids=lambda rule: rule.id)
def test_python_rules_find_before_and_not_after(rule: PythonRule) -> None:
    before = python_findings(rule.before)
    assert {each.rule for each in before} == {rule.id}
    if any(each.edits for each in before):
        assert settle(rule.before, python_findings) == rule.after
    assert python_findings(rule.after) == []
    compile(rule.after, "after", "exec")


def resolves(name: str) -> bool:
    parts = name.split(".")
    for split in range(len(parts) - 1, 0, -1):
        with contextlib.suppress(ImportError, AttributeError):
            value: Any = importlib.import_module(".".join(parts[:split]))
            for part in parts[split:]:
                value = getattr(value, part)
            return True
    return False


@pytest.mark.parametrize("rule", [r for r in RULES.python if "." in (r.replace_with or "")], ids=lambda rule: rule.id)
def test_new_names_exist_in_the_installed_libraries(rule: PythonRule) -> None:
    assert resolves(rule.replace_with or "")


@pytest.mark.parametrize("name", ["numpy.product", "numpy.in1d", "numpy.trapz", "numpy.NaN", "transformers.AdamW"])
def test_names_that_rules_call_removed_are_gone(name: str) -> None:
    assert not resolves(name)


# --- Python ---


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("import torch as t\nx = t.cuda.amp.autocast()\n", 'import torch as t\nx = t.amp.autocast("cuda")\n'),
        (
            "from torch.cuda import amp\nx = amp.autocast()\n",
            'import torch.amp\nfrom torch.cuda import amp\nx = torch.amp.autocast("cuda")\n',
        ),
        (
            "from torch.cuda.amp import (\n    autocast,  # a\n    GradScaler,\n)\nx = autocast()\n",
            'from torch.amp import autocast\nfrom torch.amp import GradScaler\nx = autocast("cuda")\n',
        ),
        ("import numpy as np\r\nx = np.float( 3 )\r\n", "import numpy as np\r\nx = float( 3 )\r\n"),
        (
            "from torch import load\nx = load(p,\n    mmap=True,\n)\n",
            "from torch import load\nx = load(p,\n    mmap=True, weights_only=True,\n)\n",
        ),
    ],
)
def test_edits_follow_aliases_and_keep_formatting(before: str, after: str) -> None:
    text = settle(before, python_findings)
    assert text == after
    compile(text, "after", "exec")
    assert settle(text, python_findings) == text


@pytest.mark.parametrize(
    "source",
    [
        "class np:\n    float = 1\nx = np.float\n",
        "x = torch.cuda.amp.autocast()\n",
        "def f(torch):\n    return torch.load(1)\n",
        "# torch.cuda.amp.autocast\ns = 'np.float'\n",
        "import torch\ntorch.load(p, weights_only=False)\n",
    ],
)
def test_what_only_looks_like_a_name_is_left_alone(source: str) -> None:
    assert python_findings(source) == []


def test_places_are_exact() -> None:
    text = "import numpy as np\n\nä = 1; x = [np.float,\n   np.float]\n"
    assert [(each.line, each.column) for each in python_findings(text)] == [(3, 13), (4, 4)]


def test_a_reference_that_is_not_called_is_left_for_a_person() -> None:
    text = "from torch.cuda.amp import autocast\ncontext = autocast\nx = autocast()\n"
    findings = python_findings(text)
    assert findings
    assert not any(each.edits for each in findings)


def test_options_that_may_hold_the_keyword_are_left_for_a_person() -> None:
    (finding,) = python_findings("import torch\ntorch.load(p, **options)\n")
    assert finding.edits == ()


@pytest.mark.parametrize(
    ("content", "line", "why"),
    [
        (b"import numpy as np\nx = (np.float\n", 2, "never closed"),
        (b"x = '\xff'  # np.float\n", 1, "not valid Python"),
        (b"\x00 np.float", 1, "null bytes"),
        (b"x = np.float" + b"+1" * 20_000, 1, "nested too deeply"),
        (b"x = np.float " + b"and a " * 20_000, 1, "nested too deeply"),
        (b"x = np.float, " + b"'' " * 20_000, 1, "nested too deeply"),
        (b"import np.float" + b".a" * 20_000, 1, "nested too deeply"),
    ],
)
def test_broken_source_is_reported_with_its_place(content: bytes, line: int, why: str) -> None:
    (finding,) = check_python(content, "x.py", RULES.python)
    assert (finding.rule, finding.line) == ("unreadable", line)
    assert why in finding.why


def test_a_coding_line_is_honoured(tmp_path: Path) -> None:
    content = "# coding: latin-1\nimport numpy as np\nx = np.float; s = 'ä'\n".encode("latin-1")
    (tmp_path / "a.py").write_bytes(content)
    assert migrate(tmp_path, tmp_path.parent / "out-latin", "v5.0") == []
    assert (tmp_path.parent / "out-latin" / "a.py").read_bytes() == content.replace(b"np.float", b"float")


# --- Settings ---

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


def test_rules_up_to_the_source_do_not_apply(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("gradient_clip: 1.0\ncoldStartTimeout: 60\n")
    assert [each.rule for each in found(tmp_path, "v5.0", "v3.5")] == ["config-cold-start"]
    assert [each.rule for each in found(tmp_path, "v3.5")] == ["config-gradient-clip"]


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


# --- Checkpoints ---


class Evil:
    """Unpickling it would make a file."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(6))
def test_a_malicious_pickle_is_named_and_not_run(protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    payload = {"w": [1.0], "x": Evil(f"touch {marker}")}
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(payload, protocol))
    torch.save(payload, tmp_path / "zipped.pt")
    torch.save(payload, tmp_path / "older.bin", _use_new_zipfile_serialization=False)
    findings = found(tmp_path)
    assert [each.rule for each in findings] == ["checkpoint-malicious"] * 3
    assert all("system" in each.why for each in findings)
    left = migrate(tmp_path, tmp_path.parent / f"out-{protocol}-{tmp_path.name}", "v5.0")
    assert [each.rule for each in left] == ["checkpoint-malicious"] * 3
    assert not marker.exists()


def test_names_hidden_in_the_memo_or_the_stack_are_not_trusted(tmp_path: Path) -> None:
    hidden = [
        # "posix", "system" pushed early, harmless names pushed and popped, then STACK_GLOBAL.
        b"\x80\x04\x8c\x05posix\x8c\x06system\x8c\x0bcollections\x8c\x0bOrderedDict00\x93)R.",
        # The two names come back from the memo.
        b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x940" + b"0h\x00h\x01\x93)R.",
        b"\x80\x04cposix\nsystem\n)R.",
        b"(iposix\nsystem\n.",
    ]
    for number, content in enumerate(hidden):
        path = tmp_path / f"{number}.pkl"
        path.write_bytes(content)
        assert read_pickle(path).foreign, content


def test_an_archive_behind_a_pickle_does_not_hide_it(tmp_path: Path) -> None:
    harmless = io.BytesIO()
    torch.save({"w": torch.ones(1)}, harmless)
    (tmp_path / "both.pt").write_bytes(pickle.dumps(Evil("true")) + harmless.getvalue())
    assert [each.rule for each in found(tmp_path)] == ["checkpoint-malicious"]


def test_tensors_in_pickles_are_harmless(tmp_path: Path) -> None:
    state = OrderedDict(w=torch.ones(2), n=torch.ones(1, dtype=torch.int64), p=torch.nn.Parameter(torch.ones(1)))
    for number, is_new in enumerate((True, False)):
        torch.save(state, tmp_path / f"{number}.pt", _use_new_zipfile_serialization=is_new)
        assert read_pickle(tmp_path / f"{number}.pt").foreign == ()
    (tmp_path / "array.pkl").write_bytes(pickle.dumps({"a": numpy.ones(2)}))
    assert read_pickle(tmp_path / "array.pkl").foreign == ()


def zipped(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80",
        b"\x80\x04",
        b"hello",
        b"\x80\x02\x8e\nl\xfc\x9cF\xf9 j\xa8P\x19.",
        zipped("a/data.pkl", b"\x80\x02.")[30:],
        zipped("x.txt", b""),
        zipped("a/data.pkl", b"\x80\x04"),
        zipped("a/data.pkl", bytes(65_000_000)),
    ],
    ids=["empty", "start", "cut", "text", "terabytes", "no front", "no pickle", "cut in a zip", "bomb"],
)
def test_what_is_no_pickle_is_reported(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    assert [each.rule for each in found(tmp_path)] == ["unreadable"]


GOOD_PICKLE = pickle.dumps({"w": numpy.ones(3), "x": ["a", 1.5, ("b", None)]})


@settings(deadline=None, max_examples=300)
@given(
    change=st.one_of(
        st.binary(max_size=60),
        st.lists(st.tuples(st.integers(0, len(GOOD_PICKLE) - 1), st.integers(0, 255)), max_size=4),
    )
)
@example(change=b"\x80\x04X\xff\xff\xff\x7f")
def test_no_bytes_make_the_pickle_reader_crash(change: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    content = bytearray(GOOD_PICKLE)
    if isinstance(change, bytes):
        content = bytearray(change)
    else:
        for at, byte in change:
            content[at] = byte
    path = tmp_path_factory.getbasetemp() / "fuzzed.pkl"
    path.write_bytes(content)
    with contextlib.suppress(CorruptArtifactError):
        read_pickle(path)


@settings(deadline=None, max_examples=200)
@given(st.text("ab:-[]{}\"'#&*!|> \n\t=.,é\\0", max_size=60), st.sampled_from([".yaml", ".json", ".toml"]))
def test_no_text_makes_the_settings_reader_crash(text: str, suffix: str) -> None:
    with contextlib.suppress(SettingsError):
        for entry in read_entries(text, suffix):
            assert 0 <= entry.start <= entry.end <= len(text)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.sampled_from(
            [
                "import numpy as np",
                "np.float",
                "(",
                ")",
                ",",
                "\n",
                "    ",
                "def f",
                ":",
                "=",
                "x",
                '"',
                "with ",
                "torch.load",
                "from torch import load",
                "load(",
                "*",
                "lambda",
            ]
        ),
        max_size=14,
    )
)
def test_no_source_makes_the_python_checker_crash(pieces: list[str]) -> None:
    text = "".join(pieces)
    changed = settle(text, python_findings)
    with contextlib.suppress(SyntaxError, ValueError):
        compile(text, "before", "exec")
        compile(changed, "after", "exec")


def save_old_llama(folder: Path) -> dict[str, torch.Tensor]:
    weights = VersionConverter("5.0", "3.0").convert(build("llama").state_dict())
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    return weights


def test_checkpoints_are_judged_by_their_headers(tmp_path: Path) -> None:
    weights = save_old_llama(tmp_path / "old")
    save_file({name: each.clone() for name, each in build("bert").state_dict().items()}, tmp_path / "good.safetensors")
    half = {name: each for name, each in weights.items() if "gate_up" not in name}
    half |= {f"model.layers.{n}.mlp.{p}_proj.weight": torch.ones(2, 2) for n in range(2) for p in ("gate", "up")}
    save_file(half, tmp_path / "half.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "good.safetensors").read_bytes()[:-5])
    rules = {each.path: each.rule for each in found(tmp_path)}
    assert rules == {
        "old/model.safetensors": "checkpoint-layout",
        "half.safetensors": "checkpoint-half-converted",
        "cut.safetensors": "unreadable",
    }


def test_a_family_that_is_fused_by_nature_is_not_judged(tmp_path: Path) -> None:
    phi3 = build("phi3")
    save_file({name: each.clone() for name, each in phi3.state_dict().items()}, tmp_path / "model.safetensors")
    assert [each.rule for each in found(tmp_path)] == ["checkpoint-layout"]
    phi3.config.save_pretrained(tmp_path)
    assert found(tmp_path) == []


# --- Folders ---


def make_project(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text("generation: v2.0  # ours\nfp16: true\ndistributed:\n  tensor_parallel: 2\n")
    (folder / "train.py").write_text("import numpy as np\n\nx = np.float(1)   # keep\n")
    save_old_llama(folder / "weights")
    torch.save(build("gpt2").state_dict(), folder / "model.pt")
    (folder / "README.md").write_text("np.float")
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(each.relative_to(folder)): each.read_bytes() for each in sorted(folder.rglob("*")) if each.is_file()}


def test_apply_writes_a_clean_copy_and_leaves_the_original(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project")
    before = snapshot(project)
    assert run(project) == 1
    assert run(project, apply=True, out=tmp_path / "out") == 0
    assert snapshot(project) == before
    out = tmp_path / "out"
    assert (out / "config.yaml").read_text() == (
        "generation: v5.0  # ours\nds_amp_level: O1\nmodel_parallel:\n  tensor_parallel_size: 2\n"
    )
    assert (out / "train.py").read_text() == "import numpy as np\n\nx = float(1)   # keep\n"
    assert load_file(out / "weights" / "model.safetensors").keys() == build("llama").state_dict().keys()
    assert not (out / "model.pt").exists()
    assert load_file(out / "model.safetensors").keys() == build("gpt2").state_dict().keys()


def test_applying_twice_changes_nothing(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project")
    migrate(project, tmp_path / "once", "v5.0")
    migrate(tmp_path / "once", tmp_path / "twice", "v5.0")
    assert snapshot(tmp_path / "twice") == snapshot(tmp_path / "once")


def test_links_neither_loop_nor_lead_the_copy_outside(tmp_path: Path) -> None:
    project, outside = make_project(tmp_path / "project"), tmp_path / "outside"
    outside.mkdir()
    (outside / "c.yaml").write_text("gradient_clip: 1.0\n")
    (project / "loop").symlink_to(project)
    (project / "away").symlink_to(outside)
    (project / "broken.yaml").symlink_to(tmp_path / "nothing")
    findings = found(project)
    assert "away/c.yaml" in [each.path for each in findings]
    assert [each.path for each in findings if each.is_unreadable] == ["broken.yaml"]
    migrate(project, tmp_path / "out", "v5.0")
    assert (outside / "c.yaml").read_text() == "gradient_clip: 1.0\n"


def test_broken_files_are_reported_and_the_rest_is_still_checked(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import numpy as np\nx = np.float(\n")
    (tmp_path / "b.py").write_text("import numpy as np\nx = np.float\n")
    (tmp_path / "c.yaml").write_bytes(b"gradient_clip: \xff\n")
    (tmp_path / "d.py").write_bytes(b"x = '\xff'\n")
    assert [each.rule for each in found(tmp_path)] == ["unreadable", "python-numpy-float", "unreadable", "unreadable"]
    assert run(tmp_path) == 2


def test_the_command_says_place_rule_and_fix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.py").write_text("import numpy as np\nx = np.float\n")
    assert run(check=tmp_path, target="v5.0") == 1
    assert "a.py:2:5: error python-numpy-float: the alias of the built-in type is gone" in capsys.readouterr().out
    assert run(check=tmp_path, json=True) == 1
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert (finding["line"], finding["column"], finding["is_fixable"]) == (2, 5, True)
    (tmp_path / "a.py").write_text("x = 1\n")
    assert run(tmp_path) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give one path"),
        ({"path": Path("missing")}, "missing does not exist"),
        ({"path": Path(), "apply": True}, "give both or none"),
        ({"path": Path(), "apply": True, "out": Path("inside")}, "lies inside"),
        ({"path": Path(), "apply": True, "out": Path("/tmp")}, "exists"),
        ({"path": Path(), "target": "v9"}, "unknown generation 'v9'"),
        ({"path": Path(), "target": "v2.0", "source": "v3.0"}, "a migration goes up"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(**arguments)
