"""What two branches (or two iterations of a loop) agree on: one description that both sides' values can take.

A graph has one type per value, Python has one per branch. `Merger.merge` compares the values of two branches leaf by
leaf and describes what both become; `flatten` brings a branch's values into that form as a list of fresh tensors, and
`rebuild` makes Python values of it again. Leaves that are equal Python values stay Python. Numbers that differ become
`Number`s of the graph: bool, int64 or float64, whatever tensors are at hand. Types of tensors are promoted as torch
promotes them. Shapes must be equal: broadcasting one branch to the other's shape would change what a later `sum` says.
Containers keep their class and the order of their keys.

Everything here is traced by Dynamo, hence the plain style: tuples, loops and isinstance.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepseek.compiler.jit.shared_names import INTERNAL, RESULT_NAME
from deepseek.compiler.jit.tracing.python_numbers import Number, as_tensor, is_number, number_dtype
from deepseek.compiler.jit.tracing.sites import Site, refuse
from deepseek.compiler.jit.tracing.speculation import HOLDER, SHARED

RETURN_ONE_STRUCTURE = (
    "a graph can choose between tensors and numbers of one structure; return the same structure on both sides"
)
PLAIN = (str, bytes, torch.dtype, torch.device, torch.Size, type(None))


class Undefined:
    """The value of a variable that has none yet."""

    def __repr__(self) -> str:
        return "undefined"


UNDEFINED = Undefined()


class Leaf:
    """A tensor in both branches: its type, shape and device, and whether both lay it out in memory alike.

    `is_number` says that it stands for a Python number; `sources` are the sides' tensors where Python would give one
    that shares its memory, and the graph gives a copy. `zeros` stand for the value on the side that has none, if
    `is_one_sided`.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        shape: Sequence[Any],
        device: torch.device,
        is_contiguous: bool,
        is_number: bool,
        sources: tuple[Tensor, ...] = (),
        is_one_sided: bool = False,
    ) -> None:
        self.dtype = dtype
        self.shape = tuple(shape)  # of numbers and symbols, which a branch takes in, unlike a size
        self.device = device
        self.is_contiguous = is_contiguous
        self.is_number = is_number
        self.sources = sources
        self.is_one_sided = is_one_sided
        self.zeros: Tensor | None = None


