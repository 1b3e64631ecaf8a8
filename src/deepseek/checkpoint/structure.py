"""A nested training state as JSON and tensors, and back, bit for bit and without a pickle.

`flatten` takes what `state_dict` methods return: dicts (also with int keys, as optimizers have), lists, tuples,
numbers, strings, None and tensors of any dtype. JSON has no tuples, int keys or infinities, so a value it cannot
hold as it is becomes an object with one key that says what it is:

    {"step": 7, 0: (1.5, inf), "w": tensor}  ->
    {"dict": [["step", 7], [0, {"tuple": [1.5, {"float": "inf"}]}], ["w", {"tensor": "w"}]]}

Finite floats are written by `repr`, which Python reads back exactly. Tensors that are the same memory are stored once
and come back as one tensor. Any other type is refused, because it would come back as something else.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from deepseek.core.errors import CheckpointError

_RESERVED_NAMES = {"__metadata__"}  # means something else in a safetensors file


def flatten(state: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """Split `state` into JSON values and named tensors. Raises `CheckpointError` for a type that cannot be kept.

    >>> flatten({"step": 7, "betas": (0.9, 0.95)})
    ({'dict': [['step', 7], ['betas', {'tuple': [0.9, 0.95]}]]}, {})
    """
    tensors = _Tensors()
    return _encode(state, (), tensors), tensors.by_name


def unflatten(structure: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Rebuild the state that `flatten` was given from what it returned.

    >>> unflatten({"dict": [["step", 7], ["betas", {"tuple": [0.9, 0.95]}]]}, {})
    {'step': 7, 'betas': (0.9, 0.95)}
    """
    if isinstance(structure, list):
        return [unflatten(value, tensors) for value in structure]
    if not isinstance(structure, dict):
        return structure
    ((kind, content),) = structure.items()
    return _DECODERS[kind](content, tensors)


_DECODERS: dict[str, Callable[[Any, Mapping[str, Tensor]], Any]] = {
    "dict": lambda pairs, tensors: {key: unflatten(value, tensors) for key, value in pairs},
    "tuple": lambda items, tensors: tuple(unflatten(value, tensors) for value in items),
    "float": lambda text, tensors: float(text),
    "tensor": lambda name, tensors: tensors[name],
    "complex_tensor": lambda name, tensors: torch.view_as_complex(tensors[name]),
}


class _Tensors:
    """The tensors met so far, each piece of memory once."""

    def __init__(self) -> None:
        self.by_name: dict[str, Tensor] = {}
        self._names: dict[Any, str] = {}

    def add(self, tensor: Tensor, path: tuple[Any, ...]) -> str:
        """Keep `tensor` and return its name, which is its path unless that is taken."""
        identity = _identity(tensor)
        if identity is not None and identity in self._names:
            return self._names[identity]
        name = ".".join(map(str, path))
        while name in self.by_name or name in _RESERVED_NAMES:
            name += "'"
        self.by_name[name] = tensor
        if identity is not None:
            self._names[identity] = name
        return name


def _identity(tensor: Tensor) -> Any:
    """Equal for tensors that show the same memory in the same way; None where there is no memory to share."""
    if tensor.numel() == 0 or tensor.is_meta or tensor.layout is not torch.strided:
        return None
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_neg()


def _encode(value: Any, path: tuple[Any, ...], tensors: _Tensors) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if kind is list:
        return [_encode(item, (*path, index), tensors) for index, item in enumerate(value)]
    if kind in (tuple, torch.Size):
        return {"tuple": [_encode(item, (*path, index), tensors) for index, item in enumerate(value)]}
    if kind in (dict, OrderedDict):
        return {"dict": [[_encode_key(key, path), _encode(item, (*path, key), tensors)] for key, item in value.items()]}
    if isinstance(value, Tensor):
        return _encode_tensor(value, path, tensors)
    raise CheckpointError(
        f"{_show(path)} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot keep; "
        "give tensors, numbers, strings, None, dicts, lists or tuples"
    )


def _encode_key(key: Any, path: tuple[Any, ...]) -> str | int:
    if type(key) in (str, int):
        return key  # type: ignore[no-any-return]
    raise CheckpointError(f"{_show(path)} has the key {key!r} of type {type(key).__name__}; use str or int keys")


def _encode_tensor(tensor: Tensor, path: tuple[Any, ...], tensors: _Tensors) -> dict[str, str]:
    """Complex numbers are kept as pairs, since safetensors has no type for the wide ones."""
    if tensor.is_complex():
        return {"complex_tensor": tensors.add(torch.view_as_real(tensor.detach().resolve_conj().resolve_neg()), path)}
    return {"tensor": tensors.add(tensor, path)}


def _show(path: tuple[Any, ...]) -> str:
    return "state" + "".join(f"[{part!r}]" for part in path)
