"""Single changes between two forms of the same weights, planned on names and shapes, each with its way back.

    Rename    one tensor, another name
    Fuse      several tensors joined along a dimension: Q, K, V or gate, up
    Stack     one tensor for each expert, or one for all experts of a layer
    Quantize  floating matrices, or int8 with a scale for each row
    Drop      buffers that are computed anew when the model is built; no way back

A transform looks at the specs of all tensors and returns the *operations* it would run; `conversion_steps.py` says
between which generations it applies, `conversion_paths.py` chains them. Names are matched by templates: `{prefix}`
stands for any modules before (also none), `{kind}` for weight or bias, `{rest}` for anything, and any other word for a
number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING, Literal, Protocol

from deepseek.compat.tensors import TensorSpec, torch_dtype
from deepseek.core.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

Specs = Mapping[str, TensorSpec]
Direction = Literal["forward", "backward"]
Kind = Literal["renamed", "merged", "split", "quantized", "dequantized", "cast", "dropped"]

_PLACEHOLDERS = {"prefix": r"(?:.*\.)?", "kind": "weight|bias", "rest": ".+"}
_INT8_MAX = 127


@dataclass(frozen=True)
class Operation:
    """Tensors that go in, tensors that come out, and the arithmetic between them."""

    kind: Kind
    sources: tuple[str, ...]
    targets: Mapping[str, TensorSpec]
    run: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    moves_elements: bool = True
    """Whether elements are only moved, so that an optimizer's moments can move the same way."""


class Transform(Protocol):
    """A change between an older form (forward leaves it) and a newer one (backward leaves it)."""

    @property
    def name(self) -> str:
        """Name the change in messages."""

    @property
    def is_evidence(self) -> bool:
        """Whether one form is evidence for the generation that wrote the weights."""

    def plan(self, specs: Specs, direction: Direction) -> list[Operation]:
        """Plan the operations for all tensors in the form that `direction` leaves."""


@dataclass(frozen=True)
class Rename:
    """Rows of (older template, newer template); `shifts` are added to numbers on the way to the newer name."""

    name: str
    rows: tuple[tuple[str, str], ...]
    shifts: Mapping[str, int] = field(default_factory=dict)
    requires: tuple[str, str] | None = None
    """Templates of which one tensor must be there in the older or newer form, where the names alone are too general."""
    is_evidence: bool = True

    def plan(self, specs: Specs, direction: Direction) -> list[Operation]:
        """Plan one operation per tensor that a row names."""
        old, sign = (0, 1) if direction == "forward" else (1, -1)
        if self.requires and not any(_compile(self.requires[old]).fullmatch(name) for name in specs):
            return []
        rows = [(_compile(row[old]), row[1 - old]) for row in self.rows]
        operations = []
        for name, spec in specs.items():
            for pattern, template in rows:
                if match := pattern.fullmatch(name):
                    target = _fill(template, _shift(match.groupdict(), self.shifts, sign))
                    operations.append(Operation("renamed", (name,), {target: spec}, list))
                    break
        return operations


