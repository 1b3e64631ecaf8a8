"""State that a recomputation must find as the first run found it, and leave as the first run left it.

A checkpointed function runs twice in a training step, and what it changes besides its result would change twice: the
running statistics of batch normalization, the power iteration of spectral normalization, a codebook that moves with
what it sees, a counter. `activations.py` remembers that state before the first run and runs the second one on copies of
it; afterwards everything is as the first run left it.

What is remembered: buffers, tensors and plain values of the modules that the function can reach (bound to it, among its
arguments, in its closure, or globals that it names), and tensors without gradients that it is given, closes over or
names. A tensor that takes part in gradients cannot be replaced by a copy, so a function that writes into one that it
was given is refused. Containers of Python objects are not remembered: what is appended to a list is appended twice.

Cost: a copy of each such tensor before the first run. Copies of large tensors are dropped right after it unless torch
counted a write; small copies stay, since the kernels of batch normalization do not count theirs.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deepseek.core.errors import ConfigError

# Copies up to this size are kept until the backward pass, whether or not a write was counted.
_SMALL_BYTES = 1 << 20


@dataclass(frozen=True, eq=False)
class _Slot:
    """A place that holds state: a name in a namespace, or a variable of a closure."""

    owner: dict[str, Any] | types.CellType
    name: str = ""

    def read(self) -> Any:
        return self.owner.cell_contents if isinstance(self.owner, types.CellType) else self.owner.get(self.name)

    def write(self, value: Any) -> None:
        if isinstance(self.owner, types.CellType):
            self.owner.cell_contents = value
        else:
            self.owner[self.name] = value


@dataclass(frozen=True)
class _Before:
    """The value of a variable before the first run."""

    original: Any
    num_writes: int
    copy: Tensor | None
    """Of a tensor, while it may have to be put back."""

    def is_as_it_was(self, now: Any) -> bool:
        return now is self.original and _count_writes(now) == self.num_writes

    def restore(self) -> Any:
        """Return a value for one repetition, which may write into it."""
        return self.original if self.copy is None else self.copy.clone()


class RecomputedState(AbstractContextManager[None]):
    """One call of a checkpointed function, which can be repeated `with state:` on what the first run found."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        leaves, self._spec = pytree.tree_flatten((args, dict(kwargs)))
        self._function = function
        self._repeated: dict[int, Any] = {}
        plain, bound = _unwrap(function)
        self._modules = _find_modules(pytree.tree_leaves([_find_outer_values(plain), bound, leaves]))
        self._slots = {slot: _look_at(slot.read()) for slot in [*_find_slots(self._modules), *_find_outer_slots(plain)]}
        self._held = {index: _look_at(leaf) for index, leaf in enumerate(leaves) if _is_state(leaf)}
        self.given: list[Any] = [None if index in self._held else leaf for index, leaf in enumerate(leaves)]
        """The arguments for `run`, without those that are state."""
        self._num_writes = [_count_writes(leaf) for leaf in self.given]

    def run(self, *given: Any) -> Any:
        """Call the function."""
        leaves = list(given)
        for index, before in self._held.items():
            leaves[index] = self._repeated.get(index, before.original)
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return self._function(*args, **kwargs)

    def forget_unchanged(self) -> None:
        """After the first run, drop what is not needed again; raise `ConfigError` where an input was written to."""
        for leaf, num_writes in zip(self.given, self._num_writes, strict=True):
            if _count_writes(leaf) != num_writes:
                raise ConfigError(
                    f"{_name_of(self._function)} writes into a tensor of shape {tuple(leaf.shape)} that it was given, "
                    "so that its second run would begin from changed values; let it write into a copy (x = x.clone())"
                )
        self._slots = {
            slot: before
            for slot, before in self._slots.items()
            if slot.name == "training" or _is_small(before.copy) or not before.is_as_it_was(slot.read())
        }
        for index, before in self._held.items():
            if not _is_small(before.copy) and before.is_as_it_was(before.original):
                self._held[index] = replace(before, copy=None)

    def __enter__(self) -> None:
        """Put back what the first run found."""
        self._now = [(slot, slot.read()) for slot in self._slots]
        namespaces = [namespace for module in self._modules for namespace in (vars(module), module._buffers)]
        self._namespaces = [(namespace, dict(namespace)) for namespace in namespaces]
        self._refuse_late_writes()
        befores = [*self._slots.values(), *self._held.values()]
        restored = {id(before.original): before.restore() for before in befores}  # one tensor may be in several places
        self._repeated = {index: restored[id(before.original)] for index, before in self._held.items()}
        for slot, before in self._slots.items():
            slot.write(restored[id(before.original)])

    def __exit__(self, *_: object) -> None:
        """Leave everything as it was when the repetition began."""
        self._repeated = {}
        for slot, value in self._now:
            slot.write(value)
        for namespace, kept in self._namespaces:
            for name in namespace.keys() - kept.keys():
                del namespace[name]
            namespace.update(kept)
        self._now, self._namespaces = [], []

    def _refuse_late_writes(self) -> None:
        """Raise `ConfigError` where an argument that was not copied has been written to since the first run."""
        for before in self._held.values():
            if before.copy is None and not before.is_as_it_was(before.original):
                raise ConfigError(
                    f"a tensor of shape {tuple(before.original.shape)} that {_name_of(self._function)} was given was "
                    "written to before the backward pass, which needs it; write into it after backward, or pass a copy"
                )


