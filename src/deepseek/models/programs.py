"""Model files run as they are by the runtime that takes them: ONNX by ONNX Runtime or OpenVINO, TensorFlow by OpenVINO.

A `Program` is called with tensors in the order of the file's inputs, or by their names, and gives tensors. It has no
parameters and cannot be trained; for that an ONNX file is converted (`onnx/importing.py`).

    .onnx                     onnxruntime, openvino
    SavedModel, .pb, .tflite  openvino, which reads them without TensorFlow

Both come in through the doors of `compiler/backends`, which keep OpenVINO from reporting its use to its makers. Where
the processor has bfloat16, OpenVINO computes in it unless told otherwise, with errors of 1e-3, and where weights are
int8 it rounds what they are multiplied with to int8 as well (measured on all-MiniLM-L6-v2: off by 0.07): here fp32 is
asked for and that rounding is not, and what it says that it runs in is compared with the request.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek.artifact.verifying import is_pickle
from deepseek.compiler.runtimes.backends.onnxruntime import make_session
from deepseek.compiler.runtimes.backends.openvino import require_openvino
from deepseek.core.errors import ConfigError, CorruptArtifactError, MissingExtraError, UnsafeFileError
from deepseek.core.names import explain_unknown
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
        """The output of the file, or a tuple of them; inputs in order or by name."""
        outputs = self.run(self._bind(inputs, named))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def explain(self) -> str:
        """What runs, by what, in which precision."""
        wanted = ", ".join(f"{spec.name} {_show(spec)}" for spec in self.inputs)
        text = f"{self.path} as it is, by {self.runtime} in {self.precision}; inputs: {wanted}"
        return f"{text}\n{self.note}" if self.note else text

    def _bind(self, inputs: Sequence[Tensor], named: Mapping[str, Tensor]) -> list[Tensor]:
        names = [spec.name for spec in self.inputs]
        for name in named:
            if name not in names:
                raise ConfigError(explain_unknown("input", name, names))
        given = dict(zip(names, inputs, strict=False)) | dict(named)
        missing = [name for name in names if name not in given]
        if missing or len(inputs) > len(names):
            raise ConfigError(
                f"{self.path} takes {', '.join(names)} and {len(inputs) + len(named)} were given; give each"
            )
        return [given[name].detach() for name in names]


def run_onnx(path: Path, runtime: str, precision: str = "auto") -> Program:
    """The ONNX file `path` on `runtime`; the file's own precision holds, and OpenVINO may be asked for another."""
    return RUNTIMES[runtime](path, precision)


def run_tensorflow(path: Path, precision: str = "auto") -> Program:
    """A SavedModel folder, a frozen graph or a TFLite file on OpenVINO."""
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
    inputs = tuple(
        InputSpec(each.name, tuple(_length(dim) for dim in each.shape), _ORT_DTYPES[each.type])
        for each in session.get_inputs()
    )

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        feed = {spec.name: tensor.contiguous().cpu().numpy() for spec, tensor in zip(inputs, tensors, strict=True)}
        return [torch.from_numpy(each) for each in session.run(None, feed)]

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
    inputs = tuple(_describe_port(port, place) for place, port in enumerate(compiled.inputs))

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        results = compiled([tensor.contiguous().cpu().numpy() for tensor in tensors])
        return [torch.from_numpy(results[port].copy()) for port in compiled.outputs]

    return Program(path, "openvino", runs_in, inputs, run)


RUNTIMES: dict[str, Callable[[Path, str], Program]] = {"onnxruntime": _open_onnxruntime, "openvino": _open_openvino}


def find_tensorflow(path: Path) -> bool:
    """Whether `path` is a SavedModel folder or a file of TensorFlow, by its name."""
    return (path / SAVED_MODEL_NAME).is_file() or (path.is_file() and path.suffix in TENSORFLOW_SUFFIXES)


def _describe_port(port: Any, place: int) -> InputSpec:
    names = sorted(port.get_names(), key=lambda name: (":" in name, name))
    lengths = tuple(dim.get_length() if dim.is_static else None for dim in port.get_partial_shape())
    name = names[0].partition(":")[0] if names else f"input_{place}"
    return InputSpec(name, lengths, _OPENVINO_DTYPES[port.get_element_type().get_type_name()])


def _length(dim: Any) -> int | None:
    return dim if isinstance(dim, int) and dim > 0 else None


def _show(spec: InputSpec) -> str:
    return f"({', '.join('any' if length is None else str(length) for length in spec.shape)})"


def _explain_refusal(path: Path, error: Exception) -> Exception:
    """What OpenVINO has against a file: an operator that it does not know, or that it is no model."""
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
    "tensor(bool)": torch.bool,
}
_OPENVINO_DTYPES = {
    "f32": torch.float32,
    "f16": torch.float16,
    "f64": torch.float64,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
    "boolean": torch.bool,
}
