"""Numbers taken out of tensors, indices that are not known yet, and changes: `out[i] = v`, `x += v`, `found.append(v)`.

Outside of tensor conditions a change is made in place, as in Python. Inside of one it is made on a copy that goes on
under the variable's name, if that variable alone holds what is changed (`HOLDER`); if somebody else would see the
change, it is refused.
"""

from __future__ import annotations

import builtins
import collections
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deepseek.compiler.jit.shared_names import BINARY
from deepseek.compiler.jit.tracing.conditions import OUTSIDE, ConditionOperators
from deepseek.compiler.jit.tracing.indexing import as_indices, is_index, is_plain_index
from deepseek.compiler.jit.tracing.merging import UNDEFINED, is_traced
from deepseek.compiler.jit.tracing.python_numbers import Number, as_number, as_tensor, beside, is_number, number_dtype
from deepseek.compiler.jit.tracing.sites import CHANGES_OUTSIDE, CHANGES_OUTSIDE_HINT, Site, note_write, refuse
from deepseek.compiler.jit.tracing.speculation import HOLDER, OUTSIDE_OF_FUNCTION

NUMBERS: dict[str, Callable[[Any], Any]] = {"int": int, "float": float, "bool": bool}
CHOOSERS: dict[str, tuple[Callable[..., Any], Callable[..., Tensor]]] = {
    "min": (builtins.min, torch.minimum),
    "max": (builtins.max, torch.maximum),
}
CONTAINERS = (list, dict, set, collections.OrderedDict, collections.deque)


