"""Loss scaling for FP16: gradients too small for its range are lifted into it and divided back before the update.

    scaler = GradScaler()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)          # only to look at or clip gradients
    scaler.step(optimizer)              # skipped where a gradient is infinite
    scaler.update()

The contract and the numbers are torch's, whose class this is; what is added is that ranks agree. A rank that holds a
shard sees only its own infinities, so one rank would skip a step that the others take, and the weights would part for
ever: here one number per step is reduced over the group first. Gradients that are DTensors are read and divided shard
by shard, without a collective of their own. Cost: one fused kernel over all gradients of a dtype, one all-reduce of
four bytes where there are ranks, and one synchronization per optimizer step.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek.core.errors import ConfigError

Group = dist.ProcessGroup | Literal["world"] | None


class GradScaler(torch.amp.GradScaler):
    """torch's gradient scaler, with infinities found on any rank of `group` skipping the step on all.

    `group` is a process group, `"world"` for all ranks where torch.distributed is initialized, or `None` for this
    process alone. `device` defaults to `cuda` where there is one, else `cpu`. Raises `ConfigError` for factors that
    cannot work, and torch's own errors for calls out of order: `RuntimeError` for a second `unscale_` or `step`.

    >>> scaler = GradScaler(init_scale=4.0)
    >>> scaler.scale(torch.tensor(0.5)).item()
    2.0
    """

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        *,
        device: str | torch.device | None = None,
        group: Group = "world",
    ) -> None:
        _check_factors(init_scale, growth_factor, backoff_factor, growth_interval)
        kind = torch.device(device).type if device is not None else _default_device()
        super().__init__(kind, init_scale, growth_factor, backoff_factor, growth_interval, enabled)
        self.group = group

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        """torch's step over the gradients, on local shards, followed by the agreement; both ways into it pass here."""
        by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    gradient = _local_values(parameter, allow_fp16)
                    by_kind[gradient.device, gradient.dtype].append(gradient)
        found = {device: found_inf.to(device, copy=True) for device, _ in by_kind}
        with torch.no_grad():
            for (device, _), gradients in by_kind.items():
                torch._amp_foreach_non_finite_check_and_unscale_(gradients, found[device], inv_scale.to(device))
        return self._agree(found, found_inf)

    def _agree(self, found: dict[torch.device, Tensor], none_found: Tensor) -> dict[torch.device, Tensor]:
        """Agree on one answer over the ranks; a rank without gradients takes part, or the others would wait."""
        if (group := open_group(self.group)) is None:
            return found
        found = found or {none_found.device: none_found}
        anywhere = torch.stack([flag.to(none_found.device) for flag in found.values()]).amax()
        dist.all_reduce(anywhere, op=dist.ReduceOp.MAX, group=group)
        return {device: anywhere.to(device) for device in found}


def _local_values(parameter: Tensor, allow_fp16: bool) -> Tensor:
    """Return the memory that holds this process's part of a gradient."""
    gradient = parameter.grad
    assert gradient is not None
    if gradient.dtype == torch.float16 and not allow_fp16:
        raise ValueError("Attempting to unscale FP16 gradients.")  # torch's own words for it
    if gradient.is_sparse:
        if gradient.dtype == torch.float16:  # adding up doubled indices may overflow, and must be seen
            parameter.grad = gradient = gradient.coalesce()
        return gradient._values()
    to_local = getattr(gradient, "to_local", None)
    return gradient if to_local is None else to_local()


def open_group(group: Group) -> dist.ProcessGroup | None:
    """Return the process group that `group` stands for, or None where this process is alone."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    return dist.group.WORLD if group == "world" else group


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _check_factors(init_scale: float, growth: float, backoff: float, interval: Any) -> None:
    if not init_scale > 0:
        raise ConfigError(f"init_scale is {init_scale}; give a positive number, such as 2**16")
    if not growth > 1:
        raise ConfigError(f"growth_factor is {growth}; give a number above 1, such as 2.0")
    if not 0 < backoff < 1:
        raise ConfigError(f"backoff_factor is {backoff}; give a number between 0 and 1, such as 0.5")
    if interval < 1:
        raise ConfigError(f"growth_interval is {interval}; give a number of steps, 1 or more")
