"""Python numbers whose value only the graph knows: counters of loops, `x.item()`, numbers that branches disagree on.

A `Number` holds a tensor of no dimension, float64, int64 or bool, and means what the Python number would mean: it
calculates with all digits among numbers, and beside a tensor it takes the tensor's type, as `x * 0.1` stays bf16 for
a bf16 `x`. A plain tensor would not do: beside a tensor without dimensions its type would win, `torch.full` would take
it for a float32, and two bools would add up to a bool. Branches and loops carry the tensor and wrap it again; what a
function returns to its caller is the tensor.

The tracer follows the methods below like user code. Where a graph breaks, Python meets the same object with a real
tensor in it, and takes the number out (`__bool__`, `__index__`, `__float__`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deepseek.compiler.jit.shared_names import COMPARISONS, Operation
from deepseek.compiler.jit.tracing.sites import need_value

PYTHON_NUMBERS = (bool, int, float)
LOGICAL = (operator.and_, operator.or_, operator.xor)
MIRRORED = {"Lt": "Gt", "LtE": "GtE", "Gt": "Lt", "GtE": "LtE", "Eq": "Eq", "NotEq": "NotEq"}
FILLED = (torch.full, torch.full_like, Tensor.new_full, Tensor.fill_)


class Number:
    """A Python number that a graph computes."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch with numbers among its arguments."""
        options = {} if kwargs is None else kwargs
        if function in FILLED:
            return _fill(function, args, options)
        tensors = find_tensors(args)
        plain = [lower_numbers(value, tensors) for value in args]
        return function(*plain, **{name: lower_numbers(value, tensors) for name, value in options.items()})

    # ---- taken out where Python runs

    def __bool__(self) -> bool:
        return bool(self.tensor.item())

    def __int__(self) -> int:
        return int(self.tensor.item())

    def __float__(self) -> float:
        return float(self.tensor.item())

    def __index__(self) -> int:
        return operator.index(self.tensor.item())  # type: ignore[arg-type]

    def __hash__(self) -> int:
        return hash(self.tensor.item())

    def __format__(self, form: str) -> str:
        return format(self.tensor.item(), form)

    def __str__(self) -> str:
        return str(self.tensor.item())

    def __round__(self, digits: int | None = None) -> Any:
        return round(self.tensor.item(), digits)

    def __trunc__(self) -> int:
        number: float = self.known()
        return math.trunc(number)

    def __floor__(self) -> int:
        number: float = self.known()
        return math.floor(number)

    def __ceil__(self) -> int:
        number: float = self.known()
        return math.ceil(number)

    def __complex__(self) -> complex:
        return complex(self.known())

    def __repr__(self) -> str:
        return repr(self.known())

    def __reduce__(self) -> tuple[type, tuple[float]]:
        return type(self.tensor.item()), (self.tensor.item(),)

    def bit_length(self) -> int:
        return operator.index(self.known()).bit_length()

    def as_integer_ratio(self) -> tuple[int, int]:
        ratio: tuple[int, int] = self.known().as_integer_ratio()
        return ratio

    def hex(self) -> str:
        return float(self.known()).hex()

    def known(self) -> Any:
        """Return the Python number itself; one graph has no place for it."""
        if torch.compiler.is_compiling():
            need_value()
            torch._dynamo.graph_break()
        return self.tensor.item()

    # ---- what both kinds of numbers are asked

    def is_integer(self) -> Number:
        return Number(torch.isfinite(self.tensor) & (self.tensor == torch.floor(self.tensor)))

    def conjugate(self) -> Number:
        return +self

    @property
    def real(self) -> Number:
        return +self

    @property
    def imag(self) -> Number:
        return Number(torch.zeros_like(_widen(self.tensor)))

    # ---- arithmetic

    def __add__(self, other: Any) -> Any:
        return calculate(operator.add, self, other)

    def __radd__(self, other: Any) -> Any:
        return calculate(operator.add, other, self)

    def __sub__(self, other: Any) -> Any:
        return calculate(operator.sub, self, other)

    def __rsub__(self, other: Any) -> Any:
        return calculate(operator.sub, other, self)

    def __mul__(self, other: Any) -> Any:
        return calculate(operator.mul, self, other)

    def __rmul__(self, other: Any) -> Any:
        return calculate(operator.mul, other, self)

    def __truediv__(self, other: Any) -> Any:
        return calculate(operator.truediv, self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return calculate(operator.truediv, other, self)

    def __floordiv__(self, other: Any) -> Any:
        return calculate(operator.floordiv, self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return calculate(operator.floordiv, other, self)

    def __mod__(self, other: Any) -> Any:
        return calculate(operator.mod, self, other)

    def __rmod__(self, other: Any) -> Any:
        return calculate(operator.mod, other, self)

    def __pow__(self, other: Any) -> Any:
        return calculate(operator.pow, self, other)

    def __rpow__(self, other: Any) -> Any:
        return calculate(operator.pow, other, self)

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self

    def __and__(self, other: Any) -> Any:
        return calculate(operator.and_, self, other)

    def __rand__(self, other: Any) -> Any:
        return calculate(operator.and_, other, self)

    def __or__(self, other: Any) -> Any:
        return calculate(operator.or_, self, other)

    def __ror__(self, other: Any) -> Any:
        return calculate(operator.or_, other, self)

    def __xor__(self, other: Any) -> Any:
        return calculate(operator.xor, self, other)

    def __rxor__(self, other: Any) -> Any:
        return calculate(operator.xor, other, self)

    def __lshift__(self, other: Any) -> Any:
        return calculate(operator.lshift, self, other)

    def __rlshift__(self, other: Any) -> Any:
        return calculate(operator.lshift, other, self)

    def __rshift__(self, other: Any) -> Any:
        return calculate(operator.rshift, self, other)

    def __rrshift__(self, other: Any) -> Any:
        return calculate(operator.rshift, other, self)

    def __neg__(self) -> Number:
        return Number(-_widen(self.tensor))

    def __pos__(self) -> Number:
        return Number(_widen(self.tensor))

    def __abs__(self) -> Number:
        return Number(_widen(self.tensor).abs())

    def __invert__(self) -> Number:
        return Number(~_widen(self.tensor))

    # ---- comparisons

    def __lt__(self, other: Any) -> Any:
        return compare(operator.lt, self, other)

    def __le__(self, other: Any) -> Any:
        return compare(operator.le, self, other)

    def __gt__(self, other: Any) -> Any:
        return compare(operator.gt, self, other)

    def __ge__(self, other: Any) -> Any:
        return compare(operator.ge, self, other)

    def __eq__(self, other: object) -> Any:
        return compare(operator.eq, self, other)

    def __ne__(self, other: object) -> Any:
        return compare(operator.ne, self, other)


def is_number(value: Any) -> bool:
    """Return whether it is a Python number, known or computed by the graph."""
    return isinstance(value, (*PYTHON_NUMBERS, Number))


def number_dtype(value: Any) -> torch.dtype:
    """Return the type in which a graph holds a Python number: float64 has all its digits."""
    if isinstance(value, Number):
        return value.tensor.dtype
    if isinstance(value, bool):
        return torch.bool
    return torch.int64 if isinstance(value, int) else torch.float64


def as_number(tensor: Tensor) -> Number:
    """Return the Python number that a tensor of one element holds, as `tensor.item()` gives it."""
    tensor = tensor.detach().reshape(())
    if tensor.dtype == torch.bool:
        return Number(tensor)
    return Number(tensor.to(torch.float64 if tensor.is_floating_point() else torch.int64))


def as_tensor(value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a number as a tensor without dimensions."""
    if isinstance(value, Number):
        return value.tensor.to(dtype)
    return torch.full((), value, dtype=dtype, device=device)


def beside(number: Number, tensors: Sequence[Tensor]) -> Tensor:
    """Return a number as the tensor that behaves beside these tensors like the Python number.

    Beside a tensor with dimensions of the same kind (whole or floating) torch ignores the type of one without. Beside
    a tensor without dimensions it takes that one's type, and of a kind that no tensor has, torch's default type.
    """
    value = number.tensor
    is_real = value.is_floating_point()
    is_new_kind = True
    for tensor in tensors:
        if tensor.is_floating_point() or tensor.is_complex():
            is_new_kind = False
            if is_real and tensor.dim() == 0 and tensor.is_floating_point():
                value = value.to(tensor.dtype)
        elif tensor.dtype != torch.bool and not is_real:
            is_new_kind = False
            if tensor.dim() == 0:
                value = value.to(tensor.dtype)
    if is_new_kind and is_real and len(tensors) > 0:
        return value.to(torch.get_default_dtype())
    return value


def calculate(operation: Operation, left: Any, right: Any) -> Any:
    """Python's arithmetic with numbers, of which at least one is a `Number`; beside a tensor, torch's."""
    if isinstance(left, Tensor):
        return operation(left, beside(right, [left]))
    if isinstance(right, Tensor):
        return operation(beside(left, [right]), right)
    if not is_number(left) or not is_number(right):
        return NotImplemented
    if operation in LOGICAL and number_dtype(left) == torch.bool and number_dtype(right) == torch.bool:
        return Number(operation(_tensor_of(left), _tensor_of(right)))
    is_real = operation is operator.truediv or _is_real(left) or _is_real(right)
    is_real = is_real or (operation is operator.pow and isinstance(right, int) and right < 0)
    return Number(operation(_convert(left, is_real=is_real), _convert(right, is_real=is_real)))


def compare(operation: Operation, left: Number, right: Any) -> Any:
    """A comparison of a number with a number, or with a tensor as torch compares."""
    if isinstance(right, Tensor):
        return operation(beside(left, [right]), right)
    if not is_number(right):
        return NotImplemented
    is_real = _is_real(left) or _is_real(right)
    return Number(operation(_convert(left, is_real=is_real), _convert(right, is_real=is_real)))


def relate(name: str, left: Any, right: Any) -> Any:
    """Compare as Python's operator `name` does; the tracer leaves out numbers of the graph beside symbols of shapes."""
    if isinstance(left, Number) and is_number(right):
        return compare(COMPARISONS[name], left, right)
    if isinstance(right, Number) and is_number(left):
        return compare(COMPARISONS[MIRRORED[name]], right, left)
    return COMPARISONS[name](left, right)


def find_tensors(values: Any) -> list[Tensor]:
    """Return the tensors among arguments, also inside lists and tuples."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(find_tensors(value))
    return found


def lower_numbers(value: Any, tensors: Sequence[Tensor]) -> Any:
    """Return an argument with tensors in place of its numbers."""
    if isinstance(value, Number):
        return beside(value, tensors)
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)([lower_numbers(item, tensors) for item in value])
    return value


def _fill(function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """`torch.full` and its relatives: the type is the number's where none is given."""
    options = dict(options)
    value = options.pop("fill_value") if "fill_value" in options else args[-1]
    known = args[:-1] if len(args) > 0 and args[-1] is value else args
    if function is Tensor.fill_:
        return function(args[0], value.tensor.to(args[0].dtype))
    if function is torch.full and options.get("dtype") is None:
        is_real = value.tensor.is_floating_point()
        options["dtype"] = torch.get_default_dtype() if is_real else value.tensor.dtype
    filled: Tensor = function(*known, fill_value=0, **options)
    return filled.fill_(value.tensor.to(filled.dtype))


def _is_real(value: Any) -> bool:
    return value.tensor.is_floating_point() if isinstance(value, Number) else isinstance(value, float)


def _tensor_of(value: Any) -> Any:
    return value.tensor if isinstance(value, Number) else value


def _convert(value: Any, *, is_real: bool) -> Any:
    """Return a number as an operand: of floats where one is among the operands, otherwise of whole numbers."""
    if isinstance(value, Number):
        return value.tensor.to(torch.float64) if is_real else _widen(value.tensor)
    return float(value) if is_real else int(value)


def _widen(tensor: Tensor) -> Tensor:
    """Return a bool as the whole number that it is in Python's arithmetic."""
    return tensor.to(torch.int64) if tensor.dtype == torch.bool else tensor
