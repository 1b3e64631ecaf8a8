"""Every backend against FP32 eager, and against its own promise: the precision it says is the one it runs in."""

from __future__ import annotations

import copy
import gc
import logging
import shutil
import sys
import warnings
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

import deepseek
from deepseek.compiler.runtimes.backends import BACKENDS, BackendError, calibration_memory, dynamo
from deepseek.compiler.runtimes.backends import inductor as inductor_backend
from deepseek.compiler.runtimes.backends import onnxruntime as onnxruntime_backend
from deepseek.compiler.runtimes.backends import openvino as openvino_backend
from deepseek.compiler.runtimes.backends.accelerators import on_device
from deepseek.compiler.runtimes.backends.eager import DynamicInt8Linear, lacks_fp16, listen_to_onednn
from deepseek.compiler.runtimes.backends.flat_signature import flatten_model, split_samples, trace_outputs
from deepseek.compiler.runtimes.backends.interface import Built, Job, Missing, Variant, build, quiet
from deepseek.compiler.runtimes.fallbacks import read_onednn_kernels
from deepseek.compiler.runtimes.selection_policy import PRECISIONS, BackendSelector, Traits
from deepseek.core.errors import ConfigError
from tests.compiler.models import Tagger, small_mlp, small_resnet

# What each precision may cost on these models: rounding of 24, 8 and 8 bits through six layers.
BOUNDS = {"fp32": 1e-5, "bf16": 0.03, "fp16": 0.01, "int8": 0.08}
HERE = [name for name in ("eager", "inductor", "onnxruntime", "openvino") if BACKENDS[name].is_available()]
ON_PICTURES = [
    (name, variant.name, variant.precision)
    for name in HERE
    for variant in BACKENDS[name].variants
    if "cpp" not in variant.name and "tuned" not in variant.name and variant.name not in ("dynamic", "session")
]


def relative_error(answer, reference):
    answer, reference = answer.detach().double(), reference.detach().double()
    return float((answer - reference).norm() / reference.norm())


@contextmanager
def threads(num_threads):
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pictures():
    return small_resnet()


@pytest.fixture(scope="module")
def job(pictures):
    """One job for all variants, which share its exports and quantized graphs as in a selection."""
    calibration = [(torch.randn(4, 3, 16, 16),) for _ in range(4)]
    return Job(flatten_model(pictures.model, pictures.samples), calibration=[*calibration, (pictures.samples,)])


# ---- the table


def test_every_selector_but_auto_has_a_backend_of_its_name():
    assert set(BACKENDS) == {str(each) for each in BackendSelector} - {"auto"}
    assert all(backend.name == name for name, backend in BACKENDS.items())


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_describes_itself_and_covers_every_precision_or_says_why_not(name):
    backend = BACKENDS[name]
    described = backend.describe()
    assert described["summary"] and backend.variants
    assert (described["missing"] is None) == backend.is_available()
    covered = {each.precision for each in backend.variants} | set(backend.unsupported)
    assert covered == set(PRECISIONS)
    assert len({(each.name, each.precision) for each in backend.variants}) == len(backend.variants)
    names = {(each.name, each.precision) for each in backend.variants}
    assert all((each.refines, each.precision) in names for each in backend.variants if each.refines)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA")
@pytest.mark.parametrize(
    ("name", "needs"), [("cuda", "CUDA build"), ("tensorrt", "CUDA build"), ("rocm", "ROCm build")]
)
def test_an_absent_accelerator_says_what_it_needs(name, needs):
    missing = BACKENDS[name].find_missing()
    assert isinstance(missing, Missing) and needs in str(missing) and torch.__version__ in str(missing)
    with pytest.raises(BackendError, match=needs):
        BACKENDS[name].compile(nn.Linear(2, 2).eval(), torch.ones(1, 2))


@pytest.mark.parametrize(("name", "library"), [("gaudi", "habana_frameworks"), ("ascend", "torch_npu")])
def test_an_absent_bridge_is_named(name, library):
    assert library in str(BACKENDS[name].find_missing())


def test_a_missing_library_is_an_instruction(monkeypatch):
    monkeypatch.setattr(openvino_backend, "has_library", lambda name: False)
    with pytest.raises(BackendError, match=r"pip install 'deepseek-engine\[compile\]'"):
        BACKENDS["openvino"].compile(nn.Linear(2, 2).eval(), torch.ones(1, 2))


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "C++ compiler" in str(BACKENDS["inductor"].find_missing())


