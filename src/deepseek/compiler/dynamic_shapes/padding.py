"""Batches padded to a boundary or split by length, and their outputs put back as if nothing had happened.

`dynamic_graph` calls this around a compiled function. Two changes of a batch are known. `pad_length` lengthens every
length dim to a boundary, and `cut_length` takes the surplus off the outputs again. `take_rows` selects rows and
shortens them to their own longest, and `join_rows` puts the outputs of such pieces back in order, with zeros where a
row has ended.

Neither is right for every function. Which dims are lengths is read off the shapes (`find_input_roles`, `find_roles`),
what a function does with padding is found out by comparing its numbers with those of the unchanged batch
(`compare`), and whatever is unclear raises `PaddingRefusedError` with the reason: then the caller leaves batches as
they are. A wrong answer is never the price of a fast one.

Legend of shapes: B rows of a batch, T its length (the longest row), b and t those of a piece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

# Largest difference, relative to the largest number of the reference, that rounding in another order explains.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class PaddingRefusedError(Exception):
    """This batch cannot be padded or split without changing what is computed; the message says why."""


@dataclass(frozen=True)
class InputRole:
    """The meaning of one tensor argument's dims: whether dim 0 counts rows, and which dims are lengths."""

    is_batched: bool
    length_dims: tuple[int, ...]


NO_ROLE = InputRole(False, ())
Shapes = tuple[tuple[int, ...] | None, ...]
# Shapes that are kept to find out which dims vary.
_MAX_HISTORY = 16


def name_leaves(arguments: Mapping[str, Any]) -> tuple[list[str], list[Any], pytree.TreeSpec]:
    """Return everything in nested arguments with a name for each: `tokens`, `batch['mask']`.

    >>> name_leaves({"batch": {"mask": 1}, "scale": 2})[0]
    ["batch['mask']", 'scale']
    """
    pairs, spec = pytree.tree_flatten_with_path(dict(arguments))
    names = [path[0].key + pytree.keystr(path[1:]) for path, _ in pairs]  # type: ignore[attr-defined]
    return names, [leaf for _, leaf in pairs], spec


def shapes_of(leaves: Sequence[Any]) -> tuple[tuple[int, ...] | None, ...]:
    """Return the shape of every tensor among `leaves`, `None` for what is no tensor."""
    return tuple(tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in leaves)


class ShapeHistory:
    """Shapes of calls of one kind, and the dims of each leaf that varied among them."""

    def __init__(self) -> None:
        self.shapes: list[Shapes] = []
        self.varying: list[tuple[int, ...]] = []

    def note(self, shapes: Shapes) -> None:
        """Take note of a call's shapes."""
        if shapes not in self.shapes and len(self.shapes) < _MAX_HISTORY:
            self.shapes.append(shapes)
            self.varying = find_varying(self.shapes)


def find_varying(history: Sequence[tuple[tuple[int, ...] | None, ...]]) -> list[tuple[int, ...]]:
    """Return the dims of each leaf whose size was not the same in all of `history`.

    >>> find_varying([((4, 10, 8), None), ((4, 12, 8), None)])
    [(1,), ()]
    """
    varying = []
    for shapes in zip(*history, strict=True):
        known = [shape for shape in shapes if shape is not None]
        ranks = {len(shape) for shape in known}
        dims = range(ranks.pop()) if len(ranks) == 1 else ()
        varying.append(tuple(dim for dim in dims if len({shape[dim] for shape in known}) > 1))
    return varying


def find_input_roles(
    shapes: Sequence[tuple[int, ...] | None],
    mask: int,
    history: Sequence[tuple[tuple[int, ...] | None, ...]],
    given: Mapping[int, tuple[int, ...]] | None = None,
) -> list[InputRole]:
    """Return the roles of all leaves beside a mask (B, T), which is leaf number `mask`.

    A dim counts rows where it is the first and as large as B, and is a length where it is as large as T. Once T has
    changed between calls of `history`, a dim that did not change with it is not a length, whatever its size. `given`
    dims are taken as they are. Raises `PaddingRefusedError` while more than one reading is possible.
    """
    num_rows, length = _rows_and_length(shapes[mask])
    has_varied = len({entry[mask] for entry in history}) > 1 and 1 in find_varying(history)[mask]
    varying = find_varying(history) if has_varied else None
    roles = []
    for index, shape in enumerate(shapes):
        if shape is None or not shape:
            roles.append(NO_ROLE)
            continue
        is_batched = shape[0] == num_rows and not (given and index in given and 0 in given[index])
        candidates = tuple(dim for dim in range(int(is_batched), len(shape)) if shape[dim] == length)
        if given is not None and index in given:
            candidates = given[index]
        elif varying is not None:
            candidates = tuple(dim for dim in candidates if dim in varying[index])
        elif len(candidates) > 1 or (num_rows == length and len(shape) == 1):
            raise PaddingRefusedError(
                f"it is not clear which dims of a tensor of shape {shape} are lengths; name them with dims="
            )
        roles.append(InputRole(is_batched, candidates))
    return roles


