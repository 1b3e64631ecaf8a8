"""What `DynamicPrecision` does to a model: each layer's matmuls in a precision of its own, and narrow storage.

A layer's `forward` is replaced on the instance by a method that reads the layer's `compute` setting, so a deep copy
runs its own weights, state dicts and types stay as they are, and compiled code is guarded on the setting: it is
compiled again when a decision changes and at no other time, and one block's code fits its neighbours. (With a partial
function in the method's place, torch compiled each of six equal blocks by itself.) A pickle of the module needs
`clear_compute_` first.

Autocast narrows matmuls, but two things stay large. What norms, residual sums and activations keep for the backward
pass stays FP32: `Narrowing` keeps it in bf16, which has FP32's range, each tensor once however many operators keep it,
and leaves weights alone. And autocast narrows the same input anew for each layer that reads it, so the three
projections of an attention keep three copies of one tensor: `NarrowedInput` narrows it once. It belongs to one forward
pass and goes with it, so that no activation outlives the pass but for what autograd keeps. Measured on a decoder of
four layers, 32 rows of 128 tokens: FP32 237 MB, autocast 171, with `Narrowing` 152, with both 141. The forward pass is
the same to the bit; gradients see values rounded as a bf16 matmul would round them.
"""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from deepseek.mixed_precision.norms import run_norm

_SMALLEST = 1 << 14  # elements; below that, packing costs more than it saves
_SETTING, _TALLY = "compute", "narrowing_tally"


@dataclass(frozen=True)
class Compute:
    """How a module's own operators run."""

    device_type: str
    dtype: torch.dtype | None
    """Of matmuls; None for FP32, whatever surrounds the module."""
    keeps_narrow: bool = False
    """Whether FP32 tensors that are kept for the backward pass are kept in bf16."""
    is_root: bool = False
    is_layer: bool = False
    """Whether the module multiplies its input, and so narrows it."""
    is_inherited: bool = False
    """Whether the module around it has the same setting, so that there is no context to enter."""


@dataclass
class Tally:
    """Whether narrowing finds anything in a model: without it, hooks on all that is kept are 2 % of a ResNet's step."""

    is_open: bool = True
    num_passes: int = 0
    num_narrowed: int = 0

    def close_step(self) -> None:
        """At the end of a step: no more hooks if the passes since the last one had nothing to narrow."""
        self.is_open = self.is_open and (self.num_passes == 0 or self.num_narrowed > 0)
        self.num_passes = self.num_narrowed = 0

    def reopen(self) -> None:
        """Look again."""
        self.is_open, self.num_passes, self.num_narrowed = True, 0, 0


def set_compute_(module: nn.Module, compute: Compute) -> None:
    """Run the module's forward under `compute` from now on."""
    if _SETTING not in module.__dict__:
        if "forward" in module.__dict__:
            module.__dict__["plain_forward"] = module.__dict__["forward"]
        module.forward = types.MethodType(_run_under_setting, module)
    module.__dict__[_SETTING] = compute
    if compute.is_root:
        module.__dict__[_TALLY] = Tally()


def has_compute(module: nn.Module) -> bool:
    """Return whether the module's forward runs under a setting of its own.

    >>> has_compute(nn.Identity())
    False
    """
    return _SETTING in vars(module)


def clear_compute_(module: nn.Module) -> None:
    """Put back the forward that the module had."""
    if module.__dict__.pop(_SETTING, None) is None:
        return
    module.__dict__.pop(_TALLY, None)
    del module.__dict__["forward"]
    plain = module.__dict__.pop("plain_forward", None)
    if plain is not None:
        module.__dict__["forward"] = plain


def compute_of(module: nn.Module) -> Compute | None:
    """Return the module's setting, or None where it has none of its own."""
    return module.__dict__.get(_SETTING)


def tally_of(module: nn.Module) -> Tally:
    """Return the tally of a root; of a module that is none, an unused one."""
    tally: Tally = module.__dict__.get(_TALLY) or Tally()
    return tally


def _run_under_setting(self: nn.Module, *inputs: Any, **named_inputs: Any) -> Any:
    compute: Compute = self.compute  # type: ignore[assignment]
    if compute.dtype is None:
        inputs, named_inputs = tree_map(_widen, (inputs, named_inputs))
    elif compute.is_layer and not torch.compiler.is_compiling():
        inputs = _narrow_inputs(inputs, compute.dtype)
    if compute.is_inherited:
        return _run_plain(self, inputs, named_inputs)
    with _context(compute), _storage(compute, self), _sharing(compute):
        return _run_plain(self, inputs, named_inputs)


def _run_plain(module: nn.Module, inputs: tuple[Any, ...], named_inputs: dict[str, Any]) -> Any:
    """Run the forward that the module had: one that was put on it, or its class's."""
    if "plain_forward" in module.__dict__:
        return module.__dict__["plain_forward"](*inputs, **named_inputs)
    if isinstance(module, nn.RMSNorm):
        return run_norm(module, *inputs, **named_inputs)
    return type(module).forward(module, *inputs, **named_inputs)


def _context(compute: Compute) -> AbstractContextManager[object]:
    if compute.dtype is None:
        return torch.autocast(compute.device_type, enabled=False)
    return torch.autocast(compute.device_type, dtype=compute.dtype)


