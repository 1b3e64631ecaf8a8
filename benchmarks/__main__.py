"""List the benchmarks with the claim that each one checks: the first line of its file."""

from __future__ import annotations

import ast
from pathlib import Path

SUPPORT = {
    "__init__",
    "__main__",
    "measuring",
    "smollm2",
    "collective_ranks",
    "parallel_ranks",
    "rank_processes",
    "shaped_hosts",
}


def main() -> None:
    """Print name and claim of each benchmark, without importing any."""
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem not in SUPPORT:
            claim = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()[0]
            print(f"python -m benchmarks.{path.stem:<12} {claim}")


if __name__ == "__main__":
    main()
