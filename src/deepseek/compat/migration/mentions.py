"""Whether a Python file can hold a finding at all, from its bytes, before anything is parsed.

Parsing with scopes costs up to a second for a large file; looking for import lines and for the dotted names that they
make possible costs a millisecond. `import numpy as np` with `np.float` is a reason to parse, `x.float()` is not.
The answer may be yes for a name in a comment; it is never no for one that libcst would resolve.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

from deepseek.compat.migration.rules import PythonRule

_IMPORT = re.compile(
    rb"(?:^|[;:])[ \t]*(?:from[ \t]+(?P<module>[\w.]+)[ \t]+import[ \t]*(?P<names>\([^)]*\)|(?:\\\r?\n|[^\r\n;#])*)"
    rb"|import[ \t]+(?P<modules>(?:\\\r?\n|[^\r\n;#])*))",
    re.MULTILINE,
)
_NAME = re.compile(rb"([\w.]+)(?:\s+as\s+(\w+))?")
_COMMENT = re.compile(rb"#[^\r\n]*|[\\()]")


def mentions_any(content: bytes, rules: tuple[PythonRule, ...]) -> bool:
    """Whether some rule's name can be written in the file."""
    bindings = set(_bindings(content))
    return any(_mentions(content, rule, local, name) for rule in rules for local, name in bindings)


def _mentions(content: bytes, rule: PythonRule, local: str, name: str) -> bool:
    if rule.keyword and rule.keyword.encode() not in content:
        return False
    if rule.name == name:
        return True
    return rule.name.startswith(f"{name}.") and bool(_written(local, rule.name[len(name) :]).search(content))


@functools.lru_cache(maxsize=1000)
def _written(local: str, rest: str) -> re.Pattern[bytes]:
    """`local.rest` with any space around the dots."""
    dotted = r"[\s\\]*\.[\s\\]*".join(map(re.escape, (local + rest).split(".")))
    return re.compile(rf"(?<!\w){dotted}(?!\w)".encode())


def _bindings(content: bytes) -> Iterator[tuple[str, str]]:
    """Local names and the full names they stand for."""
    for match in _IMPORT.finditer(content):
        module = match["module"]
        listed = match["names"] if module else match["modules"]
        for name, alias in _NAME.findall(_COMMENT.sub(b" ", listed)):
            if module:
                yield (alias or name).decode("utf-8", "replace"), (module + b"." + name).decode("utf-8", "replace")
            else:
                top = name if alias else name.partition(b".")[0]
                yield (alias or top).decode("utf-8", "replace"), top.decode("utf-8", "replace")