def _storage(compute: Compute, module: nn.Module) -> AbstractContextManager[object]:
    """How kept tensors are stored; a compiler decides for itself what it keeps."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return nullcontext()
    if not compute.is_root:
        return nullcontext() if compute.keeps_narrow else torch.autograd.graph.saved_tensors_hooks(_keep, _unpack)
    tally = tally_of(module)
    if not compute.keeps_narrow or not tally.is_open:
        return nullcontext()
    tally.num_passes += 1
    return Narrowing(module.parameters(), tally)


@dataclass
class NarrowedInput:
    """The input that was narrowed last in one forward pass, for the next layer that reads the same one."""

    source: Tensor | None = None
    result: Tensor | None = None
    version: int = -1

    def narrow(self, source: Tensor, dtype: torch.dtype) -> Tensor:
        """Return `source` in `dtype`: the layer before's copy, if that read the same tensor."""
        is_known = source is self.source and source._version == self.version
        if not is_known or self.result is None or self.result.dtype != dtype:
            self.source, self.result, self.version = source, source.to(dtype), source._version
        return self.result


class _ForwardPass(threading.local):
    """The forward pass of a root that this thread is in, if it is in one."""

    narrowed: NarrowedInput | None = None


_PASS = _ForwardPass()


def _sharing(compute: Compute) -> AbstractContextManager[object]:
    """The layers in a root's forward pass share narrowed inputs; compiled code does that by itself."""
    if not compute.is_root or torch.compiler.is_compiling():
        return nullcontext()
    return share_inputs()


@contextmanager
def share_inputs() -> Iterator[None]:
    """Let layers that run in the block share the narrow copies of their inputs, and let go of the last one after it."""
    outer, _PASS.narrowed = _PASS.narrowed, NarrowedInput()
    try:
        yield
    finally:
        _PASS.narrowed = outer


def _narrow_inputs(inputs: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """Return `inputs` with the first in `dtype` where it is FP32 and its copy can be shared."""
    source = inputs[0] if inputs else None
    if _PASS.narrowed is None or not torch.is_grad_enabled():
        return inputs
    if not isinstance(source, Tensor) or source.dtype != torch.float32:
        return inputs
    return (_PASS.narrowed.narrow(source, dtype), *inputs[1:])


def _widen(value: Any) -> Any:
    is_narrow = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if is_narrow else value


def _keep(value: Tensor) -> tuple[Tensor, int]:
    """The tensor as it is, with its version, which torch does not watch for tensors that went through a hook."""
    return value, value._version


class Narrowing(torch.autograd.graph.saved_tensors_hooks):
    """Inside, FP32 results that operators keep for the backward pass are kept in bf16; `weights` are left alone.

    >>> x = torch.randn(4096, requires_grad=True)
    >>> with Narrowing():
    ...     y = (x * 2).sin()
    >>> y.sum().backward()
    >>> torch.allclose(x.grad, 2 * (2 * x).cos(), atol=0.1)
    True
    """

    def __init__(self, weights: Iterable[Tensor] = (), tally: Tally | None = None) -> None:
        super().__init__(self._pack, _unpack)
        self._tally = tally or Tally()
        # By memory, since what autograd hands over is an alias of the weight that does not know it is one.
        self._weights = {
            weight.untyped_storage()._cdata for weight in weights if type(weight) in (Tensor, nn.Parameter)
        }
        self._kept: dict[tuple[Any, ...], tuple[weakref.ref[Any], weakref.ref[_Narrow]]] = {}

    def _pack(self, value: Tensor) -> tuple[Tensor, int] | _Narrow:
        if not _is_worth_it(value):  # most are not, and every kept tensor of the model passes here
            return _keep(value)
        storage = value.untyped_storage()
        # An expanded tensor is smaller than it looks.
        if storage._cdata in self._weights or storage.nbytes() < value.numel() * value.element_size():
            return _keep(value)
        key = (storage._cdata, value.storage_offset(), value.shape, value.stride(), value._version)
        source, narrow = self._kept.get(key, (None, None))
        if source is not None and source() is not None and narrow is not None and (known := narrow()) is not None:
            return known
        kept = _Narrow(value.detach().to(torch.bfloat16))
        self._tally.num_narrowed += 1
        # An address may be used again once its first owner is gone; the weak reference tells.
        self._kept[key] = weakref.ref(storage), weakref.ref(kept)
        return kept


class _Narrow:
    """A kept tensor; an object of its own, so that operators can share it and the last one frees it."""

    __slots__ = ("__weakref__", "values")

    def __init__(self, values: Tensor) -> None:
        self.values = values


def _is_worth_it(value: Tensor) -> bool:
    """Return whether a narrow copy can be kept and is enough smaller."""
    if value.dtype is not torch.float32 or value.numel() < _SMALLEST:
        return False
    return type(value) is Tensor and value.layout is torch.strided


def _unpack(kept: tuple[Tensor, int] | _Narrow) -> Tensor:
    if isinstance(kept, _Narrow):
        return kept.values.float()
    value, version = kept
    if value._version != version:
        raise RuntimeError(
            f"a tensor of shape {list(value.shape)} that the backward pass needs was changed in place after the "
            "forward pass had kept it, and its gradients would be wrong; make a new tensor instead of changing this one"
        )
    return value
