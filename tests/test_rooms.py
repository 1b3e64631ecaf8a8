"""The floors of the house: who may import whom, and which library has which door."""

import ast
import re
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "deepseek"
ROOMS = sorted(each.name for each in PACKAGE.iterdir() if (each / "__init__.py").exists())

# Library -> the files (or rooms) that may import it, wherever in the file they do.
DOORS = {
    "cyclopts": {"cli"},
    "rich": {"cli"},
    "matplotlib": {"cli/screen/plots.py"},
    "plotext": {"cli/screen/plots.py"},
    "tokenizers": {"data/tokenizing.py"},
    "fsspec": {"data/sources.py"},
    "pyarrow": {"data/sources.py"},
    "jinja2": {"data/chat_templates.py"},
    "safetensors": {"artifact", "compat/migration/applying.py"},
    "libcst": {"compat/migration/python_files.py"},
    "starlette": {"serve/app.py", "serve/server.py"},
    "uvicorn": {"serve/server.py"},
    "prometheus_client": {"serve/metrics.py", "serve/server.py"},
    "onnx": {"onnx/files.py", "onnx/importing.py", "compiler/runtimes/backends/onnxruntime.py"},
    "transformers": {"models/transformers_models/model.py"},
    "openai": set(),
    "onnxruntime": {"compiler/runtimes/backends/onnxruntime.py"},
    "openvino": {"compiler/runtimes/backends/openvino.py"},
    "nncf": {"compiler/runtimes/backends/openvino.py"},
    "tvm": {"compiler/runtimes/backends/tvm.py"},
    "torchao": {"compiler/runtimes/backends/inductor.py"},
    "torch_tensorrt": {"compiler/runtimes/backends/accelerators.py"},
    "habana_frameworks": {"compiler/runtimes/backends/accelerators.py"},
    "torch_npu": {"compiler/runtimes/backends/accelerators.py"},
}
# Python's own libraries that reach into the machine: policy that is pure stays away from them.
PURE = (
    "serve/scheduling.py",
    "serve/sequences.py",
    "optim/learning_rates.py",
    "core/units.py",
    "core/names.py",
    "compiler/runtimes/selection_policy.py",
    "mixed_precision/policy.py",
    "compiler/passes/memory/ordering.py",
    "compiler/passes/placement/assignment.py",
    "compiler/passes/memory/segments.py",
    "compiler/dynamic_shapes/buckets.py",
    "compiler/dynamic_shapes/length_policy.py",
)


def layers():
    """The floors of the contract, each a list of (room, whether it may be missing)."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = settings["tool"]["importlinter"]["contracts"][0]
    floors = [[each.strip() for each in floor.split("|")] for floor in contract["layers"]]
    return [[(room.strip("()"), room.startswith("(")) for room in floor] for floor in floors]


def imported_modules(path):
    """Everything that a file imports anywhere in it, and what it asks `require` for."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require" and node.args:
            yield getattr(node.args[0], "value", "")


def is_inside(path, doors):
    name = path.relative_to(PACKAGE).as_posix()
    return name in doors or name.partition("/")[0] in doors


def test_no_import_goes_up_or_sideways():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_every_room_on_disk_is_named_in_the_contract():
    assert set(ROOMS) <= {room for floor in layers() for room, _ in floor}


def test_every_room_that_must_be_there_is_on_disk():
    assert {room for floor in layers() for room, is_optional in floor if not is_optional} <= set(ROOMS)


def test_the_architecture_page_shows_each_room_on_its_floor_of_the_contract():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", page, flags=re.MULTILINE)
    shown = [room for _, room in rows]
    assert sorted(shown) == ROOMS
    rank = {room: -index for index, floor in enumerate(layers()) for room, _ in floor}
    for (upper_floor, upper), (lower_floor, lower) in pairwise(rows):
        assert (int(upper_floor) > int(lower_floor)) == (rank[upper] > rank[lower])
        assert (upper_floor == lower_floor) == (rank[upper] == rank[lower])


def test_every_room_has_tests():
    missing = [room for room in ROOMS if not any((ROOT / "tests" / room).rglob("test_*.py"))]
    assert not missing


@pytest.mark.parametrize("library", DOORS)
def test_a_library_comes_in_by_its_own_door(library):
    users = [
        path
        for path in PACKAGE.rglob("*.py")
        if any(name.partition(".")[0] == library for name in imported_modules(path))
    ]
    assert [path for path in users if not is_inside(path, DOORS[library])] == []
    assert bool(users) == bool(DOORS[library])  # a row for a library that nobody uses any more is stale


@pytest.mark.parametrize("name", PURE)
def test_pure_policy_imports_no_tensors(name):
    libraries = {module.partition(".")[0] for module in imported_modules(PACKAGE / name)}
    assert libraries.isdisjoint({"torch", "numpy", "subprocess", "socket"})
    assert libraries <= {*sys.stdlib_module_names, "deepseek", "__future__"}


def test_no_file_is_a_heap():
    heaps = {"utils", "util", "helpers", "helper", "common", "misc", "shared"}
    assert [path for path in PACKAGE.rglob("*.py") if path.stem in heaps or path.parent.name in heaps] == []
