"""Starting: `import deepseek` <= 50 ms beyond Python itself, `deepseek --help` <= 300 ms.

Each side runs in a process of its own and returns starts per second: Python alone, importing the package, the list of
commands, and the help of the largest command. The shortest time counts, since a machine can only slow a start down; the
tests count the modules that are loaded instead, which no machine changes.
"""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks.measuring import Bar, Side, measure, parse_arguments, report

PYTHON = (sys.executable, "-c", "pass")
IMPORT = (sys.executable, "-c", "import deepseek")
HELP = (sys.executable, "-m", "deepseek", "--help")
HELP_OF_TRAIN = (sys.executable, "-m", "deepseek", "train", "--help")
IMPORT_LIMIT_MS, HELP_LIMIT_MS = 50, 300


def main() -> None:
    """Measure and report."""
    arguments = parse_arguments(str(__doc__))
    commands = {"python": PYTHON, "import deepseek": IMPORT, "--help": HELP, "train --help": HELP_OF_TRAIN}
    sides = [Side(name, lambda command=command: starts_per_s(command)) for name, command in commands.items()]
    rows = measure(sides, num_rounds=3 if arguments.quick else 20)
    shortest_ms = {row.name: 1e3 / row.highest for row in rows if row.highest}
    bars = (
        Bar("import beyond Python, ms", shortest_ms["import deepseek"] - shortest_ms["python"], IMPORT_LIMIT_MS, False),
        Bar("--help, ms", shortest_ms["--help"], HELP_LIMIT_MS, False),
    )
    report("startup", "starts/s", rows, bars, arguments)


def starts_per_s(command: tuple[str, ...]) -> float:
    """One over the seconds that a process takes from its start to its end."""
    began_s = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return 1 / (time.perf_counter() - began_s)


if __name__ == "__main__":
    main()
