"""`deepseek explain`: what was decided about a model, with every measurement and every refusal."""

from __future__ import annotations

import sys


def explain(model: str, *, json: bool = False) -> None:
    """Say how MODEL was decided to run on this machine: what was measured, what was refused, and why.

    A decision is made the first time a model is loaded with a backend of `auto`, and is then remembered.

    Example: deepseek explain resnet50

    Parameters
    ----------
    model
        Name under which it was loaded, its class, or the beginning of its digest.
    json
        Print the decisions as one JSON object.
    """
    from deepseek.cli.screen.tables import show_table
    from deepseek.compiler.runtimes.decisions import find_decisions, to_dict
    from deepseek.compiler.runtimes.selection_report import (
        COLUMNS,
        describe_key,
        list_notes,
        list_refusals,
        list_rows,
        list_untried,
        summarize,
    )

    found = find_decisions(model)
    if json:
        from json import dumps

        sys.stdout.write(dumps({"decisions": [to_dict(decision) for decision in found]}, indent=2) + "\n")
        return
    for decision in found:
        sys.stdout.write(f"{describe_key(decision.key)}\n{summarize(decision)}\n")
        show_table("Measured", COLUMNS, list_rows(decision))
        show_table("Noted", ("", ""), list_notes(decision))
        show_table("Refused", ("", ""), list_refusals(decision))
        if untried := list_untried(decision):
            show_table("Not tried", ("", ""), untried)
