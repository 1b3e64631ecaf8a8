"""Weights of one generation into weights of another.

    weights = VersionConverter("v2.0", "v3.5").convert(model.state_dict())
    weights.report.merged

The converter walks the shortest path of registered steps (`conversion_steps.py`); a change that a later step of the
path undoes is not made at all. Whether the weights really are of the source generation is checked by their names: all
in the destination's form pass through with a warning, a mixture is refused. Moves of elements are bit-exact; casts and
quantisation are the only lossy changes, and both are reported. `sharded_checkpoints.py` does the same for folders of
files.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deepseek.compat.conversion_paths import Action, ConversionPlan, Stage, make_plan
from deepseek.compat.conversion_steps import (
    FUSED_FAMILIES,
    STEPS,
    DirectedTransform,
    Step,
    find_path,
    identify,
    is_half_converted,
    net_changes,
)
from deepseek.compat.generations import find_generation
from deepseek.compat.tensors import FLOAT_DTYPES, describe, parse_dtype
from deepseek.compat.transforms import Kind, Operation, Specs
from deepseek.core.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor


_MOVES = ("renamed", "merged", "split")
# The parameters and statistics of one module, which move together.
_LEAVES = ("weight", "bias", "gamma", "beta", "running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class ConversionReport:
    """The record of a conversion, tensor by tensor."""

    path: tuple[str, ...]
    """The generations walked through, first to last."""
    actions: tuple[Action, ...]
    notes: tuple[str, ...] = ()
    """The warnings given."""

    def of_kind(self, *kinds: Kind) -> tuple[Action, ...]:
        """Return the actions of some kinds."""
        return tuple(action for action in self.actions if action.kind in kinds)

    @property
    def renamed(self) -> dict[str, str]:
        """Old name to new name, through all steps' renames one by one."""
        return {action.sources[0]: action.targets[0] for action in self.of_kind("renamed")}

    @property
    def split(self) -> tuple[Action, ...]:
        """One tensor became several."""
        return self.of_kind("split")

    @property
    def merged(self) -> tuple[Action, ...]:
        """Several tensors became one."""
        return self.of_kind("merged")

    @property
    def cast(self) -> tuple[Action, ...]:
        """Another dtype, quantised or floating."""
        return self.of_kind("cast", "quantized", "dequantized")

    @property
    def dropped(self) -> tuple[str, ...]:
        """Tensors that the destination does not hold."""
        return tuple(action.sources[0] for action in self.of_kind("dropped"))


class ConvertedWeights(dict[str, "Tensor"]):
    """A state dict that knows how it came about."""

    def __init__(self, weights: Mapping[str, Tensor], report: ConversionReport, optimizer: Any = None) -> None:
        super().__init__(weights)
        self.report = report
        self.optimizer = optimizer
        """The optimizer's state under the new names, when one was given."""


class VersionConverter:
    """Converts weights from `src_version` to `dst_version`, both under any name that users write.

    `dtype` casts floating tensors to one that the destination can hold; without it a tensor keeps its own wherever
    it can. Raises `ConfigError` for an unknown generation and where no path of steps leads from one to the other.

    >>> VersionConverter("v2.0", "v5.0").path
    ('2.0', '3.5', '4.0', '5.0')
    """

    def __init__(
        self, src_version: str, dst_version: str, *, dtype: str | None = None, steps: Sequence[Step] = STEPS
    ) -> None:
        self.source = find_generation(src_version)
        self.target = find_generation(dst_version)
        self.steps = find_path(self.source.name, self.target.name, steps)
        self.dtype = None if dtype is None else parse_dtype(str(dtype))
        layout = self.target.layout
        self.dtypes: tuple[str, ...] = layout.dtypes if layout else ()
        if self.dtype and self.dtype not in self.dtypes:
            raise ConfigError(
                f"generation {self.target.name} holds {', '.join(self.dtypes)}, not {self.dtype}; choose one of these"
            )

    @property
    def path(self) -> tuple[str, ...]:
        """List the generations on the way, both ends included."""
        return (self.source.name, *(step.target for step in self.steps))

    def plan(self, specs: Specs, model_type: str | None = None) -> tuple[ConversionPlan, ConversionReport]:
        """Plan what `convert` would do to tensors of these names, dtypes and shapes.

        `model_type` is that of the Hugging Face config, where there is one: Phi-3 holds the joined names of generation
        3.0 to 4.0 itself, and is left as it is.
        """
        changes = net_changes(self.steps)
        notes: list[str] = []
        doubt = _doubt_fused(specs, changes, model_type)
        if doubt is None:
            doubt = _judge_forms(specs, [change for step in changes for change in step], self, notes)
        if doubt is None:
            plan = make_plan(specs, changes, self.dtypes, self.dtype)
            doubt = _explain_doubt(specs, plan, changes)
        if doubt is not None:
            plan = make_plan(specs, (), self.dtypes, self.dtype)
            notes.append(f"the names and groups of the weights are left as they are: {doubt}")
        dropped = [action.sources[0] for action in plan.actions if action.kind == "dropped"]
        if dropped:
            notes.append(f"dropped {', '.join(dropped)}: models of generation {self.target.name} compute them")
        return plan, ConversionReport(self.path, plan.actions, tuple(notes))

    def convert(
        self,
        weights: Mapping[str, Tensor],
        *,
        optimizer: Mapping[str, Any] | None = None,
        model_type: str | None = None,
    ) -> ConvertedWeights:
        """Return the same model as `weights` in the destination's form, with a report of the changes.

        `weights` is a flat state dict and stays as it is. `optimizer` is `{"state": {name: {...}}, "param_groups": []}`
        keyed by parameter names, as torch.distributed.checkpoint.state_dict gives it; its entries follow their
        parameters and are dropped with a warning where they cannot. `model_type` as in `plan`; without it Phi-3 is
        known by the modules that a state dict of torch names, or by the sizes of its published vocabularies. Raises
        `ArtifactError` for half converted weights.
        """
        specs = {name: describe(name, tensor) for name, tensor in weights.items()}
        plan, report = self.plan(specs, model_type or _recognize_phi3(specs, getattr(weights, "_metadata", ())))
        for note in report.notes:
            warnings.warn(note, stacklevel=2)
        converted = dict(plan.run(weights.__getitem__))
        moments = None if optimizer is None else _convert_optimizer(optimizer, plan)
        return ConvertedWeights(converted, report, moments)


