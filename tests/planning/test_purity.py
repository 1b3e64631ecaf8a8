import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOM = Path(__file__).parents[2] / "src" / "deepseek" / "planning"
# These ask the machine or a module; everything else is numbers.
IMPURE = {
    "machines/local_ranks.py",
    "machines/measured_collectives.py",
    "machines/measurement.py",
    "machines/rank_measurement.py",
    "models/from_module.py",
}
PURE = sorted({path.relative_to(ROOM).as_posix() for path in ROOM.rglob("*.py")} - IMPURE)


def is_for_types_only(node):
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@pytest.mark.parametrize("name", PURE)
def test_the_planner_is_numbers_only(name):
    libraries = set()
    tree = ast.parse((ROOM / name).read_text(encoding="utf-8"))
    for block in [node for node in ast.walk(tree) if isinstance(node, ast.If) and is_for_types_only(node)]:
        block.body = []  # names of types; the test below proves that nothing of theirs is loaded
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            libraries |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            libraries.add((node.module or "").partition(".")[0])
    assert libraries <= {*sys.stdlib_module_names, "deepseek", "numpy"} - {"subprocess", "socket"}


def test_planning_and_predicting_load_no_torch():
    names = ("published_runs", "search.planner", "scaling", "strategies", "naming", "machines.measurement")
    code = "import sys, {}; sys.exit('torch' in sys.modules)".format(
        ", ".join(f"deepseek.planning.{name}" for name in names)
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
