"""`deepseek doctor`: settings of the environment that pay on this machine, measured."""

from __future__ import annotations

import sys


def doctor(*, apply: bool = False, json: bool = False) -> None:
    """Measure settings of the environment that may pay here: allocator, threads, huge pages, OpenMP's spins.

    Each is run against its absence in fresh processes; nothing outside them changes. For those that pay, the line is
    printed that sets them for programs of your own.

    Example: deepseek doctor --apply

    Parameters
    ----------
    apply
        Make those that pay in this process only, and measure once more here.
    json
        Print the measurements as JSON.
    """
    from deepseek.cli.screen.tables import show_table
    from deepseek.compat.doctor import apply_hints, diagnose, time_network
    from deepseek.core.units import format_seconds

    results = diagnose()
    applied_s = None
    if apply:
        apply_hints([result.hint.name for result in results if result.pays])
        applied_s = time_network()
    if json:
        from json import dumps

        rows = [
            {
                "hint": result.hint.name,
                "before_s": result.before_s,
                "after_s": result.after_s,
                "pays": result.pays,
                "line": result.hint.line,
            }
            for result in results
        ]
        sys.stdout.write(dumps({"hints": rows, "applied_s": applied_s}, indent=2) + "\n")
        return
    show_table(
        "Settings measured on this machine",
        ("setting", "before", "after", "gain", "pays", "what it is"),
        [
            (
                result.hint.name,
                format_seconds(result.before_s),
                format_seconds(result.after_s),
                f"{result.gain:.2f}x",
                "yes" if result.pays else "no",
                f"{result.hint.why}; {result.hint.cost}",
            )
            for result in results
        ],
    )
    lines = [result.hint.line for result in results if result.pays]
    if lines:
        sys.stdout.write("\n".join(("for programs of your own, before they start:", *lines, "")))
    if applied_s is not None:
        sys.stdout.write(f"with those that pay, in this process: {format_seconds(applied_s)}\n")
