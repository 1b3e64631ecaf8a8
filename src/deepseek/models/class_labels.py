"""The names of a classifier's classes, which its config carries into the artifact."""

from __future__ import annotations

from collections.abc import Sequence

from deepseek.core.errors import ConfigError


def check_labels(labels: Sequence[str], num_classes: int) -> None:
    """Raise `ConfigError` where some classes have a name and others none.

    >>> check_labels((), 2), check_labels(("cat", "dog"), 2)
    (None, None)
    """
    if labels and len(labels) != num_classes:
        raise ConfigError(f"labels has {len(labels)} names and there are {num_classes} classes; name each of them")
