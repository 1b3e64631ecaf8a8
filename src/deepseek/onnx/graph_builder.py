"""Building an fx graph while an ONNX graph is read: constants are computed at once, lengths are followed one by one.

A value of the ONNX graph is one of three things here, and `GraphBuilder` hides which from the operators:

    Tensor      known now: a weight, or computed from weights; nothing of it goes into the graph until a node needs it
    fx.Node     known when the model runs
    Lengths     a list of lengths, each a number or a node that gives one: what ONNX computes from `Shape`

ONNX computes shapes with tensors (Shape -> Gather -> Concat -> Reshape). Followed as lists of whole numbers they become
plain arithmetic on `x.shape`, which torch's compilers read as symbolic sizes; as tensors they would break every graph.

Every node carries what it gives for the sample inputs, as a tensor without values, so that operators know dtypes and
ranks, and a model whose shapes do not fit is refused while it is read and by the name of its operator.
"""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from deepseek.onnx import functions
from deepseek.onnx.files import UnsupportedOperatorError

Number: TypeAlias = "int | float | bool | fx.Node"


_OTHER_REALS = (torch.float16, torch.bfloat16, torch.float64)
_WIDE_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


@dataclass(frozen=True)
class Lengths:
    """A vector or scalar of numbers of which at least one is only known when the model runs."""

    numbers: tuple[Number, ...]
    is_scalar: bool = False


Value: TypeAlias = "Tensor | fx.Node | Lengths | None"