# Of Phi-3 and 3.5, of Phi-4, and of Phi-4-mini.
_PHI3_VOCABULARIES = (32064, 100352, 200064)


def _recognize_phi3(specs: Specs, modules: Iterable[str]) -> str | None:
    """Return `phi3` where the weights are known to be of one: names and shapes alone could be a joined Llama."""
    rows = {spec.shape[0] for name, spec in specs.items() if name.endswith("embed_tokens.weight")}
    is_phi3 = bool(rows) and rows.issubset(_PHI3_VOCABULARIES)
    return "phi3" if is_phi3 or any(name.endswith(".resid_attn_dropout") for name in modules) else None


def _doubt_fused(specs: Specs, changes: Sequence[Sequence[DirectedTransform]], model_type: str | None) -> str | None:
    """Say why the joined projections of a family that has them itself are not split; `None` where none would be."""
    if model_type not in FUSED_FAMILIES:
        return None
    splits = [change for step in changes for change in step if change.direction == "backward"]
    names = [name for change in splits for op in change.transform.plan(specs, "backward") for name in op.sources]
    if not names:
        return None
    return f"transformers holds {names[0]} of {model_type} joined, as it is; give another model_type if it is none"


def _explain_doubt(specs: Specs, plan: ConversionPlan, changes: Sequence[Sequence[DirectedTransform]]) -> str | None:
    """Say why a plan must not be carried out although every step of it can be; `None` where nothing speaks against it.

    What belongs to a tensor that is moved has to move with it, and the way back has to lead to the same tensors.
    """
    moved = [operation for stage in plan.stages for operation in stage.operations if operation.kind in _MOVES]
    if not moved:
        return None
    modules = {_module_of(name): name for operation in moved for name in operation.sources if name in specs}
    names = set(modules.values()) | {name for operation in moved for name in operation.sources}
    for name, spec in specs.items():
        owner = next((modules[around] for around in _modules_around(name) if around in modules), None)
        if owner is not None and name not in names and _module_of(name) not in modules:
            return f"{name} belongs to {owner} and no step knows it; merge adapters and undo quantization first"
        if not spec.is_float and _is_joined(name, moved):
            return f"{name} is {spec.dtype}; quantized weights are not joined, since their scales would be wrong"
    dropped = {name for operation in plan.actions if operation.kind == "dropped" for name in operation.sources}
    way_back = [[change.inverse for change in reversed(step)] for step in reversed(changes)]
    try:
        back = make_plan(plan.specs, way_back, FLOAT_DTYPES).specs
    except ArtifactError as error:
        return f"the way back fails, {error}"
    for name, spec in specs.items():
        if name not in dropped and (name not in back or back[name].shape != spec.shape):
            came = f"as {list(back[name].shape)} instead of {list(spec.shape)}" if name in back else "not at all"
            return f"{name} would come back {came}"
    return None


