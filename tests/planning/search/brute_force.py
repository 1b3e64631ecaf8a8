"""An independent reference for the search: every plan that `Plan` and `explain_misfit` accept, estimated one by one."""

import itertools
from dataclasses import replace

from deepseek.core.errors import ConfigError
from deepseek.distributed.plan import RECOMPUTATIONS, SCHEDULES, Plan
from deepseek.planning.estimate.step import predict
from deepseek.planning.feasibility import explain_misfit
from deepseek.planning.models.model_shape import ModelShape

SMALL = ModelShape(layers=6, hidden=1024, heads=4, ffn=2816, vocabulary=8192, sequence=512, name="small")
EXPERTS = replace(SMALL, experts=4, top_k=2, name="experts")


def brute_force(model, cluster, batch, budget=None):
    """Every plan that `Plan` and `explain_misfit` accept, estimated one by one."""
    devices = cluster.num_devices
    found = {}
    divisors = [divisor for divisor in range(1, devices + 1) if devices % divisor == 0]
    for tp, pp, cp in itertools.product(divisors, repeat=3):
        if devices % (tp * pp * cp):
            continue
        dp = devices // (tp * pp * cp)
        choices = itertools.product(
            range(1, batch + 1),
            (0, 1, 2, 3),
            RECOMPUTATIONS,
            SCHEDULES,
            range(1, model.layers + 1),
            range(1, 5),
            {1, tp},
        )
        for size, zero, again, schedule, chunks, ep, etp in choices:
            if not model.experts and ep * etp > 1:
                continue
            if (zero and dp * cp == 1) or (pp == 1 and schedule != "1f1b"):
                continue  # written in several ways, the same plan
            try:
                plan = Plan(
                    tp=tp, pp=pp, cp=cp, dp=dp, ep=ep, etp=etp, zero_stage=zero, recomputation=again,
                    micro_batch_size=size, schedule=schedule, virtual_stages=chunks, sequence_parallel=tp > 1,
                )  # fmt: skip
            except ConfigError:
                continue
            is_uneven = chunks == 1 and (schedule != "interleaved")
            if explain_misfit(plan, model, cluster, batch, is_padding_layers=is_uneven) or has_empty_stage(plan, model):
                continue
            if schedule == "interleaved" and chunks == 1:
                continue
            if (tp * cp * dp) % (ep * etp):
                continue
            estimated = predict(model, cluster, plan, batch, is_checked=False)
            if estimated.memory_bytes <= (budget or cluster.accelerators[0].memory_bytes):
                found[plan] = estimated
    return found


def has_empty_stage(plan, model):
    slots = -(-model.layers // plan.pp)
    missing = slots * plan.pp - model.layers
    return bool(missing) and -(-missing // 2) >= slots
