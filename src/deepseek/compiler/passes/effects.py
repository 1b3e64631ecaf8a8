"""What an operator does besides computing: writing into its inputs, drawing random numbers, returning views.

The passes over captured graphs (fusing, reordering, in-place reuse, placement) ask here before they move or replace a
node. Everything is read from the operator's own schema and tags, so an operator that torch gains tomorrow is answered
for as well; what has no schema (control flow, a called module) counts as having every effect.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Node

# Python functions on sizes, not on tensors; `getitem` takes one of several results.
_PURE_FUNCTIONS: tuple[Any, ...] = (
    *(operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod),
    *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.neg, operator.pow),
    *(torch.sym_int, torch.sym_float, torch.sym_max, torch.sym_min, torch.sym_not),
)


def is_aten(node: Node) -> bool:
    """Return whether `node` calls an operator with a schema."""
    return node.op == "call_function" and isinstance(node.target, OpOverload)


def is_control_flow(node: Node) -> bool:
    """Return whether `node` is a branch or a loop over graphs of its own."""
    return node.op == "call_function" and isinstance(node.target, HigherOrderOperator)


def is_computation(node: Node) -> bool:
    """Return whether `node` computes values, rather than naming, viewing or picking them."""
    if node.op in ("placeholder", "get_attr", "output") or node.target in _PURE_FUNCTIONS:
        return False
    return node.op != "call_module" and not is_view(node)


def is_view(node: Node) -> bool:
    """Return whether the result of `node` shares memory with an input that is left as it is."""
    if not is_aten(node):
        return False
    schema = _schema(node)
    returned = [value.alias_info for value in schema.returns]
    return bool(returned) and all(info is not None and not info.is_write for info in returned)


def find_written(node: Node) -> list[Node]:
    """Return the inputs that `node` writes into."""
    if not is_aten(node):
        return []
    written = []
    for index, argument in enumerate(_schema(node).arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            written += _nodes_in(value)
    return written


def is_random(node: Node) -> bool:
    """Return whether `node` draws from a generator, so that its place among the others that do matters."""
    return is_aten(node) and torch.Tag.nondeterministic_seeded in node.target.tags  # type: ignore[union-attr]


def is_opaque(node: Node) -> bool:
    """Return whether nothing is known about what `node` does: it stays where it is."""
    if node.op == "call_module" or is_control_flow(node) or node.op == "call_method":
        return True
    return node.op == "call_function" and not is_aten(node) and node.target not in _PURE_FUNCTIONS


def has_effects(node: Node) -> bool:
    """Return whether `node` must stay in its place among the other nodes for which this holds."""
    return is_opaque(node) or is_random(node) or bool(find_written(node))


def find_root(node: Node) -> Node:
    """Return the node whose memory `node` may be a view of; itself for what owns its memory."""
    while is_aten(node) or node.target is operator.getitem:
        source = _viewed(node)
        if source is None:
            return node
        node = source
    return node


def read_arguments(node: Node) -> dict[str, Any]:
    """Return all arguments of an operator by name, defaults filled in."""
    values = {}
    for index, argument in enumerate(_schema(node).arguments):
        if index < len(node.args):
            values[argument.name] = node.args[index]
        else:
            values[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return values


def find_line(node: Node) -> str:
    """Return where the user wrote `node`, as file:line; the module's path or the node's name where that is not
    recorded."""
    frames = [line.strip() for line in (node.stack_trace or "").splitlines() if line.strip().startswith("File ")]
    own = [frame for frame in frames if "/torch/" not in frame] or frames
    if not own:
        return _module_path(node) or node.name
    _, path, rest = own[-1].split('"', 2)
    return f"{path}:{rest.split('line ')[1].split(',')[0]}"


def _module_path(node: Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return next((path for path, *_ in reversed(list(stack.values())) if path), "")


def _schema(node: Node) -> Any:
    return node.target._schema  # type: ignore[union-attr]


def _viewed(node: Node) -> Node | None:
    if node.target is operator.getitem:
        return _first_node(node.args)
    schema = _schema(node)
    returned = {name for value in schema.returns if value.alias_info for name in value.alias_info.before_set}
    arguments = read_arguments(node)
    for argument in schema.arguments:
        info = argument.alias_info
        # A list of views, as `split` returns one, is written `Tensor(a -> *)`: the argument goes into the list.
        if info is not None and (returned & info.before_set or "*" in info.after_set):
            return _first_node([arguments[argument.name]])
    return None


def _first_node(values: Iterable[Any]) -> Node | None:
    return next(iter(_nodes_in(list(values))), None)


def _nodes_in(value: Any) -> list[Node]:
    if isinstance(value, Node):
        return [value]
    if isinstance(value, list | tuple):
        return [node for element in value for node in _nodes_in(element)]
    return []
