"""Tensor parallelism from outside: a table of (pattern, style) rows, applied to the modules whose names match.

    ("layers.*.attention", enter)               the input goes to all ranks, its gradient is summed over them
    ("layers.*.attention.q_proj", columns)      each rank computes a part of the outputs
    ("layers.*.attention.o_proj", rows)         each rank has a part of the inputs; the results are summed
    ("embed", vocabulary)                       each rank holds a part of the table
    ("head", logits)                            each rank computes a part of the logits, and they stay there

A style is a function of a module and a `TensorParallel`. Sharded weights become DTensors, so that what saves, loads and
clips them sees whole tensors; activations between the modules are plain tensors. With `sequence_parallel`, activations
between two styles hold a part of the sequence each, and the weights that work on them (`spread`) have a gradient on
each rank that is a part of the sum: `ParallelModel` sums it.

Rows that do not divide are legal: of 50,257 rows, two ranks hold 25,129 and 25,128.
Sources: Shoeybi et al. 2019 (columns, then rows); Korthikanti et al. 2022 (sequences).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from deepseek.core.divisors import explain_division
from deepseek.core.errors import ConfigError
from deepseek.core.names import explain_unknown
from deepseek.distributed.parallel.pipeline import Received, TakenOut

SEQUENCE_DIM = 1


@dataclass(frozen=True)
class TensorParallel:
    """The tensor parallel neighbors of this rank, and what the styles note for the rest of a step."""

    mesh: DeviceMesh
    """One axis, `tp`."""
    has_sequences: bool
    """Whether activations between the styles hold a part of the sequence each."""
    partial_parameters: list[nn.Parameter] = field(default_factory=list)
    """Whole weights whose gradient on each rank is a part of the sum."""

    @property
    def rank(self) -> int:
        """The place of this rank among its neighbors."""
        return self.mesh.get_local_rank()

    @property
    def between(self) -> Placement:
        """How activations lie between the styles."""
        return Shard(SEQUENCE_DIM) if self.has_sequences else Replicate()


Style = Callable[[nn.Module, TensorParallel], None]
Rows = Sequence[tuple[str, Style | str]]


def columns(module: nn.Module, tensor: TensorParallel) -> None:
    """Give each rank a part of the outputs of a linear layer; they stay there."""
    _apply(module, tensor, ColwiseParallel(input_layouts=tensor.between))


def rows(module: nn.Module, tensor: TensorParallel) -> None:
    """Give each rank a part of the inputs of a linear layer, which lie there, and sum what comes out."""
    module.register_forward_pre_hook(partial(_say_width, tensor))
    _apply(module, tensor, RowwiseParallel(output_layouts=tensor.between))


def _say_width(tensor: TensorParallel, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Say how wide the parts of an input are together: torch takes the parts of all ranks for equal otherwise."""
    local, width = inputs[0], cast("nn.Linear", module).in_features
    shape = torch.Size([*local.shape[:-1], width])
    stride = torch.empty(shape, device="meta").stride()
    whole = DTensor.from_local(local, tensor.mesh, [Shard(-1)], run_check=False, shape=shape, stride=stride)
    return (whole, *inputs[1:])


def vocabulary(module: nn.Module, tensor: TensorParallel) -> None:
    """Give each rank a part of the rows of an embedding; it answers for its own tokens, and the answers are summed."""
    _apply(module, tensor, RowwiseParallel(input_layouts=Replicate(), output_layouts=tensor.between))


def logits(module: nn.Module, tensor: TensorParallel) -> None:
    """Compute a part of the logits on each rank; they stay there as a DTensor, which the loss reads as it lies."""
    _apply(module, tensor, ColwiseParallel(input_layouts=tensor.between, use_local_output=False))


def outputs(module: nn.Module, tensor: TensorParallel) -> None:
    """Compute a part of the outputs on each rank, and give all of them to all ranks."""
    _apply(module, tensor, ColwiseParallel(input_layouts=tensor.between, output_layouts=Replicate()))


def enter(module: nn.Module, tensor: TensorParallel) -> None:
    """Give the whole first input to the layers inside; its gradient is summed over the ranks once for all of them."""
    module.register_forward_pre_hook(partial(_enter, tensor))