def test_an_unknown_precision_or_variant_is_answered_with_what_there_is():
    with pytest.raises(ConfigError, match=r"widens fp16"):
        BACKENDS["onnxruntime"].find_variant("fp16")
    with pytest.raises(ConfigError, match=r"it has .*static \(int8\)"):
        BACKENDS["onnxruntime"].find_variant("int8", "nonesuch")


# ---- numbers


@pytest.mark.parametrize(("name", "variant", "precision"), ON_PICTURES, ids=lambda value: str(value))
def test_a_variant_answers_like_eager_and_is_what_it_says(name, variant, precision, pictures, job):
    chosen = BACKENDS[name].find_variant(precision, variant)
    if chosen.find_obstacle(job.traits) is not None:
        pytest.skip(chosen.find_obstacle(job.traits))
    with threads(2 if variant == "streams" else 1):
        built = build(chosen, job)
    assert not any(each.is_serious for each in built.findings)
    reference = pictures.model(pictures.samples).detach()
    (answer,) = built.run(pictures.samples)
    assert answer.dtype == torch.float32
    assert relative_error(answer, reference) < BOUNDS[precision]
    if precision != "fp32":
        assert relative_error(answer, reference) > 0  # the same numbers would mean that nothing was rounded
    kept = answer.clone()
    again = torch.randn_like(pictures.samples)
    (other,) = built.run(again)
    assert relative_error(other, pictures.model(again).detach()) < 2 * BOUNDS[precision]
    assert torch.equal(answer, kept)


@pytest.mark.parametrize("name", [name for name in ("eager", "onnxruntime") if name in HERE])
def test_dynamic_int8_answers_like_eager(name):
    mlp = small_mlp()
    compiled = BACKENDS[name].compile(mlp.model, mlp.samples, "int8", variant="dynamic")
    error = relative_error(compiled(mlp.samples), mlp.model(mlp.samples).detach())
    assert 0 < error < 0.03
    assert not any(each.is_serious for each in compiled.findings)


def test_int8_by_fbgemm_is_the_product_of_rounded_numbers():
    torch.manual_seed(0)
    linear, x = nn.Linear(32, 8), torch.randn(4, 32)
    scales = linear.weight.abs().amax(1, keepdim=True) / 127
    weight = (linear.weight / scales).round() * scales
    error = relative_error(DynamicInt8Linear(linear)(x), (x @ weight.T + linear.bias).detach())
    # Only the inputs' rounding is left: a step of 1/255 of their range, uniformly distributed.
    step = float(x.max() - x.min()) / 255
    assert error < 3 * step / 12**0.5 / float(x.std())


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bf16 instructions here")
def test_the_kernels_of_onednn_are_heard_and_the_output_is_as_before(capfd):
    linear, x = nn.Linear(64, 64).bfloat16(), torch.randn(8, 64).bfloat16()
    kernels = read_onednn_kernels(listen_to_onednn(lambda: linear(x)))
    assert any("bf16" in name for name in kernels)
    print("and then", flush=True)
    assert capfd.readouterr().out == "and then\n"


def test_the_model_is_left_as_it_was(pictures, job):
    before = copy.deepcopy(pictures.model.state_dict())
    build(BACKENDS["eager"].find_variant("bf16", "cast"), job).run(pictures.samples)
    after = pictures.model.state_dict()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert pictures.model.stem[0].weight.is_contiguous()


def test_streams_answer_each_row_in_its_place(pictures, job):
    built = build(BACKENDS["openvino"].find_variant("fp32", "streams"), job)
    (answer,) = built.run(pictures.samples)
    assert torch.allclose(answer, pictures.model(pictures.samples), atol=1e-5)
    assert "4 parts of 1 rows" in " ".join(built.notes)


def test_a_batch_that_has_no_equal_parts_is_refused():
    flattened = flatten_model(nn.Linear(3, 2).eval(), torch.randn(7, 3))
    assert len(openvino_backend.split_batch(Job(flattened), 8)) == 7
    with pytest.raises(BackendError, match="no 2 or fewer equal parts"):
        openvino_backend.split_batch(Job(flattened), 2)


# ---- settings of the process


def test_inductor_leaves_its_settings_as_they_were(job):
    import torch._inductor.config as settings

    before = settings.save_config_portable()
    build(BACKENDS["inductor"].find_variant("int8", "static"), job)
    assert settings.save_config_portable() == before
    assert settings.pre_grad_custom_pass is None


