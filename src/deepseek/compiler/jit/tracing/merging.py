"""What two branches (or two turns of a loop) agree on: one description that both sides' values can take.

A graph has one type per value, Python has one per branch. `merge` compares the values of two branches leaf by leaf
and describes what both become; `flatten` brings a branch's values into that form as a list of fresh tensors, and
`rebuild` makes Python values of it again. Leaves that are equal Python values stay Python. Numbers that differ become
tensors of no dimension: bool, int64, or the widest floating type among the tensors at hand, since a float32 copy of a
Python float would lose what a float64 program kept. Types are promoted as torch promotes them. Shapes must be equal:
broadcasting one branch to the other's shape would change what a later `sum` says.

Everything here is traced by Dynamo, hence the plain style: tuples, loops and isinstance.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepseek.compiler.jit.tracing.sites import Site, refuse

INTERNAL = "_ds_"  # variables that the rewriting itself made; they may be empty in one branch


class Undefined:
    """The value of a variable that has none yet."""

    def __repr__(self) -> str:
        return "undefined"


UNDEFINED = Undefined()


class Leaf:
    """A tensor in both branches: its type, shape and device, and whether their memory layouts differ."""

    def __init__(self, dtype: torch.dtype, shape: Any, device: torch.device, is_contiguous: bool) -> None:
        self.dtype = dtype
        self.shape = shape
        self.device = device
        self.is_contiguous = is_contiguous


class Constant:
    """The same value in both branches: a Python value, or a tensor from outside that neither touches."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Node:
    """A tuple, list or dict in both branches; `kind` rebuilds it."""

    def __init__(self, kind: Any, keys: Any, children: Any) -> None:
        self.kind = kind
        self.keys = keys
        self.children = children


Form = Leaf | Constant | Node


def is_traced(value: Any) -> bool:
    """Whether `value` is a tensor whose number is not known yet, because a graph is being made."""
    return isinstance(value, Tensor) and torch.compiler.is_compiling()


def is_number(value: Any) -> bool:
    """Whether it is a Python number that a tensor can stand for."""
    return isinstance(value, (bool, int, float))


def choose_float(like: Any) -> torch.dtype:
    """The floating type for Python floats that become tensors: the widest among the tensors at hand."""
    dtype = None
    for value in like:
        if isinstance(value, Tensor) and value.is_floating_point():
            dtype = value.dtype if dtype is None else torch.promote_types(dtype, value.dtype)
    return torch.get_default_dtype() if dtype is None else dtype


def number_dtype(value: Any, floating: torch.dtype) -> torch.dtype:
    if isinstance(value, bool):
        return torch.bool
    return torch.int64 if isinstance(value, int) else floating


def merge(first: Any, second: Any, name: str, site: Site, like: Any, device: torch.device) -> Form:  # noqa: PLR0911 - a table
    """The form that both values can take; refuses with the variable's `name` where there is none."""
    if first is UNDEFINED or second is UNDEFINED:
        return _merge_undefined(first, second, name, site, like, device)
    if isinstance(first, Tensor) and first is second:
        return Constant(first)  # neither side touches it
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return _merge_tensors(first, second, name, site, like, device)
    if is_number(first) and is_number(second):
        return _merge_numbers(first, second, like, device)
    if isinstance(first, (tuple, list)) and isinstance(second, (tuple, list)):
        return _merge_sequences(first, second, name, site, like, device)
    if isinstance(first, dict) and isinstance(second, dict):
        return _merge_dicts(first, second, name, site, like, device)
    if first is second or _are_equal(first, second):
        return Constant(first)
    refuse(
        site.key,
        None,
        f"{name} is {describe(first)} on one side of a tensor condition and {describe(second)} on the other",
        "a graph can choose between tensors and numbers of one structure; return the same structure on both sides",
    )
    return Constant(None)


def _merge_undefined(first: Any, second: Any, name: str, site: Site, like: Any, device: torch.device) -> Form:
    if first is UNDEFINED and second is UNDEFINED:
        return Constant(UNDEFINED)
    known = second if first is UNDEFINED else first
    if not name.startswith(INTERNAL) and site.kind == "if":
        refuse(
            site.key,
            None,
            f"{name} gets a value on only one side of a tensor condition and is read afterwards",
            f"give {name} a value before the if",
        )
    return fill(known, name, site, like, device)


def fill(known: Any, name: str, site: Site, like: Any, device: torch.device) -> Form:
    """The form of a value whose other side is empty: every number in it becomes a tensor."""
    if is_number(known):
        return Leaf(number_dtype(known, choose_float(like)), (), device, True)
    if isinstance(known, Tensor):
        return Leaf(known.dtype, known.shape, known.device, False)
    if isinstance(known, (tuple, list)):
        return Node(type(known), None, [fill(child, name, site, like, device) for child in known])
    if isinstance(known, dict):
        keys = list(known.keys())
        return Node(dict, keys, [fill(known[key], name, site, like, device) for key in keys])
    return merge(known, known, name, site, like, device)


