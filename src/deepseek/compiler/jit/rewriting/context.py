"""What the rewriting knows where it stands: about the function, about its variables, and about one statement.

Three values, each made once and handed on whole: `Context` for a definition and everything nested in it, `Scope` for
one function's variables, `Position` for a statement (how many tensor conditions surround it, and which variables have
a value there).
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from deepseek.compiler.jit.rewriting.trees import load
from deepseek.compiler.jit.rewriting.variables import Names, reads
from deepseek.compiler.jit.shared_names import SITES_NAME
from deepseek.compiler.jit.tracing.sites import Site

Outside = type[ast.Global] | type[ast.Nonlocal]


@dataclass(frozen=True)
class Context:
    """The definition that is rewritten: its file, what its free names mean, and the sites made so far."""

    file: str
    resolve: Callable[[str], Any]
    class_name: str | None = None
    sites: list[Site] = field(default_factory=list)

    def is_builtin(self, name: str) -> bool:
        """Return whether a name that no local variable has is Python's own."""
        return hasattr(builtins, name) and self.resolve(name) is getattr(builtins, name)

    def add_site(self, site: Site) -> ast.expr:
        """Keep a site, and give the expression that finds it when the code runs."""
        self.sites.append(site)
        return ast.Subscript(load(SITES_NAME), ast.Constant(len(self.sites) - 1), ast.Load())


@dataclass
class Scope:
    """One function of the user's while it is rewritten: its variables, by what may happen to them."""

    name: str
    parameters: tuple[str, ...]
    names: Names
    """Local variables that nobody else writes."""
    outside: dict[str, Outside]
    """Variables assigned here and living elsewhere."""
    shared: Names
    """Local variables that functions defined here read."""
    missing: set[str] = field(default_factory=set)
    """Variables that may be read before they are written."""
    num_parts: int = 0
    deleted: Names = frozenset()
    """Local variables that a `del` may leave without a value."""

    @property
    def locals(self) -> Names:
        return self.names | frozenset(self.parameters)


@dataclass(frozen=True)
class Position:
    """Where in a function a statement stands."""

    context: Context
    scope: Scope
    level: int
    """How many parts of the function surround the statement; the operators of each level have a name."""
    known: Names
    """Variables that have a value."""
    is_outermost: bool = True
    """Whether the function is the one that was rewritten, and not one defined inside of it."""

    @property
    def operators(self) -> str:
        return f"_ds{self.level}"

    def deeper(self, known: Names | None = None) -> Position:
        return replace(self, level=self.level + 1, known=self.known if known is None else known)

    def knowing(self, names: Names) -> Position:
        return replace(self, known=self.known | names)

    def site(self, node: ast.stmt | ast.expr, kind: str, **facts: Any) -> ast.expr:
        """Return the expression for a site at `node`."""
        return self.context.add_site(Site(self.context.file, node.lineno, kind, self.scope.name, **facts))

    def read_only(self, nodes: Sequence[ast.AST], bound: Names) -> Names:
        """Return the variables with a value that a part reads and does not write: they come in as parameters, too."""
        read = frozenset(name for node in nodes for name in reads(node))
        return ((read & self.scope.locals & self.known) - bound) - self.scope.shared


@dataclass(frozen=True)
class Flow:
    """Variables read after a list of statements: after its end, a native `continue`, and a native `break`."""

    after: Names
    head: Names = frozenset()
    end: Names = frozenset()