class Constant:
    """The same value in both branches: a Python value, or an object from outside that neither touches."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Container:
    """A tuple, list, dict or dataclass in both branches; `kind` rebuilds it, `keys` name its children."""

    def __init__(self, kind: type, keys: list[Any] | None, children: list[Form]) -> None:
        self.kind = kind
        self.keys = keys
        self.children = children


Form = Leaf | Constant | Container


def is_traced(value: Any) -> bool:
    """Return whether `value` is a tensor or number that is not known yet, because a graph is being made."""
    return isinstance(value, (Tensor, Number)) and torch.compiler.is_compiling()


class Merger:
    """Merges the values of two sides of the tensor condition at `site`; numbers become tensors on `device`."""

    def __init__(self, site: Site, device: torch.device, *, is_loop: bool = False) -> None:
        self.site = site
        self.is_loop = is_loop  # the first side is what goes into an iteration
        self.device = device
        self.results: Any = None  # of both sides

    def merge_variables(self, first: Sequence[Any], second: Sequence[Any], names: tuple[str, ...]) -> Container:
        """Return the form of all variables."""
        lasting = [index for index in range(len(names)) if names[index] != RESULT_NAME]
        self.results = ([first[index] for index in lasting], [second[index] for index in lasting])
        forms = [self.merge(first[index], second[index], names[index]) for index in range(len(names))]
        return Container(tuple, None, forms)

    def merge(self, first: Any, second: Any, name: str) -> Form:  # noqa: PLR0911 - a table
        """Return the form that both values can take; refuses with the variable's `name` where there is none."""
        if not isinstance(first, tuple) and first is second:
            return Constant(first)  # neither side touches it
        if first is UNDEFINED or second is UNDEFINED:
            return self._merge_undefined(first, second, name)
        if isinstance(first, Tensor) or isinstance(second, Tensor):
            return self._merge_tensors(first, second, name)
        if is_number(first) and is_number(second):
            return self._merge_numbers(first, second)
        if has_children(first) and has_children(second):
            return self._merge_containers(first, second, name)
        if isinstance(first, set) and isinstance(second, set) and first == second:
            return Constant(first)
        if isinstance(first, PLAIN) and isinstance(second, PLAIN) and first == second:
            return Constant(first)
        self._refuse_sides(first, second, name, RETURN_ONE_STRUCTURE)
        return Constant(None)

    def _merge_undefined(self, first: Any, second: Any, name: str) -> Form:
        known = second if first is UNDEFINED else first
        if not name.startswith(INTERNAL) and self.site.kind == "if":
            refuse(
                self.site.key,
                None,
                f"{name} gets a value on only one side of a tensor condition and is read afterwards",
                f"give {name} a value before the if",
            )
        return self.fill(known, name)

    def fill(self, known: Any, name: str) -> Form:
        """Return the form of a value whose other side is empty: every number in it becomes a tensor."""
        if isinstance(known, Number) or is_number(known):
            return Leaf(number_dtype(known), (), self.device, is_contiguous=True, is_number=True, is_one_sided=True)
        if isinstance(known, Tensor):
            sources = (known,) if self._is_shared(known, name) else ()
            return Leaf(known.dtype, known.shape, known.device, False, False, sources, is_one_sided=True)
        if has_children(known):
            keys = keys_of(known)
            children = [self.fill(child, name) for child in children_of(known, keys)]
            return Container(type(known), keys, children)
        return Constant(known)

    def _merge_tensors(self, first: Any, second: Any, name: str) -> Form:
        if not isinstance(first, Tensor) or not isinstance(second, Tensor):
            tensor, other = (first, second) if isinstance(first, Tensor) else (second, first)
            if not is_number(other) or tensor.dim() > 0:
                self._refuse_sides(
                    first, second, name, "make both tensors of one shape, for example with torch.zeros_like"
                )
            dtype = _with_number(tensor.dtype, other)
            return Leaf(dtype, tensor.shape, tensor.device, is_contiguous=True, is_number=False)
        if tuple(first.shape) != tuple(second.shape):
            self._refuse_sides(
                first,
                second,
                name,
                "a graph has one shape per value; make the shapes equal on both sides,"
                " for example with expand or padding",
            )
        if first.device != second.device:
            refuse(
                self.site.key,
                None,
                f"{name} is on {first.device} on one side of a tensor condition and on {second.device} on the other",
                "move it to one device in both",
            )
        dtype = torch.promote_types(first.dtype, second.dtype)
        is_shared = self._is_shared(second, name) or (not self.is_loop and self._is_shared(first, name))
        sources = (first, second) if is_shared else ()
        return Leaf(dtype, first.shape, first.device, first.stride() != second.stride(), False, sources)

    def _is_shared(self, value: Tensor, name: str) -> bool:
        """Return whether somebody else will hold the value's memory when the variable `name` holds it."""
        if name == RESULT_NAME:
            return SHARED(value, (), None)
        is_leaving = self.site.names is None and self.site.kind == "if"
        return SHARED(value, self.results, None if is_leaving else (self.site.names or ()))

    def _merge_numbers(self, first: Any, second: Any) -> Form:
        is_known = not isinstance(first, Number) and not isinstance(second, Number)
        if is_known and type(first) is type(second) and (first == second or (first != first and second != second)):  # noqa: PLR0124
            return Constant(first)
        dtype = torch.promote_types(number_dtype(first), number_dtype(second))
        return Leaf(dtype, (), self.device, is_contiguous=True, is_number=True)

    def _merge_containers(self, first: Any, second: Any, name: str) -> Form:
        for side in (first, second):
            is_mutable = isinstance(side, (list, dict)) and self.site.names is not None and name in self.site.names
            holder = HOLDER(side, name) if is_mutable else ""
            if holder != "":
                refuse(
                    self.site.key,
                    None,
                    f"{name} is one {type(side).__name__} with that of {holder}, and a graph would make it another",
                    f"give a copy, for example {type(side).__name__}({holder})",
                )
        if type(first) is not type(second):
            self._refuse_sides(first, second, name, "a graph has one structure per value; return one class of objects")
        keys = keys_of(first)
        if keys is None:
            if len(first) != len(second):
                self._refuse_sides(
                    first, second, name, "a graph has one structure per value; return as many items on both sides"
                )
        elif keys != keys_of(second):
            refuse(
                self.site.key,
                None,
                f"{name} has the keys {keys} on one side of a tensor condition and {keys_of(second)} on the other",
                "a graph has one structure per value; give both sides the same keys in one order",
            )
        ones, others = children_of(first, keys), children_of(second, keys)
        labels = list(range(len(ones))) if keys is None else keys
        children = [self.merge(ones[index], others[index], f"{name}[{labels[index]!r}]") for index in range(len(ones))]
        return Container(type(first), keys, children)

    def _refuse_sides(self, first: Any, second: Any, name: str, hint: str) -> None:
        refuse(
            self.site.key,
            None,
            f"{name} is {describe(first)} on one side of a tensor condition and {describe(second)} on the other",
            hint,
        )


def _with_number(dtype: torch.dtype, number: Any) -> torch.dtype:
    """Return the type of a tensor's values beside a Python number, as in `tensor + number`."""
    kind = number_dtype(number)
    if kind == torch.float64 and not (dtype.is_floating_point or dtype.is_complex):
        return torch.get_default_dtype()
    return torch.int64 if dtype == torch.bool and kind != torch.bool else dtype