def _merge_tensors(first: Any, second: Any, name: str, site: Site, like: Any, device: torch.device) -> Form:
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        tensor, other = (first, second) if isinstance(first, Tensor) else (second, first)
        if not is_number(other) or tensor.dim() > 0:
            refuse(
                site.key,
                None,
                f"{name} is {describe(first)} on one side of a tensor condition and {describe(second)} on the other",
                "make both tensors of one shape, for example with torch.zeros_like or torch.full_like",
            )
        return Leaf(_with_number(tensor.dtype, other), tensor.shape, tensor.device, True)
    if tuple(first.shape) != tuple(second.shape):
        refuse(
            site.key,
            None,
            f"{name} is {describe(first)} on one side of a tensor condition and {describe(second)} on the other",
            "a graph has one shape per value; make the shapes equal on both sides, for example with expand or padding",
        )
    if first.device != second.device:
        refuse(
            site.key,
            None,
            f"{name} is on {first.device} on one side of a tensor condition and on {second.device} on the other",
            "move it to one device in both",
        )
    dtype = torch.promote_types(first.dtype, second.dtype)
    return Leaf(dtype, first.shape, first.device, first.stride() != second.stride())


def _with_number(dtype: torch.dtype, number: Any) -> torch.dtype:
    """The type of a tensor's values beside a Python number, as in `tensor + number`."""
    if isinstance(number, float) and not (dtype.is_floating_point or dtype.is_complex):
        return torch.get_default_dtype()
    return torch.int64 if dtype == torch.bool and not isinstance(number, bool) else dtype


def _merge_numbers(first: Any, second: Any, like: Any, device: torch.device) -> Form:
    if type(first) is type(second) and (first == second or (first != first and second != second)):  # noqa: PLR0124
        return Constant(first)
    floating = choose_float(like)
    dtype = torch.promote_types(number_dtype(first, floating), number_dtype(second, floating))
    return Leaf(dtype, (), device, True)


def _merge_sequences(first: Any, second: Any, name: str, site: Site, like: Any, device: torch.device) -> Form:
    if len(first) != len(second) or type(first) is not type(second):
        refuse(
            site.key,
            None,
            f"{name} is {describe(first)} on one side of a tensor condition and {describe(second)} on the other",
            "a graph has one structure per value; return as many items on both sides",
        )
    children = [
        merge(first[index], second[index], f"{name}[{index}]", site, like, device) for index in range(len(first))
    ]
    return Node(type(first), None, children)


def _merge_dicts(first: Any, second: Any, name: str, site: Site, like: Any, device: torch.device) -> Form:
    keys = list(first.keys())
    if len(keys) != len(second) or not all(key in second for key in keys):
        refuse(
            site.key,
            None,
            f"{name} has the keys {keys} on one side of a tensor condition and {list(second.keys())} on the other",
            "a graph has one structure per value; give both sides the same keys",
        )
    children = [merge(first[key], second[key], f"{name}[{key!r}]", site, like, device) for key in keys]
    return Node(dict, keys, children)


def _are_equal(first: Any, second: Any) -> bool:
    plain = (str, bytes, torch.dtype, torch.device, torch.Size, type(None))
    return isinstance(first, plain) and isinstance(second, plain) and first == second


def describe(value: Any) -> str:
    """A value in a few words, for messages."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {[int(size) for size in value.shape]} and {value.dtype}"
    if value is None or is_number(value) or isinstance(value, str):
        return repr(value)
    if isinstance(value, (tuple, list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def flatten(form: Form, value: Any) -> list[Tensor]:
    """The tensors of `value` in the order of `form`, each fresh: nothing that goes in may come out of a branch."""
    if isinstance(form, Constant):
        return []
    if isinstance(form, Leaf):
        return [_fresh(form, value)]
    leaves = []
    for index in range(len(form.children)):
        child = UNDEFINED
        if value is not UNDEFINED:
            child = value[index] if form.keys is None else value[form.keys[index]]
        leaves.extend(flatten(form.children[index], child))
    return leaves


def _fresh(form: Leaf, value: Any) -> Tensor:
    if value is UNDEFINED:
        return torch.zeros(form.shape, dtype=form.dtype, device=form.device)
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=form.dtype, device=form.device)
    if value.dtype != form.dtype:
        value = value.to(form.dtype)
    fresh: Tensor = value.clone(memory_format=torch.contiguous_format) if form.is_contiguous else value.clone()
    return fresh


def rebuild(form: Form, leaves: list[Tensor]) -> Any:
    """The Python value of `form` whose tensors are taken from the front of `leaves`."""
    if isinstance(form, Constant):
        return form.value
    if isinstance(form, Leaf):
        return leaves.pop(0)
    children = [rebuild(child, leaves) for child in form.children]
    if form.keys is not None:
        return dict(zip(form.keys, children, strict=True))
    if form.kind is list:
        return children
    if hasattr(form.kind, "_fields"):
        return form.kind(*children)
    return tuple(children)


def has_leaves(form: Form) -> bool:
    """Whether any tensor is in it."""
    if isinstance(form, Node):
        return any(has_leaves(child) for child in form.children)
    return isinstance(form, Leaf)


def leaves_of(form: Form) -> list[Leaf]:
    """The tensors of a form, in order."""
    if isinstance(form, Leaf):
        return [form]
    children: list[Form] = form.children if isinstance(form, Node) else []
    return [leaf for child in children for leaf in leaves_of(child)]
