"""Whether a Python file can hold a finding at all, from its bytes, before anything is parsed.

Parsing costs milliseconds, looking for words costs microseconds. A use of `torch.cuda.amp.autocast` needs the words
`torch` and `autocast` somewhere in the file, however it was imported; so the answer may be yes for a file without a
finding, and is never no for one with.
"""

from __future__ import annotations

import functools

from deepseek.compat.migration.rules import PythonRule


def mentions_any(content: bytes, rules: tuple[PythonRule, ...]) -> bool:
    """Whether some rule's name can be written in the file."""
    return any(all(word in content for word in _words(name, rule.keyword)) for rule in rules for name in rule.names)


@functools.cache
def _words(name: str, keyword: str | None) -> tuple[bytes, ...]:
    """Return the words that every use of a name needs, the rarest ones first."""
    module, _, rest = name.partition(".")
    return tuple(word.encode() for word in (keyword, rest.rpartition(".")[2], module) if word)
