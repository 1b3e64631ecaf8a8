"""The full names behind the names of a Python module, through its imports: `ac` is `torch.cuda.amp.autocast`.

`find_names(tree, wanted)` gives every use of a wanted full name. Scopes follow the language: a local variable hides an
import, a class body is invisible to its methods, `global` leads to the module. `ac = torch.cuda.amp.autocast` gives the
name another one, like an import. A name that may also be something else (an import in `try`, another one in `except`)
is a use that is not *certain*. Nothing is imported or run.

The compiler's own `ast` is used, and not libcst, because it is some thirty times as fast (docs/log.md); the tests
compare the two on the same sources.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_BINDING = (
    *(ast.Name, ast.ExceptHandler, ast.NamedExpr, ast.Import, ast.ImportFrom, ast.Global, ast.Nonlocal),
    *(ast.MatchAs, ast.MatchStar, ast.MatchMapping),
)
# Fields that hold no node: names and numbers, and the marks that all nodes of a kind share.
_PLAIN_FIELDS = frozenset(
    ["ctx", "op", "ops", "id", "attr", "arg", "kind", "level", "module", "conversion", "type_comment", "simple"]
)
_child_fields: dict[type[ast.AST], tuple[str, ...]] = {}
_OTHER = ""
"""The meaning of a name that is bound by anything but an absolute import."""


@dataclass(frozen=True)
class Use:
    """One expression that stands for a wanted name."""

    node: ast.Name | ast.Attribute
    name: str
    num_attributes: int
    """How many of the last parts of the name are written as attributes; the rest is what the local name stands for."""
    is_certain: bool
    """Whether the local name has no other meaning."""
    alias: str | None = None
    """The name that an assignment gives it here, where the use is all that is assigned."""
    is_local_alias: bool = False
    """Whether that name is a variable of a function, which no other code can reach."""
    is_renamed: bool = False
    """Whether it is read by a name that an assignment gave it."""


@dataclass
class Names:
    """The imports of one module and the names that it uses."""

    uses: list[Use] = field(default_factory=list)
    imports: list[ast.ImportFrom] = field(default_factory=list)
    """Absolute `from a import b`, wherever they stand."""
    star_modules: list[ast.ImportFrom] = field(default_factory=list)
    """`from a import *`; a wanted name that comes through one is a use that is not certain."""
    bindings: dict[str, set[str]] = field(default_factory=dict)
    """Every name that any scope binds, with its meanings."""


@dataclass(frozen=True)
class _Alias:
    """`target = root.attributes`, which gives what is imported another name."""

    target: str
    root: ast.Name
    attributes: tuple[str, ...]
    scope: _Scope

    @property
    def is_local(self) -> bool:
        """Whether it is a variable of a function."""
        return self.scope.kind == "function" and self.target not in self.scope.redirected


@dataclass
class _Scope:
    kind: Literal["module", "function", "class", "comprehension"]
    parent: _Scope | None = None
    bindings: dict[str, set[str]] = field(default_factory=dict)
    redirected: dict[str, _Scope] = field(default_factory=dict)
    """Names that `global` or `nonlocal` lead elsewhere."""

    def bind(self, name: str, meaning: str = _OTHER) -> None:
        """Add a meaning to a name, in the scope that a statement here binds it in."""
        scope = self.redirected.get(name, self)
        scope.bindings.setdefault(name, set()).add(meaning)

    def look_up(self, name: str) -> set[str]:
        """Return the meanings of a name that is read here; none where it is a built-in or comes from elsewhere."""
        scope: _Scope | None = self.redirected.get(name, self)
        start = scope
        while scope is not None:
            if name in scope.bindings and (scope is start or scope.kind != "class"):
                return scope.bindings[name]
            scope = scope.parent
        return set()


def find_names(tree: ast.Module, wanted: frozenset[str]) -> Names:
    """Find every use of a name in `wanted`, in the order of the source."""
    names, module = Names(), _Scope("module")
    aliases: dict[int, _Alias] = {}
    reads = list(_collect(tree, module, names, aliases))
    renamed = _bind_aliases(aliases.values(), wanted)
    for made in aliases.values():
        names.bindings.setdefault(made.target, set()).update(made.scope.look_up(made.target))
    stars = {statement.module or "" for statement in names.star_modules}
    for node, attributes, scope in reads:
        meanings = scope.look_up(node.id)
        # No module exports a built-in name to a star.
        is_unknown = not meanings and not hasattr(builtins, node.id)
        through_star = {f"{star}.{node.id}" for star in stars} if is_unknown else set()
        for meaning in (meanings | through_star) - {_OTHER}:
            is_certain = len(meanings) == 1
            for count in range(len(attributes) + 1):
                full = ".".join([meaning, *(attribute.attr for attribute in attributes[:count])])
                if full in wanted:
                    alias = aliases.get(id(node)) if count == len(attributes) else None
                    names.uses.append(
                        Use(
                            attributes[count - 1] if count else node,
                            full,
                            count,
                            is_certain,
                            alias=alias.target if alias else None,
                            is_local_alias=alias is not None and alias.is_local,
                            is_renamed=not count and node.id in renamed,
                        )
                    )
    names.uses.sort(key=lambda use: (use.node.lineno, use.node.col_offset))
    return names


def _bind_aliases(aliases: Iterable[_Alias], wanted: frozenset[str]) -> set[str]:
    """Give every alias its meanings, in the order of the source; return those that lead to a wanted name.

    The others are variables like any.
    """
    renamed = set()
    for alias in aliases:
        meanings = {".".join([meaning, *alias.attributes]) for meaning in alias.scope.look_up(alias.root.id) - {_OTHER}}
        leading = {full for full in meanings if any(name == full or name.startswith(f"{full}.") for name in wanted)}
        renamed |= {alias.target} if leading else set()
        for full in leading or {_OTHER}:
            alias.scope.bind(alias.target, full)
    return renamed


def _find_alias(node: ast.AST, scope: _Scope) -> _Alias | None:
    """Return the alias that a statement makes; `None` where it is any other statement."""
    target = value = None
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        target, value = node.targets[0], node.value
    elif isinstance(node, ast.AnnAssign):
        target, value = node.target, node.value
    attributes: list[str] = []
    while isinstance(value, ast.Attribute):
        attributes.insert(0, value.attr)
        value = value.value
    if isinstance(target, ast.Name) and isinstance(value, ast.Name):
        return _Alias(target.id, value, tuple(attributes), scope)
    return None


def _collect(
    tree: ast.Module, module: _Scope, names: Names, aliases: dict[int, _Alias]
) -> Iterator[tuple[ast.Name, list[ast.Attribute], _Scope]]:
    """Bind every name in its scope; yield those that are read, with the attributes written after them."""
    scopes = [module]
    pending: list[tuple[ast.AST, _Scope]] = [(tree, module)]
    while pending:
        node, scope = pending.pop()
        attributes: list[ast.Attribute] = []
        while isinstance(node, ast.Attribute):
            attributes.insert(0, node)
            node = node.value
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield node, attributes, scope
        elif isinstance(node, (*_FUNCTIONS, ast.Lambda, ast.ClassDef, *_COMPREHENSIONS)):
            inner, around, inside = _open_scope(node, scope)
            scopes.append(inner)
            # `global` statements have to be seen before what follows them, so bodies are walked in their order.
            pending += [(child, inner) for child in reversed(inside)] + [(child, scope) for child in reversed(around)]
        elif not isinstance(node, ast.Constant):
            if isinstance(node, _BINDING):
                _bind(node, scope, module, names)
            alias = _find_alias(node, scope) if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
            if alias is not None:
                aliases[id(alias.root)] = alias
            inside = _bound_apart(node) if alias is None else children(node)[1:]  # its target is bound with it
            pending += [(child, scope) for child in reversed(inside)]
    for scope in scopes:
        for name, meanings in scope.bindings.items():
            names.bindings.setdefault(name, set()).update(meanings)


def children(node: ast.AST) -> list[ast.AST]:
    """Return the nodes directly inside another one, without the marks for load, store and operators.

    The same as `ast.iter_child_nodes` at a third of its time, which is most of what a scan takes.
    """
    kind = type(node)
    if kind not in _child_fields:
        _child_fields[kind] = () if kind is ast.Constant else tuple(n for n in kind._fields if n not in _PLAIN_FIELDS)
    found: list[ast.AST] = []
    for name in _child_fields[kind]:
        value = getattr(node, name, None)
        if isinstance(value, list):
            found += [item for item in value if isinstance(item, ast.AST)]
        elif isinstance(value, ast.AST):
            found.append(value)
    return found


def _bound_apart(node: ast.AST) -> list[ast.AST]:
    """Return the nodes to look at inside another one; the target of `:=` is bound with it."""
    return [node.value] if isinstance(node, ast.NamedExpr) else children(node)


def _bind(node: ast.AST, scope: _Scope, module: _Scope, names: Names) -> None:
    """Bind what one node binds, its children apart."""
    match node:
        case ast.Name(id=name) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
            scope.bind(name)
        case ast.ExceptHandler(name=str(name)) | ast.MatchMapping(rest=str(name)):
            scope.bind(name)
        case ast.NamedExpr(target=ast.Name(id=name)):
            outside = scope
            while outside.kind == "comprehension" and outside.parent is not None:
                outside = outside.parent
            outside.bind(name)
        case ast.Import() | ast.ImportFrom():
            _bind_imports(node, scope, names)
        case ast.Global(names=listed):
            scope.redirected |= dict.fromkeys(listed, module)
        case ast.Nonlocal(names=listed):
            scope.redirected |= {name: _find_nonlocal(scope, name) for name in listed}


def _bind_imports(node: ast.Import | ast.ImportFrom, scope: _Scope, names: Names) -> None:
    if isinstance(node, ast.Import):
        for alias in node.names:
            top = alias.name.partition(".")[0]
            scope.bind(alias.asname or top, alias.name if alias.asname else top)
        return
    is_absolute = not node.level and node.module is not None
    if node.names[0].name == "*":
        names.star_modules += [node] if is_absolute else []
        return
    names.imports += [node] if is_absolute else []
    for alias in node.names:
        scope.bind(alias.asname or alias.name, f"{node.module}.{alias.name}" if is_absolute else _OTHER)


def _open_scope(node: ast.AST, scope: _Scope) -> tuple[_Scope, list[ast.AST], list[ast.AST]]:
    """Return the scope that a node opens, what is evaluated around it, and what is evaluated in it."""
    if isinstance(node, ast.ClassDef):
        scope.bind(node.name)
        outside: list[ast.AST] = [*node.decorator_list, *node.bases, *(keyword.value for keyword in node.keywords)]
        return _Scope("class", scope), outside, list(node.body)
    if isinstance(node, (*_FUNCTIONS, ast.Lambda)):
        inner = _Scope("function", scope)
        arguments = node.args
        listed = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        given = [argument for argument in listed if argument is not None]
        for argument in given:
            inner.bind(argument.arg)
        outside = [*arguments.defaults, *(default for default in arguments.kw_defaults if default is not None)]
        outside += [argument.annotation for argument in given if argument.annotation is not None]
        if isinstance(node, ast.Lambda):
            return inner, outside, [node.body]
        scope.bind(node.name)
        outside += [*node.decorator_list, *([node.returns] if node.returns is not None else [])]
        return inner, outside, list(node.body)
    assert isinstance(node, _COMPREHENSIONS)
    inner = _Scope("comprehension", scope)
    first, *others = node.generators
    inside: list[ast.AST] = [first.target, *first.ifs, *others]
    inside += [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
    return inner, [first.iter], inside


def _find_nonlocal(scope: _Scope, name: str) -> _Scope:
    """Return the function around `scope` that binds the name; the nearest one where none has been seen to."""
    around = scope.parent
    while around is not None and not (around.kind == "function" and name in around.bindings):
        around = around.parent
    return around or scope.parent or scope
