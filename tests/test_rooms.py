"""The house: who may import whom, which library has which door, what a user reaches, and what each name means.

The first half is the floors. The second half is one graph of files, in which an import counts wherever it stands: at
the top of a file, in a function, below `TYPE_CHECKING`. For reach, so does what is loaded later: a literal
"deepseek.x.y", an f"deepseek.x.{name}", or a table in an `__init__.py` that names the file beside it.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

import deepseek
from deepseek.cli import VERBS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "deepseek"
ROOMS = sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists())


def name_of(path):
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES.values()}

# Library -> the files (or rooms) that may import it, wherever in the file they do.
DOORS = {
    "cyclopts": {"cli"},
    "rich": {"cli"},
    "matplotlib": {"cli/screen/plots.py"},
    "plotext": {"cli/screen/plots.py"},
    "tokenizers": {"data/tokenizing.py"},
    "fsspec": {"data/sources.py"},
    "PIL": {"data/images.py"},
    "pyarrow": {"data/documents.py"},
    "pycocotools": {"train/average_precision.py"},
    "jinja2": {"data/template_worker.py"},
    "safetensors": {"artifact", "compat/migration/applying.py"},
    "starlette": {"serve/app.py", "serve/server.py"},
    "uvicorn": {"serve/server.py"},
    "prometheus_client": {"serve/metrics.py", "serve/server.py"},
    "onnx": {"onnx/files.py", "onnx/importing.py", "compiler/runtimes/backends/onnxruntime.py"},
    "transformers": {"models/transformers_models/model.py", "planning/models/built_families.py"},
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
    "checkpoint/segments.py",
    "compiler/dynamic_shapes/buckets.py",
    "compiler/dynamic_shapes/length_policy.py",
)


def layers():
    """The floors of the contract, each a list of (room, whether it may be missing)."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = settings["tool"]["importlinter"]["contracts"][0]
    floors = [[room.strip() for room in floor.split("|")] for floor in contract["layers"]]
    return [[(room.strip("()"), room.startswith("(")) for room in floor] for floor in floors]