def test_a_reset_of_dynamo_changes_nothing(job, pictures):
    built = build(BACKENDS["inductor"].find_variant("int8", "static"), job)
    before = built.run(pictures.samples)[0].clone()
    torch._dynamo.reset()
    assert torch.equal(built.run(pictures.samples)[0], before)


def test_without_freezing_the_int8_fallback_is_found(job, pictures):
    """Inductor without freezing computes int8 graphs in FP32, silently; the counters say so."""
    variant = Variant("unfrozen", "int8", "", inductor_backend.compile_static_int8({}, glue=torch.float32))
    built = build(variant, job)
    assert relative_error(built.run(pictures.samples)[0], pictures.model(pictures.samples).detach()) < BOUNDS["int8"]
    assert [each.is_serious for each in built.findings] == [True]


def test_activations_are_inlined_and_what_has_weights_stays():
    relu, linear = nn.ReLU(), nn.Linear(2, 2)
    model = inductor_backend.inline_activations_(nn.Sequential(relu, linear, nn.Sequential(relu, nn.PReLU())))
    assert [type(each).__name__ for each in (model[0], model[2][0])] == ["Inlined", "Inlined"]
    assert model[1] is linear and isinstance(model[2][1], nn.PReLU)
    assert model[0](torch.tensor([-1.0, 1.0])).tolist() == [0.0, 1.0]


def test_openvino_reports_nothing_and_leaves_no_trace():
    with openvino_backend.without_telemetry(), pytest.raises(ImportError):
        import openvino_telemetry  # noqa: F401
    assert sys.modules.get("openvino_telemetry", "absent") == "absent"


class Attending(nn.Module):
    """Causal attention of a batch with itself."""

    def forward(self, x_BNTH):
        return nn.functional.scaled_dot_product_attention(x_BNTH, x_BNTH, x_BNTH, is_causal=True)


@pytest.mark.skipif("openvino" not in HERE, reason="OpenVINO is not installed")
def test_openvino_gets_attention_whole_and_in_parts_where_that_fails(monkeypatch):
    samples = torch.randn(2, 2, 8, 4)
    whole = Job(flatten_model(Attending().eval(), samples))
    model, notes = openvino_backend.convert(whole)
    names = {each.get_type_name() for each in model.get_ops()}
    assert notes == ()
    assert "ScaledDotProductAttention" in names

    real, programs = openvino_backend._convert_program, []

    def fail_once(library, program):
        programs.append(program)
        if len(programs) == 1:
            raise RuntimeError("no such operator")
        return real(library, program)

    monkeypatch.setattr(openvino_backend, "_convert_program", fail_once)
    parts = Job(flatten_model(Attending().eval(), samples))
    model, _ = parts.once("openvino", lambda: openvino_backend.convert(parts))
    names = {each.get_type_name() for each in model.get_ops()}
    assert "ScaledDotProductAttention" not in names and "MatMul" in names
    for each, said in ((whole, ""), (parts, "no such operator")):
        built = build(BACKENDS["openvino"].find_variant("fp32", "latency"), each)
        (answer,) = built.run(samples)
        torch.testing.assert_close(answer, Attending()(samples))
        assert said in " ".join(built.notes) and bool(said) == bool(built.notes)


def test_openvino_that_ignored_a_hint_is_found(job):
    library = openvino_backend.require_openvino()
    model, _ = job.once("openvino", lambda: openvino_backend.convert(job))
    compiled = library.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    findings = openvino_backend._judge(compiled, "bf16")
    assert [each.is_serious for each in findings] == [True]


def test_onnxruntime_says_which_kernels_it_lacks():
    onnxruntime_backend.require_kernels("FLOAT")
    with pytest.raises(BackendError, match="no kernels"):
        onnxruntime_backend.require_kernels("BFLOAT16")


def test_the_exported_file_goes_with_the_job():
    mlp = small_mlp()
    job = Job(flatten_model(mlp.model, mlp.samples))
    path = onnxruntime_backend.export_onnx(job)
    assert path.is_file()
    del job
    gc.collect()
    assert not path.parent.exists()


def test_activations_are_counted_without_computing_them():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Unflatten(1, (2, 8)), nn.Flatten(), nn.Linear(16, 4)).eval()
    flattened = flatten_model(model, torch.randn(5, 8))
    assert calibration_memory.count_activation_bytes(flattened) == 4 * 5 * (16 + 16 + 4)
    many = replace(flattened, inputs=(torch.empty(1).expand(10**12, 8),))  # no machine holds what follows from these
    assert calibration_memory.count_activation_bytes(many) == 4 * 10**12 * (16 + 16 + 4)


