"""`--plan auto`: the plan that the planner finds fastest for a run, on the ranks of this machine that were started.

    config -> shape; measured machine -> one device for each rank -> search -> the fastest plan that can run

Ranks on processors share them, so each has its part of the measured speed and memory. What the runtime cannot do is
left out of the search: the rules of `distributed/parallel/legality.py` and a step's rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import torch

from deepseek.bench.recipe_requests import choose_recipe_precision, narrow_space, read_recipe_shape
from deepseek.core.errors import ConfigError, InfeasibleError
from deepseek.distributed.launch_environment import read_launch_environment
from deepseek.distributed.parallel.legality import ModelParts, explain_illegal
from deepseek.distributed.plan import Plan
from deepseek.models.decoder.model import Decoder
from deepseek.models.parallelizing import list_model_rows
from deepseek.planning.machines.cluster import Cluster, Node
from deepseek.planning.search.planner import plan_request
from deepseek.planning.search.request import Request, Space
from deepseek.planning.search.results import EstimatedPlan
from deepseek.train.config import TrainConfig
from deepseek.train.parallel_run import split_step


def choose_rank_plan(config: TrainConfig, num_ranks: int, machine: Cluster) -> Plan:
    """Return the fastest plan for a run on `num_ranks` ranks of this machine, which was measured as `machine`.

    Raises `ConfigError` for a run that the planner cannot estimate, for ranks on several machines, whose network nobody
    measured, and where no plan can run.
    """
    here = read_launch_environment(os.environ).local_world_size
    if here < num_ranks:
        raise ConfigError(
            f"--plan auto plans for the ranks of one machine, and {num_ranks} ranks are on several of {here}; search "
            "with deepseek plan --cluster and --json, and give its file"
        )
    found = list(_search(config, share_machine(machine, num_ranks), num_ranks))
    if not found:
        raise ConfigError(
            f"no plan for {num_ranks} ranks can run on this model with {config.sequences_per_step} rows a step; start "
            "another number of ranks, or give a plan"
        )
    return min(found, key=lambda estimated: estimated.step_time_s).plan


def share_machine(machine: Cluster, num_ranks: int) -> Cluster:
    """Return this machine as `num_ranks` devices, of which each has its part where they are more than there are."""
    (node, *_) = machine.nodes
    device, share = node.accelerator, max(num_ranks / machine.num_devices, 1.0)
    part = replace(
        device,
        memory_bytes=device.memory_bytes / share,
        memory_bandwidth_bytes_per_s=device.memory_bandwidth_bytes_per_s / share,
        peak_flops={precision: flops / share for precision, flops in device.peak_flops.items()},
        scale_up_size=num_ranks,
    )
    return Cluster((Node(part, num_ranks),), machine.network)


def _search(config: TrainConfig, cluster: Cluster, num_ranks: int) -> Iterator[EstimatedPlan]:
    """Yield what the searches find that can run; a pipeline and ZeRO above 1 exclude each other, so there are two."""
    shape = read_recipe_shape(config, "of this run", sequence=None)
    with torch.device("meta"):
        parts = list_model_rows(Decoder(config.model)).parts
    usual = Space(
        cp=(1,), recomputations=("none",), schedules=("1f1b",), precision=choose_recipe_precision(config, is_here=True)
    )
    usual = replace(narrow_space(usual, config, num_devices=num_ranks, is_compiled=False), recomputations=("none",))
    for space in (replace(usual, pp=(1,)), replace(usual, zero_stages=(0, 1))):
        try:
            result = plan_request(Request(shape, cluster, config.sequences_per_step, space=space))
        except InfeasibleError:
            continue
        candidates = [result.best, *(runner_up.candidate for runner_up in result.runners_up)]
        yield from (
            one for one in candidates if one.plan.num_devices == num_ranks and _can_run(config, one.plan, parts)
        )


def _can_run(config: TrainConfig, plan: Plan, parts: ModelParts) -> bool:
    if explain_illegal(plan, parts) is not None:
        return False
    try:
        split_step(config, plan)
    except ConfigError:
        return False
    return True
