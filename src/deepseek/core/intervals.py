"""Measurements that come with the interval which their true value lies in: how the ends are called.

`accuracy` stands beside `accuracy_low` and `accuracy_high`; who shows measurements shows the three as one.
"""

from __future__ import annotations

from collections.abc import Collection

LOW, HIGH = "_low", "_high"


def find_ends(names: Collection[str]) -> dict[str, tuple[str, str]]:
    """Return the measurements among `names` that come with an interval, and what the ends of it are called.

    >>> find_ends(["accuracy", "accuracy_low", "accuracy_high", "flow", "flow_low"])
    {'accuracy': ('accuracy_low', 'accuracy_high')}
    """
    return {name: (name + LOW, name + HIGH) for name in names if {name + LOW, name + HIGH} <= set(names)}