def _enter(tensor: TensorParallel, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    here = DTensor.from_local(inputs[0], tensor.mesh, [tensor.between], run_check=False)
    return (here.redistribute(placements=[Replicate()]), *inputs[1:])


def split(module: nn.Module, tensor: TensorParallel) -> None:
    """Leave each rank the part of an output that goes with its part of the sequence."""
    if tensor.has_sequences:
        tensor.partial_parameters.extend(module.parameters(recurse=False))
        module.register_forward_hook(partial(_split, tensor))


def _split(tensor: TensorParallel, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.chunk(tensor.mesh.size(), dim=SEQUENCE_DIM)[tensor.rank]


def spread(module: nn.Module, tensor: TensorParallel) -> None:
    """Let a module with whole weights, a norm say, work on the part of the sequence that lies on each rank."""
    if tensor.has_sequences:
        tensor.partial_parameters.extend(module.parameters())


def within(module: nn.Module, tensor: TensorParallel) -> None:
    """Let a module with whole weights work on what only this rank has, heads say."""
    tensor.partial_parameters.extend(module.parameters())
    module.register_forward_pre_hook(leave)


def leave(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Take the local part of a DTensor whose gradient on each rank is a part of the sum."""
    first = inputs[0]
    return (first.to_local(grad_placements=[Partial()]) if isinstance(first, DTensor) else first, *inputs[1:])


def divide(*names: str) -> Style:
    """Divide whole-number attributes of a module, its number of heads say, by the number of ranks."""

    def divide_attributes(module: nn.Module, tensor: TensorParallel) -> None:
        size = tensor.mesh.size()
        for name in names:
            value = getattr(module, name)
            if value % size:
                raise ConfigError(explain_division("tp", size, name, value))
            setattr(module, name, value // size)

    return divide_attributes


STYLES: dict[str, Style] = {
    "columns": columns,
    "rows": rows,
    "vocabulary": vocabulary,
    "logits": logits,
    "outputs": outputs,
    "enter": enter,
    "split": split,
    "spread": spread,
    "within": within,
}


def apply_rows(module: nn.Module, table: Rows, tensor: TensorParallel) -> None:
    """Apply every row to the modules whose names match its pattern, in place; tied weights stay tied.

    `*` in a pattern stands for one part of a name. Raises `ConfigError` for an unknown style, and for a pattern that
    matches no module.
    """
    tied = find_tied(module)
    for pattern, style in table:
        found = match_modules(module, pattern)
        if not found:
            known = ", ".join(name for name, _ in list(module.named_modules())[1:6])
            raise ConfigError(
                f"the row {pattern!r} matches no module of {type(module).__name__}; its modules are {known}, ..."
            )
        for matched in found.values():
            if not isinstance(matched, Received | TakenOut):
                _find_style(style)(matched, tensor)
    for first, other in tied:
        _tie_again(module, first, other)


def match_modules(module: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """Return the modules whose names match `pattern`, in which `*` stands for one part of a name."""
    rule = re.compile(r"[^.]+".join(re.escape(part) for part in pattern.split("*")))
    return {name: found for name, found in module.named_modules() if rule.fullmatch(name)}


def find_tied(module: nn.Module) -> list[tuple[str, str]]:
    """Return pairs of names, the first one and another one, under which a module holds the same parameter."""
    first: dict[int, str] = {}
    pairs = []
    for name, parameter in module.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            pairs.append((known, name))
    return pairs


def _tie_again(module: nn.Module, first: str, other: str) -> None:
    """Let two names hold one parameter as before: the sharded one, if only one of them was cut."""
    weights = [module.get_parameter(first), module.get_parameter(other)]
    kept = weights[isinstance(weights[1], DTensor) and not isinstance(weights[0], DTensor)]
    _set_parameter(module, first, kept)
    _set_parameter(module, other, kept)


def _set_parameter(module: nn.Module, path: str, parameter: nn.Parameter) -> None:
    owner, _, name = path.rpartition(".")
    module.get_submodule(owner).register_parameter(name, parameter)


def _find_style(style: Style | str) -> Style:
    if not isinstance(style, str):
        return style
    if style not in STYLES:
        raise ConfigError(explain_unknown("style", style, STYLES))
    return STYLES[style]


def read_rows(table: Mapping[str, str] | Rows) -> Rows:
    """Return the rows of a table that a user wrote: a mapping, or pairs.

    >>> read_rows({"mlp.0": "columns", "mlp.2": "rows"})
    (('mlp.0', 'columns'), ('mlp.2', 'rows'))
    """
    return tuple(table.items()) if isinstance(table, Mapping) else tuple(table)


def _apply(module: nn.Module, tensor: TensorParallel, style: ParallelStyle) -> None:
    style.src_data_rank = None  # every rank has the same weights already
    parallelize_module(module, tensor.mesh, style)
