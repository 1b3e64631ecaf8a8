"""Many plans on local ranks: does the order that the planner predicts hold, and how far off are its seconds and bytes?

    measure the ranks -> predict each plan -> train each plan for some steps, in turns -> Spearman's rank correlation

The machine that is planned for are ranks of this one, measured while all of them compute
(`planning/machines/rank_measurement.py`). The model trains in FP32 on random tokens through `ds.parallelize`, as any
program would call it; what depends on the data is not measured. Which plans are tried does not depend on what is
predicted of them. A step's time is that of the slowest rank, its memory what the fullest rank gained over what it held
before there was a model.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from deepseek.bench.plan_parity import launch
from deepseek.core.allocator import give_back_freed_memory
from deepseek.core.divisors import list_divisors
from deepseek.core.errors import ConfigError
from deepseek.core.process_memory import forget_peak, peak_bytes
from deepseek.data.batching import Batch
from deepseek.distributed.parallel.legality import ModelParts, describe, list_plans
from deepseek.distributed.parallel.mesh import build_mesh
from deepseek.distributed.plan import Plan
from deepseek.models.decoder.model import Decoder
from deepseek.models.parallelizing import list_model_rows, parallelize
from deepseek.planning.estimate.step import Prediction, predict
from deepseek.planning.feasibility import explain_misfit
from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.machines.rank_measurement import PRECISION, build_rank_cluster, measure_ranks
from deepseek.planning.machines.software import SOFTWARE
from deepseek.planning.models.model_shape import ModelShape
from deepseek.train.config import TrainConfig
from deepseek.train.tasks.causal_lm import CausalLM

_FEWEST_STEPS = 3
NUM_ROUNDS = 3
_LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class RankedPlan:
    """One plan, predicted beside measured."""

    plan: dict[str, object]
    description: str
    predicted_s: float
    measured_s: float
    predicted_bytes: float
    measured_bytes: float

    @property
    def time_ratio(self) -> float:
        """Predicted over measured seconds."""
        return self.predicted_s / self.measured_s


@dataclass(frozen=True)
class PlanRanking:
    """All plans that were tried, and how well their order was predicted."""

    num_ranks: int
    num_cores: int
    rows: tuple[RankedPlan, ...]

    @property
    def time_correlation(self) -> float:
        """Spearman's correlation of predicted and measured step times."""
        return correlate_ranks([row.predicted_s for row in self.rows], [row.measured_s for row in self.rows])

    @property
    def memory_correlation(self) -> float:
        """The same of memory."""
        return correlate_ranks([row.predicted_bytes for row in self.rows], [row.measured_bytes for row in self.rows])

    def to_dict(self) -> dict[str, Any]:
        """Return everything by name."""
        return {
            **asdict(self),
            "time_correlation": self.time_correlation,
            "memory_correlation": self.memory_correlation,
        }


def rank_plans(
    config: TrainConfig, shape: ModelShape, *, num_ranks: int, num_plans: int, num_steps: int, global_batch: int
) -> PlanRanking:
    """Measure `num_ranks` local ranks, then predict and train up to `num_plans` plans for the decoder of `config`.

    `shape` is that decoder's, with rows as long as they are to be trained. Raises `ConfigError` where fewer than three
    plans can run, since two are in order by chance.
    """
    if num_steps < _FEWEST_STEPS:
        raise ConfigError(f"--steps {num_steps} leaves nothing to measure after the warm-up; give at least 3")
    cluster = build_rank_cluster(measure_ranks(num_ranks))
    with torch.device("meta"):
        parts = list_model_rows(Decoder(config.model)).parts
    plans = choose_plans(parts, shape, cluster, global_batch, num_plans)
    if len(plans) < 3:
        raise ConfigError(
            f"{len(plans)} plans can run {shape.name or 'this model'} on {num_ranks} ranks with {global_batch} "
            "sequences a step, and an order needs three; give another --global-batch or --ranks"
        )
    predictions = [predict_here(shape, cluster, plan, global_batch) for plan in plans]
    measured = launch(num_ranks, _train_on_rank, config, shape.sequence, plans, global_batch, num_steps)
    rows = [
        RankedPlan(plan.as_dict(), describe(replace(plan, precision=Plan().precision)), prediction.step_time_s, seconds,
                   prediction.memory_bytes - prediction.memory_items_bytes.get("context", 0.0), num_bytes)
        for plan, prediction, (seconds, num_bytes) in zip(plans, predictions, measured, strict=True)
    ]  # fmt: skip
    return PlanRanking(num_ranks, cluster.num_cores, tuple(rows))


def predict_here(shape: ModelShape, cluster: Cluster, plan: Plan, global_batch: int) -> Prediction:
    """Predict a step of this framework, without compiling."""
    return predict(shape, cluster, plan, global_batch, software=SOFTWARE["deepseek"], is_checked=False)


