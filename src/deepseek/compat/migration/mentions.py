"""Whether a Python file can hold a finding at all, from its bytes, before anything is parsed.

Parsing costs milliseconds, looking for words costs microseconds. A use of `torch.cuda.amp.autocast` needs the words
`torch` and `autocast` somewhere in the file, however it was imported; so the answer may be yes for a file without a
finding, and is never no for one with.
"""

from __future__ import annotations

from deepseek.compat.migration.rules import PythonRule


def mentions_any(content: bytes, rules: tuple[PythonRule, ...]) -> bool:
    """Whether some rule's name can be written in the file."""
    return any(_mentions(content, rule) for rule in rules)


def _mentions(content: bytes, rule: PythonRule) -> bool:
    module, _, rest = rule.name.partition(".")
    words = (module, rest.rpartition(".")[2], rule.keyword or "")
    return all(word.encode() in content for word in words)
