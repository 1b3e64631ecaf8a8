"""An ONNX graph as a `torch.fx.GraphModule` with parameters, for compilers, quantizers and training.

    model = import_onnx(read_onnx(path))       opsets 11 to 28

Operator by operator, each through its row in `operators.OPERATORS`. What ONNX itself defines through other operators
(attention, rotary embedding, ...) and functions inside the file are written out first. Convolutions, batch norms,
layer norms, embeddings and linear maps become the modules of torch, under the names that their weights have in the
file, so that passes which look for modules find them. An operator that has no row is refused by name and opset; the
file may then still run as it is on a runtime that takes ONNX.

The module is in evaluation mode and computes in the dtypes of the file. Weights that the file stores in int8 with a
scale are widened: the int8 arithmetic of such a file is only had by the runtimes that take it as it is.
Specification: https://onnx.ai/onnx/operators/. Tested against ONNX's own node tests and ONNX Runtime.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, fx, nn

from deepseek.core.errors import ConfigError, CorruptArtifactError, DeepSeekError
from deepseek.core.extras import require
from deepseek.core.names import explain_unknown
from deepseek.onnx import functions
from deepseek.onnx.files import ONNX_TYPES, UnsupportedOperatorError, opset_of, to_torch, torch_dtype
from deepseek.onnx.graph_builder import GraphBuilder, Value
from deepseek.onnx.operators import OPERATORS
from deepseek.onnx.operators.node import Operator
from deepseek.onnx.sample_inputs import build_inputs, describe_inputs

_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Type of an input -> types that are converted to it, since Python's and NumPy's own numbers are of 64 bits.
_CALLED_WITH = {**dict.fromkeys(_WHOLE, _WHOLE), **dict.fromkeys(_REAL, _REAL)}
_MAX_LENGTH = 4096  # of a sample input along one dimension
# Attributes that need not be read: the inputs say the same, or they matter in training alone.
_SAID_ELSEWHERE = {
    "BatchNormalization": ("momentum", "spatial"),
    "Conv": ("kernel_shape",),
    "ConvInteger": ("kernel_shape",),
    "ConvTranspose": ("kernel_shape",),
    "Dropout": ("ratio", "seed"),
    "QLinearConv": ("kernel_shape",),
    "Split": ("num_outputs",),
}


def import_onnx(
    model: Any,
    *,
    sample_inputs: Sequence[Tensor] | None = None,
    source: str = "the ONNX model",
    in_float32: bool = False,
) -> fx.GraphModule:
    """Translate the `ModelProto` `model` to PyTorch, in evaluation mode; `sample_inputs` say what it leaves open.

    The module takes the inputs of the file in order, as tensors or arrays, and returns its output, or a tuple of them.
    With `in_float32` a file of another precision (fp16, bf16, double) is computed in FP32 throughout, where backends
    choose a precision of their own; its inputs and outputs keep their types. Raises
    `UnsupportedOperatorError`, a `ConfigError`, for an operator that has no counterpart here, and `ConfigError` where
    the sample inputs do not fit.
    """
    opset = opset_of(model, source)
    model = _write_out(model)
    specs = describe_inputs(model)
    samples = sample_inputs if sample_inputs is not None else build_inputs(specs)
    if len(samples) != len(specs):
        names = ", ".join(spec.name for spec in specs)
        raise ConfigError(
            f"{source} takes {len(specs)} inputs ({names}) and {len(samples)} were given; give one for each"
        )
    builder = GraphBuilder(in_float32=in_float32)
    values: dict[str, Value] = {"": None}
    for spec, sample in zip(specs, samples, strict=True):
        values[spec.name] = builder.add_input(spec.name, torch.as_tensor(sample).to(spec.dtype))
    for tensor in model.graph.initializer:
        values[tensor.name] = builder.name_weight(builder.widen(_read_weight(tensor, source)), tensor.name)
    for position, node in enumerate(model.graph.node):
        try:
            values |= _translate_node(builder, node, values, opset, source)
        except UnsupportedOperatorError as error:
            error.position = position
            raise
    missing = [output.name for output in model.graph.output if output.name not in values]
    if missing:
        raise CorruptArtifactError(f"{source} promises the output {missing[0]!r}, which nothing gives; export it again")
    outputs = [_restore_dtype(builder, values[output.name], output) for output in model.graph.output]
    finished = _finish(builder, outputs)
    take = TakeArrays(tuple((spec.name, spec.dtype) for spec in specs))
    take.attach(finished)
    return finished


def _restore_dtype(builder: GraphBuilder, value: Value, output: Any) -> Value:
    """Return the output in the type that the file promises, if it was computed in FP32 instead."""
    elem_type = output.type.tensor_type.elem_type
    if not builder.in_float32 or not elem_type or builder.sample(value).dtype is torch_dtype(elem_type):
        return value
    restored: Value = builder.call(functions.cast, value, torch_dtype(elem_type))
    return restored


@dataclass(frozen=True)
class TakeArrays:
    """Before a forward pass: arrays become tensors, numbers of another width those of the file, names those of Python.

    Inputs are given in order or by the names that the file has for them, of which many are no names of Python.
    """

    inputs: tuple[tuple[str, torch.dtype], ...]
    """Name and type of each."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names that the file has for its inputs."""
        return tuple(name for name, _ in self.inputs)

    def attach(self, module: fx.GraphModule) -> None:
        """Do this before every forward pass of `module`, and of its copies, which lose their hooks otherwise."""
        module.register_forward_pre_hook(self, with_kwargs=True)
        module.input_names = self.names  # type: ignore[assignment]  # by which a selected model binds keywords
        module._register_deepcopy_hook(self.attach)

    def __call__(
        self, module: nn.Module, values: tuple[Any, ...], named: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        names = self.names
        arguments = [name for name in inspect.signature(module.forward).parameters if name != "args"]
        spelled = dict(zip(arguments, names, strict=False)) | {name: name for name in names}
        for name in named:
            if name not in spelled:
                raise ConfigError(explain_unknown("input", name, names))
        given = dict(zip(names, values, strict=False)) | {spelled[name]: value for name, value in named.items()}
        if len(given) != len(names) or len(values) + len(named) != len(names):
            raise ConfigError(
                f"the model takes {', '.join(names) or 'no inputs'} and {len(values) + len(named)} were given; "
                "give each once"
            )
        return tuple(self._take(given[name], name, dtype) for name, dtype in self.inputs), {}

    def _take(self, value: Any, name: str, dtype: torch.dtype) -> Tensor:
        value = torch.from_numpy(value) if isinstance(value, numpy.ndarray) else value
        if not isinstance(value, Tensor):
            raise ConfigError(f"input {name!r} is a {type(value).__name__}; give a tensor or an array")
        if value.dtype is dtype:
            return value
        is_narrower = dtype.is_floating_point and value.dtype in (torch.float16, torch.bfloat16)
        if is_narrower or value.dtype in _CALLED_WITH.get(dtype, ()):  # 16 bits are what a backend hands over
            return value if is_narrower else value.to(dtype)
        raise ConfigError(
            f"input {name!r} is {str(dtype).removeprefix('torch.')} in the file and "
            f"{str(value.dtype).removeprefix('torch.')} was given; convert it"
        )


def _read_weight(tensor: Any, source: str) -> Tensor:
    try:
        return to_torch(tensor)
    except UnsupportedOperatorError as error:
        raise UnsupportedOperatorError(
            f"{source}: weight {tensor.name!r} cannot be converted to PyTorch: {error}"
        ) from error
    except ValueError as error:
        raise CorruptArtifactError(f"{source}: weight {tensor.name!r} is damaged ({error}); copy it again") from error


def list_unsupported(model: Any) -> list[str]:
    """List the operators of the `ModelProto` `model` that have no row here, sorted."""
    nodes = _write_out(model).graph.node
    return sorted({_full_name(node) for node in nodes if not _is_known(node)})


@dataclass(frozen=True)
class _Node:
    """Name and opset of an operator, for error messages."""

    name: str
    opset: int
    source: str

    def explain(self, problem: str) -> str:
        return (
            f"{self.source}: {self.name} of opset {self.opset} cannot be converted to PyTorch: {problem}; "
            "run the file as it is with backend='onnxruntime' or 'openvino'"
        )


def _translate_node(
    builder: GraphBuilder, node: Any, values: Mapping[str, Value], opset: int, source: str
) -> dict[str, Value]:
    said = _Node(f"operator {_full_name(node)}" + (f" ({node.name})" if node.name else ""), opset, source)
    if not _is_known(node):
        raise UnsupportedOperatorError(said.explain("it is not in the table of operators"))
    unset = [name for name in node.input if name not in values]
    if unset:
        raise CorruptArtifactError(f"{source}: {said.name} reads {unset[0]!r}, which nothing gives; export it again")
    op = Operator(node.op_type, node.name, opset, _attributes(node), len([name for name in node.output if name]))
    inputs = [values[name] for name in node.input]
    builder.tries_on_zeros = not _has_usual_types(builder, op, inputs)
    try:
        given = OPERATORS[node.op_type](builder, op, *inputs)
        _refuse_unread_attributes(op)
    except UnsupportedOperatorError as error:
        raise UnsupportedOperatorError(said.explain(str(error))) from error
    except DeepSeekError:
        raise
    except Exception as error:  # what a use that nobody foresaw raises in torch or Python has no class below this one
        problem = str(error).strip().partition("\n")[0]
        refusal = UnsupportedOperatorError(said.explain(f"{type(error).__name__}, {problem}".rstrip(", ")))
        refusal.numbers = _list_numbers(builder, op, inputs)
        raise refusal from error
    if node.op_type == "Identity" and isinstance(given, Tensor):  # how exporters store equal weights once
        given = builder.name_weight(given.clone(), node.output[0])
    results = given if isinstance(given, tuple) else (given,)
    return {name: result for name, result in zip(node.output, results, strict=False) if name}


def _list_numbers(builder: GraphBuilder, op: Operator, inputs: Sequence[Value]) -> tuple[int, ...]:
    """List lengths that stand in an operator: in shapes, constants and attributes, their sums and products."""
    groups: list[Sequence[int]] = []
    for value in inputs:
        if value is None:
            continue
        sample = builder.sample(value)
        groups += [list(sample.shape), list(sample.shape[1:])]
        if isinstance(value, Tensor) and value.numel() <= 8 and not value.is_floating_point():
            groups.append([int(number) for number in value.reshape(-1).tolist()])
    attributes = [value if isinstance(value, list) else [value] for value in op.attributes.values()]
    groups += [numbers for numbers in attributes if all(isinstance(number, int) for number in numbers)]
    group = op.attributes.get("group", 1)
    groups += [[builder.sample(inputs[1]).shape[1] * group]] if op.op_type == "Conv" and inputs[1:] else []
    found = [number for numbers in groups for number in numbers]
    found += [number for numbers in groups if numbers for number in (sum(numbers), math.prod(map(abs, numbers)))]
    found += [number + 1 for number in found]
    return tuple(dict.fromkeys(number for number in found if 0 < number <= _MAX_LENGTH))


def _has_usual_types(builder: GraphBuilder, op: Operator, inputs: Sequence[Value]) -> bool:
    """Return whether ONNX lists the types of these inputs for the operator, equal ones where it wants them equal."""
    formal = list(require("onnx", extra="compile").defs.get_schema(op.op_type, op.opset).inputs)
    found: dict[str, torch.dtype] = {}
    for value, parameter in zip(inputs, [*formal, *formal[-1:] * len(inputs)], strict=False):
        if not isinstance(value, Tensor | fx.Node):
            continue
        dtype = builder.sample(value).dtype
        if ONNX_TYPES[dtype] not in parameter.types:
            return False
        is_shared = parameter.is_homogeneous and parameter.type_str not in parameter.types
        if is_shared and found.setdefault(parameter.type_str, dtype) is not dtype:
            return False
    return True


def _refuse_unread_attributes(op: Operator) -> None:
    """Raise where an attribute says something that the translation did not ask for."""
    onnx = require("onnx", extra="compile")
    defaults = onnx.defs.get_schema(op.op_type, op.opset).attributes
    for name, value in op.attributes.items():
        if name in op.read or name in _SAID_ELSEWHERE.get(op.op_type, ()):
            continue
        default = defaults[name].default_value if name in defaults else None
        if default is None or not default.name or value != onnx.helper.get_attribute_value(default):
            raise UnsupportedOperatorError(f"its attribute {name}={value!r} is not followed")


def _is_known(node: Any) -> bool:
    return node.domain in ("", "ai.onnx") and node.op_type in OPERATORS


def _full_name(node: Any) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else str(node.op_type)


def _write_out(model: Any) -> Any:
    """Write out the functions of `model`, and the operators that ONNX defines by others and that have no row here."""
    inliner = require("onnx.inliner", extra="compile")
    if model.functions:
        model = inliner.inline_local_functions(model)
    unknown = [node for node in model.graph.node if not _is_known(node)]
    if not unknown:
        return model
    model = _with_types_and_defaults(model)
    names = sorted({(node.domain, node.op_type) for node in unknown})
    try:
        return inliner.inline_selected_functions(model, names, inline_schema_functions=True)
    except RuntimeError:  # one of them is not defined by others after all: it is then refused by name
        return model


def _with_types_and_defaults(model: Any) -> Any:
    """Return a copy in which values have types, and operators that will be written out have all their attributes.

    Functions of ONNX depend on the types, and what it leaves out of a written-out operator is not its default.
    """
    onnx = require("onnx", extra="compile")
    model = onnx.shape_inference.infer_shapes(model)
    versions = {opset.domain: opset.version for opset in model.opset_import}
    for node in model.graph.node:
        if _is_known(node) or not onnx.defs.has(node.op_type, node.domain):
            continue
        schema = onnx.defs.get_schema(node.op_type, versions.get(node.domain, 1), node.domain)
        given = {attribute.name for attribute in node.attribute}
        defaults = [attribute.default_value for attribute in schema.attributes.values()]
        node.attribute.extend(default for default in defaults if default.name and default.name not in given)
    return model


def _attributes(node: Any) -> dict[str, Any]:
    helper = require("onnx", extra="compile").helper
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _finish(builder: GraphBuilder, outputs: list[Value]) -> fx.GraphModule:
    results = [builder.materialize(value) for value in outputs]
    builder.graph.output(results[0] if len(results) == 1 else tuple(results))
    model = fx.GraphModule(builder.root, builder.graph)
    model.graph.eliminate_dead_code()
    model.delete_all_unused_submodules()
    _fold_biases(model)
    return model.eval()


def _fold_biases(model: fx.GraphModule) -> None:
    """Fold x @ W + b, which ONNX writes as two operators, into one linear layer with a bias."""
    for node in list(model.graph.nodes):
        if node.op != "call_function" or node.target is not torch.add or len(node.args) != 2:
            continue
        for linear, bias in (node.args, node.args[::-1]):
            if _takes_bias(model, linear, bias, node):
                layer, values = model.get_submodule(linear.target), _read(model, bias.target)
                layer.bias = nn.Parameter(values.detach())
                node.replace_all_uses_with(linear)
                model.graph.erase_node(node)
                break
    model.graph.eliminate_dead_code()
    for name in _unread_tensors(model):
        owner, _, leaf = name.rpartition(".")
        delattr(model.get_submodule(owner), leaf)
    model.recompile()


def _takes_bias(model: fx.GraphModule, linear: Any, bias: Any, addition: fx.Node) -> bool:
    is_linear = isinstance(linear, fx.Node) and linear.op == "call_module" and list(linear.users) == [addition]
    if not is_linear or not isinstance(bias, fx.Node) or bias.op != "get_attr":
        return False
    layer = model.get_submodule(str(linear.target))
    if not isinstance(layer, nn.Linear) or "bias" in dict(layer.named_parameters()):
        return False
    values = _read(model, str(bias.target))
    return values.shape == (layer.out_features,) and values.dtype is layer.weight.dtype


def _read(model: nn.Module, path: str) -> Tensor:
    owner, _, leaf = path.rpartition(".")
    tensor = getattr(model.get_submodule(owner), leaf)
    assert isinstance(tensor, Tensor)
    return tensor


def _unread_tensors(model: fx.GraphModule) -> list[str]:
    """List parameters and buffers that stand alone in the module and that no node reads any more."""
    read = {node.target for node in model.graph.nodes if node.op == "get_attr"}
    called = {node.target for node in model.graph.nodes if node.op == "call_module"}
    names = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
    return [name for name in names if name not in read and name.rpartition(".")[0] not in called]
