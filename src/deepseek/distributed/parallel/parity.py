"""The oracle: a model under a plan, held step by step against the same model in one process.

    records = record_steps(model, learner, steps, build_optimizer)            # one process, float64
    partings = compare_steps(parallel, learner, steps, records, build_optimizer)    # every rank

Loss, norm, every gradient and every parameter are compared on every rank, after each step, so that copies that drift
apart are seen as well. What parts first is named first: the loss, then gradients from the last layer to the first,
since a wrong one spoils those behind it, then parameters. SGD comes before AdamW, which hides a wrong scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepseek.distributed.parallel.parallel_model import ParallelModel
from deepseek.distributed.parallel.pipeline import Learner

Kind = Literal["loss", "norm", "gradient", "parameter"]
_KINDS: tuple[Kind, ...] = ("loss", "gradient", "norm", "parameter")
Steps = Sequence[Sequence[Any]]
"""The batches of each step. Rank d of dp ranks takes those at d, d + dp, d + 2 dp, ..."""
BuildOptimizer = Callable[[list[dict[str, list[nn.Parameter]]]], torch.optim.Optimizer]
Merge = Callable[[Sequence[Any]], Any]

RELATIVE_TOLERANCE = 1e-9
"""Largest difference between float64 sums in another order, as a share of a tensor's largest value."""
LEAST_SHARE = 1e-4
"""The same for gradients that are zero but for rounding: a share of that, of the largest value of all tensors."""
_TINY = 1e-30


@dataclass(frozen=True)
class StepRecord:
    """What one step came to in a single process."""

    loss: float
    norm: float
    gradients: dict[str, Tensor]
    """By name; a parameter without a gradient is not in it."""
    parameters: dict[str, Tensor]
    """After the step."""


@dataclass(frozen=True)
class Parting:
    """A value that differs under the plan."""

    step: int
    """From 0."""
    kind: Kind
    name: str
    """Of the parameter; empty for losses and norms."""
    rank: int
    difference: float
    """Largest, or infinite where one side has no value or another shape."""
    allowed: float
    order: int
    """Place in the backward pass, for gradients: from the last layer to the first."""

    def describe(self) -> str:
        """Say what parted, in a sentence.

        >>> Parting(0, "gradient", "head.weight", 1, 0.5, 1e-9, 0).describe()
        'the gradient of head.weight differs by 0.5 on rank 1 in step 1 (1e-09 is rounding)'
        """
        what = f"the {self.kind} of {self.name}" if self.name else f"the {self.kind}"
        return (
            f"{what} differs by {self.difference:.3g} on rank {self.rank} in step {self.step + 1} "
            f"({self.allowed:.1g} is rounding)"
        )


@dataclass(frozen=True)
class Parity:
    """The outcome of a comparison, the same on every rank."""

    num_compared: int
    """Values and tensors compared, over all ranks."""
    largest_share: float
    """Largest difference, as a share of what is allowed."""
    partings: tuple[Parting, ...]
    """The first ones first; empty where all is equal."""

    @property
    def is_equal(self) -> bool:
        """Whether nothing parted."""
        return not self.partings


def record_steps(
    model: nn.Module,
    learner: Learner,
    steps: Steps,
    build_optimizer: BuildOptimizer,
    *,
    dp: int = 1,
    merge: Merge | None = None,
) -> list[StepRecord]:
    """Train `model` in this process and record each step.

    With `merge`, the batches that `dp` ranks take at the same time pass the model as one, which matters to layers that
    look at all of a batch.
    """
    optimizer = build_optimizer([{"params": list(model.parameters())}])
    records = []
    for batches in steps:
        optimizer.zero_grad()
        num_units = sum(learner.count_units(batch) for batch in batches)
        groups = [batches[first : first + dp] for first in range(0, len(batches), dp)]
        passes = batches if merge is None else [merge(group) for group in groups]
        loss = 0.0
        for batch in passes:
            part = learner.loss(learner.forward(model, batch), batch) / num_units
            part.backward()
            loss += float(part.detach())
        gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        norm = float(torch.nn.utils.get_total_norm(list(gradients.values())))
        optimizer.step()
        parameters = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        records.append(StepRecord(loss, norm, gradients, parameters))
    return records


