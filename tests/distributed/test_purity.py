import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOM = Path(__file__).parents[2] / "src" / "deepseek" / "distributed"
PURE = (
    "plan.py", "model_shape.py", "cluster.py", "software.py", "constants.py", "columns.py", "cost.py", "memory.py",
    "collectives_cost.py", "simulate.py", "predict.py", "predicting_runs.py", "candidates.py", "planner.py",
    "refusing.py", "balancing.py", "mixed_clusters.py", "scaling.py", "strategies.py", "finding.py",
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


def test_planning_and_predicting_load_no_torch():
    names = ("predicting_runs", "planner", "scaling", "strategies", "finding", "measuring")
    code = "import sys, {}; sys.exit('torch' in sys.modules)".format(
        ", ".join(f"deepseek.distributed.{name}" for name in names)
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