def choose_plans(
    parts: ModelParts, shape: ModelShape, cluster: Cluster, global_batch: int, num_plans: int
) -> list[Plan]:
    """Choose plans that are unlike each other: of each way to assign the ranks, from both ends in turn.

    The ends are the least sharded plan with the largest micro-batch, and the most sharded one with the smallest.
    """
    ways: defaultdict[tuple[int, ...], list[Plan]] = defaultdict(list)
    for plan in _list_candidates(parts, cluster.num_devices, global_batch):
        if explain_misfit(plan, shape, cluster, global_batch, is_padding_layers=True) is None:
            ways[plan.dp, plan.tp, plan.pp, plan.cp, plan.ep].append(plan)
    for plans in ways.values():
        plans.sort(key=lambda plan: (plan.zero_stage, -plan.micro_batch_size))
    chosen: list[Plan] = []
    takes_last = False
    while any(ways.values()) and len(chosen) < num_plans:
        for plans in [plans for plans in ways.values() if plans]:
            chosen.append(plans.pop(-1 if takes_last else 0))
        takes_last = not takes_last
    return chosen[:num_plans]


def _list_candidates(parts: ModelParts, num_ranks: int, global_batch: int) -> Iterator[Plan]:
    for plan in list_plans(parts, num_ranks):
        is_plain = plan.schedule == "1f1b" and not plan.sequence_parallel and plan.ep == 1 and plan.cp == 1
        if is_plain and global_batch % plan.dp == 0:
            for size in list_divisors(global_batch // plan.dp):
                yield replace(plan, micro_batch_size=size, precision=PRECISION)  # type: ignore[arg-type]


def correlate_ranks(one: Sequence[float], other: Sequence[float]) -> float:
    """Return Spearman's rank correlation; equal values share the mean of their ranks, and all equal ones have no order.

    >>> correlate_ranks([1.0, 2.0, 3.0], [10.0, 30.0, 20.0]), correlate_ranks([1.0, 1.0], [1.0, 2.0])
    (0.5, 0.0)
    """
    if min(len(set(one)), len(set(other))) < 2:
        return 0.0
    return round(float(np.corrcoef(_rank(one), _rank(other))[0, 1]), 6)


def _rank(values: Sequence[float]) -> list[float]:
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2 for value in values
    ]


# ---- on the ranks


def _train_on_rank(
    config: TrainConfig, length: int, plans: Sequence[Plan], global_batch: int, num_steps: int
) -> list[tuple[float, float]]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        return train_in_turns(config, length, plans, global_batch, num_steps)
    finally:
        dist.destroy_process_group()


def train_in_turns(
    config: TrainConfig, length: int, plans: Sequence[Plan], global_batch: int, num_steps: int
) -> list[tuple[float, float]]:
    """Train every plan in several rounds; return the median seconds of its steps and its bytes, of the worst rank."""
    seconds: list[list[float]] = [[] for _ in plans]
    num_bytes = [0.0 for _ in plans]
    for _ in range(NUM_ROUNDS):
        for index, plan in enumerate(plans):
            taken, gained = _train(config, length, plan, global_batch, num_steps)
            seconds[index] += taken
            num_bytes[index] = max(num_bytes[index], gained)
    return [(statistics.median(taken), gained) for taken, gained in zip(seconds, num_bytes, strict=True)]


def _train(
    config: TrainConfig, length: int, plan: Plan, global_batch: int, num_steps: int
) -> tuple[list[float], float]:
    """Return seconds of each step after the first on the slowest rank, and bytes gained by the fullest."""
    gc.collect()  # the model before, with its hooks
    give_back_freed_memory()
    forget_peak()
    before = peak_bytes()
    torch.manual_seed(0)
    mesh = build_mesh(plan)
    parallel = parallelize(Decoder(config.model).train(), plan, mesh)
    optimizer = torch.optim.AdamW(parallel.parameter_groups(), lr=_LEARNING_RATE, fused=True)
    task = CausalLM(config)
    give_back_freed_memory()
    forget_peak()
    generator = torch.Generator().manual_seed(mesh.coordinate("dp"))
    seconds = []
    for _ in range(num_steps):
        batches = [_draw(config, length, plan, generator) for _ in range(plan.count_micro_batches(global_batch))]
        dist.barrier()
        began_s = time.perf_counter()
        optimizer.zero_grad()
        parallel.accumulate_gradients(task, batches)
        optimizer.step()
        seconds.append(time.perf_counter() - began_s)
    worst = torch.tensor([*seconds[1:], float(peak_bytes() - before)], dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    *slowest, gained = worst.tolist()
    return slowest, gained


def _draw(config: TrainConfig, length: int, plan: Plan, generator: torch.Generator) -> Batch:
    tokens_BT = torch.randint(config.model.vocab_size, (plan.micro_batch_size, length + 1), generator=generator)
    targets_BT = tokens_BT[:, 1:].contiguous()
    return Batch(tokens_BT[:, :-1].contiguous(), targets_BT, targets_BT.numel())
