"""What `DynamicPrecision` does to a model: each layer's products in a precision of its own, and narrow storage.

A layer's `forward` is replaced on the instance by a bound method that reads the layer's `compute` setting, so a deep
copy runs its own weights, state dicts and types stay as they are, and a compiled model is guarded on the setting: it is
compiled again when a decision changes and at no other time.

Autocast narrows products but what norms, residual sums and activations keep for the backward pass stays FP32; in a small
transformer that is half of the memory. `Narrowing` keeps those in bf16, which has FP32's range: each is rounded once
when it is kept, a tensor that several operators keep is kept once, and weights are left alone. The forward pass is
unchanged by it; gradients see values rounded as a bf16 product would round them.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

_SMALLEST = 1024  # elements; below that, packing costs more than it saves
_SETTING = "compute"


@dataclass(frozen=True)
class Compute:
    """How a module's own operators run."""

    device_type: str
    dtype: torch.dtype | None
    """Of products; None for FP32, whatever surrounds the module."""
    keeps_narrow: bool = False
    """Whether FP32 tensors that are kept for the backward pass are kept in bf16."""
    is_root: bool = False


def set_compute_(module: nn.Module, compute: Compute) -> None:
    """Run the module's forward under `compute` from now on."""
    if _SETTING not in module.__dict__:
        if "forward" in module.__dict__:
            module.__dict__["plain_forward"] = module.__dict__["forward"]
        module.forward = types.MethodType(_run_under_setting, module)
    module.__dict__[_SETTING] = compute


def clear_compute_(module: nn.Module) -> None:
    """Put back the forward that the module had."""
    if module.__dict__.pop(_SETTING, None) is None:
        return
    del module.__dict__["forward"]
    plain = module.__dict__.pop("plain_forward", None)
    if plain is not None:
        module.__dict__["forward"] = plain


def compute_of(module: nn.Module) -> Compute | None:
    """The module's setting, or None where it has none of its own."""
    return module.__dict__.get(_SETTING)


def _run_under_setting(self: nn.Module, *inputs: Any, **named_inputs: Any) -> Any:
    compute: Compute = self.compute  # type: ignore[assignment]
    plain: Callable[..., Any] | None = self.__dict__.get("plain_forward")
    forward = plain if plain is not None else types.MethodType(type(self).forward, self)
    if compute.dtype is None:
        with torch.autocast(compute.device_type, enabled=False):
            return _run_stored(self, compute, forward, tree_map(_widen, inputs), tree_map(_widen, named_inputs))
    with torch.autocast(compute.device_type, dtype=compute.dtype):
        return _run_stored(self, compute, forward, inputs, named_inputs)


def _run_stored(
    module: nn.Module, compute: Compute, forward: Callable[..., Any], inputs: Any, named_inputs: Any
) -> Any:
    """With the storage that the setting asks for; a compiler decides for itself what it keeps."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return forward(*inputs, **named_inputs)
    with ExitStack() as stack:
        if compute.is_root and compute.keeps_narrow:
            stack.enter_context(Narrowing(module.parameters()))
        elif not compute.is_root and not compute.keeps_narrow:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_same, _same))
        return forward(*inputs, **named_inputs)


def _widen(value: Any) -> Any:
    is_narrow = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if is_narrow else value


def _same(value: Tensor) -> Tensor:
    return value


class Narrowing(torch.autograd.graph.saved_tensors_hooks):
    """Inside, FP32 results that operators keep for the backward pass are kept in bf16; `weights` are left alone.

    >>> x = torch.randn(4096, requires_grad=True)
    >>> with Narrowing():
    ...     y = (x * 2).sin()
    >>> y.sum().backward()
    >>> torch.allclose(x.grad, 2 * (2 * x).cos(), atol=0.1)
    True
    """

    def __init__(self, weights: Iterable[Tensor] = ()) -> None:
        super().__init__(self._pack, _unpack)
        # By memory, since what autograd hands over is an alias of the weight that does not know it is one.
        self._weights = {each.untyped_storage()._cdata for each in weights if type(each) in (Tensor, nn.Parameter)}
        self._kept: dict[tuple[Any, ...], tuple[weakref.ref[Any], weakref.ref[_Narrow]]] = {}

    def _pack(self, value: Tensor) -> Tensor | _Narrow:
        storage = value.untyped_storage()
        if storage._cdata in self._weights or not _is_worth_it(value, storage.nbytes()):
            return value
        key = (storage._cdata, value.storage_offset(), value.shape, value.stride(), value._version)
        source, narrow = self._kept.get(key, (None, None))
        if source is not None and source() is not None and narrow is not None and (known := narrow()) is not None:
            return known
        kept = _Narrow(value.detach().to(torch.bfloat16))
        # An address may be used again once its first owner is gone; the weak reference tells.
        self._kept[key] = weakref.ref(storage), weakref.ref(kept)
        return kept


class _Narrow:
    """A kept tensor; an object of its own, so that operators can share it and the last one frees it."""

    __slots__ = ("__weakref__", "values")

    def __init__(self, values: Tensor) -> None:
        self.values = values


def _is_worth_it(value: Tensor, storage_bytes: int) -> bool:
    """Whether keeping a narrow copy frees memory; an expanded tensor is smaller than it looks."""
    if value.dtype != torch.float32 or value.layout != torch.strided or type(value) is not Tensor:
        return False
    return value.numel() >= _SMALLEST and storage_bytes >= value.numel() * value.element_size()


def _unpack(kept: Tensor | _Narrow) -> Tensor:
    return kept.values.float() if isinstance(kept, _Narrow) else kept

