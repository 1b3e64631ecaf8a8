"""Answering an unknown name with the names that are known, nearest first.

Used by the registry, by configs and by the command line, so that every "unknown" in deepseek reads alike.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# Share of letters in common from which one spelling may be another, mistyped.
_LEAST_LIKENESS = 0.65


def explain_unknown(noun: str, name: str, known: Iterable[str]) -> str:
    """One sentence for an unknown `name`: the nearest known one, or all of them.

    >>> explain_unknown("precision", "bf61", ["bf16", "fp32"])
    "unknown precision 'bf61'; did you mean 'bf16'? (known: bf16, fp32)"
    """
    names = sorted(known)
    return word_unknown(noun, name, names, find_nearest(name, names))


def word_unknown(noun: str, name: str, known: Iterable[str], nearest: str | None) -> str:
    """The same sentence where the nearest name was found in another way."""
    names = sorted(known)
    hint = f"; did you mean {nearest!r}?" if nearest else ""
    return f"unknown {noun} {name!r}{hint} (known: {', '.join(names) or 'none'})"


def find_nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that was probably meant: one with all words of `name`, else one that is spelled like it.

    >>> find_nearest("steps", ["seed", "num_steps"]), find_nearest("model.layers", ["model.num_layers", "model.norm"])
    ('num_steps', 'model.num_layers')
    >>> find_nearest("sead", ["seed", "num_steps"]), find_nearest("gpus", ["seed", "num_steps"])
    ('seed', None)
    """
    names = sorted(known)
    words = _words(name)
    with_all = [other for other in names if words and words <= _words(other)]
    if with_all:
        return min(with_all, key=len)
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=_LEAST_LIKENESS)), None)


def find_initials(name: str, known: Iterable[str], *, of_all: bool = False) -> str | None:
    """Return the shortest known name of several words whose last ones, or `of_all`, begin with the letters of `name`.

    >>> find_initials("lr", ["base_learning_rate", "steps"]), find_initials("x", ["x_ray"])
    ('base_learning_rate', None)
    >>> find_initials("lr", ["base_learning_rate", "load_ratio"], of_all=True)
    'load_ratio'
    """
    initials = {other: "".join(word[0] for word in other.split("_") if word) for other in sorted(known)}
    fitting = [
        other
        for other, letters in initials.items()
        if len(name) > 1 and (letters == name.lower() if of_all else letters.endswith(name.lower()))
    ]
    return min(fitting, key=len, default=None)


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z]+|\d+", name.lower()))
