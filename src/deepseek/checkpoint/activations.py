"""Activation checkpointing: memory of the forward pass for time in the backward pass, with bit-equal gradients.

    @ds.checkpoint                                  # on a forward, a function, a module or a module class
    def forward(self, x): ...

    @ds.checkpoint(policy="selective")
    def forward(self, x): ...

    checkpoint_blocks_(model, policy="block")       # on the repeated blocks of a model

    none        nothing is recomputed
    selective   results that cost many operations per byte (matmuls, convolutions, attention) are kept, the cheap
                rest (norms, activations, dropout, casts) is recomputed
    block       only the inputs are kept, everything inside is recomputed
    full        as block; on a model, the blocks are checkpointed inside a checkpoint of the whole model

The recomputation runs under the autocast state and the random numbers of the first pass, so dropout drops the same
values; checkpoints may be nested. The machinery is torch's (`torch.utils.checkpoint`, non-reentrant). Cost of `block`:
one more forward pass of what is inside; of `selective`: a few percent of one.
Sources: Chen et al. 2016 (checkpointing); Korthikanti et al. 2022 (selective recomputation).
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as run_checkpointed

from deepseek.checkpoint.recomputed_state import RecomputedState
from deepseek.core.errors import ConfigError
from deepseek.core.names import explain_unknown

Policy = Literal["none", "selective", "block", "full"]
T = TypeVar("T", bound=Callable[..., Any])

# Attribute of a checkpointed function: itself and the function without its checkpoint.
_MARK = "_checkpointed_and_plain"
# An elementwise operator spends about a quarter of an operation on a byte of its result, a sum of K products K / 2.
_KEPT_FROM_FLOPS_PER_BYTE = 8.0


@overload
def checkpoint(target: T, /) -> T: ...
@overload
def checkpoint(
    *, policy: Policy = "block", min_flops_per_byte: float = ..., preserve_rng: bool = ...
) -> Callable[[T], T]: ...


def checkpoint(
    target: Any = None,
    /,
    *,
    policy: Policy = "block",
    min_flops_per_byte: float = _KEPT_FROM_FLOPS_PER_BYTE,
    preserve_rng: bool = True,
) -> Any:
    """Recompute what `target` computes in the backward pass instead of keeping it.

    `target` is a function or a `forward` method; an `nn.Module`, whose forward is changed in place; or a class of
    modules. Without it, the decorator for these settings. A second policy for a module replaces the first.
    `min_flops_per_byte` is the cost from which `selective` keeps a result. `preserve_rng=False` saves a little where
    nothing inside is random. Raises `ConfigError` for an unknown policy, and for a target that cannot be run twice: a
    generator or a coroutine. What the target changes besides its result, such as the statistics of batch
    normalization, changes once (`recomputed_state.py` says what is looked at).

    >>> @checkpoint
    ... def block(x):
    ...     return x.sin().exp()
    >>> x = torch.ones(3, requires_grad=True)
    >>> block(x).sum().backward()
    >>> torch.equal(x.grad, x.cos() * x.sin().exp())
    True
    """
    if policy not in get_args(Policy):
        raise ConfigError(explain_unknown("checkpoint policy", policy, get_args(Policy)))
    settings = _Settings(policy, min_flops_per_byte, preserve_rng)
    return functools.partial(_checkpoint, settings=settings) if target is None else _checkpoint(target, settings)


@dataclass(frozen=True)
class _Settings:
    policy: Policy
    min_flops_per_byte: float
    preserve_rng: bool


def _checkpoint(target: Any, settings: _Settings) -> Any:
    if isinstance(target, nn.Module):
        return _wrap_module_(target, settings)
    if isinstance(target, type) and issubclass(target, nn.Module):
        target.forward = _wrap_function(target.forward, settings)
        return target
    return _wrap_function(target, settings)


def checkpoint_blocks_(
    model: nn.Module, policy: Policy = "block", *, blocks: Sequence[str] | None = None, **settings: Any
) -> int:
    """Checkpoint the repeated blocks of `model` in place, and return how many there are.

    `blocks` are paths of modules; those of `find_blocks` by default. Raises `ConfigError` where there are none.
    """
    names = find_blocks(model) if blocks is None else blocks
    for name in names:
        checkpoint(policy=policy, **settings)(model.get_submodule(name))
    if policy == "full":
        checkpoint(policy=policy, **settings)(model)
    return len(names)


def find_blocks(model: nn.Module) -> list[str]:
    """Find the blocks that a model repeats, as paths: lists of modules of one class that have modules of their own.

    >>> find_blocks(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False))
    ['layers.0', 'layers.1']
    """
    found: list[str] = []
    for path, module in model.named_modules():
        is_inside = any(path.startswith(f"{block}.") for block in found)
        if is_inside or not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        blocks = [(name, child) for name, child in module.named_children() if any(True for _ in child.children())]
        kinds = {type(child) for _, child in blocks}
        if len(blocks) > 1 and len(kinds) == 1 and kinds != {nn.ModuleList}:
            found += [f"{path}.{name}" if path else name for name, _ in blocks]
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no list of repeated blocks; put ds.checkpoint on the forward of its parts, or "
            "name them with blocks=, in the order in which they run"
        )
    return found


def _wrap_module_(module: nn.Module, settings: _Settings) -> nn.Module:
    """Replace the forward of `module`; by a method and not a closure, so that a copy runs its own weights."""
    forward = module.forward
    function = forward.__func__ if isinstance(forward, types.MethodType) else forward
    wrapped = _wrap_function(_find_plain(function), settings)
    module.forward = types.MethodType(wrapped, module) if isinstance(forward, types.MethodType) else wrapped
    if wrapped is type(module).forward:
        del module.forward
    return module


def _find_plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` without its own checkpoint; decorators around a checkpointed function copy its mark."""
    checkpointed, plain = getattr(function, _MARK, (None, function))
    return plain if checkpointed is function else function