def is_dataclass(value: Any) -> bool:
    """Return whether it is an object of a dataclass, such as the outputs of transformers."""
    return hasattr(type(value), "__dataclass_fields__")


def has_children(value: Any) -> bool:
    """Return whether it is a container that a graph can take apart and put together again."""
    kind = type(value)
    if kind in (tuple, list, dict, collections.OrderedDict):
        return True
    return (isinstance(value, tuple) and hasattr(kind, "_fields")) or is_dataclass(value)


def keys_of(value: Any) -> list[Any] | None:
    """Return the keys of a container's children; none where they are counted."""
    if isinstance(value, dict):
        return list(value.keys())
    if is_dataclass(value):
        return list(type(value).__dataclass_fields__)
    return None


def children_of(value: Any, keys: list[Any] | None) -> list[Any]:
    """Return a container's children in order."""
    if keys is None:
        return list(value)
    if isinstance(value, dict):
        return [value[key] for key in keys]
    return [getattr(value, key) for key in keys]


def describe(value: Any) -> str:
    """Return a value in a few words, for messages."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {[int(size) for size in value.shape]} and {value.dtype}"
    if isinstance(value, Number):
        return f"a number of {value.tensor.dtype}"
    if value is None or is_number(value) or isinstance(value, str):
        return repr(value)
    if isinstance(value, (tuple, list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def flatten(form: Form, value: Any) -> list[Tensor]:
    """Return the tensors of `value` in the order of `form`, each fresh: nothing that goes in may come out of a
    branch."""
    if isinstance(form, Constant):
        return []
    if isinstance(form, Leaf):
        return [_fresh(form, value)]
    values = [UNDEFINED] * len(form.children) if value is UNDEFINED else children_of(value, form.keys)
    leaves = []
    for index in range(len(form.children)):
        leaves.extend(flatten(form.children[index], values[index]))
    return leaves


def _fresh(form: Leaf, value: Any) -> Tensor:
    if value is UNDEFINED:
        return sample_of(form) if form.zeros is None else form.zeros.clone()
    if not isinstance(value, Tensor):
        return as_tensor(value, form.dtype, form.device).clone()
    if value.dtype != form.dtype:
        value = value.to(form.dtype)
    fresh: Tensor = value.clone(memory_format=torch.contiguous_format) if form.is_contiguous else value.clone()
    return fresh


def sample_of(leaf: Leaf) -> Tensor:
    """Return zeros in the form of a tensor that a branch gives."""
    return torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device)


def provide_zeros(leaves: list[Leaf]) -> None:
    """Make what stands for missing values ahead of the branches, which cannot build a tensor of a symbolic size."""
    for leaf in leaves:
        if leaf.is_one_sided:
            leaf.zeros = sample_of(leaf)


def rebuild(form: Form, leaves: list[Tensor]) -> Any:
    """Return the Python value of `form` whose tensors are taken from the front of `leaves`."""
    if isinstance(form, Constant):
        return form.value
    if isinstance(form, Leaf):
        leaf = leaves.pop(0)
        return Number(leaf) if form.is_number else leaf
    return assemble(form.kind, form.keys, [rebuild(child, leaves) for child in form.children])


def assemble(kind: type, keys: list[Any] | None, children: list[Any]) -> Any:
    """Return a container of a class with these children."""
    if keys is not None:
        named = dict(zip(keys, children, strict=True))
        if kind is dict:
            return named
        if kind is collections.OrderedDict:
            return collections.OrderedDict(named)
        return kind(**named)
    if kind is list:
        return children
    return kind(*children) if hasattr(kind, "_fields") else tuple(children)


def publish(value: Any) -> Any:
    """Return a result for the caller: numbers that the graph computes leave it as tensors without dimensions."""
    if isinstance(value, Number):
        return value.tensor
    if not _holds_number(value):
        return value
    keys = keys_of(value)
    return assemble(type(value), keys, [publish(child) for child in children_of(value, keys)])


def _holds_number(value: Any) -> bool:
    if isinstance(value, Number):
        return True
    return has_children(value) and any(_holds_number(child) for child in children_of(value, keys_of(value)))


def has_leaves(form: Form) -> bool:
    """Return whether any tensor is in it."""
    if isinstance(form, Container):
        return any(has_leaves(child) for child in form.children)
    return isinstance(form, Leaf)


def leaves_of(form: Form) -> list[Leaf]:
    """Return the tensors of a form, in order."""
    if isinstance(form, Leaf):
        return [form]
    children: list[Form] = form.children if isinstance(form, Container) else []
    return [leaf for child in children for leaf in leaves_of(child)]
