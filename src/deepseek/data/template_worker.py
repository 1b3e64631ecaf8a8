"""The process in which chat templates run: one JSON line in, one JSON line out, under limits.

    {"source": "...", "variables": {...}}  ->  {"text": "..."} | {"refused": "..."} | {"broken": "...", "line": 3}

Templates are code of strangers. Jinja's immutable sandbox keeps them from files, modules and the insides of objects,
but not from loops without an end or from strings of gigabytes; a process of its own can be limited and killed.
`chat_templates.py` starts this file as a script and is its only user. It imports nothing of deepseek, so that it starts
in a tenth of a second.

The environment is that of `transformers.apply_chat_template`: trimmed blocks, loop controls, `{% generation %}`,
`tojson` without HTML escapes, `raise_exception`, `strftime_now`, and a `namespace` without private names. What stands
in `{% generation %}`, a mark for training, is written as it is, and the answer says between which characters:
`"generated": [[10, 24], ...]`.
"""

from __future__ import annotations

import datetime
import json
import re
import secrets
import sys
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

if TYPE_CHECKING:
    from jinja2.parser import Parser

MAX_MEMORY_BYTES = 1 << 30
MAX_TEXT_CHARACTERS = 4 << 20
# Stand in the text while it is written; nobody who writes templates or messages can know them.
_KEY = secrets.token_hex(16)
_BEGIN, _END = f"<{_KEY}[>", f"<{_KEY}]>"
_MARKS = re.compile(rf"<{_KEY}([\[\]])>")


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` around what the assistant said; names set inside end with it."""

    tags = {"generation"}  # noqa: RUF012 - the attribute of the base class

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)]) for mark in (_BEGIN, _END))
        return jinja2.nodes.Scope([begin, *body, end]).set_lineno(line)


class PublicNamespace(jinja2.utils.Namespace):
    """Jinja's `namespace`, refusing names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            refuse_private(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        refuse_private(name)
        super().__setitem__(name, value)


def refuse_private(name: object) -> None:
    """Raise `SecurityError` for a private name."""
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a template may not store the private name {name!r}")


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write `value` as JSON; Jinja's own filter escapes for HTML, which a prompt is not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def refuse(message: str) -> None:
    """Raise the template's own complaint about the messages."""
    raise jinja2.TemplateError(message)


def format_now(layout: str) -> str:
    """Write the time of day as `layout` says."""
    return datetime.datetime.now().astimezone().strftime(layout)


@lru_cache(maxsize=16)
def compile_template(source: str) -> jinja2.Template:
    """Compile a template in the environment that chat templates expect; raises `TemplateSyntaxError`."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": format_now, "namespace": PublicNamespace}
    return environment.from_string(source)


def render(source: str, variables: dict[str, Any]) -> dict[str, Any]:
    """Render `source` and return the answer of one line."""
    try:
        template = compile_template(source)
    except jinja2.TemplateSyntaxError as error:
        return {"broken": str(error), "line": error.lineno}
    try:
        text = template.render(variables)
    except (jinja2.TemplateError, ArithmeticError, TypeError, ValueError, LookupError, AttributeError) as error:
        return {"refused": str(error)}
    except (MemoryError, RecursionError):
        return {"refused": "it needs more memory than a template may take"}
    if len(text) > MAX_TEXT_CHARACTERS:
        return {"refused": f"it wrote {len(text)} characters and {MAX_TEXT_CHARACTERS} are the most"}
    return take_out_marks(text)


def take_out_marks(text: str) -> dict[str, Any]:
    """Return the text without the marks of what was generated, and the characters that stood between them."""
    pieces = _MARKS.split(text)  # text, bracket, text, bracket, ..., text
    generated: list[list[int]] = []
    length = len(pieces[0])
    for bracket, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        if bracket == "[":
            generated.append([length, length])
        elif generated:
            generated[-1][1] = length
        length += len(piece)
    return {"text": "".join(pieces[::2])} | ({"generated": generated} if generated else {})


def limit_memory() -> None:
    """Let this process take at most `MAX_MEMORY_BYTES` of address space, where the system can say so."""
    if sys.platform == "win32":
        return
    import resource

    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = MAX_MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(hard, MAX_MEMORY_BYTES)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def main() -> None:
    """Answer lines until the input ends."""
    limit_memory()
    for line in sys.stdin:
        request = json.loads(line)
        sys.stdout.write(json.dumps(render(request["source"], request["variables"])) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
