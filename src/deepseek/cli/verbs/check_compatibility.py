"""`deepseek-cli check-compatibility`: what this machine can run, and the next step for what it cannot."""

from __future__ import annotations

import sys

import deepseek


def check_compatibility(*, json: bool = False) -> None:
    """Say what this machine can run, from Python to the cluster, with the next step for every failing line.

    The last lines compare it with what the documents ask for each generation: versions 1.0 to 5.0 of the engine that
    this product was built from, which are not versions of this product. A line "no" there means that the machine lacks
    something that generation was described with; this product runs all the same.

    Example: deepseek check-compatibility --json

    Parameters
    ----------
    json
        Print the checks as one JSON object.
    """
    from deepseek.cli.screen.tables import show_table
    from deepseek.compat.compatibility import check_compatibility as check

    checks = check()
    if json:
        from json import dumps

        sys.stdout.write(dumps({"checks": [line.to_dict() for line in checks]}, indent=2) + "\n")
        return
    rows = [(line.name, line.status, line.seen, line.next_step or "") for line in checks]
    show_table("What this machine can run", ("", "", "", ""), list(rows))
    unmet = [line.name.removeprefix("meets ") for line in checks if line.status == "unmet"]
    if unmet:
        sys.stdout.write(
            f"Generations {', '.join(unmet)} were described with hardware or a cluster that is not here; `deepseek` "
            f"{deepseek.__version__} itself, which is no generation, runs wherever no line above says failing\n"
        )