class Values(ConditionOperators):
    """Operators on values: numbers, tensors and containers."""

    # ---- values that Python would take out of a tensor

    def to_number(self, kind: str, value: Any) -> Any:
        """`int(value)`, `float(value)` or `bool(value)`; of a traced tensor, a number of the graph without gradient."""
        if not is_traced(value):
            return NUMBERS[kind](value)
        number = as_number(value) if isinstance(value, Tensor) else value
        tensor = number.tensor
        if kind == "bool":
            return Number(tensor if tensor.dtype == torch.bool else tensor != 0)
        return Number(tensor.to(torch.int64 if kind == "int" else torch.float64))

    def item(self, value: Any) -> Any:
        return as_number(value) if isinstance(value, Tensor) and is_traced(value) else value.item()

    def is_instance(self, value: Any, kinds: Any) -> bool:
        """`isinstance(value, kinds)`; a number of the graph is the Python number that it stands for."""
        return isinstance(_example_of(value), kinds)

    def type_of(self, value: Any) -> type:
        """`type(value)`; a number of the graph is the Python number that it stands for."""
        return type(_example_of(value))

    def is_truth(self, value: Any, wanted: bool) -> Any:
        """`value is True` or `value is False`; a bool of the graph is the one that it stands for."""
        if isinstance(value, Number) and value.tensor.dtype == torch.bool:
            return value if wanted else Number(torch.logical_not(value.tensor))
        return value is wanted

    def choose(self, name: str, *values: Any) -> Any:
        """`min` and `max` of values among which there may be numbers of the graph."""
        plain, of_tensors = CHOOSERS[name]
        if len(values) == 1 and type(values[0]) in (list, tuple):
            values = tuple(values[0])
            if len(values) == 0:
                return plain(values)
        if len(values) == 1 or not any(isinstance(value, Number) and is_traced(value) for value in values):
            return plain(*values)
        result = values[0]
        for value in values[1:]:
            if isinstance(result, Tensor) or isinstance(value, Tensor):
                tensors = [operand for operand in (result, value) if isinstance(operand, Tensor)]
                pair = [_beside_all(side, tensors) for side in (result, value)]
                result = of_tensors(pair[0], pair[1])
            else:
                left, right = result + 0, value + 0  # a bool is the number that it is
                difference = (left if isinstance(left, Number) else right) * 0
                left, right = left + difference, right + difference
                result = Number(of_tensors(left.tensor, right.tensor))
        return result

    def power(self, *values: Any) -> Any:
        """`pow(base, exponent, modulus)`, which Python computes: a graph has no such power."""
        return pow(*(value.known() if isinstance(value, Number) else value for value in values))

    def sorted(self, values: Any, *, key: Any = None, reverse: bool = False) -> Any:
        """`sorted(values)`; numbers of the graph of one kind (whole or not) are sorted in the graph."""
        is_plain = not isinstance(values, (list, tuple)) or not any(isinstance(value, Number) for value in values)
        if is_plain or not torch.compiler.is_compiling():
            return builtins.sorted(values, key=key, reverse=reverse)
        numbers = [value + 0 for value in values if is_number(value)]  # a bool is the number that it is
        is_of_one_kind = len({number_dtype(number) for number in numbers}) == 1 and len(numbers) == len(values)
        if key is not None or not is_of_one_kind:
            known = [value.known() if isinstance(value, Number) else value for value in values]
            return builtins.sorted(known, key=key, reverse=reverse)
        device = next(value.tensor.device for value in values if isinstance(value, Number))
        dtype = number_dtype(numbers[0])
        ordered = torch.stack([as_tensor(number, dtype, device) for number in numbers])
        ordered = torch.sort(ordered, stable=True, descending=reverse).values
        return [Number(ordered[index]) for index in builtins.range(len(numbers))]

    def tensor(self, function: Callable[..., Tensor], value: Any, *args: Any, **options: Any) -> Tensor:
        """`torch.tensor(value)` of one number of the graph; of anything else, torch's."""
        if not (isinstance(value, Number) and is_traced(value)):
            return function(value, *args, **options)
        dtype = options.get("dtype")
        if dtype is None:
            dtype = torch.get_default_dtype() if value.tensor.is_floating_point() else value.tensor.dtype
        return value.tensor.to(device=options.get("device"), dtype=dtype).clone()

    # ---- indices

    def get(self, value: Any, index: Any) -> Any:
        """`value[index]`, where the index may be a traced number."""
        if isinstance(value, (list, tuple, dict, str)):
            return value[index.known() if isinstance(index, Number) else index]
        index = _lower_index(index)
        if isinstance(value, Tensor) and is_traced(index) and is_index(index):
            return torch.ops.aten.index.Tensor(value, [index])
        if isinstance(value, Tensor) and isinstance(index, tuple) and is_plain_index(index):
            return torch.ops.aten.index.Tensor(value, as_indices(value, index))
        return value[index]

    def slice(self, start: Any, stop: Any, step: Any, site: Site) -> slice:
        """`start:stop:step` in brackets, which must be known: they decide about a shape."""
        if not isinstance(start, Number) and not isinstance(stop, Number) and not isinstance(step, Number):
            return builtins.slice(start, stop, step)
        if torch.compiler.is_compiling():
            if not site.is_native:
                refuse(
                    site.key,
                    self.depth,
                    "a slice ends at a number that the graph computes, which would decide about a shape",
                    "choose with a mask, for example torch.where(torch.arange(len(x)) < n, x, 0)",
                )
            torch._dynamo.graph_break()
        start, stop, step = [bound.__index__() if isinstance(bound, Number) else bound for bound in (start, stop, step)]
        return builtins.slice(start, stop, step)

    # ---- changes

    def set(self, value: Any, path: tuple[Any, ...], new: Any, name: str, site: Site) -> Any:
        """`value[index] = new` for the variable `name`; gives what it holds afterwards.

        `path` has the index, or, of `value["a"]["b"] = new`, all of them.
        """
        if isinstance(value, Tensor):
            value = self._own(value, name, site)
            self._store_at(value, path, lambda _: new)
            return value
        if len(path) > 1:
            inner = self.get(value, path[0])
            new = self.set(inner, path[1:], new, name, site)
            if not self._is_copied(inner):
                return value
        return self._store(self._own(value, name, site), path[0], new)

    def augment_item(self, operation: str, value: Any, path: tuple[Any, ...], other: Any, name: str, site: Site) -> Any:
        """`value[index] += other` for the variable `name`, in place as in Python; gives what it holds afterwards."""

        def add(item: Any) -> Any:
            is_number = isinstance(other, Number) and isinstance(item, Tensor)
            return BINARY[operation][1](item, beside(other, [item]) if is_number else other)

        if isinstance(value, Tensor):
            value = self._own(value, name, site)
            self._store_at(value, path, add)
            return value
        item = self.get(value, path[0])
        if len(path) > 1:
            new = self.augment_item(operation, item, path[1:], other, name, site)
            if not self._is_copied(item):
                return value
        else:
            new = add(self._own(item, name, site))
        return self._store(self._own(value, name, site), path[0], new)

    def _is_copied(self, value: Any) -> bool:
        """Return whether a change of a value is made on a copy, here in a tensor condition."""
        is_inside = self.depth != OUTSIDE and torch.compiler.is_compiling()
        return is_inside and (isinstance(value, Tensor) or type(value) in CONTAINERS)

    def _store_at(self, value: Tensor, path: tuple[Any, ...], change: Callable[[Any], Any]) -> None:
        """Change what stands at the end of `value[i][j]`, where each index but a mask gives a view of `value`."""
        item = self.get(value, path[0])
        if len(path) > 1:
            self._store_at(item, path[1:], change)
            if is_traced(path[0]) and is_index(path[0]):
                self._store(value, path[0], item)
        else:
            self._store(value, path[0], change(item))

    def _store(self, value: Any, index: Any, new: Any) -> Any:
        if not isinstance(value, Tensor):
            value[index] = new
            return value
        index = _lower_index(index)
        if isinstance(new, Number):
            new = as_tensor(new, value.dtype, value.device)
        has_traced = (is_traced(index) and is_index(index)) or (isinstance(index, tuple) and is_plain_index(index))
        if not has_traced:
            value[index] = new
            return value
        if not isinstance(new, Tensor):
            new = torch.full((), new, dtype=value.dtype, device=value.device)
        indices = as_indices(value, index if isinstance(index, tuple) else (index,))
        torch.ops.aten.index_put_(value, indices, new.to(value.dtype))
        return value

    def change(
        self, value: Any, path: tuple[Any, ...], method: str, name: str, site: Site, *args: Any, **options: Any
    ) -> Any:
        """`value.append(...)`, `value.add_(...)` as a statement; gives what the variable `name` holds afterwards.

        Of `value["a"].append(...)`, `path` has the indices.
        """
        if len(path) > 0:
            inner = self.get(value, path[0])
            new = self.change(inner, path[1:], method, name, site, *args, **options)
            if not self._is_copied(inner) or isinstance(value, Tensor):
                return value
            return self._store(self._own(value, name, site), path[0], new)
        is_memory = isinstance(value, Tensor) and method.endswith("_")
        if not is_memory and type(value) not in CONTAINERS:
            self.method(value, method)(*args, **options)
            return value
        value = self._own(value, name, site)
        if type(value) is list and method == "sort":
            value[:] = self.sorted(value, **options)
        else:
            getattr(value, method)(*args, **options)
        return value

    def augment(self, operation: str, value: Any, other: Any, name: str, site: Site) -> Any:
        """`value += other`: in place as in Python, on a copy inside of a tensor condition."""
        in_place = BINARY[operation][1]
        if isinstance(value, Tensor):
            value = self._own(value, name, site)
            return in_place(value, beside(other, [value]) if isinstance(other, Number) else other)
        if type(value) in CONTAINERS:
            value = self._own(value, name, site)
        return in_place(value, other)

    def _own(self, value: Any, name: str, site: Site) -> Any:
        """Return the object that a change of `name` may modify: the value, or its copy in a tensor condition."""
        if self.depth == OUTSIDE or not torch.compiler.is_compiling():
            return value  # Python makes the change
        if not isinstance(value, Tensor) and type(value) not in CONTAINERS:
            return value
        note_write(name)
        holder = HOLDER(value, name) if self.is_probing else ""
        if holder == OUTSIDE_OF_FUNCTION:
            refuse(site.key, self.depth, CHANGES_OUTSIDE, CHANGES_OUTSIDE_HINT)
        copied = f"{name}.clone()" if isinstance(value, Tensor) else f"{type(value).__name__}({name})"
        if holder == name:  # of the function that calls this one
            refuse(
                site.key,
                self.depth,
                f"{CHANGES_OUTSIDE}: the function that calls this one holds {name}, too",
                f"copy it before with {name} = {copied}, return it, and assign what the call gives",
            )
        if holder != "":
            refuse(
                site.key,
                self.depth,
                f"{CHANGES_OUTSIDE}: {holder} holds it beside {name}",
                f"copy it before with {name} = {copied}",
            )
        return value.clone() if isinstance(value, Tensor) else copy_container(value)

    def check(self, value: Any, name: str) -> Any:
        """Check a variable that may have no value yet."""
        if value is UNDEFINED:
            raise UnboundLocalError(f"cannot access local variable '{name}' where it is not associated with a value")
        return value

    def method(self, value: Any, name: str) -> Any:
        """Return the method to call; a mixin beside this one rewrites it."""
        return getattr(value, name)


def copy_container(value: Any) -> Any:
    """Return a container of the same class with the same items; by constructors, which the tracer follows."""
    if type(value) is list:
        return list(value)
    if type(value) is dict:
        return dict(value)
    if type(value) is set:
        return set(value)
    if type(value) is collections.OrderedDict:
        return collections.OrderedDict(value)
    return collections.deque(value, value.maxlen)


def _lower_index(index: Any) -> Any:
    """Return an index with tensors in place of numbers of the graph."""
    if isinstance(index, Number):
        return index.tensor if torch.compiler.is_compiling() else index.__index__()
    if isinstance(index, tuple):
        return tuple(_lower_index(part) if isinstance(part, Number) else part for part in index)
    return index


def _beside_all(value: Any, tensors: list[Tensor]) -> Tensor:
    if isinstance(value, Tensor):
        return value
    number = value if isinstance(value, Number) else Number(torch.tensor(value, device=tensors[0].device))
    return beside(number, tensors).to(tensors[0].device)


def _example_of(value: Any) -> Any:
    """Return `value`, or a Python number of the type that a number of the graph stands for."""
    if not isinstance(value, Number):
        return value
    if value.tensor.dtype == torch.bool:
        return True
    return 0.0 if value.tensor.is_floating_point() else 0
