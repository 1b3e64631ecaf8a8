"""Whether a plan can run: a plan held against a model, a cluster and a batch.

What does not fit is one sentence with the numbers that would. The search drops such plans; a user who wrote one by hand
reads the sentence.
"""

from __future__ import annotations

from deepseek.core.divisors import explain_division
from deepseek.core.errors import ConfigError
from deepseek.distributed.plan import Plan
from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.models.model_shape import ModelShape, OperatorList


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
    """Say why `plan` cannot run, or `None`; `is_padding_layers` allows stages of unequal depth.

    >>> from deepseek.planning.machines.cluster import Cluster
    >>> from deepseek.planning.models.model_shape import get_model_shape
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
        return explain_division("tp", plan.tp, "heads", model.heads)
    if model.sequence % (plan.cp * (plan.tp if plan.sequence_parallel else 1)):
        return f"sequence={model.sequence} cannot be cut into cp*tp = {plan.cp}*{plan.tp} parts; choose powers of two"
    slots = plan.pp * plan.virtual_stages
    if slots > model.layers:
        return f"pp*virtual_stages = {slots} is more than layers={model.layers}; use at most {model.layers}"
    if model.layers % slots and not is_padding_layers:
        return explain_division("pp*virtual_stages", slots, "layers", model.layers)
    return _explain_experts(plan, model)


def _explain_experts(plan: Plan, model: ModelShape) -> str | None:
    if plan.ep == 1:
        return None
    if not model.experts:
        return f"ep={plan.ep} needs a model with experts; use ep=1"
    if model.experts % plan.ep:
        return explain_division("ep", plan.ep, "experts", model.experts)
    if (plan.tp * plan.cp * plan.dp) % (plan.ep * plan.etp):
        return (
            f"ep*etp = {plan.ep}*{plan.etp} does not divide tp*cp*dp = {plan.tp * plan.cp * plan.dp}, the ranks of a "
            "stage; lower one of them"
        )
    return None
