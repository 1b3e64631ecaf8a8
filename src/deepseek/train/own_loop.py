"""For people who keep their own loop: what a run here would set up, around objects that they made.

    model, optimizer, loader = ds.prepare(model, optimizer, loader, precision="auto", grad_clip=1.0)
    for tokens, targets in loader:
        loss = loss_function(model(tokens), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

The same objects come back, changed in place: the model's forward pass runs under the precision policy (and compiled, if
asked), the optimizer clips the gradient before each step, and batches arrive on the device. Nothing is hidden in a
wrapper, so state dicts, hooks and type checks work as before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, Generic, TypeVar

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
        return getattr(self.loader, name)


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
    target = torch.device(device) if device is not None else next(model.parameters()).device
    _check_belongs(model, optimizer)
    model.to(target)
    _run_under(model, choose_precision(precision, target), target)
    if compile:
        model.compile()
    if grad_clip is not None:
        optimizer.register_step_pre_hook(lambda optimizer, *_: _clip(optimizer, grad_clip))
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
        moved = replace(batch, **{each.name: move(getattr(batch, each.name), device) for each in fields(batch)})
    return moved  # type: ignore[no-any-return]


def _check_belongs(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    own = {id(each) for each in model.parameters()}
    if not all(id(each) in own for group in optimizer.param_groups for each in group["params"]):
        raise ConfigError(
            "the optimizer updates parameters that the model does not have; build it from model.parameters()"
        )


def _run_under(model: nn.Module, precision: Precision, device: torch.device) -> None:
    forward = model.forward

    def forward_under_policy(*args: Any, **kwargs: Any) -> Any:
        with autocast(precision, device):
            return forward(*args, **kwargs)

    model.forward = forward_under_policy


def _clip(optimizer: torch.optim.Optimizer, grad_clip: float) -> None:
    clip_gradients_([each for group in optimizer.param_groups for each in group["params"]], grad_clip)
