"""One way of laying a training run over devices, as a value.

A `Plan` says how many devices share what (tensor, pipeline, data, expert and context parallelism), what is kept and
what is recomputed, and in which order micro-batches pass the stages. `deepseek.planning` searches plans and estimates
their time and memory; whether a plan fits a model and a cluster is in `planning/feasibility.py`.

Ranks are numbered as in Megatron-LM: tensor neighbours are closest, then context, then data, then pipeline
(Narayanan et al. 2021, arXiv:2104.04473), so tensor parallelism stays inside a node as long as it fits there.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

from deepseek.core.errors import ConfigError
from deepseek.core.names import explain_unknown

Recomputation = Literal["none", "selective", "full"]
Schedule = Literal["gpipe", "1f1b", "interleaved", "zero_bubble"]
Precision = Literal["fp32", "fp16", "bf16", "fp8", "mxfp8", "fp4"]
RECOMPUTATIONS: tuple[Recomputation, ...] = get_args(Recomputation)
SCHEDULES: tuple[str, ...] = get_args(Schedule)
PRECISIONS: tuple[str, ...] = get_args(Precision)
_CHOICES: dict[str, tuple[str, ...]] = {"recomputation": RECOMPUTATIONS, "schedule": SCHEDULES, "precision": PRECISIONS}
_COUNTS = ("tp", "pp", "dp", "ep", "cp", "etp", "micro_batch_size", "virtual_stages")


@dataclass(frozen=True)
class Plan:
    """How one training step is spread over `tp * pp * dp * cp` devices.

    `dp` counts the replicas of the attention weights; experts are spread over `ep * etp` of the `tp * cp * dp` ranks
    of a stage. `shard_group` is how many data-parallel ranks share the weights under ZeRO 3 (0: all of them; a node's
    worth is what PyTorch calls HSDP).

    >>> Plan(tp=8, pp=4, dp=2, micro_batch_size=2).num_devices
    64
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    cp: int = 1
    etp: int = 1
    zero_stage: int = 0
    recomputation: Recomputation = "none"
    micro_batch_size: int = 1
    schedule: Schedule = "1f1b"
    virtual_stages: int = 1
    sequence_parallel: bool = False
    precision: Precision = "bf16"
    shard_group: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers and words that mean nothing for any model."""
        for name in _COUNTS:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={value!r} is not a positive whole number; use 1 to switch it off")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(explain_unknown(name, str(getattr(self, name)), known))
        if self.zero_stage not in (0, 1, 2, 3):
            raise ConfigError(f"zero_stage={self.zero_stage!r} is not a ZeRO stage; choose one of 0, 1, 2, 3")
        if self.shard_group < 0 or (self.shard_group and self.dp % self.shard_group):
            raise ConfigError(f"shard_group={self.shard_group} does not divide dp={self.dp}; use 0 for all of them")
        _check_schedule(self)

    @property
    def num_devices(self) -> int:
        """Devices that hold a part of the model."""
        return self.tp * self.pp * self.dp * self.cp

    @property
    def expert_dp(self) -> int:
        """Copies of every expert."""
        return max(self.tp * self.cp * self.dp // (self.ep * self.etp), 1)

    def count_micro_batches(self, global_batch: int) -> int:
        """Count micro-batches that each pipeline works through in one step."""
        return global_batch // (self.dp * self.micro_batch_size)

    def as_dict(self) -> dict[str, object]:
        """Return every field by name, as `Plan(**plan.as_dict())` takes it."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _check_schedule(plan: Plan) -> None:
    if plan.virtual_stages > 1 and plan.schedule != "interleaved":
        raise ConfigError(
            f"virtual_stages={plan.virtual_stages} needs schedule='interleaved', not {plan.schedule!r}; "
            "set one or the other"
        )
    if plan.schedule == "interleaved" and plan.pp == 1:
        raise ConfigError("schedule='interleaved' needs pp of at least 2; use '1f1b' for a single stage")
