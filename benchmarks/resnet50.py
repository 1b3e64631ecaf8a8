"""`BackendSelector.AUTO`: as fast as the best peer at each precision (0.97 is equal), 6.8 times eager FP32 end to end.

Models (`--model resnet50`, `mobilenet_v3_large`, `bert_base` at 128 tokens, `yolov7`), batch 1 and 16; of each table
all sides take turns, in one process but for the first. Sides: eager FP32 as a user has it, in a process where none of
our tuning ran; the same beside the others, where AUTO has told the allocator to keep its memory, which serves every
side there; what AUTO chooses when it must stay in FP32, bf16 or int8, and when it may choose; and each peer called as
its documentation says: `torch.compile` by default and with freezing (PT2E for int8), ONNX Runtime (float, and its
static and dynamic quantizers), OpenVINO at each precision (NNCF for int8).

Weights are random, since none are to be had here, and sized as trained ones are: batch norms carry the statistics of
the samples, and the last norm of each residual branch is scaled by 0.2, without which an untrained network amplifies
every rounding. Times do not depend on weights; agreement and cosine do, and say only that the arithmetic is sound. For
that reason a side that is told its precision is not bounded in error; AUTO at any precision keeps the default bounds.

A table needs a dozen copies of a model in one process. Where memory does not allow that (YOLOv7 on 16 images: more
than 24 GB), `--precision fp32` and so on measure the sides of one precision, beside eager FP32.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.measuring import Bar, Row, report
from deepseek.compiler.runtimes.accuracy import compare
from deepseek.compiler.runtimes.backends.calibration_memory import refuse_too_large
from deepseek.compiler.runtimes.backends.flat_signature import Flattened, flatten_model
from deepseek.compiler.runtimes.backends.onnxruntime import CALIBRATION_SHARE
from deepseek.compiler.runtimes.backends.openvino import without_telemetry
from deepseek.compiler.runtimes.selection import select
from deepseek.compiler.runtimes.selection_policy import Tolerance
from deepseek.compiler.runtimes.timing import SLOW_CALL_S, measure_in_turns, time_call
from deepseek.core.extras import has_library
from deepseek.models import zoo

MODELS = ("resnet50", "mobilenet_v3_large", "bert_base", "yolov7")
PRECISIONS = ("fp32", "bf16", "int8")
CHOICES = (*PRECISIONS, "auto")
SEQUENCE_LENGTH = 128
NUM_CALIBRATION = 4
RESIDUAL_SCALE = 0.2
GOAL_PEER, GOAL_EAGER = 0.97, 6.8
MOST_SECONDS = 240.0
"""No new round of one table is begun after this."""
SLOW = 4.0
"""A side whose call takes so many times eager's, and half a second, is called once: its row is that call."""
LOOSE = Tolerance(relative_error=1.0, cosine=0.0, agreement=0.0)
Call = Callable[[], Any]
EAGER, PLAIN_EAGER = "eager FP32", "eager FP32, a process of its own"
WORKER_OPTION = "--serve-eager"  # how this file calls itself for the plain side


@dataclass(frozen=True)
class Contender:
    """One side: how it is called, and its answers to the samples."""

    name: str
    precision: str
    run: Call | None
    answers: tuple[Tensor, ...] = ()
    note: str = ""


def main() -> None:
    """Measure each model and batch that was asked for, each in a process of its own, and report."""
    if sys.argv[1:2] == [WORKER_OPTION]:
        serve_eager(sys.argv[2], int(sys.argv[3]))
        return
    arguments = parse_arguments()
    tables = [(name, size) for name in arguments.model for size in arguments.batch_size]
    if len(tables) == 1:
        report("resnet50", "ms a call", *measure_model(*tables[0], arguments), arguments)
        return
    rows: list[Row] = []
    bars: list[Bar] = []
    for name, size in tables:
        found = measure_in_a_process(name, size, arguments)
        rows += found[0]
        bars += found[1]
        report("resnet50", "ms a call", rows, bars, arguments)  # what is measured so far is kept


def measure_in_a_process(name: str, batch_size: int, arguments: argparse.Namespace) -> tuple[list[Row], list[Bar]]:
    """One table, measured by this file called for it alone: a dozen copies of a model are a lot of memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.json"
        command = [sys.executable, "-m", "benchmarks.resnet50", "--model", name, "--batch-size", str(batch_size)]
        command += ["--budget", str(arguments.budget), "--json", str(path), *(["--quick"] if arguments.quick else [])]
        command += ["--precision", *arguments.precision]
        status = subprocess.run(command, check=False).returncode
        if status != 0:
            return [Row(f"{name} batch {batch_size}", None, None, None, f"its process ended with status {status}")], []
        table = json.loads(path.read_text(encoding="utf-8"))
    return [Row(**row) for row in table["rows"]], [Bar(**bar) for bar in table["bars"]]


def parse_arguments() -> argparse.Namespace:
    """Return the options of every benchmark, and which models and batches."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the result to this file as JSON")
    parser.add_argument("--markdown", type=Path, help="also write the result to this file as Markdown")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and a short search, to see that it runs")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["resnet50"])
    parser.add_argument("--batch-size", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--precision", nargs="+", choices=CHOICES, default=CHOICES, help="measure only these")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds of each search of AUTO")
    return parser.parse_args()