def read_lengths(mask: Tensor) -> list[int]:
    """For each row of a mask (B, T) of zeros and ones, where its last one is, plus one; at least 1.

    >>> read_lengths(torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 0]]))
    [2, 3, 1]
    """
    counted = torch.arange(1, mask.shape[1] + 1, device=mask.device) * (mask != 0)
    lengths: list[int] = counted.amax(dim=1).clamp(min=1).tolist()
    return lengths


def take_rows(
    leaves: Sequence[Any], roles: Sequence[InputRole], rows: Tensor | None, length: int, values: Sequence[float]
) -> list[Any]:
    """Return the `rows` (all, for `None`) of every batched leaf, with every length dim cut or padded to `length`."""
    taken = []
    for leaf, role, value in zip(leaves, roles, values, strict=True):
        piece = leaf
        if role.length_dims:
            piece = pad_length(piece, role.length_dims, length, value)
        if role.is_batched and rows is not None:
            piece = piece.index_select(0, rows)
        taken.append(piece)
    return taken


def pad_length(tensor: Tensor, dims: Sequence[int], length: int, value: float = 0.0) -> Tensor:
    """`tensor` with each of `dims` cut to `length`, or padded at its end with `value`.

    >>> pad_length(torch.tensor([[1, 2, 3]]), (1,), 2).tolist(), pad_length(torch.tensor([1]), (0,), 3, 9).tolist()
    ([[1, 2]], [1, 9, 9])
    """
    for dim in dims:
        if tensor.shape[dim] > length:
            tensor = tensor.narrow(dim, 0, length)
        elif tensor.shape[dim] < length:
            margins = [0, 0] * (tensor.dim() - 1 - dim % tensor.dim()) + [0, length - tensor.shape[dim]]
            if tensor.dtype == torch.bool:
                tensor = F.pad(tensor.to(torch.uint8), margins, value=float(bool(value))).to(torch.bool)
            else:
                tensor = F.pad(tensor, margins, value=value)
    return tensor


def cut_length(outputs: Sequence[Any], roles: Sequence[tuple[int, ...]], length: int) -> list[Any]:
    """Return the outputs of a padded call with their length dims cut back to `length`."""
    return [pad_length(output, dims, length) if dims else output for output, dims in zip(outputs, roles, strict=True)]


def find_roles(
    reference: Sequence[Any],
    piece: Sequence[Any],
    *,
    length: int,
    piece_length: int,
    rows: tuple[int, int] | None = None,
) -> list[tuple[int, ...]]:
    """Return the length dims of each output: those as large as `length` in the `reference` and `piece_length` in the
    piece.

    With `rows` (B, b) the first dim must count rows. Raises `PaddingRefusedError` for an output that follows neither.
    """
    if len(reference) != len(piece):
        raise PaddingRefusedError(f"it returns {len(reference)} values for one length and {len(piece)} for another")
    roles: list[tuple[int, ...]] = []
    for whole, part in zip(reference, piece, strict=True):
        if not isinstance(whole, Tensor) or not isinstance(part, Tensor):
            _check_constant(whole, part)
            roles.append(())
            continue
        roles.append(_length_dims(tuple(whole.shape), tuple(part.shape), length, piece_length, rows))
    return roles