def _module_of(name: str) -> str:
    """Return the module of a parameter; a parameter with a name of its own stands for itself."""
    module, _, leaf = name.rpartition(".")
    return module if leaf in _LEAVES else name


def _modules_around(name: str) -> Iterator[str]:
    """Yield the modules that a tensor lies in, the nearest first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _is_joined(name: str, moved: Sequence[Operation]) -> bool:
    return any(name in operation.sources and operation.kind in ("merged", "split") for operation in moved)


def _judge_forms(
    specs: Specs, changes: Sequence[DirectedTransform], converter: VersionConverter, notes: list[str]
) -> str | None:
    """Compare the names with both ends; say why a plan must not be made, and note what is converted already.

    Raises `ArtifactError` where they are half converted, and where they are of other generations than the source.
    """
    judged = [change for change in changes if change.transform.is_evidence]
    old = [change.transform.name for change in judged if change.transform.plan(specs, change.direction)]
    new = [change.transform.name for change in judged if change.transform.plan(specs, change.inverse.direction)]
    source, target = converter.source.name, converter.target.name
    if new and not old:
        notes.append(
            f"the weights already have the form of generation {target} ({', '.join(new)}); these stay as they are"
        )
    if not (old and new):
        return None
    forms = f"{', '.join(old)} as in {source}, {', '.join(new)} as in {target}"
    if is_half_converted(specs):
        raise ArtifactError(
            f"the weights are half converted: {forms}; "
            "convert the original anew, or name the generation it is really of"
        )
    if generations := identify(specs):
        raise ArtifactError(
            f"the weights have {forms}, so they are of generation {' or '.join(generations)}, not of {source}; "
            "name it as the source"
        )
    return f"they have {forms}, as no generation has both"


def _convert_optimizer(optimizer: Mapping[str, Any], plan: ConversionPlan) -> dict[str, Any]:
    state: dict[str, Any] = dict(optimizer.get("state", {}))
    groups = [{**group, "params": list(group["params"])} for group in optimizer.get("param_groups", [])]
    if any(not isinstance(name, str) for name in [*state, *(name for group in groups for name in group["params"])]):
        raise ArtifactError(
            "the optimizer state is keyed by position; expected parameter names: "
            "torch.distributed.checkpoint.state_dict.get_optimizer_state_dict(model, optimizer) gives them"
        )
    for stage in plan.stages:
        state = _move_state(state, stage)
        for group in groups:
            group["params"] = _move_names(group["params"], stage)
    return {**optimizer, "state": state, "param_groups": groups}


def _move_names(names: list[str], stage: Stage) -> list[str]:
    """Rename a group's parameters; a merged one belongs to the group of its first part."""
    moved = []
    for name in names:
        operation = stage.by_source.get(name)
        if operation is None:
            moved.append(name)
        elif operation.sources[0] == name:
            moved += list(operation.targets)
    return moved


def _move_state(state: dict[str, Any], stage: Stage) -> dict[str, Any]:
    moved = {name: entry for name, entry in state.items() if name not in stage.by_source}
    for operation in stage.operations:
        entries = [state[name] for name in operation.sources if name in state]
        if not entries:
            continue
        if not _can_move(entries, operation, stage):
            names = ", ".join(operation.sources)
            warnings.warn(f"the optimizer state of {names} does not map one to one and starts anew", stacklevel=4)
            continue
        columns = {key: _move_values([entry[key] for entry in entries], operation) for key in entries[0]}
        for position, target in enumerate(operation.targets):
            moved[target] = {key: values[position] for key, values in columns.items()}
    return moved


def _can_move(entries: Sequence[Mapping[str, Any]], operation: Operation, stage: Stage) -> bool:
    """Whether all parts have the same entries, each one number on which they agree or a moment for every element."""
    if operation.kind == "cast":
        return True
    if not operation.moves_elements or len(entries) < len(operation.sources):
        return False
    if any(set(entry) != set(entries[0]) for entry in entries):
        return False
    shapes = [stage.before[name].shape for name in operation.sources]
    columns = [[entry[key] for entry in entries] for key in entries[0]]
    return all(_is_shared(values) or [tuple(getattr(v, "shape", ())) for v in values] == shapes for values in columns)


def _move_values(values: Sequence[Any], operation: Operation) -> Sequence[Any]:
    """Return one value per target: the shared number, or moments moved with their parameters."""
    is_cast = operation.kind == "cast"
    return [values[0]] * len(operation.targets) if is_cast or _is_shared(values) else operation.run(values)


def _is_shared(values: Sequence[Any]) -> bool:
    """Whether the values are one number, such as a step count, on which all parts agree."""
    are_numbers = all(getattr(value, "shape", ()) == () for value in values)
    return are_numbers and all(bool(value == values[0]) for value in values)