def _wrap_function(function: Callable[..., Any], settings: _Settings) -> Callable[..., Any]:
    if not callable(function):
        raise ConfigError(f"ds.checkpoint was put on {function!r}; put it on a function, a forward or a module")
    code = getattr(function, "__code__", None)
    if code is not None and code.co_flags & _RUNS_IN_PIECES:
        raise ConfigError(
            f"{function.__qualname__} is a generator or a coroutine, which cannot be run again in the backward pass; "
            "put ds.checkpoint on a plain function"
        )
    preserve_rng = settings.preserve_rng
    if settings.policy == "none":
        return function
    selective = (
        functools.partial(_selective_contexts, settings.min_flops_per_byte) if settings.policy == "selective" else None
    )

    @functools.wraps(function)
    def checkpointed(*inputs: Any, **named_inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*inputs, **named_inputs)
        if torch.compiler.is_compiling():  # in a captured graph, writes are values like others and happen once
            contexts: dict[str, Any] = {"context_fn": selective} if selective else {}
            return run_checkpointed(
                function, *inputs, use_reentrant=False, preserve_rng_state=preserve_rng, **contexts, **named_inputs
            )
        state = RecomputedState(function, inputs, named_inputs)
        result = run_checkpointed(
            state.run,
            *state.given,
            use_reentrant=False,
            preserve_rng_state=preserve_rng,
            context_fn=functools.partial(_build_contexts, state, selective),
        )
        state.forget_unchanged()
        return result

    setattr(checkpointed, _MARK, (checkpointed, function))
    return checkpointed


class _Both(AbstractContextManager[None]):
    """Two contexts as one that can be entered again: a backward pass may be repeated."""

    def __init__(self, outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> None:
        self.outer, self.inner = outer, inner

    def __enter__(self) -> None:
        self.outer.__enter__()
        self.inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.inner.__exit__(*error)
        self.outer.__exit__(*error)


def _build_contexts(
    state: RecomputedState,
    selective: Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]] | None,
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return the context of the first run and that of each repetition."""
    first, second = selective() if selective is not None else (nullcontext(), nullcontext())
    return first, _Both(state, second)


# Generators, coroutines and asynchronous generators, in the flags of a code object.
_RUNS_IN_PIECES = 0x20 | 0x80 | 0x200


def _selective_contexts(min_flops_per_byte: float) -> Any:
    def decide(_: Any, operator: Any, *inputs: Any, **named_inputs: Any) -> CheckpointPolicy:
        cost = flops_per_byte(operator, *inputs, **named_inputs)
        return CheckpointPolicy.MUST_SAVE if cost >= min_flops_per_byte else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(decide)


def flops_per_byte(operator: Any, *inputs: Any, **_: Any) -> float:
    """Return the operations that an operator spends on each byte of its result; 0 for all that are cheap.

    >>> flops_per_byte(torch.ops.aten.mm.default, torch.ones(8, 64), torch.ones(64, 8))
    32.0
    """
    name = getattr(operator, "overloadpacket", operator).__name__
    if "scaled_dot_product" in name or name in _ATTENTION:
        return float("inf")
    if name not in _LEFT_FACTOR:
        return 0.0
    factor: Tensor = inputs[_LEFT_FACTOR[name]]
    return 2 * _inner_size(name, factor) / factor.element_size()


def _inner_size(name: str, factor: Tensor) -> int:
    """Return how many products are added up for each element of the result."""
    if "convolution" in name:  # the weight, (out, in / groups, *kernel) or, transposed, (in, out / groups, *kernel)
        return factor[0].numel()
    return factor.shape[-1]


# Operators whose results are sums of products -> the index of the factor that shows how long the sums are.
_LEFT_FACTOR = {
    "mm": 0,
    "bmm": 0,
    "mv": 0,
    "addmm": 1,
    "baddbmm": 1,
    "_scaled_mm": 0,
    "convolution": 1,
    "_convolution": 1,
    "_slow_conv2d_forward": 1,
}
_ATTENTION = {"_flash_attention_forward", "_efficient_attention_forward", "flex_attention"}
