"""Model files run as they are by the runtime that takes them: ONNX by ONNX Runtime or OpenVINO, TensorFlow by OpenVINO.

A `Program` is called with tensors in the order of the file's inputs, or by their names, and gives tensors. It has no
parameters and cannot be trained; for that an ONNX file is converted (`onnx/importing.py`).

    .onnx                     onnxruntime, openvino
    SavedModel, .pb, .tflite  openvino, which reads them without TensorFlow

Both come in through the doors of `compiler/backends`, which keep OpenVINO from reporting its use to its makers. Where
the processor has bfloat16, OpenVINO computes in it unless told otherwise, with errors of 1e-3, and where weights are
int8 it rounds what they are multiplied with to int8 as well (measured on all-MiniLM-L6-v2: off by 0.07): here fp32 is
asked for and that rounding is not, and what it says that it runs in is compared with the request.

Only tensors go in and come out: a file with texts, sequences or maps among its inputs or outputs (a classifier of
scikit-learn, as it is usually exported) is refused when it is opened.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from deepseek.artifact.verifying import is_pickle
from deepseek.compiler.runtimes.backends.onnxruntime import make_session
from deepseek.compiler.runtimes.backends.openvino import require_openvino
from deepseek.core.errors import ConfigError, CorruptArtifactError, MissingExtraError, UnsafeFileError
from deepseek.core.names import explain_unknown
from deepseek.onnx.files import ONNX_SUFFIX, UnsupportedOperatorError
from deepseek.onnx.sample_inputs import InputSpec

_AS_WRITTEN = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}  # OpenVINO rounds nothing that the file does not round
SAVED_MODEL_NAME = "saved_model.pb"
TENSORFLOW_SUFFIXES = (".pb", ".tflite")


@dataclass(frozen=True)
class Program:
    """A model file that a runtime executes; called like a model."""

    path: Path
    runtime: str
    precision: str
    inputs: tuple[InputSpec, ...]
    run: Callable[[Sequence[Tensor]], list[Tensor]]
    note: str = ""

    def __call__(self, *inputs: Tensor, **named: Tensor) -> Any:
        """Run the file and return its output, or a tuple of them; inputs in order or by name."""
        bound = self.bind(inputs, named)
        try:
            outputs = self.run(bound)
        except Exception as error:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in bound)
            raise ConfigError(
                f"{self.runtime} cannot run {self.path} on inputs of shapes {shapes} ({_last_line(error)}); give others"
            ) from error
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def explain(self) -> str:
        """Describe the file, the runtime and the precision."""
        wanted = ", ".join(f"{spec.name} {_show(spec)}" for spec in self.inputs)
        text = f"{self.path} as it is, by {self.runtime} in {self.precision}; inputs: {wanted}"
        return f"{text}\n{self.note}" if self.note else text

    def bind(self, inputs: Sequence[Tensor], named: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the inputs of a call in the order and the types of the file."""
        names = [spec.name for spec in self.inputs]
        for name in named:
            if name not in names:
                raise ConfigError(explain_unknown("input", name, names))
        given = dict(zip(names, inputs, strict=False)) | dict(named)
        if len(given) != len(names) or len(inputs) + len(named) != len(names):
            raise ConfigError(
                f"{self.path} takes {', '.join(names)} and {len(inputs) + len(named)} were given; give each once"
            )
        return [_take_input(spec, given[spec.name]) for spec in self.inputs]


def run_onnx(path: Path, runtime: str, precision: str = "auto") -> Program:
    """Open the ONNX file `path` on `runtime`; the file's precision holds, OpenVINO may be asked for another."""
    return RUNTIMES[runtime](path, precision)


def run_tensorflow(path: Path, precision: str = "auto") -> Program:
    """Open a SavedModel folder, a frozen graph or a TFLite file on OpenVINO."""
    if path.is_file() and is_pickle(path):
        raise UnsafeFileError(f"{path} is a pickle with the name of a TensorFlow file; do not load it")
    return _open_openvino(path, precision)