@pytest.mark.parametrize("name", [each for each in ("onnxruntime", "openvino") if each in HERE])
def test_calibrating_what_memory_does_not_hold_is_refused_before_it_kills_the_process(name, pictures, monkeypatch):
    fresh = Job(flatten_model(pictures.model, pictures.samples))
    num_bytes = calibration_memory.count_activation_bytes(fresh.flattened)
    monkeypatch.setattr(calibration_memory, "measure_free_bytes", lambda: num_bytes // 3)
    variant = BACKENDS[name].find_variant("int8", "static" if name == "onnxruntime" else "latency")
    with pytest.raises(BackendError, match="GB are free; give samples of fewer rows"):
        build(variant, fresh)


def test_the_log_is_as_loud_as_before():
    before = logging.root.manager.disable
    with quiet():
        assert logging.root.manager.disable >= logging.WARNING
    assert logging.root.manager.disable == before


def test_fp16_is_tried_only_where_the_processor_has_it():
    is_there = torch.ops.mkldnn._is_mkldnn_fp16_supported()
    assert (lacks_fp16(Traits()) is None) == is_there


def test_on_a_device_inputs_are_cast_and_answers_come_home():
    seen = []
    flattened = flatten_model(nn.Linear(4, 2).eval(), torch.randn(2, 4))
    run = on_device(lambda x: seen.append((x.dtype, x.device.type)) or x[:, :2], "cpu", torch.bfloat16, Job(flattened))
    (answer,) = run(torch.randn(2, 4))
    assert seen == [(torch.bfloat16, "cpu")] and answer.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("variant", ["graph", "eager"])
def test_a_gpu_answers_like_eager(variant, pictures):
    compiled = BACKENDS["cuda"].compile(pictures.model, pictures.samples, "fp32", variant=variant)
    assert relative_error(compiled(pictures.samples), pictures.model(pictures.samples)) < 2e-3  # TF32 at most


# ---- calling conventions


def tagger_inputs(is_scaled=False):
    return {"tokens": torch.arange(6).reshape(2, 3), "mask": torch.ones(2, 3), "is_scaled": is_scaled}


@pytest.mark.parametrize("name", HERE)
def test_keywords_flags_and_nested_answers_come_through(name):
    torch.manual_seed(0)
    model = Tagger().eval()
    compiled = BACKENDS[name].compile(model, tagger_inputs(is_scaled=True))
    answer, reference = compiled(**tagger_inputs(is_scaled=True)), model(**tagger_inputs(is_scaled=True))
    assert torch.allclose(answer["scores"], reference["scores"], atol=1e-5)
    assert answer["kind"] == "tags" and torch.equal(answer["hidden"][1], reference["hidden"][1])
    assert answer["hidden"][1].dtype == torch.int64


class Repeating(nn.Module):
    """Large answers: computed, computed and returned twice, and handed through."""

    def forward(self, x):
        y = x * 2
        return y, y, x, x + 1


@pytest.mark.parametrize("name", HERE)
def test_answers_that_are_inputs_or_repeat_are_right_and_their_own(name):
    x = torch.randn(1024, 512)
    compiled = BACKENDS[name].compile(Repeating().eval(), x)
    first = compiled(x)
    second = compiled(-x)
    for sign, answers in ((1, first), (-1, second)):
        for answer, expected in zip(answers, Repeating()(sign * x), strict=True):
            assert torch.equal(answer, expected)


def test_only_what_is_computed_is_asked_of_a_runtime():
    x, y = torch.ones(1), torch.ones(1)
    assert trace_outputs([y, x, y], [x]) == ((0,), (("answer", 0), ("input", 0), ("answer", 0)))
    assert trace_outputs([x], [x]) == ((0,), (("answer", 0),))


@pytest.mark.parametrize("name", HERE)
def test_a_model_that_computes_nothing_answers_its_input(name):
    x = torch.randn(1024, 512)
    compiled = BACKENDS[name].compile(nn.Identity().eval(), x)
    assert torch.equal(compiled(x), x) and torch.equal(compiled(-x), -x)


def test_a_call_unlike_the_samples_is_refused():
    compiled = BACKENDS["eager"].compile(Tagger().eval(), tagger_inputs())
    with pytest.raises(ConfigError, match="is True and was False"):
        compiled(**tagger_inputs(is_scaled=True))
    with pytest.raises(ConfigError, match="call it like them"):
        compiled(torch.arange(6).reshape(2, 3))
    with pytest.raises(ConfigError, match=r"float32\[2, 4\]"):
        BACKENDS["eager"].compile(nn.Linear(4, 2).eval(), torch.ones(1, 4))(torch.ones(2, 4))


@pytest.mark.parametrize(
    ("samples", "said"),
    [(None, "missing"), (7, "are 7"), ("text", "'text'"), ((), "no tensor"), ({"x": 3}, "no tensor")],
)
def test_samples_that_are_none_are_refused(samples, said):
    with pytest.raises(ConfigError, match=said):
        flatten_model(nn.Linear(4, 2).eval(), samples)


def test_a_model_that_is_none_or_trains_is_refused():
    with pytest.raises(ConfigError, match=r"give a torch\.nn\.Module"):
        flatten_model(lambda x: x, torch.ones(1))
    with pytest.raises(ConfigError, match=r"model\.eval"):
        flatten_model(nn.Sequential(nn.Linear(4, 2).eval(), nn.Dropout()), torch.ones(1, 4))


def test_samples_are_positional_or_named():
    assert split_samples((1, 2)) == ((1, 2), {})
    assert split_samples({"a": 1}) == ((), {"a": 1})


# ---- torch.compile


@pytest.mark.parametrize("name", [each for each in ("onnxruntime", "openvino") if each in HERE])
def test_torch_compile_runs_on_our_backends(name, pictures):
    torch._dynamo.reset()
    fast = torch.compile(pictures.model, backend=getattr(dynamo, name), dynamic=False)
    with torch.no_grad():
        answer = fast(pictures.samples)
        assert torch.allclose(answer, pictures.model(pictures.samples), atol=1e-5)
        assert torch.allclose(fast(pictures.samples * 2), pictures.model(pictures.samples * 2), atol=1e-5)


@pytest.mark.parametrize("name", [each for each in ("onnxruntime", "openvino") if each in HERE])
def test_jit_knows_our_backends_by_name(name, pictures):
    fast = deepseek.jit(pictures.model, backend=name, dynamic=False)
    with torch.no_grad():
        for samples in (pictures.samples, pictures.samples * 2):
            assert torch.allclose(fast(samples), pictures.model(samples), atol=1e-5)
    assert dynamo.find_compiler("inductor") == "inductor"


def test_gradients_are_refused_where_there_are_none(pictures):
    torch._dynamo.reset()
    fast = torch.compile(pictures.model, backend=dynamo.onnxruntime, dynamic=False)
    with pytest.raises(Exception, match="no gradients"):
        fast(pictures.samples)


def test_tvm_answers_like_eager_and_says_what_tuning_costs():
    if not BACKENDS["tvm"].is_available():
        pytest.skip("apache-tvm is not installed")
    mlp = small_mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        compiled = BACKENDS["tvm"].compile(mlp.model, mlp.samples)
        assert torch.allclose(compiled(mlp.samples), mlp.model(mlp.samples), atol=1e-5)
        with pytest.raises(BackendError, match=r"takes about \d+ minutes"):
            BACKENDS["tvm"].compile(mlp.model, mlp.samples, variant="tuned")
        torch._dynamo.reset()
        fast = torch.compile(mlp.model, backend=dynamo.tvm, dynamic=False)
        with torch.no_grad():
            assert torch.allclose(fast(mlp.samples), mlp.model(mlp.samples), atol=1e-5)


# ---- failures


def test_a_model_that_is_no_graph_says_so():
    class Branching(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(BackendError, match="not one graph"):
        BACKENDS["openvino"].compile(Branching().eval(), torch.ones(2))


def test_a_runtime_that_fails_is_one_sentence():
    def fail(job):
        raise RuntimeError("first line\nsecond line")

    with pytest.raises(BackendError, match=r"^odd in fp32: RuntimeError: first line$"):
        build(Variant("odd", "fp32", "", fail), Job(flatten_model(nn.Linear(2, 2).eval(), torch.ones(1, 2))))


def test_what_failed_once_is_not_tried_again():
    calls = []

    def make():
        calls.append(1)
        raise BackendError("no")

    job = Job(flatten_model(nn.Linear(2, 2).eval(), torch.ones(1, 2)))
    for _ in range(2):
        with pytest.raises(BackendError, match="no"):
            job.once("key", make)
    assert calls == [1]


def test_notes_and_findings_are_part_of_the_description():
    compiled = BACKENDS["eager"].compile(small_mlp().model, small_mlp().samples, "int8")
    assert compiled.describe()["notes"] == ["2 linear layers in int8"]
    assert Built(lambda: ()).findings == ()