def _find_modules(values: Iterable[Any]) -> list[nn.Module]:
    roots = [value for value in values if isinstance(value, nn.Module)]
    return list(dict.fromkeys(module for root in roots for module in root.modules()))


def _find_slots(modules: Sequence[nn.Module]) -> Iterator[_Slot]:
    for module in modules:
        yield from (_Slot(module._buffers, name) for name, value in module._buffers.items() if _is_state(value))
        yield from (_Slot(vars(module), name) for name, value in vars(module).items() if _is_state_or_plain(value))


def _find_outer_slots(plain: Callable[..., Any]) -> Iterator[_Slot]:
    """Find variables of the closure and globals that a plain function names, where they hold state."""
    slots = [_Slot(cell) for cell in getattr(plain, "__closure__", None) or () if _has_value(cell)]
    if isinstance(plain, types.FunctionType):
        slots += [_Slot(plain.__globals__, name) for name in plain.__code__.co_names]
    yield from (slot for slot in slots if _is_state_or_plain(slot.read()))


def _find_outer_values(plain: Callable[..., Any]) -> list[Any]:
    """Find what a plain function, or a module, reaches beside its arguments."""
    cells = [cell.cell_contents for cell in getattr(plain, "__closure__", None) or () if _has_value(cell)]
    if not isinstance(plain, types.FunctionType):
        return [plain, *cells]
    return [*cells, *(plain.__globals__.get(name) for name in plain.__code__.co_names)]


def _unwrap(function: Callable[..., Any]) -> tuple[Callable[..., Any], list[Any]]:
    """Return the function inside of bound methods and partial functions, and what it is bound to."""
    bound: list[Any] = []
    while isinstance(function, functools.partial | types.MethodType):
        if isinstance(function, types.MethodType):
            bound.append(function.__self__)
            function = function.__func__
        else:
            bound += [*function.args, *function.keywords.values()]
            function = function.func
    return function, bound


def _has_value(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - an empty cell raises
    except ValueError:
        return False
    return True


def _look_at(value: Any) -> _Before:
    return _Before(value, _count_writes(value), value.detach().clone() if _is_state(value) else None)


def _is_state(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.requires_grad


def _is_state_or_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str) or _is_state(value)


def _is_small(copy: Tensor | None) -> bool:
    return copy is not None and copy.nbytes <= _SMALL_BYTES


def _count_writes(value: Any) -> int:
    """Writes that torch counted; tensors of inference mode cannot be written to where gradients are recorded."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", repr(function))
