"""Throughput and cost of a step time: tokens a second, model FLOP/s utilization, days and cost of a budget."""

from __future__ import annotations

from dataclasses import dataclass

from deepseek.core.errors import ConfigError
from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.models.model_shape import ModelShape

_SECONDS_A_DAY = 86400.0


@dataclass(frozen=True)
class Throughput:
    """How much of a training run one step is; `mfu` is of the devices' dense peak in the plan's precision."""

    num_devices: int
    tokens_per_step: int
    tokens_per_s: float
    mfu: float


@dataclass(frozen=True)
class Budget:
    """Time and cost of the steps that train on a number of tokens: a floor, since nothing fails, waits or is evaluated.

    `cost` is in the unit of the price, `None` without one.
    """

    num_tokens: int
    num_steps: int
    days: float
    device_hours: float
    cost: float | None


def count_model_flops(model: ModelShape, sequences: int) -> float:
    """Count operations of a step as is usual: 6 per active weight and token, and the attention scores.

    >>> from deepseek.planning.models.model_shape import get_model_shape
    >>> round(count_model_flops(get_model_shape("GPT3-175B"), 1) / 2048 / 1e12, 2)
    1.08
    """
    tokens = sequences * model.sequence
    weights = model.num_active_parameters - model.vocabulary * model.hidden * (not model.tied_embeddings)
    scores = 12.0 * model.layers * model.heads * model.head_dim * model.sequence
    return tokens * (6.0 * weights + scores)


def measure_throughput(
    model: ModelShape, cluster: Cluster, global_batch: int, precision: str, step_time_s: float
) -> Throughput:
    """Return what a step of `step_time_s` means."""
    tokens = global_batch * model.sequence
    peak = sum(device.get_peak_flops(precision) for device in cluster.accelerators)
    mfu = count_model_flops(model, global_batch) / step_time_s / peak
    return Throughput(cluster.num_devices, tokens, tokens / step_time_s, mfu)


def estimate_budget(throughput: Throughput, num_tokens: int, price_per_device_hour: float | None = None) -> Budget:
    """Return what training on `num_tokens` takes, in whole steps.

    >>> budget = estimate_budget(Throughput(8, 1_000_000, 100_000.0, 0.4), 8_640_000_000, 2.0)
    >>> budget.days, budget.device_hours, budget.cost
    (1.0, 192.0, 384.0)
    """
    if num_tokens < 1:
        raise ConfigError(f"num_tokens={num_tokens!r} trains nothing; give a number of tokens above 0")
    if price_per_device_hour is not None and not price_per_device_hour > 0:
        raise ConfigError(f"price_per_device_hour={price_per_device_hour!r} is no price; give one above 0, or none")
    steps = -(-num_tokens // throughput.tokens_per_step)
    seconds = steps * throughput.tokens_per_step / throughput.tokens_per_s
    hours = seconds / 3600 * throughput.num_devices
    cost = None if price_per_device_hour is None else hours * price_per_device_hour
    return Budget(num_tokens, steps, seconds / _SECONDS_A_DAY, hours, cost)
