"""The arguments of a call as `dynamic_graph` sees them: named leaves, the kind of call, and what the dims mean.

An argument may be left out, or be `None` in one call and a tensor in the next. Calls are therefore told apart by kind:
which leaves there are, and which of them are tensors of how many dims. What is learned from calls, above all which dims
vary, is learned for each kind by itself (`CallKind`); `execution.py` keeps its checks and the roles of outputs there.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from deepseek.compiler.dynamic_shapes.buckets import Way
from deepseek.compiler.dynamic_shapes.options import DynamicOptions
from deepseek.compiler.dynamic_shapes.padding import (
    InputRole,
    PaddingRefusedError,
    ShapeHistory,
    Shapes,
    find_input_roles,
    name_leaves,
    shapes_of,
)
from deepseek.core.errors import ConfigError

# Calls that may be unclear about which dims are lengths before that is refused.
_MAX_UNCLEAR = 8

KindKey = tuple[tuple[str, int | None], ...]
"""The name of each leaf with its number of dims; `None` for what is no tensor."""


@dataclass
class CallKind:
    """Knowledge of the calls of one kind."""

    num_calls: int = 0
    history: ShapeHistory = field(default_factory=ShapeHistory)
    roles: list[tuple[int, ...]] | None = None
    """The length dims of each output, once a piece was compared with the whole."""
    has_seen_lengths: bool = False
    """Whether a piece of another length than its batch was among those."""
    has_probed: bool = False
    num_unclear: int = 0
    checks: Counter[Way] = field(default_factory=Counter)


@dataclass(frozen=True)
class Call:
    """One call, taken apart into named leaves."""

    bound: inspect.BoundArguments
    names: list[str]
    leaves: list[Any]
    spec: Any
    shapes: Shapes
    key: KindKey
    kind: CallKind

    def rebuild(self, leaves: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return arguments as those of the call, with other leaves."""
        bound = inspect.BoundArguments(self.bound.signature, dict(pytree.tree_unflatten(leaves, self.spec)))
        return bound.args, bound.kwargs


class CallReader:
    """Takes the calls of one function apart, and remembers their kinds."""

    def __init__(self, function: Callable[..., Any], options: DynamicOptions, name: str) -> None:
        self._signature, self._options, self._name = inspect.signature(function), options, name
        self._kinds: dict[KindKey, CallKind] = {}

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Take a call apart and note its shapes."""
        bound = self._signature.bind(*args, **kwargs)
        names, leaves, spec = name_leaves(bound.arguments)
        shapes = shapes_of(leaves)
        key = tuple((name, None if shape is None else len(shape)) for name, shape in zip(names, shapes, strict=True))
        kind = self._kinds.setdefault(key, CallKind())
        kind.num_calls += 1
        kind.history.note(shapes)
        return Call(bound, names, leaves, spec, shapes, key, kind)

    def find_mask(self, call: Call) -> Tensor | None:
        """Return the mask of a call, if it has any position; raises `ConfigError` for one that is no (rows, length) of
        zeros and ones."""
        name = self._options.mask
        mask = call.leaves[call.names.index(name)] if name in call.names else None
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.is_complex():
            seen = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ConfigError(f"the mask {name!r} of {self._name} is {seen}; expected (rows, length) of zeros and ones")
        if mask.is_floating_point() and mask.numel() > 0 and not _is_zeros_and_ones(mask):
            raise ConfigError(
                f"the mask {name!r} of {self._name} is {mask.dtype} of numbers from {mask.min():g} to {mask.max():g}; "
                "expected (rows, length) of zeros and ones: ones where positions count, and not what is added to scores"
            )
        return mask if mask.numel() > 0 else None

    def find_input_roles(self, call: Call) -> list[InputRole] | None:
        """Say what the dims of all arguments mean; `None` while shapes do not tell, which is refused in the end."""
        if self._options.mask not in call.names:
            return None
        mask = call.names.index(self._options.mask)
        try:
            return find_input_roles(call.shapes, mask, call.kind.history.shapes, self._given_dims(call))
        except PaddingRefusedError:
            call.kind.num_unclear += 1
            if call.kind.num_unclear >= _MAX_UNCLEAR:
                raise
            return None

    def find_length_roles(self, call: Call) -> list[InputRole]:
        """Say which dims are lengths where no mask says how long rows are: those given, or all that varied but rows."""
        given = self._given_dims(call)
        if given:
            return [InputRole(False, given.get(index, ())) for index in range(len(call.leaves))]
        ranks = [len(shape or ()) for shape in call.shapes]
        return [
            InputRole(False, tuple(dim for dim in dims if dim > 0 or rank == 1))
            for dims, rank in zip(call.kind.history.varying, ranks, strict=True)
        ]

    def pad_values(self, call: Call) -> list[float]:
        """Return what each leaf is padded with; a mask has zeros where positions do not count."""
        value = self._options.pad_value
        if isinstance(value, Mapping):
            return [value.get(name, value.get(name.partition("[")[0], 0.0)) for name in call.names]
        return [0.0 if name == self._options.mask else value or 0.0 for name in call.names]

    def _given_dims(self, call: Call) -> dict[int, tuple[int, ...]]:
        given = {}
        for name, dims in (self._options.dims or {}).items():
            for index, leaf in enumerate(call.names):
                shape = call.shapes[index]
                if (leaf == name or leaf.startswith(f"{name}[")) and shape is not None:
                    wanted = [dims] if isinstance(dims, int) else dims
                    given[index] = tuple(_check_dim(dim, len(shape), name) for dim in wanted)
        return given


def _is_zeros_and_ones(mask: Tensor) -> bool:
    """Return whether a mask of reals says which positions count; zeros alone may as well be what is added to scores."""
    return bool(((mask == 0) | (mask == 1)).all() & (mask == 1).any())


def _check_dim(dim: int, rank: int, name: str) -> int:
    if not -rank <= dim < rank:
        raise ConfigError(f"dims names dim {dim} of {name!r}, which has {rank} dims")
    return dim % rank
