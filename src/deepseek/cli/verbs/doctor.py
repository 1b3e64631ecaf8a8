"""`deepseek doctor`: settings of the environment that pay on this machine, measured."""

from __future__ import annotations

import sys


def doctor(*, apply: bool = False, json: bool = False) -> None:
    """Measure settings of the environment that may pay here: allocator, threads, huge pages.

    Each is run against its absence in fresh processes; nothing outside them changes.

    Example: deepseek doctor --apply

    Parameters
    ----------
    apply
        Make those that pay in this process only, and measure once more here.
    json
        Print the measurements as JSON.
    """
    from deepseek.cli.screen.events import show_table
    from deepseek.compat.doctor import apply_hints, diagnose, time_network
    from deepseek.core.units import format_seconds

    results = diagnose()
    applied_s = None
    if apply:
        apply_hints([each.hint.name for each in results if each.pays])
        applied_s = time_network()
    if json:
        from json import dumps

        rows = [{"hint": each.hint.name, "before_s": each.before_s, "after_s": each.after_s} for each in results]
        sys.stdout.write(dumps({"hints": rows, "applied_s": applied_s}, indent=2) + "\n")
        return
    show_table(
        "Settings measured on this machine",
        ("setting", "before", "after", "gain", "pays", "what it is"),
        [
            (
                each.hint.name,
                format_seconds(each.before_s),
                format_seconds(each.after_s),
                f"{each.gain:.2f}x",
                "yes" if each.pays else "no",
                f"{each.hint.why}; {each.hint.cost}",
            )
            for each in results
        ],
    )
    if applied_s is not None:
        sys.stdout.write(f"with those that pay, in this process: {format_seconds(applied_s)}\n")
