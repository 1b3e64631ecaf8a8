"""`deepseek-cli check-compatibility`: what this machine can run, and the next step for what it cannot."""

from __future__ import annotations

import sys


def check_compatibility(*, json: bool = False) -> None:
    """Say what this machine can run, from Python to the cluster, with the next step for every failing line.

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
