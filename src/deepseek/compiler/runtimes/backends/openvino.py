"""OpenVINO: converted from the exported graph in memory, in any precision, for one answer soon or for many.

The model goes from `torch.export` straight into OpenVINO, without a file. FP32 and bf16 are the same model with another
execution precision; int8 is NNCF's post-training quantization, calibrated on the samples. Two ways to run it: `latency`
gives one request all threads; `streams` cuts a batch into parts that one-thread streams work on side by side, so that
no layer waits for its slowest thread. For ResNet-50 the processor time of an image falls from 11.0 to 9.5 ms in int8
as a part grows from 1 to 16 rows and rises from 36 to 39 in FP32: int8 and bf16 get one part a stream, FP32 small ones.

A precision is a hint to OpenVINO: a processor without bf16 runs bf16 models in FP32, silently. What was executed is
read from the compiled model's own graph. OpenVINO and NNCF report their use over the network unless told otherwise;
here they are always told otherwise, and nothing else of the process is changed for it.

Measured for ResNet-50, one image, 2 threads: FP32 61 ms (eager 66), bf16 20.5, int8 15.5, which nothing else reached.
"""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from torch import Tensor

from deepseek.compiler.runtimes.backends.calibration_memory import refuse_too_large
from deepseek.compiler.runtimes.backends.interface import Backend, BackendError, Built, Job, Missing, Variant, quiet
from deepseek.compiler.runtimes.fallbacks import judge_openvino_layers
from deepseek.compiler.runtimes.selection_policy import Traits
from deepseek.core.extras import DISTRIBUTION, has_library, require

_HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
_TELEMETRY = "openvino_telemetry"
_CALIBRATION_SHARE = 0.7  # memory that calibrating takes, relative to the activations of a batch (YOLOv7 0.5)
SMALLEST_BINDING_BYTES = 1 << 20
"""A smaller answer is copied sooner than memory is handed over."""
SMALLEST_SPLIT = 2
"""A batch of fewer rows is not cut into parts."""


def find_missing() -> Missing | None:
    """The runtime."""
    return None if has_library("openvino") else Missing("openvino", f"pip install '{DISTRIBUTION}[compile]'")


def run_latency(precision: str, hint: str | None = None) -> Callable[[Job], Built]:
    """Build the model for one request at a time."""

    def run(job: Job) -> Built:
        library = require_openvino()
        model, notes = _model(job, precision)
        compiled = _compile(library, model, hint or _HINTS[precision], {"NUM_STREAMS": 1})
        return Built(Requests(library, compiled, job, [slice(None)]), findings=_judge(compiled, precision), notes=notes)

    return run


def run_streams(precision: str, num_parts: int, hint: str | None = None) -> Callable[[Job], Built]:
    """Build the model for batches that are cut into `num_parts` parts for each stream."""

    def run(job: Job) -> Built:
        library = require_openvino()
        parts = split_batch(job, torch.get_num_threads() * num_parts)
        shared, notes = _model(job, precision)
        model = shared.clone()
        rows = parts[0].stop - parts[0].start
        model.reshape({index: _with_rows(job.inputs[index], rows) for index in range(len(model.inputs))})
        streams = {"NUM_STREAMS": torch.get_num_threads()}
        compiled = _compile(library, model, hint or _HINTS[precision], streams)
        return Built(
            Requests(library, compiled, job, parts),
            findings=_judge(compiled, precision),
            notes=(*notes, f"{len(parts)} parts of {rows} rows on {torch.get_num_threads()} streams"),
        )

    return run