def compare_steps(
    parallel: ParallelModel,
    learner: Learner,
    steps: Steps,
    records: Sequence[StepRecord],
    build_optimizer: BuildOptimizer,
    *,
    tolerance: float = RELATIVE_TOLERANCE,
) -> Parity:
    """Train under the plan and compare each step with its record; every rank calls it.

    `tolerance` is what counts as rounding, as a share of a tensor's largest value.
    """
    optimizer = build_optimizer(parallel.parameter_groups())
    dp, mine = parallel.plan.dp, parallel.mesh.coordinate("dp")
    found: list[Parting] = []
    num_compared, largest = 0, 0.0
    for step, (batches, record) in enumerate(zip(steps, records, strict=True)):
        optimizer.zero_grad()
        totals = parallel.accumulate_gradients(learner, batches[mine::dp])
        compared = [*_compare_numbers(step, totals.loss, parallel.gradient_norm(), record, tolerance)]
        compared += _compare_gradients(step, parallel, record, tolerance)
        optimizer.step()
        compared += _compare_parameters(step, parallel, record, tolerance)
        num_compared += len(compared)
        shares = [parting.difference / parting.allowed for parting in compared]
        largest = max(largest, *shares)
        found += [parting for parting, share in zip(compared, shares, strict=True) if not share <= 1]
    return _join(parallel, records, found, num_compared, largest)


def _join(
    parallel: ParallelModel,
    records: Sequence[StepRecord],
    found: list[Parting],
    num_compared: int,
    largest: float,
) -> Parity:
    """Join what all ranks found; a parameter that no rank holds is a parting as well."""
    names = {name for name, _ in parallel.named_parameters()}
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, (names, found, num_compared, largest))
    held = set().union(*(answer[0] for answer in answers))
    missing = [
        Parting(0, "parameter", name, 0, float("inf"), RELATIVE_TOLERANCE, 0)
        for name in records[0].parameters
        if name not in held
    ]
    partings = missing + [parting for answer in answers for parting in answer[1]]
    partings.sort(key=lambda parting: (parting.step, _KINDS.index(parting.kind), parting.order, parting.rank))
    return Parity(sum(answer[2] for answer in answers), max(answer[3] for answer in answers), tuple(partings))


def _compare_numbers(step: int, loss: float, norm: float, record: StepRecord, tolerance: float) -> Iterator[Parting]:
    for kind, value, expected in (("loss", loss, record.loss), ("norm", norm, record.norm)):
        allowed = tolerance * (abs(expected) + LEAST_SHARE)
        yield Parting(step, kind, "", dist.get_rank(), _as_difference(abs(value - expected)), allowed, 0)  # type: ignore[arg-type]


def _compare_gradients(step: int, parallel: ParallelModel, record: StepRecord, tolerance: float) -> Iterator[Parting]:
    order = {name: place for place, name in enumerate(reversed(list(record.parameters)))}
    least = max(_largest(record.gradients), _TINY) * LEAST_SHARE
    for name, parameter in parallel.named_parameters():
        whole = None if parameter.grad is None else parallel.gather(name, parameter.grad)
        yield _compare(step, "gradient", name, whole, record.gradients.get(name), least, tolerance, order[name])


def _compare_parameters(step: int, parallel: ParallelModel, record: StepRecord, tolerance: float) -> Iterator[Parting]:
    least = max(_largest(record.parameters), _TINY) * LEAST_SHARE
    for place, (name, parameter) in enumerate(parallel.named_parameters()):
        whole = parallel.gather(name, parameter)
        yield _compare(step, "parameter", name, whole, record.parameters[name], least, tolerance, place)


def _compare(
    step: int,
    kind: Kind,
    name: str,
    value: Tensor | None,
    expected: Tensor | None,
    least: float,
    tolerance: float,
    order: int,
) -> Parting:
    if value is None or expected is None or value.shape != expected.shape:
        difference = 0.0 if value is None and expected is None else float("inf")
        return Parting(step, kind, name, dist.get_rank(), difference, tolerance * least, order)
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    difference = float((value - expected.to(value.device)).abs().max()) if expected.numel() else 0.0
    return Parting(step, kind, name, dist.get_rank(), _as_difference(difference), tolerance * (largest + least), order)


def _as_difference(value: float) -> float:
    return value if value == value else float("inf")  # noqa: PLR0124 - not a number is a difference without bound


def _largest(tensors: dict[str, Tensor]) -> float:
    return max((float(tensor.abs().max()) for tensor in tensors.values() if tensor.numel()), default=0.0)
