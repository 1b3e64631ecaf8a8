"""ONNX Runtime: our own way from a model to a session, since torch's backend for it is gone.

The model is exported once (`torch.onnx.export` with the dynamo exporter) to a temporary folder that lives as long as
the job; sessions are made from it with the thread count set, and called with inputs and outputs bound to torch's own
memory, so that nothing is copied. int8 is static (QDQ, calibrated) or dynamic; both run `quant_pre_process` first,
without which dynamic quantization fails on what the dynamo exporter writes.

Measured for ResNet-50, one image, 2 threads: FP32 48 ms (eager 66), int8 QDQ 36. For a 1024-4096-1024 MLP and one
row, dynamic int8 takes 0.14 ms, the least of all. On many CNNs its int8 is slower than its own FP32, which only
measuring shows.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek.compiler.runtimes.backends.calibration_memory import refuse_too_large
from deepseek.compiler.runtimes.backends.eager import lacks_fbgemm, output_dtypes, restore_dtypes
from deepseek.compiler.runtimes.backends.interface import (
    Backend,
    BackendError,
    Built,
    Job,
    Missing,
    Variant,
    quiet,
)
from deepseek.compiler.runtimes.fallbacks import judge_onnx_operators, judge_providers
from deepseek.compiler.runtimes.selection_policy import Traits
from deepseek.core.errors import first_line
from deepseek.core.extras import DISTRIBUTION, has_library, require

CPU_PROVIDER = "CPUExecutionProvider"
OPSET = 20
CALIBRATION_SHARE = 2.1
"""Memory that calibrating takes, relative to the activations of a batch (YOLOv7 2.1, ResNet-50 1.5)."""


def find_missing() -> Missing | None:
    """The runtime, and what writes and exports ONNX."""
    absent = [name for name in ("onnxruntime", "onnx", "onnxscript") if not has_library(name)]
    return Missing(" and ".join(absent), f"pip install '{DISTRIBUTION}[compile]'") if absent else None


def run_float(job: Job) -> Built:
    """Return the exported model as it is."""
    return _build(job, export_onnx(job), "fp32")


def run_static_int8(job: Job) -> Built:
    """Return the model with quantized weights and activations, calibrated on the job's samples."""
    return _build(job, job.once("onnx static", lambda: _quantize_static(job)), "int8")


def run_dynamic_int8(job: Job) -> Built:
    """Return the model with quantized weights; activations are quantized as they come."""
    return _build(job, job.once("onnx dynamic", lambda: _quantize_dynamic(job)), "int8")


def run_bf16(job: Job) -> Built:
    """Return the model in bf16, where the runtime has kernels for it; where not, its own message is the error."""
    job.once("onnx bf16 kernels", lambda: require_kernels("BFLOAT16"))
    raise BackendError("ONNX Runtime runs bf16 here, for which there is no export yet; use its FP32 or int8")


def export_onnx(job: Job) -> Path:
    """Return the model as an ONNX file in a folder that lives as long as the job."""
    path: Path = job.once("onnx", lambda: _export(job))
    return path


def require_kernels(element: str) -> None:
    """Raise `BackendError` when the CPU provider has no MatMul for `element` (an ONNX type), as a one-node model
    shows."""
    onnx = require("onnx", extra="compile")
    kind = getattr(onnx.TensorProto, element)
    values = [onnx.helper.make_tensor_value_info(name, kind, [2, 2]) for name in ("x", "y", "z")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["x", "y"], ["z"])], "one", values[:2], values[2:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=10)
    try:
        make_session(model.SerializeToString(), num_threads=1)
    except Exception as error:
        raise BackendError(f"its CPU provider has no kernels for it ({first_line(error)})") from error


def make_session(model: bytes | str, *, num_threads: int, optimized: Path | None = None) -> Any:
    """Return a session on the CPU with `num_threads` threads; the optimized graph is written to `optimized`."""
    runtime = require("onnxruntime", extra="compile")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4  # errors are raised, and translated: its own lines on stderr would say them twice
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return runtime.InferenceSession(model, options, providers=[CPU_PROVIDER])


SMALLEST_BINDING_BYTES = 1 << 20
"""Smaller answers are copied sooner than memory is bound: 40 us of a call, 1.3 % of a MobileNetV3's."""


class BoundSession:
    """A session that reads torch's own memory, and writes large answers into it; those one call at a time."""

    def __init__(self, session: Any, job: Job) -> None:
        self.session = session
        self.names = [argument.name for argument in session.get_inputs()]
        self.used = used_inputs(self.names, len(job.inputs))
        self.outputs = [(output.name, _torch_type(output.type)) for output in session.get_outputs()]
        self.shapes = [tuple(output.shape) for output in job.flattened.outputs]
        self.kinds = output_dtypes(job)
        self.is_bound = sum(output.nbytes for output in job.flattened.outputs) >= SMALLEST_BINDING_BYTES
        self.lock = threading.Lock()
        self.binding = session.io_binding()

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        held = [inputs[index].detach().contiguous() for index in self.used]
        answers = self._run_bound(held) if self.is_bound else self._run(held)
        return restore_dtypes(answers, self.kinds)

    def _run(self, held: Sequence[Tensor]) -> list[Tensor]:
        feeds = {name: tensor.numpy() for name, tensor in zip(self.names, held, strict=True)}
        return [torch.from_numpy(answer) for answer in self.session.run(None, feeds)]

    def _run_bound(self, held: Sequence[Tensor]) -> list[Tensor]:
        with self.lock:
            for name, tensor in zip(self.names, held, strict=True):
                self.binding.bind_input(
                    name, "cpu", 0, _numpy_type(tensor.dtype), tuple(tensor.shape), tensor.data_ptr()
                )
            answers = [
                torch.empty(shape, dtype=kind) for shape, (_, kind) in zip(self.shapes, self.outputs, strict=True)
            ]
            for (name, kind), answer in zip(self.outputs, answers, strict=True):
                self.binding.bind_output(name, "cpu", 0, _numpy_type(kind), tuple(answer.shape), answer.data_ptr())
            self.session.run_with_iobinding(self.binding)
        return answers