def imported_modules(path):
    """Everything that a file imports anywhere in it, and what it asks `require` for."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require" and node.args:
            yield getattr(node.args[0], "value", "")


@cache
def libraries_of(path):
    return {module.partition(".")[0] for module in imported_modules(path)}


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
    users = [path for path in TREES if library in libraries_of(path)]
    assert [path for path in users if not is_inside(path, DOORS[library])] == []
    assert bool(users) == bool(DOORS[library])  # a row for a library that nobody uses any more is stale


@pytest.mark.parametrize("name", PURE)
def test_pure_policy_imports_no_tensors(name):
    libraries = libraries_of(PACKAGE / name)
    assert libraries.isdisjoint({"torch", "numpy", "subprocess", "socket"})
    assert libraries <= {*sys.stdlib_module_names, "deepseek", "__future__"}


def test_no_file_is_a_heap():
    heaps = {"utils", "util", "helpers", "helper", "common", "misc", "shared"}
    known = {PACKAGE / "nn" / "utils.py"}  # `deepseek.nn.utils`, the name that users of `torch.nn.utils` expect
    found = {path for path in PACKAGE.rglob("*.py") if path.stem in heaps or path.parent.name in heaps}
    assert found - known == set()


# One graph of files


# Names that more than one file has, and the one meaning that they have there.
SHARED_FILE_NAMES = {
    "__init__": "what a folder offers",
    "__main__": "what `python -m` runs",
    "model": "the architecture, as PyTorch for one device",
    "keymap": "other libraries' settings and tensor names for that architecture",
    "config": "the settings of a room",
    "events": "the events that a run yields",
    "plan": "the parallel plan: the value, the verb that finds it, and where it takes hold of an architecture",
    "quickstart": "the main job: its recipe, and the verb that runs it",
    "decorator": "the decorator that users write, of that room",
    "doctor": "settings of the environment that pay: the measurement, and the verb that shows it",
}
SHARED_CLASS_NAMES = {
    "Block": "one block of that architecture",
    "ConvNorm": "a convolution and its batch norm in that architecture",
}

# Today's offenders. Nothing is ever added here; what is mended need not be taken off at once.
KNOWN_UNREACHED: set[str] = set()
KNOWN_FILE_NAMES: set[str] = set()
KNOWN_CLASS_NAMES: set[str] = set()
KNOWN_UNTESTED: set[str] = set()


def imported_names(name):
    """What a file imports, as written, made absolute: modules, and names that may be modules or stand in one."""
    path = FILES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            above = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, [above, node.module]))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def loaded_names(name):
    """The modules that a file names in literals, f-strings and tables, to load them later."""
    path = FILES[name]
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"deepseek(\.\w+)+(:\w+)?", node.value):
                yield node.value.partition(":")[0]
            elif path.name == "__init__.py" and name != "deepseek" and f"{name}.{node.value}" in FILES:
                yield f"{name}.{node.value}"
        elif isinstance(node, ast.JoinedStr) and name != "deepseek":
            parts = [re.escape(part.value) if isinstance(part, ast.Constant) else r"\w+" for part in node.values]
            if parts[0].startswith(r"deepseek\."):
                yield from (other for other in FILES if re.fullmatch("".join(parts).partition(":")[0], other))


def files_of(names):
    """The file that each name is, or stands in."""
    found = set()
    for name in names:
        while name and name not in FILES:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {""}


IMPORTS = {name: files_of(imported_names(name)) - {name} for name in FILES}
LOADS = {name: files_of(loaded_names(name)) - {name} for name in FILES}


def find_circles(graph):
    """The groups of files in which each leads to each (Tarjan's strongly connected components)."""
    order, lowest, stack, circles = {}, {}, [], []

    def visit(name):
        order[name] = lowest[name] = len(order)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in order:
                visit(other)
            if other in stack:
                lowest[name] = min(lowest[name], lowest[other])
        if lowest[name] == order[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                circles.append(set(group))

    for name in graph:
        if name not in order:
            visit(name)
    return circles


def find_reached(starts, graph):
    reached, waiting = set(), list(starts)
    while waiting:
        name = waiting.pop()
        if name and name not in reached:
            reached.add(name)
            waiting += [name.rpartition(".")[0], *graph[name]]
    return reached


def public_modules():
    """Where users begin: the package with its public names, and the commands."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    commands = {target.partition(":")[0] for target in scripts.values()}
    verbs = {f"deepseek.cli.verbs.{verb.replace('-', '_')}" for verb in VERBS}
    rooms = {f"deepseek.{name}" for name in deepseek._MODULES}
    return {"deepseek", "deepseek.__main__", *commands, *verbs, *rooms, *deepseek._PUBLIC.values()} & set(FILES)


def file_homes():
    homes = defaultdict(set)
    for name, path in FILES.items():
        homes[path.stem].add(name)
    return homes


def class_homes():
    homes = defaultdict(set)
    for name, path in FILES.items():
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.ClassDef):
                homes[node.name].add(name)
    return homes


def functions_of(path):
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(TREES[path]) if isinstance(node, functions)]


def has_logic(path):
    """Whether a file has more than definitions in it: twenty lines of functions or more."""
    return sum(node.end_lineno - node.lineno + 1 for node in functions_of(path)) >= 20


def test_the_walk_finds_a_circle_and_what_nobody_reaches():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"a"}}
    assert find_circles(graph) == [{"b", "c"}]
    assert set(graph) - find_reached({"a"}, graph) == {"e"}


def test_the_walk_sees_imports_at_the_top_in_functions_and_for_types_only():
    assert "deepseek.core.errors" in IMPORTS["deepseek.cli"]  # at the top
    assert "deepseek.train.config" in IMPORTS["deepseek.recipes"]  # below TYPE_CHECKING
    assert "deepseek.cli.verbs.train" in LOADS["deepseek.cli"]  # an f-string
    assert "deepseek.serve.engine" in LOADS["deepseek.serve"]  # a table of public names


def test_no_files_import_each_other_in_a_circle():
    assert find_circles(IMPORTS) == [], (
        "open the circle: move what both need into a file below, or hand it over as an argument"
    )


def test_every_file_is_reached_from_a_public_name_or_a_command():
    graph = {name: IMPORTS[name] | LOADS[name] for name in FILES}
    unreached = set(FILES) - find_reached(public_modules(), graph)
    assert sorted(unreached - KNOWN_UNREACHED) == [], "wire it into what a user calls, or delete it"


def test_a_file_name_has_one_meaning():
    doubled = {name: sorted(places) for name, places in file_homes().items() if len(places) > 1}
    allowed = {*SHARED_FILE_NAMES, *KNOWN_FILE_NAMES}
    assert {name: places for name, places in doubled.items() if name not in allowed} == {}


def test_a_class_name_has_one_meaning():
    doubled = {name: sorted(places) for name, places in class_homes().items() if len(places) > 1}
    allowed = {*SHARED_CLASS_NAMES, *KNOWN_CLASS_NAMES}
    assert {name: places for name, places in doubled.items() if name not in allowed} == {}


def test_every_file_with_logic_has_its_tests_in_the_same_place_below_tests():
    files = {path.relative_to(PACKAGE): path for path in FILES.values() if not path.stem.startswith("__")}
    tests = ROOT / "tests"
    untested = {
        name.as_posix()
        for name, path in files.items()
        if has_logic(path) and not (tests / name.parent / f"test_{name.name}").exists()
    }
    assert sorted(untested - KNOWN_UNTESTED) == []
