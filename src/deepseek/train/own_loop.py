"""For people who keep their own loop: what a run here would set up, around objects that they made.

    model, optimizer, loader = ds.prepare(model, optimizer, loader, precision="auto", grad_clip=1.0)
    for tokens, targets in loader:
        loss = loss_function(model(tokens), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

The same objects come back, changed in place: the model's forward pass runs under the precision policy (and compiled, if
asked), the optimizer clips the gradient before each step, and after each evaluation of a closure, and batches arrive on
the device. Nothing is hidden in a wrapper, so state dicts, hooks and type checks work as before; a deep copy (an EMA)
runs its own weights and clips its own gradients, and what could be pickled before can be pickled. torch leaves hooks
out of a copied or unpickled optimizer, so the clipping travels with what rebuilds it. A prepared model can be exported,
traced and compiled; `torch.jit.script`, which reads source code, would lose the policy and is refused.
"""

from __future__ import annotations

import inspect
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, Generic, NoReturn, SupportsIndex, TypeVar

import torch
from torch import Tensor, nn

from deepseek.core.errors import ConfigError
from deepseek.mixed_precision.forward_precision import Precision, autocast, choose_precision
from deepseek.optim.clipping import clip_gradients_

M = TypeVar("M", bound=nn.Module)
O = TypeVar("O", bound=torch.optim.Optimizer)  # noqa: E741
B = TypeVar("B")


class DeviceLoader(Generic[B]):
    """Batches of another loader, with their tensors on `device`."""

    def __init__(self, loader: Iterable[B], device: torch.device) -> None:
        self.loader = loader
        self.device = device

    def __iter__(self) -> Iterator[B]:
        for batch in self.loader:
            yield move(batch, self.device)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        # How this object is copied and pickled is its own business, and while that is done it has no loader yet.
        if name == "loader" or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.loader, name)


class ScriptingError(ConfigError, AttributeError):
    """`torch.jit.script` asked for the source of a forward that runs under a precision policy."""


class PolicyForward:
    """The forward of `module` under a precision policy, which stands in its place on the instance.

    A value of a class at the top of a module, with the module as an attribute: a deep copy refers to the copied module,
    and pickle knows it by name. A closure would do neither.
    """

    def __init__(self, module: nn.Module, precision: Precision, device: torch.device) -> None:
        self.module, self.precision, self.device = module, precision, device
        before = module.__dict__.get("forward")
        self.plain: Callable[..., Any] | None = before.plain if isinstance(before, PolicyForward) else before
        """The forward that stood on the instance before, if one did; an earlier policy is replaced."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with autocast(self.precision, self.device):
            if self.plain is not None:
                return self.plain(*args, **kwargs)
            return type(self.module).forward(self.module, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._wrapped())

    @property
    def __code__(self) -> types.CodeType:
        """Where the model's own forward stands, by which `torch.export` names what it traced."""
        code: types.CodeType = self._wrapped().__code__
        return code

    @property
    def __globals__(self) -> NoReturn:
        raise ScriptingError(
            "the forward of a prepared model runs under a precision policy, which torch.jit.script cannot read from "
            "its source; script the model before ds.prepare, or use torch.export.export or torch.jit.trace"
        )

    def _wrapped(self) -> Callable[..., Any]:
        return self.plain or type(self.module).forward.__get__(self.module)


def prepare(
    model: M,
    optimizer: O,
    loader: Iterable[B],
    *,
    precision: Precision = "auto",
    device: str | torch.device | None = None,
    grad_clip: float | None = 1.0,
    compile: bool = False,
) -> tuple[M, O, DeviceLoader[B]]:
    """Set up a model, its optimizer and its data for training, and return them.

    `device` defaults to where the model is; moving keeps the optimizer's parameters. Raises `ConfigError` when the
    optimizer updates parameters that are not the model's.
    """
    _check_belongs(model, optimizer)
    target = torch.device(device) if device is not None else next(model.parameters()).device
    model.to(target)
    model.forward = PolicyForward(model, choose_precision(precision, target), target)
    if compile:
        model.compile()
    if grad_clip is not None:
        _clip_before_steps(optimizer, grad_clip)
    return model, optimizer, DeviceLoader(loader, target)


def move(batch: B, device: torch.device) -> B:
    """`batch` with its tensors on `device`: a tensor, or a dict, list, tuple or dataclass of them."""
    moved: Any = batch
    if isinstance(batch, Tensor):
        moved = batch.to(device)
    elif isinstance(batch, Mapping):
        moved = {key: move(value, device) for key, value in batch.items()}
    elif isinstance(batch, tuple) and hasattr(batch, "_fields"):
        moved = type(batch)(*(move(value, device) for value in batch))
    elif isinstance(batch, list | tuple):
        moved = type(batch)(move(value, device) for value in batch)
    elif is_dataclass(batch) and not isinstance(batch, type):
        moved = replace(
            batch, **{attribute.name: move(getattr(batch, attribute.name), device) for attribute in fields(batch)}
        )
    return moved  # type: ignore[no-any-return]


def _check_belongs(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    own = {id(parameter) for parameter in model.parameters()}
    if not all(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise ConfigError(
            "the optimizer updates parameters that the model does not have; build it from model.parameters()"
        )


def _clip_before_steps(optimizer: O, grad_clip: float) -> O:
    """Let `optimizer` clip before each step, and so its copies, however they are made (copy, pickle, torch.save)."""
    plain_reduce = optimizer.__reduce_ex__  # on the instance: the class stays the user's own

    def reduce_with_clipping(protocol: SupportsIndex) -> Any:
        reduced = plain_reduce(protocol)
        assert not isinstance(reduced, str)  # the name of a global, which no optimizer is
        build, arguments, *rest = reduced
        return _rebuild_clipped, (grad_clip, build, arguments), *rest

    optimizer.__reduce_ex__ = reduce_with_clipping  # type: ignore[method-assign]
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: _clip(optimizer, grad_clip, args, kwargs))
    return optimizer


def _rebuild_clipped(grad_clip: float, build: Callable[..., O], arguments: tuple[Any, ...]) -> O:
    """Return an optimizer that pickle has yet to give its state, with the clipping."""
    optimizer = build(*arguments)
    if "_optimizer_step_pre_hooks" not in vars(optimizer):  # torch adds it with the state, and keeps one that is there
        vars(optimizer)["_optimizer_step_pre_hooks"] = OrderedDict()
    return _clip_before_steps(optimizer, grad_clip)


def _clip(
    optimizer: torch.optim.Optimizer, grad_clip: float, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Clip the gradients before a step; for one that evaluates a closure, return its arguments with one that clips."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    _, *positional = args  # the first is the optimizer itself
    closure = positional[0] if positional else kwargs.get("closure")
    if closure is None:
        clip_gradients_(parameters, grad_clip)
        return None

    def evaluate_and_clip() -> Any:
        loss = closure()
        clip_gradients_(parameters, grad_clip)
        return loss

    if positional:
        return (optimizer, evaluate_and_clip, *positional[1:]), kwargs
    return args, kwargs | {"closure": evaluate_and_clip}
