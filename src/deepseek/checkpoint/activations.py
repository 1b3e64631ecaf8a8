"""Activation checkpointing: memory of the forward pass for time in the backward pass, with bit-equal gradients.

    @ds.checkpoint                                  # on a forward, a function, a module or a module class
    def forward(self, x): ...

    @ds.checkpoint(policy="selective")
    def forward(self, x): ...

    checkpoint_blocks_(model, policy="block")       # on the repeated blocks of a model

    none        nothing is recomputed
    selective   results that cost many operations per byte (products, convolutions, attention) are kept, the cheap
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
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as run_checkpointed

from deepseek.core.errors import ConfigError
from deepseek.core.names import explain_unknown

Policy = Literal["none", "selective", "block", "full"]
T = TypeVar("T", bound=Callable[..., Any])

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
    modules. Without it, the decorator for these settings. `min_flops_per_byte` is the price from which `selective`
    keeps a result. `preserve_rng=False` saves a little where nothing inside is random. Raises `ConfigError` for an
    unknown policy, and for a target that cannot be run twice: a generator or a coroutine.

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
    settings = {"policy": policy, "min_flops_per_byte": min_flops_per_byte, "preserve_rng": preserve_rng}
    if target is None:
        return functools.partial(checkpoint, **settings)
    if isinstance(target, nn.Module):
        return _wrap_module_(target, settings)
    if isinstance(target, type) and issubclass(target, nn.Module):
        target.forward = _wrap_function(target.forward, settings)
        return target
    return _wrap_function(target, settings)


def checkpoint_blocks_(model: nn.Module, policy: Policy = "block", **settings: Any) -> int:
    """Checkpoint the repeated blocks of `model` in place, and return how many there are.

    The blocks are the children of the largest list of modules of one class. Raises `ConfigError` where there is none.
    """
    lists = [each for each in model.modules() if isinstance(each, nn.ModuleList | nn.Sequential) and len(each) > 1]
    repeated = [each for each in lists if len({type(child) for child in each}) == 1]
    if not repeated:
        raise ConfigError(
            f"{type(model).__name__} has no list of equal blocks; put ds.checkpoint on the forward of its parts instead"
        )
    blocks = max(repeated, key=lambda each: sum(parameter.numel() for parameter in each.parameters()))
    for block in blocks:
        checkpoint(policy=policy, **settings)(block)
    if policy == "full":
        checkpoint(policy=policy, **settings)(model)
    return len(blocks)


def _wrap_module_(module: nn.Module, settings: dict[str, Any]) -> nn.Module:
    """A method and not a closure, so that a copy of the module runs its own weights."""
    function = module.forward
    plain = function.__func__ if isinstance(function, types.MethodType) else None
    wrapped = _wrap_function(plain, settings) if plain else _wrap_function(function, settings)
    module.forward = types.MethodType(wrapped, module) if plain else wrapped
    return module


def _wrap_function(function: Callable[..., Any], settings: dict[str, Any]) -> Callable[..., Any]:
    if not callable(function):
        raise ConfigError(f"ds.checkpoint was put on {function!r}; put it on a function, a forward or a module")
    code = getattr(function, "__code__", None)
    if code is not None and code.co_flags & _RUNS_IN_PIECES:
        raise ConfigError(
            f"{function.__qualname__} is a generator or a coroutine, which cannot be run again in the backward pass; "
            "put ds.checkpoint on a plain function"
        )
    policy, preserve_rng = settings["policy"], settings["preserve_rng"]
    if policy == "none":
        return function
    contexts = functools.partial(_selective_contexts, settings["min_flops_per_byte"])
    options: dict[str, Any] = {"context_fn": contexts} if policy == "selective" else {}

    @functools.wraps(function)
    def checkpointed(*inputs: Any, **named_inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*inputs, **named_inputs)
        return run_checkpointed(
            function, *inputs, use_reentrant=False, preserve_rng_state=preserve_rng, **options, **named_inputs
        )

    return checkpointed


# Generators, coroutines and asynchronous generators, in the flags of a code object.
_RUNS_IN_PIECES = 0x20 | 0x80 | 0x200


def _selective_contexts(min_flops_per_byte: float) -> Any:
    def decide(_: Any, operator: Any, *inputs: Any, **named_inputs: Any) -> CheckpointPolicy:
        price = flops_per_byte(operator, *inputs, **named_inputs)
        return CheckpointPolicy.MUST_SAVE if price >= min_flops_per_byte else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(decide)


def flops_per_byte(operator: Any, *inputs: Any, **_: Any) -> float:
    """Operations that an operator spends on each byte of its result; 0 for all that are cheap.

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
    """Products that are added up for each element of the result."""
    if "convolution" in name:  # the weight, (out, in / groups, *kernel) or, transposed, (in, out / groups, *kernel)
        return factor[0].numel()
    return factor.shape[-1]


# Operators whose results are sums of products -> the place of the factor that tells how long the sums are.
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