class GraphBuilder:
    """The graph as far as it has been translated, and the module that will hold its parameters."""

    def __init__(self, *, in_float32: bool = False) -> None:
        self.in_float32 = in_float32
        self.tries_on_zeros = False
        """Whether calls are tried on zeros: types for which ONNX has no such operator, torch may not have either."""
        self.root = nn.Module()
        self.graph = fx.Graph()
        self._readers: dict[int, tuple[Tensor, fx.Node]] = {}  # the tensor is kept so that its id stays its own
        self._names: dict[int, tuple[Tensor, str]] = {}
        self._paths: set[str] = set()
        self._arguments = {"self"}
        self._device: fx.Node | None = None

    # ---- what goes in

    def add_input(self, name: str, sample: Tensor) -> fx.Node:
        """Add an argument to the model."""
        argument = _identifier(name)
        while argument in self._arguments:
            argument += "_"
        self._arguments.add(argument)
        node = self.graph.placeholder(argument)
        node.meta["sample"] = sample.to("meta")
        if self.dtype(sample.dtype) is sample.dtype:
            return node
        chosen = [dtype for dtype in (torch.float16, torch.bfloat16) if dtype is not sample.dtype]
        widened: fx.Node = self.call(functions.widen, node, chosen)
        return widened

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the type that a type of the file is computed in."""
        return torch.float32 if self.in_float32 and dtype in _OTHER_REALS else dtype

    def widen(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the file in the type that it is computed in."""
        return tensor.to(self.dtype(tensor.dtype))

    def name_weight(self, tensor: Tensor, name: str) -> Tensor:
        """Remember that `tensor` is a weight called `name`; reals become parameters under it."""
        self._names[id(tensor)] = (tensor, name)
        return tensor

    # ---- building

    def call(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """Return the value of `function`: computed at once where all is known, else a node."""
        arguments, keywords = tuple(map(self._plain, arguments)), {k: self._plain(v) for k, v in keywords.items()}
        if not _has_node((arguments, keywords)):
            return function(*arguments, **keywords)
        arguments = fx.node.map_aggregate(arguments, self.materialize)
        keywords = fx.node.map_aggregate(keywords, self.materialize)
        sample = function(*fx.node.map_aggregate(arguments, _sample), **fx.node.map_aggregate(keywords, _sample))
        if self.tries_on_zeros or _has_wide_unsigned((arguments, keywords)):
            function(*fx.node.map_aggregate(arguments, _zeros), **fx.node.map_aggregate(keywords, _zeros))
        node = self.graph.call_function(function, arguments, keywords)
        node.meta["sample"] = sample
        return node

    def call_module(self, module: nn.Module, name: str, x: Value) -> Any:
        """Return the value of `module` at the tensor `x`; the module is put under `name`."""
        x = self._plain(x)
        if not isinstance(x, fx.Node):
            with torch.no_grad():
                return module.eval()(x)
        path = self._free_path(name)
        self._owner(path).add_module(path.rpartition(".")[2], module)
        node = self.graph.call_module(path, (x,))
        state = {key: tensor.to("meta") for key, tensor in module.state_dict().items()}
        node.meta["sample"] = torch.func.functional_call(module.eval(), state, (_sample(x),))
        return node

    def item(self, node: Any, index: int) -> Any:
        """Return one of several outputs."""
        return self.call(operator.getitem, node, index)

    def materialize(self, value: Any) -> Any:
        """Return a node for `value`: one that reads a known tensor from the module, or makes one of lengths."""
        value = self.tensor(value) if isinstance(value, Lengths) else value
        return self._read_node(value) if isinstance(value, Tensor) else value

    def create(self, function: Callable[..., Tensor], *arguments: Any, dtype: torch.dtype) -> Any:
        """Create a tensor: now where its arguments are known, else on the device of the model's inputs."""
        if not _has_node(arguments):
            return function(*arguments, dtype=dtype)
        return self.call(function, *arguments, dtype=dtype, device=self.device())

    # ---- asking

    def sample(self, value: Value) -> Tensor:
        """Return what `value` is for the sample inputs: a tensor whose shape and dtype count."""
        if isinstance(value, Lengths):
            value = self.tensor(value)
        assert value is not None
        found = _sample(value)
        assert isinstance(found, Tensor)
        return found

    def rank(self, value: Value) -> int:
        """Return the number of dimensions."""
        return self.sample(value).dim()

    def shape(self, value: Value) -> list[Any]:
        """Return the lengths of a tensor; nodes, where the tensor is one."""
        if isinstance(value, Tensor):
            return list(value.shape)
        return [self.length(value, dim) for dim in range(self.rank(value))]

    def length(self, value: Value, dim: int) -> Any:
        """Return one length of a tensor; a node, where the tensor is one."""
        return self.call(_length, value, dim)

    def device(self) -> Any:
        """Return the device of the model's inputs, for operators that create tensors."""
        if self._device is None:
            first = next((node for node in self.graph.nodes if node.op == "placeholder"), None)
            if first is None:
                return torch.device("cpu")
            self._device = self.call(getattr, first, "device")
        return self._device

    def tensor(self, value: Value) -> Any:
        """Return `value` as a tensor or a node that gives one."""
        if not isinstance(value, Lengths):
            return value
        dtype = _dtype_of(value.numbers)
        content = value.numbers[0] if value.is_scalar else list(value.numbers)
        return self.create(torch.tensor, content, dtype=dtype)

    def constant(self, value: Value, what: str) -> Tensor:
        """Return `value`, which must be known now; `what` names it in the error."""
        if not isinstance(value, Tensor):
            raise UnsupportedOperatorError(f"its {what} is computed while the model runs, and must be a constant")
        return value

    def numbers(self, value: Value, what: str) -> list[Any]:
        """Return the elements of a vector or scalar of numbers, each known now or a node."""
        if isinstance(value, Lengths):
            return list(value.numbers)
        values = self.constant(value, what).reshape(-1).tolist()
        return list(values)

    def is_lengths(self, *values: Value) -> bool:
        """Return whether `values` can be computed number by number: lengths among short constants."""
        has_lengths = any(isinstance(value, Lengths) for value in values)
        return has_lengths and all(
            isinstance(value, Lengths) or (isinstance(value, Tensor) and value.dim() < 2 and value.numel() < 64)
            for value in values
        )

    # ---- inside

    def _plain(self, value: Any) -> Any:
        if isinstance(value, Lengths):
            return self.tensor(value)
        return value

    def _read_node(self, tensor: Tensor) -> fx.Node:
        if id(tensor) in self._readers:
            return self._readers[id(tensor)][1]
        _, name = self._names.get(id(tensor), (tensor, ""))
        path = self._free_path(name or "constant")
        owner, leaf = self._owner(path), path.rpartition(".")[2]
        if name and tensor.is_floating_point() and tensor.dim():
            owner.register_parameter(leaf, nn.Parameter(tensor))
        else:
            owner.register_buffer(leaf, tensor)
        node = self.graph.get_attr(path)
        node.meta["sample"] = tensor.to("meta")
        self._readers[id(tensor)] = (tensor, node)
        return node

    def name_of(self, tensor: Value, default: str) -> str:
        """Return the file's name of the weight `tensor` without its last part; `default` where it has none."""
        _, name = self._names.get(id(tensor), (tensor, ""))
        return name.rpartition(".")[0] or default

    def _free_path(self, name: str) -> str:
        """Return a path in the module for `name` that is free: its dots are kept where they can be modules."""
        parts = [_identifier(part) if not part.isdigit() else part for part in name.split(".") if part]
        path = ".".join(parts) if parts else "value"
        if any(part[0].isdigit() for part in parts[-1:]) and len(parts) == 1:
            path = f"at_{path}"
        if not self._is_free(path):
            path, number = path.replace(".", "_"), 1
            while not self._is_free(f"{path}_{number}"):
                number += 1
            path = f"{path}_{number}"
        self._paths.add(path)
        return path

    def _is_free(self, path: str) -> bool:
        """Return whether nothing stands at `path`, above it or below it, and modules have no such name themselves."""
        parts = path.split(".")
        above = {".".join(parts[:depth]) for depth in range(1, len(parts))}
        is_taken = path in self._paths or any(taken.startswith(path + ".") for taken in self._paths)
        own = dir(nn.Module)
        return not is_taken and not (above & self._paths) and not any(part in own for part in parts)

    def _owner(self, path: str) -> nn.Module:
        """Return the module that holds the last part of `path`, created as needed."""
        owner = self.root
        for part in path.split(".")[:-1]:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        return owner


def as_lengths(numbers: Iterable[Number], *, is_scalar: bool = False) -> Value:
    """Return `numbers` as a value: a tensor where all of them are known."""
    kept = tuple(numbers)
    if any(isinstance(number, fx.Node) for number in kept):
        return Lengths(kept, is_scalar)
    return torch.tensor(kept[0] if is_scalar else kept, dtype=_dtype_of(kept))


def _dtype_of(numbers: Sequence[Number]) -> torch.dtype:
    samples = [number.meta["sample"] if isinstance(number, fx.Node) else number for number in numbers]
    if any(isinstance(sample, float) for sample in samples):
        return torch.float32
    return torch.bool if samples and all(isinstance(sample, bool) for sample in samples) else torch.int64


def _identifier(name: str) -> str:
    """Return a name of Python for any name of ONNX: `x:0`, `1`, `class`."""
    found = re.sub(r"\W", "_", name, flags=re.ASCII)
    if not found or found[0].isdigit():
        found = f"_{found}"
    return f"{found}_" if keyword.iskeyword(found) else found


def _length(x: Tensor, dim: int) -> int:
    return x.shape[dim]


def _sample(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return value.meta["sample"]
    return value.to("meta") if isinstance(value, Tensor) else value


def _zeros(value: Any) -> Any:
    sample = _sample(value)
    return torch.zeros_like(sample, device="cpu") if isinstance(sample, Tensor) else sample


def _has_wide_unsigned(values: Any) -> bool:
    """Return whether a tensor is of a type that torch has and for which most of its operators are not written.

    Tensors without values do not show that; such a call is tried on zeros, so that it fails now and by its name.
    """
    found = False

    def look(value: Any) -> Any:
        nonlocal found
        found = found or getattr(_sample(value), "dtype", None) in _WIDE_UNSIGNED
        return value

    fx.node.map_aggregate(values, look)
    return found


def _has_node(values: Any) -> bool:
    found = False

    def look(value: fx.Node) -> fx.Node:
        nonlocal found
        found = True
        return value

    fx.node.map_arg(values, look)
    return found