class Requests:
    """One or more infer requests that together answer a batch; one call at a time.

    Inputs are read where torch has them. Answers are copied out of the request, which writes into the same memory in
    every call; large ones are written where torch wants them. NumPy copies, in this thread: torch's threads would help,
    and then spin for 6 ms beside OpenVINO's, which costs a BERT-base of 35 ms another 4.
    """

    def __init__(self, library: Any, compiled: Any, job: Job, parts: Sequence[slice]) -> None:
        self.library, self.parts = library, parts
        self.requests = [compiled.create_infer_request() for _ in parts]
        self.outputs = [(tuple(output.shape), output.dtype) for output in job.flattened.outputs]
        self.bound = find_bindable(compiled, job)
        self.lock = threading.Lock()

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        answers = [torch.empty(shape, dtype=kind) for shape, kind in self.outputs]
        tensors = [tensor.detach().contiguous() for tensor in inputs]
        with self.lock:
            for request, part in zip(self.requests, self.parts, strict=True):
                for index, tensor in enumerate(tensors):
                    request.set_input_tensor(index, self.library.Tensor(tensor[part].numpy(), shared_memory=True))
                for index in self.bound:
                    answer = answers[index][part].numpy()
                    request.set_output_tensor(index, self.library.Tensor(answer, shared_memory=True))
            self._run()
            self._copy_out(answers)
        return answers

    def _run(self) -> None:
        if len(self.requests) == 1:
            self.requests[0].infer()
            return
        for request in self.requests:
            request.start_async()
        for request in self.requests:
            request.wait()

    def _copy_out(self, answers: Sequence[Tensor]) -> None:
        for index, answer in enumerate(answers):
            if index not in self.bound:
                for request, part in zip(self.requests, self.parts, strict=True):
                    answer.numpy()[part] = request.get_output_tensor(index).data


def find_bindable(compiled: Any, job: Job) -> list[int]:
    """Return the outputs that may be written into memory of our own: large, and computed.

    Given memory for an output that is an input, OpenVINO takes it for the input as well and reads from it.
    """
    sources = [output.get_node().input(0).get_source_output().get_node() for output in compiled.outputs]
    is_input = [source.get_type_name() == "Parameter" for source in sources]
    sizes = [output.numel() * output.element_size() for output in job.flattened.outputs]
    return [index for index, size in enumerate(sizes) if size >= SMALLEST_BINDING_BYTES and not is_input[index]]


def split_batch(job: Job, num_parts: int) -> list[slice]:
    """Equal parts of the batch, as many as wanted or as there are rows; raises `BackendError` where it cannot be cut.

    A batch can be cut when every input and output has its rows along the first dim.
    """
    tensors = (*job.inputs, *job.flattened.outputs)
    sizes = {tensor.shape[0] if tensor.ndim else 0 for tensor in tensors}
    rows = max(sizes)
    if len(sizes) != 1 or rows < SMALLEST_SPLIT:
        raise BackendError(f"the batch cannot be cut into parts: first dims are {sorted(sizes)}")
    num_parts_wanted = num_parts
    num_parts = max(count for count in range(1, min(num_parts, rows) + 1) if rows % count == 0)
    if num_parts == 1:
        raise BackendError(f"a batch of {rows} rows has no {num_parts_wanted} or fewer equal parts to run side by side")
    size = rows // num_parts
    return [slice(start, start + size) for start in range(0, rows, size)]


def convert(job: Job) -> tuple[Any, tuple[str, ...]]:
    """Return the model in OpenVINO's own form, with the shapes of the samples, and what is to be said about it.

    Whole operators first: a scaled dot-product attention that arrives as one is run as one, which is 7 to 11 % of a
    BERT-base. What OpenVINO does not know is taken apart, which is said.
    """
    library = require_openvino()
    try:
        model = _convert_program(library, job.export())
    except Exception as error:  # noqa: BLE001 - it may stumble over anything; that small operators fail, too, is raised
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return convert_decomposed(job), (f"in small operators, since OpenVINO refused whole ones: {reason}",)
    return _with_shapes(model, job), ()


def convert_decomposed(job: Job) -> Any:
    """Return the converted model in the smallest operators, which the quantizer can follow."""
    library = require_openvino()
    return _with_shapes(_convert_program(library, job.export().run_decompositions()), job)


def _convert_program(library: Any, program: torch.export.ExportedProgram) -> Any:
    with without_telemetry(), quiet():
        return library.convert_model(program)


def _with_shapes(model: Any, job: Job) -> Any:
    model.reshape({index: list(tensor.shape) for index, tensor in enumerate(job.inputs)})
    return model