def measure_model(name: str, batch_size: int, arguments: argparse.Namespace) -> tuple[list[Row], list[Bar]]:
    """Return the rows and bars of one model at one batch size."""
    with plain_eager(name, batch_size) as plain:
        return measure_sides(name, batch_size, plain, arguments)


def measure_sides(
    name: str, batch_size: int, plain: Call, arguments: argparse.Namespace
) -> tuple[list[Row], list[Bar]]:
    """The same, with the side that is called in another process."""
    model, samples, calibration = build_model(name, batch_size)
    flattened = flatten_model(model, samples)
    contenders = [
        Contender(PLAIN_EAGER, "fp32", plain, flattened.outputs),
        Contender(EAGER, "fp32", lambda: call(model, samples), flattened.outputs),
    ]
    contenders += list(build_ours(model, samples, calibration, flattened, arguments))
    contenders += [make() for make in list_peers(model, samples, calibration, flattened, arguments.precision)]
    num_rounds = 3 if arguments.quick else 21
    sides = {contender.name: no_grad(contender.run) for contender in contenders if contender.run is not None}
    once_ms = {name: time_call(run) for name, run in sides.items()}
    slow = {name for name in sides if once_ms[name] > max(SLOW * once_ms[EAGER], 1000 * SLOW_CALL_S)}
    timed = {name: sides[name] for name in sides if name not in slow}
    times_ms = measure_in_turns(timed, num_rounds, deadline_s=time.perf_counter() + MOST_SECONDS)
    times_ms |= {name: [once_ms[name]] for name in slow}
    label = f"{name} batch {batch_size}"
    if set(arguments.precision) != set(CHOICES):
        label += f", {' and '.join(arguments.precision)} alone"
    rows = [make_row(label, contender, times_ms.get(contender.name, []), flattened) for contender in contenders]
    return rows, make_bars(label, contenders, {name: statistics.median(times_ms[name]) for name in times_ms})


