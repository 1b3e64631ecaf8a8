"""One way of laying a training run over devices, as a value.

A `Plan` says how many devices share what (tensor, pipeline, data, expert and context parallelism), what is kept and
what is recomputed, and in which order micro-batches pass the stages. The planner returns plans, `predict` prices
them, a trainer applies one. Nothing here knows a device: `validate` holds a plan against a model, a cluster and a
batch, and says in one sentence what does not fit and which numbers would.

Ranks are numbered as in Megatron-LM: tensor neighbours are closest, then context, then data, then pipeline
(Narayanan et al. 2021, arXiv:2104.04473), so tensor parallelism stays inside a node as long as it fits there.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

from deepseek.core.errors import ConfigError
from deepseek.core.names import explain_unknown
from deepseek.distributed.cluster import Cluster
from deepseek.distributed.model_shape import ModelShape, OperatorList
from deepseek.distributed.software import SOFTWARE, Software

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
    worth is what PyTorch calls HSDP). `frozen_weights` trains small adapters only (LoRA): no gradients, no optimizer
    state and no data-parallel exchange for the weights. `software` holds the traits of the program that runs the
    plan.

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
    frozen_weights: bool = False
    software: Software = SOFTWARE["modern"]

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
        """Micro-batches that each pipeline works through in one step."""
        return global_batch // (self.dp * self.micro_batch_size)

    def as_dict(self) -> dict[str, object]:
        """Every field by name, as `Plan(**plan.as_dict())` takes it."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _check_schedule(plan: Plan) -> None:
    if plan.virtual_stages > 1 and plan.schedule != "interleaved":
        raise ConfigError(
            f"virtual_stages={plan.virtual_stages} needs schedule='interleaved', not {plan.schedule!r}; "
            "set one or the other"
        )
    if plan.schedule == "interleaved" and plan.pp == 1:
        raise ConfigError("schedule='interleaved' needs pp of at least 2; use '1f1b' for a single stage")


def validate(plan: Plan, model: ModelShape | OperatorList, cluster: Cluster, global_batch: int) -> None:
    """Raise a `ConfigError` of one sentence unless `plan` can run `model` on `cluster` with that batch of sequences."""
    reason = explain_misfit(plan, model, cluster, global_batch)
    if reason is not None:
        raise ConfigError(reason)


def explain_misfit(
    plan: Plan,
    model: ModelShape | OperatorList,
    cluster: Cluster,
    global_batch: int,
    *,
    is_padding_layers: bool = False,
) -> str | None:
    """Why `plan` cannot run, or `None`; `is_padding_layers` allows stages of unequal depth.

    >>> from deepseek.distributed.cluster import Cluster
    >>> from deepseek.distributed.model_shape import get_model_shape
    >>> explain_misfit(Plan(tp=3), get_model_shape("Llama3-8B"), Cluster.of("A100-SXM-80GB", gpus_per_node=3), 8)
    'tp=3 does not divide heads=32; choose one of 1, 2, 4, 8, 16, 32'
    """
    if not isinstance(global_batch, int) or global_batch < 1:
        return (
            f"global_batch={global_batch!r} is not a positive number of sequences; give at least dp * micro_batch_size"
        )
    if plan.num_devices != cluster.num_devices:
        return (
            f"tp*pp*dp*cp = {plan.tp}*{plan.pp}*{plan.dp}*{plan.cp} = {plan.num_devices} does not fill the cluster's "
            f"{cluster.num_devices} devices; make the two equal"
        )
    if global_batch % (plan.dp * plan.micro_batch_size):
        return (
            f"global_batch={global_batch} is not a multiple of dp*micro_batch_size = "
            f"{plan.dp}*{plan.micro_batch_size} = {plan.dp * plan.micro_batch_size}; choose a batch that is"
        )
    return _explain_schedule(plan, global_batch) or _explain_shape(plan, model, is_padding_layers)


def _explain_schedule(plan: Plan, global_batch: int) -> str | None:
    micro_batches = plan.count_micro_batches(global_batch)
    if plan.schedule == "interleaved" and micro_batches % plan.pp:
        return (
            f"schedule='interleaved' needs micro-batches ({micro_batches}) to be a multiple of pp={plan.pp}; "
            "change the batch or use '1f1b'"
        )
    if plan.pp > 1 and plan.zero_stage >= 2:
        return (
            f"zero_stage={plan.zero_stage} re-gathers or re-scatters per micro-batch and excludes pp={plan.pp}; use 1"
        )
    return None


def _explain_shape(plan: Plan, model: ModelShape | OperatorList, is_padding_layers: bool) -> str | None:
    if isinstance(model, OperatorList):
        busy = [name for name in ("tp", "pp", "cp", "ep") if getattr(plan, name) > 1]
        return (
            f"{busy[0]}={getattr(plan, busy[0])} does not apply to a traced operator list; use dp only"
            if busy
            else None
        )
    if model.heads % plan.tp:
        return _explain_division("tp", plan.tp, "heads", model.heads)
    if model.sequence % (plan.cp * (plan.tp if plan.sequence_parallel else 1)):
        return f"sequence={model.sequence} cannot be cut into cp*tp = {plan.cp}*{plan.tp} parts; choose powers of two"
    slots = plan.pp * plan.virtual_stages
    if slots > model.layers:
        return f"pp*virtual_stages = {slots} is more than layers={model.layers}; use at most {model.layers}"
    if model.layers % slots and not is_padding_layers:
        return _explain_division("pp*virtual_stages", slots, "layers", model.layers)
    return _explain_experts(plan, model)


def _explain_experts(plan: Plan, model: ModelShape) -> str | None:
    if plan.ep == 1:
        return None
    if not model.experts:
        return f"ep={plan.ep} needs a model with experts; use ep=1"
    if model.experts % plan.ep:
        return _explain_division("ep", plan.ep, "experts", model.experts)
    if (plan.tp * plan.cp * plan.dp) % (plan.ep * plan.etp):
        return (
            f"ep*etp = {plan.ep}*{plan.etp} does not divide tp*cp*dp = {plan.tp * plan.cp * plan.dp}, the ranks of a "
            "stage; lower one of them"
        )
    return None


def _explain_division(name: str, value: int, of: str, total: int) -> str:
    divisors = [each for each in range(1, total + 1) if total % each == 0]
    return f"{name}={value} does not divide {of}={total}; choose one of {', '.join(map(str, divisors))}"