@dataclass(frozen=True)
class Fuse:
    """`parts` joined along `dim` into `whole`; all three are templates of one group."""

    name: str
    parts: tuple[str, ...]
    whole: str
    dim: int = 0
    first_size_from: str | None = None
    """A matrix whose columns count the rows of the first part; the others share the rest. Without it all are equal.
    Where other layers have that matrix, a whole without it is something else and stays whole."""
    requires: str | None = None
    """A template of a tensor without which a group is of another family."""
    is_evidence: bool = True

    def plan(self, specs: Specs, direction: Direction) -> list[Operation]:
        """Plan one operation per group."""
        return list(self._merge(specs) if direction == "forward" else self._split(specs))

    def _merge(self, specs: Specs) -> Iterator[Operation]:
        groups = self._of_family(_groups(self.parts, specs), specs)
        if self._are_apart_by_nature(groups, specs):
            return
        for group in groups:
            names = tuple(_fill(part, group) for part in self.parts)
            whole = _fill(self.whole, group)
            missing = [name for name in names if name not in specs]
            if missing or whole in specs:
                other = f"{whole} is there too" if whole in specs else f"{', '.join(missing)} is missing"
                raise _half_converted([name for name in names if name in specs], other)
            parts = [specs[name] for name in names]
            yield Operation("merged", names, {whole: _joined(names, parts, self.dim)}, self._join)

    def _split(self, specs: Specs) -> Iterator[Operation]:
        for group in self._with_size(self._of_family(_groups((self.whole,), specs), specs), specs):
            whole = _fill(self.whole, group)
            names = [_fill(part, group) for part in self.parts]
            left = [name for name in names if name in specs]
            if left:
                raise _half_converted([whole], f"{', '.join(left)} is there too")
            sizes = self._sizes(whole, specs, group)
            targets = {name: _resized(specs[whole], self.dim, size) for name, size in zip(names, sizes, strict=True)}
            yield Operation("split", (whole,), targets, partial(self._part, sizes))

    def _of_family(self, groups: list[dict[str, str]], specs: Specs) -> list[dict[str, str]]:
        return [group for group in groups if self.requires is None or _fill(self.requires, group) in specs]

    def _with_size(self, groups: list[dict[str, str]], specs: Specs) -> list[dict[str, str]]:
        """Leave out the groups without the matrix of `first_size_from`, where other layers have it."""
        if self.first_size_from is None or not any(map(_compile(self.first_size_from).fullmatch, specs)):
            return groups
        return [group for group in groups if _fill(self.first_size_from, group) in specs]

    def _are_apart_by_nature(self, groups: Sequence[Mapping[str, str]], specs: Specs) -> bool:
        """Whether a family has groups that cannot be joined; then none is.

        Some have fewer parts (K without a bias, layers that share another one's K and V, queries beside compressed
        keys, an up projection without a gate), some parts of unequal columns (keys of something else than queries). A
        part that every weight lacks, or that stands beside the whole, is a fault instead.
        """
        lacking, num_whole = [], 0
        for group in groups:
            names = [_fill(part, group) for part in self.parts]
            if _fill(self.whole, group) in specs:
                return False
            parts = [specs[name] for name in names if name in specs]
            if len(parts) < len(names):
                lacking.append(len(parts))
                continue
            num_whole += group.get("kind") != "bias"
            if len({_resized(part, self.dim, 0).shape for part in parts}) > 1:
                return True
        return bool(lacking) and (num_whole > 0 or 2 * max(lacking) <= len(self.parts))

    def _sizes(self, whole: str, specs: Specs, group: Mapping[str, str]) -> list[int]:
        total = _size(whole, specs[whole], self.dim)
        first = total // len(self.parts)
        if self.first_size_from:
            anchor = _fill(self.first_size_from, group)
            if anchor not in specs:
                raise ArtifactError(f"{whole} cannot be split without {anchor}, which gives the number of query rows")
            first = _size(anchor, specs[anchor], -1)
        rest, left_over = divmod(total - first, len(self.parts) - 1)
        if left_over or rest <= 0:
            raise ArtifactError(f"{whole} has {total} rows, which do not divide into {len(self.parts)} parts")
        return [first] + [rest] * (len(self.parts) - 1)

    def _join(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        import torch

        return [torch.cat(list(tensors), dim=self.dim)]

    def _part(self, sizes: list[int], tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [part.clone() for part in tensors[0].split(sizes, dim=self.dim)]


@dataclass(frozen=True)
class Stack:
    """For each layer, `parts` of every expert joined by rows and stacked into `whole` (expert, row, column)."""

    name: str
    parts: tuple[str, ...]
    whole: str
    is_evidence: bool = True

    def plan(self, specs: Specs, direction: Direction) -> list[Operation]:
        """Plan one operation per layer."""
        return list(self._merge(specs) if direction == "forward" else self._split(specs))

    def _merge(self, specs: Specs) -> Iterator[Operation]:
        num_experts: dict[str, int] = {}
        for group in _groups(self.parts, specs):
            num_experts[group["prefix"]] = max(num_experts.get(group["prefix"], 0), int(group["expert"]) + 1)
        for prefix, count in num_experts.items():
            names, whole = self._names(prefix, count), _fill(self.whole, {"prefix": prefix})
            missing = [name for name in names if name not in specs]
            if missing or whole in specs:
                other = f"{whole} is there too" if whole in specs else f"{missing[0]} is missing"
                raise _half_converted([name for name in names if name in specs][:1], other)
            one = _joined(names, [specs[name] for name in names[: len(self.parts)]], dim=0)
            if len(one.shape) != 2 or any(
                specs[name] != specs[names[index % len(self.parts)]] for index, name in enumerate(names)
            ):
                raise ArtifactError(
                    f"the experts of {prefix or 'the model'} are not matrices of one shape and dtype; check the file"
                )
            yield Operation("merged", names, {whole: TensorSpec(one.dtype, (count, *one.shape))}, self._stack)

    def _split(self, specs: Specs) -> Iterator[Operation]:
        for group in _groups((self.whole,), specs):
            whole = _fill(self.whole, group)
            spec = specs[whole]
            if len(spec.shape) != 3 or not spec.shape[0] or spec.shape[1] % len(self.parts):
                raise ArtifactError(
                    f"{whole} has shape {spec.shape}; expected (experts, {len(self.parts)} x rows, columns)"
                )
            names = self._names(group["prefix"], spec.shape[0])
            if names[0] in specs:
                raise _half_converted([whole], f"{names[0]} is there too")
            one = TensorSpec(spec.dtype, (spec.shape[1] // len(self.parts), spec.shape[2]))
            yield Operation("split", (whole,), dict.fromkeys(names, one), self._unstack)

    def _names(self, prefix: str, num_experts: int) -> tuple[str, ...]:
        groups = ({"prefix": prefix, "expert": str(expert)} for expert in range(num_experts))
        return tuple(_fill(part, group) for group in groups for part in self.parts)

    def _stack(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        import torch

        num_experts, (rows, columns) = len(tensors) // len(self.parts), tensors[0].shape
        return [torch.cat(list(tensors)).view(num_experts, len(self.parts) * rows, columns)]

    def _unstack(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [part.clone() for expert in tensors[0].unbind() for part in expert.chunk(len(self.parts))]


@dataclass(frozen=True)
class Quantize:
    """Matrices as int8 with a float32 scale for each row, symmetric, the largest value on 127; embeddings stay.

    The way back gives float32; the rounding is lost, the int8 values are not.
    """

    name: str
    skip: str = r"(?:.*[._])?(?:embed\w*|\w*embed|\w*embeddings|wte|wpe)\..*"
    is_evidence: bool = True

    def plan(self, specs: Specs, direction: Direction) -> list[Operation]:
        """Plan one operation per matrix."""
        matrices = [
            name
            for name, spec in specs.items()
            if name.endswith(".weight") and len(spec.shape) >= 2 and 0 not in spec.shape
            if not re.fullmatch(self.skip, name)
        ]
        if direction == "forward":
            return [self._pack(name, specs[name]) for name in matrices if specs[name].is_float]
        return [self._unpack(name, specs) for name in matrices if specs[name].dtype == "I8"]

    def _pack(self, name: str, spec: TensorSpec) -> Operation:
        scale = TensorSpec("F32", (spec.shape[0], *(1 for _ in spec.shape[1:])))
        targets = {name: TensorSpec("I8", spec.shape), f"{name}_scale": scale}
        return Operation(
            "quantized", (name,), targets, lambda tensors: _quantize(name, tensors[0]), moves_elements=False
        )

    def _unpack(self, name: str, specs: Specs) -> Operation:
        if f"{name}_scale" not in specs:
            raise _half_converted([name], f"{name}_scale is missing")
        target = {name: TensorSpec("F32", specs[name].shape)}
        return Operation("dequantized", (name, f"{name}_scale"), target, _dequantize, moves_elements=False)


@dataclass(frozen=True)
class Drop:
    """Tensors that newer models compute themselves."""

    name: str
    templates: tuple[str, ...]
    is_evidence: bool = False

    def plan(self, specs: Specs, direction: Direction) -> list[Operation]:
        """Plan one operation without a result per such tensor; nothing on the way back."""
        if direction == "backward":
            return []
        patterns = [_compile(template) for template in self.templates]
        dropped = [name for name in specs if any(pattern.fullmatch(name) for pattern in patterns)]
        return [Operation("dropped", (name,), {}, lambda _: []) for name in dropped]


def cast(name: str, spec: TensorSpec, dtype: str) -> Operation:
    """Plan the cast of one tensor."""

    def run(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        result = tensors[0].to(torch_dtype(dtype))
        if bool((result.isinf() & ~tensors[0].isinf()).any()):
            raise ArtifactError(f"{name} holds values beyond the range of {dtype}; choose bf16 or fp32")
        return [result]

    return Operation("cast", (name,), {name: TensorSpec(dtype, spec.shape)}, run, moves_elements=False)


def _quantize(name: str, weight: Tensor) -> Sequence[Tensor]:
    weight = weight.float()
    if not bool(weight.isfinite().all()):
        raise ArtifactError(f"{name} holds values that are not finite and cannot be quantised; check the checkpoint")
    largest = weight.abs().amax(dim=tuple(range(1, weight.dim())), keepdim=True)
    scale = (largest / _INT8_MAX).where(largest > 0, 1.0)
    return [(weight / scale).round().char(), scale]


def _dequantize(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return [tensors[0].float() * tensors[1]]


@cache
def _compile(template: str) -> re.Pattern[str]:
    """Compile a template into a regular expression."""
    pieces = re.split(r"\{(\w+)\}", template)
    return re.compile(
        "".join(
            f"(?P<{piece}>{_PLACEHOLDERS.get(piece, '[0-9]+')})" if index % 2 else re.escape(piece)
            for index, piece in enumerate(pieces)
        )
    )


def _fill(template: str, group: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: group[match[1]], template)


def _groups(templates: Sequence[str], specs: Specs) -> list[dict[str, str]]:
    """List every assignment of the placeholders under which some template names a tensor, in order of appearance."""
    patterns = [_compile(template) for template in templates]
    found = {}
    for name in specs:
        for pattern in patterns:
            if match := pattern.fullmatch(name):
                found[tuple(sorted(match.groupdict().items()))] = match.groupdict()
    return list(found.values())


def _shift(group: dict[str, str], shifts: Mapping[str, int], sign: int) -> dict[str, str]:
    return group | {word: str(int(group[word]) + sign * by) for word, by in shifts.items() if word in group}


def _joined(names: Sequence[str], parts: Sequence[TensorSpec], dim: int) -> TensorSpec:
    """Return the spec of `parts` joined along `dim`; they must agree in everything else."""
    first = parts[0]
    if any(part.dtype != first.dtype or _resized(part, dim, 0) != _resized(first, dim, 0) for part in parts):
        seen = ", ".join(f"{part.dtype}{list(part.shape)}" for part in parts)
        raise ArtifactError(
            f"{', '.join(names[: len(parts)])} are {seen} and parts that are joined must agree in all but one size; "
            "leave the weights as they are, no generation has them otherwise"
        )
    return _resized(first, dim, sum(_size(name, part, dim) for name, part in zip(names, parts, strict=False)))


def _resized(spec: TensorSpec, dim: int, size: int) -> TensorSpec:
    shape = list(spec.shape)
    if shape:
        shape[dim] = size
    return TensorSpec(spec.dtype, tuple(shape))


def _size(name: str, spec: TensorSpec, dim: int) -> int:
    if not spec.shape:
        raise ArtifactError(f"{name} is a single number; expected a matrix or a vector: check the checkpoint")
    return spec.shape[dim]


def _half_converted(seen: Sequence[str], other: str) -> ArtifactError:
    return ArtifactError(
        f"the weights are half converted: {', '.join(seen)} stands there and {other}; convert the original anew"
    )