def _open_onnxruntime(path: Path, precision: str) -> Program:
    if precision not in ("auto", "fp32"):
        raise ConfigError(
            f"ONNX Runtime runs {path} in the precision that it was written in, and {precision} was asked for; "
            "leave precision out, or convert the file by naming another backend"
        )
    try:
        session = make_session(str(path), num_threads=torch.get_num_threads())
    except MissingExtraError:
        raise
    except Exception as error:
        raise CorruptArtifactError(
            f"ONNX Runtime cannot run {path} ({_last_line(error)}); try another backend"
        ) from error
    for port in (*session.get_inputs(), *session.get_outputs()):
        _refuse_foreign_type(path, port.name, port.type, _ORT_DTYPES)
    inputs = tuple(
        InputSpec(port.name, tuple(_length(dim) for dim in port.shape), _ORT_DTYPES[port.type])
        for port in session.get_inputs()
    )

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        feed = {spec.name: tensor.contiguous().cpu().numpy() for spec, tensor in zip(inputs, tensors, strict=True)}
        return [_from_numpy(array) for array in session.run(None, feed)]

    return Program(path, "onnxruntime", "the precision of the file", inputs, run)


def _open_openvino(path: Path, precision: str) -> Program:
    openvino = require_openvino()
    hints = {"auto": "f32", "fp32": "f32", "bf16": "bf16", "fp16": "f16"}
    if precision not in hints:
        raise ConfigError(
            f"OpenVINO runs {path} in fp32, bf16 or fp16 and {precision} was asked for; choose one of them"
        )
    core = openvino.Core()
    try:
        model = core.read_model(str(path))
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hints[precision]} | _AS_WRITTEN)
    except Exception as error:
        raise _explain_refusal(path, error) from error
    runs_in = {"f32": "fp32", "bf16": "bf16", "f16": "fp16"}[
        compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    ]
    if precision not in ("auto", runs_in):
        raise ConfigError(
            f"OpenVINO would run {path} in {runs_in} here although {precision} was asked for; ask for that"
        )
    for port in (*compiled.inputs, *compiled.outputs):
        _refuse_foreign_type(path, _name_port(port, path), port.get_element_type().get_type_name(), _OPENVINO_DTYPES)
    inputs = tuple(_describe_port(port, index, path) for index, port in enumerate(compiled.inputs))

    def give(tensor: Tensor) -> Any:
        if tensor.dtype is not torch.bfloat16:
            return tensor.contiguous().cpu().numpy()
        bits = tensor.contiguous().cpu().view(torch.int16).numpy()  # NumPy has no bfloat16
        return openvino.Tensor(bits, list(bits.shape), openvino.Type.bf16)

    def take(array: Any, type_name: str) -> Tensor:
        if type_name != "bf16":
            return torch.from_numpy(array.copy())
        return torch.from_numpy(array.view(numpy.int16).copy()).view(torch.bfloat16)  # it comes by the name of float16

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        results = compiled([give(tensor) for tensor in tensors])
        return [take(results[port], port.get_element_type().get_type_name()) for port in compiled.outputs]

    return Program(path, "openvino", runs_in, inputs, run)


RUNTIMES: dict[str, Callable[[Path, str], Program]] = {"onnxruntime": _open_onnxruntime, "openvino": _open_openvino}


def find_tensorflow(path: Path) -> bool:
    """Return whether `path` is a SavedModel folder or a file of TensorFlow, by its name."""
    return (path / SAVED_MODEL_NAME).is_file() or (path.is_file() and path.suffix in TENSORFLOW_SUFFIXES)