@contextmanager
def plain_eager(name: str, batch_size: int) -> Iterator[Call]:
    """Calls of the eager model in a fresh process, one for each call of what this yields."""
    command = [sys.executable, "-m", "benchmarks.resnet50", WORKER_OPTION, name, str(batch_size)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        asking, answering = process.stdin, process.stdout

        def run() -> None:
            print("go", file=asking, flush=True)
            if answering.readline() != "done\n":
                raise RuntimeError("the process of the eager side ended; its last lines are above")

        run()  # here, so that building the model is no part of a timed call
        yield run
        asking.close()  # which ends its loop


def serve_eager(name: str, batch_size: int) -> None:
    """One call of the model for each line that arrives, with what torch and the allocator do by default."""
    model, samples, _ = build_model(name, batch_size)
    for _ in sys.stdin:
        with torch.no_grad():
            call(model, samples)
        print("done", flush=True)


def build_model(name: str, batch_size: int) -> tuple[nn.Module, Any, list[Any]]:
    """Return the model, a batch for it, and further batches to calibrate int8 on."""
    torch.manual_seed(0)
    if name == "bert_base":
        config = transformers.BertConfig()
        model = transformers.BertModel(config).eval()
        batches = [bert_inputs(config.vocab_size, batch_size) for _ in range(NUM_CALIBRATION + 1)]
        return model, batches[0], batches[1:]
    model = zoo.build(name)
    settle(model, name)
    samples = zoo.sample_inputs(name, batch_size)
    batches = [tuple(torch.randn_like(tensor) for tensor in samples) for _ in range(NUM_CALIBRATION)]
    return model.eval(), samples, batches


def settle(model: nn.Module, name: str) -> None:
    """Sizes of values as in a trained model: damped residual branches, measured statistics."""
    for path, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and path.rpartition(".")[2] == "bn3":
            nn.init.constant_(module.weight, RESIDUAL_SCALE)
    zoo.settle_(model, *zoo.sample_inputs(name, 8))


def bert_inputs(vocab_size: int, batch_size: int) -> dict[str, Tensor]:
    """Random tokens without padding, as keywords."""
    tokens = torch.randint(vocab_size, (batch_size, SEQUENCE_LENGTH))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def call(model: Callable[..., Any], samples: Any) -> Any:
    """Return the model called as it takes its samples."""
    return model(**samples) if isinstance(samples, dict) else model(*samples)


def no_grad(run: Call) -> Call:
    """`run` without gradients, as one infers."""

    def inner() -> Any:
        with torch.no_grad():
            return run()

    return inner


def build_ours(
    model: nn.Module, samples: Any, calibration: list[Any], flattened: Flattened, arguments: argparse.Namespace
) -> Iterator[Contender]:
    """Yield the winner of AUTO at each precision."""
    budget_s = 20.0 if arguments.quick else arguments.budget
    for precision in arguments.precision:
        print(f"AUTO at {precision} ...", flush=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            selection = select(
                model,
                samples,
                precision=precision,
                calibration=calibration,
                time_budget_s=budget_s,
                tolerance=None if precision == "auto" else LOOSE,
                remember=False,
            )
        print(selection.explain(), flush=True)
        chosen = selection.model
        answers = tuple(answer for answer in flattened.read_answers(call(chosen, samples)))
        run = lambda chosen=chosen: call(chosen, samples)  # noqa: E731
        yield Contender(f"AUTO {precision}", precision, run, answers, str(selection.decision.chosen))


def list_peers(
    model: nn.Module, samples: Any, calibration: list[Any], flattened: Flattened, precisions: Sequence[str]
) -> list[Callable[[], Contender]]:
    """Each peer at `precisions`, called by its documented usage; one that is missing or fails is a row that says so."""
    makers: list[tuple[str, str, Callable[[], Call]]] = [
        ("torch.compile", "fp32", lambda: torch_compile(model, samples, torch.float32)),
        ("torch.compile freezing", "fp32", lambda: torch_compile(model, samples, torch.float32, freezing=True)),
        ("torch.compile", "bf16", lambda: torch_compile(model, samples, torch.bfloat16)),
        ("torch.compile freezing", "bf16", lambda: torch_compile(model, samples, torch.bfloat16, freezing=True)),
        ("torch.compile PT2E", "int8", lambda: torch_compile_int8(model, samples, calibration)),
        ("onnxruntime", "fp32", lambda: onnxruntime_session(flattened, None, [])),
        ("onnxruntime static", "int8", lambda: onnxruntime_session(flattened, "static", calibration)),
        ("onnxruntime static u8", "int8", lambda: onnxruntime_session(flattened, "static u8", calibration)),
        ("onnxruntime dynamic", "int8", lambda: onnxruntime_session(flattened, "dynamic", [])),
        ("openvino", "fp32", lambda: openvino_model(flattened, "f32", [])),
        ("openvino", "bf16", lambda: openvino_model(flattened, "bf16", [])),
        ("openvino NNCF", "int8", lambda: openvino_model(flattened, "f32", calibration)),
    ]
    return [lambda maker=maker: make_peer(*maker, flattened) for maker in makers if maker[1] in precisions]


def make_peer(name: str, precision: str, make: Callable[[], Call], flattened: Flattened) -> Contender:
    """One peer, built and called once."""
    print(f"{name} {precision} ...", flush=True)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            run = make()
            answers = flattened.read_answers(run())
    except Exception as error:  # noqa: BLE001 - a peer may fail in any way, and the table says how
        return Contender(f"{name} {precision}", precision, None, (), f"{type(error).__name__}: {str(error)[:120]}")
    return Contender(f"{name} {precision}", precision, run, answers)


def torch_compile(model: nn.Module, samples: Any, dtype: torch.dtype, *, freezing: bool = False) -> Call:
    """`torch.compile(model)`, under autocast for bf16, with freezing switched on as its documentation says."""
    import torch._inductor.config as settings

    # A copy of its own: two compilations of one module share what the first one compiled, settings included.
    compiled = torch.compile(copy.deepcopy(model))

    def run() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return call(compiled, samples)

    with settings.patch(freezing=freezing):
        run()
    return run


def torch_compile_int8(model: nn.Module, samples: Any, calibration: list[Any]) -> Call:
    """PT2E with the X86 quantizer and freezing, as torchao's tutorial does it."""
    import torch._inductor.config as settings
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    keywords = samples if isinstance(samples, dict) else {}
    positional = () if isinstance(samples, dict) else samples
    graph = torch.export.export(model, positional, keywords).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(graph, quantizer)
    for batch in calibration:
        call(prepared, batch)
    compiled = torch.compile(convert_pt2e(prepared))
    with settings.patch(freezing=True):
        call(compiled, samples)
    return lambda: call(compiled, samples)


def onnxruntime_session(flattened: Flattened, quantization: str | None, calibration: list[Any]) -> Call:
    """`torch.onnx.export`, the quantizer, `InferenceSession`, `run`."""
    require("onnxruntime")
    import onnx
    import onnxruntime
    from onnxruntime import quantization as quantizing
    from onnxruntime.quantization.shape_inference import quant_pre_process

    names = [f"input_{index}" for index in range(len(flattened.inputs))]
    with tempfile.TemporaryDirectory() as folder:
        path, prepared, quantized = (str(Path(folder) / f"{stem}.onnx") for stem in ("model", "prepared", "int8"))
        program = torch.onnx.export(
            flattened.model, flattened.inputs, dynamo=True, input_names=names, verbose=False, external_data=False
        )
        program.save(path)
        if quantization is not None:
            quant_pre_process(path, prepared, skip_symbolic_shape=True)
            model = onnx.load(prepared)
            model.graph.ClearField("value_info")  # shapes of weights turned since, which quantize_dynamic trips over
            onnx.save(model, prepared)
        if quantization in ("static", "static u8"):
            refuse_too_large(flattened, "ONNX Runtime", share=CALIBRATION_SHARE)  # or the whole table is killed
            feeds = [
                dict(zip(names, (x.numpy() for x in flattened.read_samples(batch)), strict=True))
                for batch in calibration
            ]
            kind = {"activation_type": quantizing.QuantType.QUInt8} if quantization == "static u8" else {}
            quantizing.quantize_static(prepared, quantized, Reader(feeds), per_channel=True, **kind)
        elif quantization == "dynamic":
            quantizing.quantize_dynamic(prepared, quantized, per_channel=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path if quantization is None else quantized, options)
    known = [argument.name for argument in session.get_inputs()]
    feeds_once = {name: x.numpy() for name, x in zip(names, flattened.inputs, strict=True) if name in known}
    return lambda: session.run(None, feeds_once)


class Reader:
    """Calibration data as ONNX Runtime reads it."""

    def __init__(self, feeds: list[dict[str, Any]]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> dict[str, Any] | None:
        """Return the next one, or `None` at the end."""
        return next(self._feeds, None)


def openvino_model(flattened: Flattened, hint: str, calibration: list[Any]) -> Call:
    """`convert_model`, `nncf.quantize`, `compile_model` with the latency hint, and a call."""
    require("openvino")
    with without_telemetry():
        import openvino

        model = openvino.convert_model(torch.export.export(flattened.model, flattened.inputs, strict=False))
        if calibration:
            import nncf

            samples = [tuple(x.numpy() for x in flattened.read_samples(batch)) for batch in calibration]
            feeds = [sample[0] if len(sample) == 1 else dict(enumerate(sample)) for sample in samples]
            model = nncf.quantize(model, nncf.Dataset(feeds))
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = openvino.compile_model(model, "CPU", settings)
    arrays = [x.numpy() for x in flattened.inputs]
    return lambda: list(compiled(arrays).values())


def require(library: str) -> None:
    """Raise for a peer that is not installed; its row then says so."""
    if not has_library(library):
        raise ModuleNotFoundError(f"{library} is not installed")


def make_row(label: str, contender: Contender, times_ms: list[float], flattened: Flattened) -> Row:
    """Return a row with what the answers are worth."""
    name = f"{label}: {contender.name}"
    if contender.run is None:
        return Row(name, None, None, None, contender.note)
    numbers = compare(flattened.outputs, contender.answers, LOOSE)
    agreement = "" if numbers.raw_agreement is None else f", top-1 {numbers.raw_agreement:.2f}"
    note = f"{contender.note + '; ' if contender.note else ''}cosine {numbers.cosine:.4f}{agreement}"
    return Row(name, statistics.median(times_ms), min(times_ms), max(times_ms), note)


def make_bars(label: str, contenders: list[Contender], medians_ms: dict[str, float]) -> list[Bar]:
    """AUTO over the best peer at each precision, and over eager FP32."""
    bars = []
    for precision in PRECISIONS:
        if f"AUTO {precision}" not in medians_ms:
            continue
        peers = [
            medians_ms[contender.name]
            for contender in contenders
            if contender.precision == precision
            and contender.name in medians_ms
            and not contender.name.startswith(("AUTO", "eager"))
        ]
        value = min(peers) / medians_ms[f"AUTO {precision}"] if peers else None
        bars.append(Bar(f"{label}: AUTO / best peer, {precision}", value, GOAL_PEER))
    if "AUTO auto" in medians_ms:
        for eager in (PLAIN_EAGER, EAGER):
            bars.append(Bar(f"{label}: AUTO / {eager}", medians_ms[eager] / medians_ms["AUTO auto"], GOAL_EAGER))
    return bars


if __name__ == "__main__":
    main()
