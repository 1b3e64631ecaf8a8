"""Answering an unknown name with the names that are known, nearest first.

Used by the registry, by configs and by the command line, so that every "unknown" in deepseek reads alike.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def explain_unknown(noun: str, name: str, known: Iterable[str]) -> str:
    """One sentence for an unknown `name`: the nearest known one, or all of them.

    >>> explain_unknown("precision", "bf61", ["bf16", "fp32"])
    "unknown precision 'bf61'; did you mean 'bf16'? (known: bf16, fp32)"
    """
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"unknown {noun} {name!r}{hint} (known: {', '.join(names) or 'none'})"