def _take_input(spec: InputSpec, value: object) -> Tensor:
    """Return `value` in the type of the file; raise `ConfigError` where its kind of number or its shape is another."""
    tensor = torch.from_numpy(value) if isinstance(value, numpy.ndarray) else value
    if not isinstance(tensor, Tensor):
        raise ConfigError(f"input {spec.name!r} is a {type(value).__name__}; give a tensor")
    if not torch.can_cast(tensor.dtype, spec.dtype):
        raise ConfigError(
            f"input {spec.name!r} is {str(spec.dtype).removeprefix('torch.')} in the file and "
            f"{str(tensor.dtype).removeprefix('torch.')} was given; convert it"
        )
    fits = len(tensor.shape) == len(spec.shape) and all(
        length in (None, given) for length, given in zip(spec.shape, tensor.shape, strict=True)
    )
    if spec.shape and not fits:  # ONNX Runtime shows a shape that the file leaves open as that of a scalar
        raise ConfigError(
            f"input {spec.name!r} has shape {_show(spec)} and {tuple(tensor.shape)} was given; give one that fits"
        )
    return tensor.detach().to(spec.dtype)


def _refuse_foreign_type(path: Path, name: str, type_name: str, dtypes: Mapping[str, torch.dtype]) -> None:
    """Raise for an input or output of a runtime's type that cannot be handed over as a tensor."""
    if type_name == "tensor(bfloat16)":
        raise UnsupportedOperatorError(
            f"{path} has {name!r} in bfloat16, which ONNX Runtime does not hand over to Python; run it by "
            "backend='openvino', or convert it with backend='eager'"
        )
    if type_name not in dtypes:
        raise UnsupportedOperatorError(
            f"{path} has {name!r} of type {type_name} and only tensors of numbers are taken and given here; export it "
            "without, or with numbers instead (class labels as integers; zipmap=False in skl2onnx)"
        )


def _from_numpy(array: Any) -> Tensor:
    """Return a tensor of `array`; of two types of 64 unsigned bits NumPy has, torch knows one."""
    return torch.from_numpy(array.view(numpy.uint64) if array.dtype == numpy.ulonglong else array)


def _describe_port(port: Any, index: int, path: Path) -> InputSpec:
    lengths = tuple(dim.get_length() if dim.is_static else None for dim in port.get_partial_shape())
    name = _name_port(port, path) or f"input_{index}"
    return InputSpec(name, lengths, _OPENVINO_DTYPES[port.get_element_type().get_type_name()])


def _name_port(port: Any, path: Path) -> str:
    """Return the name of an input or output, without the number that TensorFlow adds; empty where it has none."""
    names = sorted(port.get_names(), key=lambda name: (":" in name, name))
    if not names:
        return ""
    return str(names[0] if path.suffix == ONNX_SUFFIX else names[0].partition(":")[0])


def _length(dim: Any) -> int | None:
    return dim if isinstance(dim, int) and dim > 0 else None


def _show(spec: InputSpec) -> str:
    return f"({', '.join('any' if length is None else str(length) for length in spec.shape)})"


def _explain_refusal(path: Path, error: Exception) -> Exception:
    """Return the error for a file that OpenVINO refuses: an unknown operator, or no model at all."""
    unknown = _UNKNOWN_OPERATIONS.search(str(error))
    if unknown:
        return ConfigError(f"OpenVINO cannot run {path}, it has no rule for {unknown[1].strip()}; export it without")
    return CorruptArtifactError(f"OpenVINO cannot read {path} ({_last_line(error)}); export it again")


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else type(error).__name__


_UNKNOWN_OPERATIONS = re.compile(r"No conversion rule found for operations: (.+)")
_ORT_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(int16)": torch.int16,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(uint16)": torch.uint16,
    "tensor(uint32)": torch.uint32,
    "tensor(uint64)": torch.uint64,
    "tensor(bool)": torch.bool,
}
_OPENVINO_DTYPES = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f64": torch.float64,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
    "u16": torch.uint16,
    "u32": torch.uint32,
    "u64": torch.uint64,
    "boolean": torch.bool,
}