def used_inputs(names: Sequence[str], num_inputs: int) -> list[int]:
    """Return which flat inputs a session still has: an exporter drops those that nothing reads.

    >>> used_inputs(["input_0", "input_2"], 3)
    [0, 2]
    """
    known = [f"input_{index}" for index in range(num_inputs)]
    return [known.index(name) for name in names]


def _build(job: Job, path: Path, precision: str) -> Built:
    optimized = path.with_name(f"optimized-{path.name}")
    session = make_session(str(path), num_threads=torch.get_num_threads(), optimized=optimized)
    operators = [
        node.op_type
        for node in require("onnx", extra="compile").load(str(optimized), load_external_data=False).graph.node
    ]
    optimized.unlink()
    findings = judge_onnx_operators(operators, precision)
    findings += judge_providers(session.get_providers(), CPU_PROVIDER)
    return Built(BoundSession(session, job), tuple(findings), notes=(f"{len(operators)} operators",))


def _export(job: Job) -> Path:
    folder = tempfile.mkdtemp(prefix="deepseek-onnx-")
    weakref.finalize(job, shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / "model.onnx"
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            job.flattened.model,
            job.inputs,
            dynamo=True,
            input_names=[f"input_{index}" for index in range(len(job.inputs))],
            opset_version=OPSET,
            verbose=False,
            optimize=True,
        )
    assert program is not None
    program.save(str(path), external_data=job.flattened.num_bytes > 1 << 30)
    return path


def _quantize_static(job: Job) -> Path:
    refuse_too_large(job.flattened, "ONNX Runtime", share=CALIBRATION_SHARE)
    quantization = require("onnxruntime.quantization", extra="compile")
    source, target = _prepare(job), export_onnx(job).with_name("static.onnx")
    with quiet():
        quantization.quantize_static(
            str(source),
            str(target),
            Calibration(job.calibration),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            reduce_range=not torch.cpu._is_vnni_supported(),
        )
    return target


def _quantize_dynamic(job: Job) -> Path:
    quantization = require("onnxruntime.quantization", extra="compile")
    source, target = _prepare(job), export_onnx(job).with_name("dynamic.onnx")
    with quiet():
        quantization.quantize_dynamic(
            str(source),
            str(target),
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
            reduce_range=not torch.cpu._is_vnni_supported(),
        )
    return target


def _prepare(job: Job) -> Path:
    """Return the exported model with its shapes inferred, as both quantizers need it."""

    def prepare() -> Path:
        onnx = require("onnx", extra="compile")
        shapes = require("onnxruntime.quantization.shape_inference", extra="compile")
        path = export_onnx(job).with_name("prepared.onnx")
        with quiet():
            shapes.quant_pre_process(str(export_onnx(job)), str(path), skip_symbolic_shape=True)
        model = onnx.load(str(path))
        # Shapes of weights that the optimizer has turned since; the quantizers infer them anew where there are none.
        model.graph.ClearField("value_info")
        onnx.save(model, str(path))
        return path

    prepared: Path = job.once("onnx prepared", prepare)
    return prepared


class Calibration:
    """Samples as ONNX Runtime's quantizer reads them."""

    def __init__(self, samples: Sequence[tuple[Tensor, ...]]) -> None:
        self._samples = iter(samples)

    def get_next(self) -> dict[str, Any] | None:
        """Return the next sample, or `None` at the end."""
        tensors = next(self._samples, None)
        if tensors is None:
            return None
        return {f"input_{index}": tensor.detach().contiguous().numpy() for index, tensor in enumerate(tensors)}


def lacks_layers(traits: Traits) -> str | None:
    """int8 is about convolutions and matmuls."""
    return None if traits.num_convolutions + traits.num_linears else "the model has no layer to run in int8"


def lacks_linears(traits: Traits) -> str | None:
    """Dynamic int8 covers matmuls only."""
    return lacks_fbgemm(traits)


_NUMPY: dict[torch.dtype, str] = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.bool: "bool_",
}
_TORCH = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}


def _numpy_type(dtype: torch.dtype) -> Any:
    if dtype not in _NUMPY:
        raise BackendError(f"ONNX Runtime takes no {dtype} inputs through numpy; convert them first")
    return getattr(require("numpy", extra="compile"), _NUMPY[dtype])


def _torch_type(name: str) -> torch.dtype:
    if name not in _TORCH:
        raise BackendError(f"ONNX Runtime answers with {name}, for which torch has no type")
    return _TORCH[name]


BACKEND = Backend(
    name="onnxruntime",
    summary="ONNX Runtime's CPU provider",
    find_missing=find_missing,
    variants=(
        Variant("session", "fp32", "exported with torch's dynamo exporter", run_float, 20),
        Variant("session", "bf16", "the same in bf16", run_bf16, 90),
        Variant("static", "int8", "QDQ, calibrated", run_static_int8, 21, lacks_layers),
        Variant("dynamic", "int8", "activations quantized as they come", run_dynamic_int8, 15, lacks_linears),
    ),
    unsupported={"fp16": "its CPU provider widens fp16 to FP32 before every matmul"},
)