def join_rows(
    pieces: Sequence[Sequence[Any]], order: Tensor, roles: Sequence[tuple[int, ...]], length: int
) -> list[Any]:
    """Return the outputs of pieces that hold the rows `order`, put back: row order restored, length dims zero-filled to
    T."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    joined = []
    for parts, dims in zip(zip(*pieces, strict=True), roles, strict=True):
        if not isinstance(parts[0], Tensor):
            joined.append(parts[0])
        elif torch.is_grad_enabled() and parts[0].requires_grad:
            joined.append(torch.cat([pad_length(part, dims, length) for part in parts]).index_select(0, inverse))
        else:
            joined.append(_fill(parts, order, dims, length))
    return joined


def compare(
    actual: Sequence[Any],
    reference: Sequence[Any],
    *,
    mask: Tensor | None = None,
    roles: Sequence[tuple[int, ...]] = (),
    tolerance: float | None = None,
) -> None:
    """Raise `PaddingRefusedError` unless `actual` are the numbers of `reference`, up to rounding.

    Of outputs with a length dim right after the rows, only the positions of `mask` (B, T) count. The tolerance is
    relative to the largest number of the reference; whole numbers must be equal.
    """
    for index, (one, other) in enumerate(zip(actual, reference, strict=True)):
        if not isinstance(other, Tensor):
            _check_constant(one, other)
            continue
        if one.shape != other.shape:
            raise PaddingRefusedError(f"output {index} has shape {tuple(one.shape)} instead of {tuple(other.shape)}")
        counts = None if mask is None or 1 not in roles[index] else mask != 0
        _check_close(one, other, counts, tolerance, index)


def _fill(parts: Sequence[Tensor], order: Tensor, dims: Sequence[int], length: int) -> Tensor:
    """Join rows where no gradient is wanted: each part is copied once, to its position."""
    shape = [length if dim in dims else size for dim, size in enumerate(parts[0].shape)]
    whole, start = parts[0].new_zeros([len(order), *shape[1:]]), 0
    for part in parts:
        target = whole
        for dim in dims:
            target = target.narrow(dim, 0, min(part.shape[dim], length))
        target[order[start : start + len(part)]] = (
            pad_length(part, dims, min(part.shape[dims[0]], length)) if dims else part
        )
        start += len(part)
    return whole


def _check_close(one: Tensor, other: Tensor, counts: Tensor | None, tolerance: float | None, index: int) -> None:
    if counts is not None:
        one, other = one[counts], other[counts]
    if other.numel() == 0:
        return
    if not other.is_floating_point():
        if not torch.equal(one, other):
            raise PaddingRefusedError(f"output {index} changes with other padding")
        return
    limit = tolerance if tolerance is not None else TOLERANCES.get(other.dtype, TOLERANCES[torch.float16])
    both_nan = one.isnan() & other.isnan()
    difference = torch.where((one == other) | both_nan, 0.0, (one - other).abs().double()).max().item()
    scale = max(1e-6, other.nan_to_num(0.0, 0.0, 0.0).abs().max().item())
    if not difference <= limit * scale:
        raise PaddingRefusedError(
            f"output {index} changes by {difference / scale:.2g} of its largest number with other padding"
        )


def _rows_and_length(shape: tuple[int, ...] | None) -> tuple[int, int]:
    if shape is None or len(shape) != 2:
        raise PaddingRefusedError(f"the mask has shape {shape}; expected (rows, length)")
    return shape


def _check_constant(one: Any, other: Any) -> None:
    plain = (int, float, str, bool, type(None))
    if isinstance(one, Tensor) or not isinstance(one, plain) or one != other:
        raise PaddingRefusedError(f"it returns a {type(one).__name__}, which cannot be cut or joined")


def _length_dims(
    whole: tuple[int, ...], part: tuple[int, ...], length: int, piece_length: int, rows: tuple[int, int] | None
) -> tuple[int, ...]:
    first = 0 if rows is None else 1
    if rows is not None and (not whole or not part or whole[0] != rows[0] or part[0] != rows[1]):
        raise PaddingRefusedError(f"an output of shape {whole} has no row for each of the {rows[0]} rows of the batch")
    if len(whole) != len(part):
        raise PaddingRefusedError(f"an output has shape {whole} for one length and {part} for another")
    dims = tuple(dim for dim in range(first, len(whole)) if whole[dim] != part[dim])
    if any((whole[dim], part[dim]) != (length, piece_length) for dim in dims):
        raise PaddingRefusedError(
            f"an output has shape {whole} at length {length} and {part} at length {piece_length}: not the same length"
        )
    return dims
