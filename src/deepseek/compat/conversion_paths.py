"""From the specs of a checkpoint to a plan: which operations run in which order, and what comes out.

    plan = make_plan(specs, changes_of_each_step, dtypes)
    for name, tensor in plan.run(read): ...

`read(name)` gives a tensor of the source. Results are pulled one by one, in the order of the source, and a tensor is
let go of as soon as its only consumer has it; so memory holds one group (a layer's projections, a layer's experts), not
the checkpoint. Planning costs names and shapes only, and finds what cannot be converted before a byte is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from deepseek.compat.conversion_steps import DirectedTransform
from deepseek.compat.tensors import FLOAT_DTYPES, TensorSpec
from deepseek.compat.transforms import Kind, Operation, Specs, cast
from deepseek.core.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Action:
    """One line of a report: a change, the tensors it was made to, and their new names."""

    kind: Kind
    sources: tuple[str, ...]
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """Operations that run on the result of the stage before, by each of their sources and targets."""

    by_source: Mapping[str, Operation]
    by_target: Mapping[str, Operation]
    before: Specs
    """Everything that stands before the stage."""
    specs: Specs
    """Everything that stands after it."""

    @property
    def operations(self) -> list[Operation]:
        """List each operation once, in the order of its first source."""
        return [operation for name, operation in self.by_source.items() if operation.sources[0] == name]


@dataclass(frozen=True)
class ConversionPlan:
    """A conversion, planned to the last tensor."""

    stages: tuple[Stage, ...]
    specs: Specs
    """The converted tensors, in order."""

    @property
    def actions(self) -> tuple[Action, ...]:
        """List what is done, for a report."""
        operations = [operation for stage in self.stages for operation in stage.operations]
        return tuple(Action(operation.kind, operation.sources, tuple(operation.targets)) for operation in operations)

    def run(self, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the converted tensors one by one, in the order of `specs`."""
        pull = _Pull(self.stages, read)
        for name in self.specs:
            yield name, pull.fetch(len(self.stages), name)


@dataclass
class _Pull:
    """Results that were computed beside a wanted one and still wait for their own consumer."""

    stages: tuple[Stage, ...]
    read: Callable[[str], Tensor]
    waiting: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    def fetch(self, depth: int, name: str) -> Tensor:
        """Return the tensor called `name` after the first `depth` stages."""
        if depth == 0:
            return self.read(name)
        operation = self.stages[depth - 1].by_target.get(name)
        if operation is None:
            return self.fetch(depth - 1, name)
        if (depth, name) not in self.waiting:
            results = operation.run([self.fetch(depth - 1, source) for source in operation.sources])
            self.waiting |= {(depth, target): result for target, result in zip(operation.targets, results, strict=True)}
        return self.waiting.pop((depth, name))


def make_plan(
    specs: Specs, changes: Sequence[Sequence[DirectedTransform]], dtypes: Sequence[str], dtype: str | None = None
) -> ConversionPlan:
    """Plan the changes step after step, then the casts to a dtype that the destination can hold.

    `dtypes` are what it can hold, the first being where others go; `dtype` is the user's own choice among them.
    Raises `ArtifactError` for half converted weights, for tensors that two changes claim and for names that collide.
    """
    stages = []
    for step in changes:
        claims = [
            (change.transform.name, op) for change in step for op in change.transform.plan(specs, change.direction)
        ]
        if claims:
            stages.append(_make_stage(specs, claims))
            specs = stages[-1].specs
    casts = [("cast", cast(name, spec, to)) for name, spec in specs.items() if (to := _goal(spec, dtypes, dtype))]
    if casts:
        stages.append(_make_stage(specs, casts))
    return ConversionPlan(tuple(stages), stages[-1].specs if stages else dict(specs))


def _goal(spec: TensorSpec, dtypes: Sequence[str], dtype: str | None) -> str | None:
    """Return the dtype that a tensor has to be cast to, `None` when it may stay."""
    if not spec.is_float:
        return None
    floats = [dtype_name for dtype_name in dtypes if dtype_name in FLOAT_DTYPES]
    goal = dtype or (spec.dtype if spec.dtype in floats else floats[0])
    return None if goal == spec.dtype else goal


def _make_stage(specs: Specs, claims: Sequence[tuple[str, Operation]]) -> Stage:
    by_source: dict[str, Operation] = {}
    claimed_by: dict[str, str] = {}
    for claimant, operation in claims:
        for name in operation.sources:
            if name in claimed_by:
                raise ArtifactError(
                    f"{name} is claimed by two steps, {claimed_by[name]!r} and {claimant!r}; convert one at a time"
                )
            claimed_by[name] = claimant
            by_source[name] = operation
    after: dict[str, TensorSpec] = {}
    by_target: dict[str, Operation] = {}
    for name, spec in specs.items():
        known = by_source.get(name)
        if known is not None and known.sources[0] != name:
            continue
        for target, result in ({name: spec} if known is None else known.targets).items():
            if target in after:
                raise ArtifactError(
                    f"two tensors would be called {target}; the weights hold both forms, convert the original anew"
                )
            after[target] = result
            if known is not None:
                by_target[target] = known
    return Stage({name: by_source[name] for name in specs if name in by_source}, by_target, specs, after)