def quantize(job: Job) -> Any:
    """Return the model with int8 convolutions and matmuls, calibrated on the job's samples."""
    refuse_too_large(job.flattened, "NNCF", share=_CALIBRATION_SHARE)
    model = job.once("openvino decomposed", lambda: convert_decomposed(job))
    with without_telemetry(), quiet(), redirect_stdout(io.StringIO()):  # where NNCF draws progress bars
        nncf = require("nncf", extra="compile")
        samples = [tuple(tensor.detach().contiguous().numpy() for tensor in sample) for sample in job.calibration]
        feeds = [sample[0] if len(sample) == 1 else dict(enumerate(sample)) for sample in samples]
        kind = (
            {"model_type": nncf.ModelType.TRANSFORMER} if job.traits.num_linears > job.traits.num_convolutions else {}
        )
        return nncf.quantize(model, nncf.Dataset(feeds), subset_size=len(feeds), **kind)


def require_openvino() -> Any:
    """Return the library, imported without the part that reports its use."""
    with without_telemetry():
        library = require("openvino", extra="compile")
        require("openvino.tools.ovc.convert_impl", extra="compile")
    return library


@contextmanager
def without_telemetry() -> Iterator[None]:
    """Let OpenVINO and NNCF report nothing about what happens in the block.

    Both fall back to doing nothing where the reporting library cannot be imported. Where a user has loaded it already,
    its consent is taken back for the length of the block.
    """
    loaded = sys.modules.get(_TELEMETRY)
    if loaded is None:
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
        try:
            yield
        finally:
            sys.modules.pop(_TELEMETRY, None)
        return
    sender = loaded.Telemetry
    before = sender.send_event
    sender.send_event = lambda *args, **kwargs: None
    try:
        yield
    finally:
        sender.send_event = before


def executed_layers(compiled: Any) -> list[tuple[str, str]]:
    """Return the type and runtime precision of each layer that a compiled model executes."""
    operations = compiled.get_runtime_model().get_ordered_ops()
    infos = [operation.get_rt_info() for operation in operations]
    return [(str(info["layerType"].astype(str)), str(info["runtimePrecision"].astype(str))) for info in infos]


def lacks_nncf(traits: Traits) -> str | None:
    """int8 needs NNCF."""
    if not has_library("nncf"):
        return f"int8 needs nncf: pip install '{DISTRIBUTION}[compile]'"
    if traits.num_convolutions + traits.num_linears == 0:
        return "the model has no convolution and no linear layer to run in int8"
    return None


def lacks_rows(traits: Traits) -> str | None:
    """Streams are for batches."""
    return None if traits.batch_size >= SMALLEST_SPLIT else "one row cannot be cut into parts for streams"


def lacks_nncf_or_rows(traits: Traits) -> str | None:
    """int8 streams need both."""
    return lacks_rows(traits) or lacks_nncf(traits)


def _model(job: Job, precision: str) -> tuple[Any, tuple[str, ...]]:
    if precision == "int8":
        return job.once("openvino int8", lambda: quantize(job)), ()
    return job.once("openvino", lambda: convert(job))


def _compile(library: Any, model: Any, hint: str, settings: dict[str, Any]) -> Any:
    settings = {
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        **settings,
    }
    return library.Core().compile_model(model, "CPU", settings)


def _judge(compiled: Any, precision: str) -> tuple[Any, ...]:
    return tuple(judge_openvino_layers(executed_layers(compiled), precision))


def _with_rows(tensor: Tensor, rows: int) -> list[int]:
    return [rows, *tensor.shape[1:]]


BACKEND = Backend(
    name="openvino",
    summary="OpenVINO on the CPU, int8 by NNCF",
    find_missing=find_missing,
    variants=(
        Variant("latency", "int8", "NNCF int8, all threads on one request", run_latency("int8"), 10, lacks_nncf),
        Variant(
            "streams",
            "int8",
            "NNCF int8, parts of the batch side by side",
            run_streams("int8", 1),
            11,
            lacks_nncf_or_rows,
        ),
        Variant("latency", "bf16", "all threads on one request", run_latency("bf16"), 11),
        Variant("streams", "bf16", "parts of the batch side by side", run_streams("bf16", 1), 13, lacks_rows),
        Variant("latency", "fp32", "all threads on one request", run_latency("fp32"), 16),
        Variant("streams", "fp32", "parts of the batch side by side", run_streams("fp32", 8), 17, lacks_rows),
        Variant("latency_bf16", "int8", "NNCF int8, bf16 between", run_latency("int8", "bf16"), 19, lacks_nncf),
    ),
    unsupported={"fp16": "this processor has no fp16 instructions that OpenVINO would use"},
)
