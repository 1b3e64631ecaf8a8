import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOM = Path(__file__).parents[2] / "src" / "deepseek" / "distributed"
PURE = (
    "plan.py", "model_shape.py", "cluster.py", "software.py", "constants.py", "columns.py", "cost.py", "memory.py",
    "collectives_cost.py", "simulate.py", "predict.py", "predicting_runs.py",
)  # fmt: skip


@pytest.mark.parametrize("name", PURE)
def test_the_planner_is_numbers_only(name):
    libraries = set()
    for node in ast.walk(ast.parse((ROOM / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            libraries |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            libraries.add((node.module or "").partition(".")[0])
    assert libraries <= {*sys.stdlib_module_names, "deepseek", "numpy"} - {"subprocess", "socket"}


def test_predicting_loads_no_torch():
    code = "import sys, deepseek.distributed.predicting_runs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
