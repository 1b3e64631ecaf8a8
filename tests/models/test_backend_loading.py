"""`load_model` with a backend: who runs the model, and what is said about it."""

import dataclasses
import warnings

import numpy
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from deepseek import BackendSelector
from deepseek.core.errors import ConfigError, DeepSeekError, UnsafeFileError
from deepseek.models import backend_loading, zoo
from deepseek.models.loading import LoadedModel, load_model, save_model
from tests.models import minilm
from tests.models.tensorflow_files import write_saved_model

QUICK = {"time_budget_s": 1.0}
TINY = {"overrides": {"width": 8, "num_classes": 10}}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Decisions of these tests are kept apart."""
    monkeypatch.setenv("DEEPSEEK_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    save_model(zoo.build("resnet18", **TINY["overrides"]).eval(), tmp_path / "resnet")
    return tmp_path / "resnet"


def without_warnings(*arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_model(*arguments, **options)


def test_a_backend_answers_as_the_plain_model_does_and_explains_itself(folder):
    loaded = load_model(folder, {"backend": BackendSelector.EAGER, "precision": "fp32", "batch_size": 4} | QUICK)
    assert isinstance(loaded, LoadedModel)
    (images,) = loaded.sample_inputs
    assert images.shape == (4, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(images), load_model(folder)(images), rtol=1e-3, atol=1e-3)
    said = loaded.explain()
    assert "sample inputs: (4, 3, 224, 224)" in said
    assert "an artifact of architecture resnet" in said and "eager" in said and "ms" in said
    assert isinstance(loaded.module, zoo.ResNet)


@pytest.mark.parametrize("name", ["eager", "EAGER", BackendSelector.EAGER])
def test_a_backend_is_a_member_or_its_name(folder, name):
    config = {"backend": name, "precision": "fp32", "shapes": {"images": (1, 3, 64, 64)}} | QUICK
    loaded = load_model(folder, config)
    assert loaded.sample_inputs[0].shape == (1, 3, 64, 64)


def test_random_weights_are_said_in_the_explanation_too():
    config = {"backend": "eager", "precision": "fp32", "shapes": {"images": (1, 3, 64, 64)}} | TINY | QUICK
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        loaded = load_model("resnet18", config)
    assert [each.filename for each in seen if "random weights" in str(each.message)] == [__file__]
    assert "resnet18, from the zoo, with random weights" in loaded.explain()


def test_an_artifact_stored_in_bf16_is_measured_in_float_first(folder, tmp_path):
    save_model(load_model(folder), tmp_path / "narrow", precision="bf16")
    config = {"backend": "eager", "precision": "fp32", "shapes": {"images": (1, 3, 64, 64)}} | QUICK
    assert load_model(tmp_path / "narrow", config)(torch.zeros(1, 3, 64, 64)).dtype is torch.float32


def test_every_backend_that_is_tried_is_told(folder):
    events = []
    config = {"backend": "eager", "precision": "fp32", "shapes": {"images": (1, 3, 64, 64)}} | QUICK
    load_model(folder, config, on_event=events.append)
    assert any("eager" in each.candidate for each in events)


@pytest.mark.parametrize("name", ["eagre", "cudda"])
def test_an_unknown_backend_is_answered_with_the_nearest(folder, name):
    with pytest.raises(ConfigError, match=f"unknown backend '{name}'; did you mean"):
        load_model(folder, {"backend": name})


@pytest.mark.parametrize("name", ["tensorrt", "cuda", "rocm", "gaudi", "ascend"])
def test_hardware_that_is_not_here_is_refused_with_what_it_needs(folder, name):
    if name in ("cuda", "tensorrt") and torch.cuda.is_available():
        pytest.skip("it is here")
    with pytest.raises(DeepSeekError, match=f"(?i){name}.*needs"):
        load_model(folder, {"backend": name} | QUICK)


def test_a_packed_model_has_a_layout_of_its_own(folder):
    with pytest.raises(ConfigError, match="leave one of them out"):
        load_model(folder, {"backend": "eager"}, packed=True)
    with pytest.raises(ConfigError, match="packed=True takes decoders only"):
        load_model(folder, packed=True)


# ---- half precision


def test_half_precision_where_nothing_computes_in_it_is_said_and_replaced(folder, monkeypatch):
    monkeypatch.setattr(backend_loading, "has_half_arithmetic", lambda: False)
    config = backend_loading.LoadConfig(precision="fp16", backend="auto")
    with pytest.warns(UserWarning, match="bf16 is used instead"):
        assert backend_loading.choose_half(config).precision == "bf16"
    named = backend_loading.LoadConfig(precision="fp16", backend="eager")
    assert backend_loading.choose_half(named) == named  # a named backend answers for itself
    monkeypatch.setattr(backend_loading, "has_half_arithmetic", lambda: True)
    assert backend_loading.choose_half(config) == config


def test_plain_half_precision_is_loaded_and_warned_about(folder, monkeypatch):
    monkeypatch.setattr("deepseek.models.loading.has_half_arithmetic", lambda: False)
    with pytest.warns(UserWarning, match="can store but not compute in quickly"):
        model = load_model(folder, precision="fp16")
    assert {each.dtype for each in model.parameters()} == {torch.float16}
    monkeypatch.setattr("deepseek.models.loading.has_half_arithmetic", lambda: True)
    load_model(folder, precision="fp16")


def test_int8_without_a_backend_is_explained(folder):
    with pytest.raises(ConfigError, match="only together with a backend"):
        load_model(folder, precision="int8")


def test_a_detector_is_run_without_what_only_training_needs_and_kept_with_it(tmp_path):
    torch.manual_seed(0)
    save_model(zoo.build("yolov7", width_multiple=0.125, image_size=64).eval(), tmp_path / "detector")
    loaded = load_model(tmp_path / "detector", {"backend": "eager", "precision": "fp32"} | QUICK)
    (images,) = loaded.sample_inputs
    norms = [each for each in loaded.module.modules() if isinstance(each, torch.nn.BatchNorm2d)]
    run = [type(each) for each in backend_loading.prepare(loaded.module).modules()]
    assert norms and torch.nn.BatchNorm2d not in run
    with torch.inference_mode():
        torch.testing.assert_close(loaded(images), loaded.module(images), rtol=1e-3, atol=1e-3)


# ---- ONNX


def write_onnx(path, node, shape, weights=None, *, domain="", opset=17):
    graph = helper.make_graph(
        [node],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(each, name) for name, each in (weights or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


@pytest.fixture
def linear_file(tmp_path):
    weight = numpy.random.default_rng(0).standard_normal((16, 8)).astype("f")
    node = helper.make_node("Gemm", ["x", "w"], ["y"])
    return write_onnx(tmp_path / "linear.onnx", node, ["n", 16], {"w": weight}), torch.from_numpy(weight)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_runtime_takes_an_onnx_file_as_it_is(linear_file, backend):
    path, weight = linear_file
    loaded = load_model(path, {"backend": backend, "batch_size": 3})
    x = torch.randn(5, 16)
    torch.testing.assert_close(loaded(x), x @ weight, rtol=1e-4, atol=1e-4)
    assert loaded.sample_inputs[0].shape == (3, 16)
    assert f"as it is, by {backend}" in loaded.explain() and loaded.module is None


def test_a_file_in_pytorch_goes_to_the_backends_of_modules(linear_file):
    path, weight = linear_file
    loaded = load_model(path, {"backend": "eager", "precision": "fp32", "batch_size": 2} | QUICK)
    x = loaded.sample_inputs[0]
    torch.testing.assert_close(loaded(x), x @ weight, rtol=1e-3, atol=1e-3)
    assert "converted to PyTorch" in loaded.explain()


def test_auto_compares_the_file_as_it_is_with_the_converted_one(linear_file):
    path, weight = linear_file
    loaded = without_warnings(path, {"backend": "auto", "batch_size": 2, "time_budget_s": 0.5})
    x = loaded.sample_inputs[0]
    torch.testing.assert_close(loaded(x), x @ weight, rtol=0.1, atol=0.3)
    said = loaded.explain()
    assert all(f"{name} file as written" in said for name in ("onnxruntime", "openvino"))
    assert "eager plain fp32" in said and "openvino latency fp32" in said  # the converted model, beside the file


def test_the_choice_of_a_file_is_remembered_and_forgotten_with_the_file(linear_file, monkeypatch):
    path, weight = linear_file
    events = []
    config = {"backend": "auto", "batch_size": 2, "time_budget_s": 0.5}
    without_warnings(path, config)
    without_warnings(path, config, on_event=events.append)
    assert [each.is_remembered for each in events] == [True]
    model = onnx.load(path)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(2 * weight.numpy(), "w"))
    onnx.save(model, path)
    doubled = without_warnings(path, config, on_event=events.append)
    assert [each.is_remembered for each in events if hasattr(each, "is_remembered")] == [True, False]
    x = torch.ones(2, 16)
    torch.testing.assert_close(doubled(x), 2 * x @ weight, rtol=0.1, atol=0.3)


def test_a_runtime_that_answers_wrongly_to_the_file_is_refused_with_its_error(linear_file, monkeypatch):
    path, _ = linear_file
    right = backend_loading.RUNTIMES["onnxruntime"]

    def wrong(given, precision):
        program = right(given, precision)
        return dataclasses.replace(program, run=lambda tensors: [1.2 * each for each in program.run(tensors)])

    monkeypatch.setitem(backend_loading.RUNTIMES, "onnxruntime", wrong)
    loaded = without_warnings(path, {"backend": "auto", "batch_size": 2, "time_budget_s": 0.5})
    assert "refused: onnxruntime file as written: relative error 0.2 is above 0.05" in loaded.explain()
    assert "onnxruntime file" not in loaded.choice


def test_a_file_that_cannot_be_converted_runs_as_it_is_with_a_warning(tmp_path):
    path = write_onnx(tmp_path / "det.onnx", helper.make_node("Det", ["x"], ["y"]), [2, 3, 3])
    with pytest.raises(ConfigError, match="Det of opset 17"):
        load_model(path)
    with pytest.raises(ConfigError, match="Det of opset 17"):
        load_model(path, {"backend": "eager"} | QUICK)
    with pytest.warns(UserWarning, match="Det of opset 17 .* only runtimes that take the file"):
        loaded = load_model(path, {"backend": "auto"})
    x = torch.randn(2, 3, 3)
    torch.testing.assert_close(loaded(x), torch.linalg.det(x), rtol=1e-4, atol=1e-4)
    assert loaded.module is None and "onnxruntime file as written" in loaded.explain()
    assert "refused: openvino file as written: OpenVINO cannot run" in loaded.explain()
    assert "times onnxruntime, which is the reference" in loaded.explain()  # and not eager FP32, which never ran


@pytest.mark.parametrize("opset", [9, 10])
def test_a_file_of_an_opset_that_is_not_converted_runs_as_it_is(tmp_path, opset):
    path = write_onnx(tmp_path / "relu.onnx", helper.make_node("Relu", ["x"], ["y"]), [2, 3], opset=opset)
    with pytest.raises(ConfigError, match=f"opset {opset} and 11 to 28 are converted .*backend='onnxruntime'"):
        load_model(path)
    loaded = load_model(path, {"backend": "onnxruntime"})
    torch.testing.assert_close(loaded(torch.tensor([[-1.0, 0, 1]] * 2)), torch.tensor([[0.0, 0, 1]] * 2))
    with pytest.warns(UserWarning, match=f"opset {opset} .*only runtimes"):
        assert load_model(path, {"backend": "auto"}).module is None


def test_a_file_that_no_runtime_takes_is_explained(tmp_path):
    node = helper.make_node("Gelu2", ["x"], ["y"], domain="com.example")
    path = write_onnx(tmp_path / "gelu.onnx", node, [2], domain="com.example")
    with pytest.raises(DeepSeekError, match="ONNX Runtime cannot run"):
        load_model(path, {"backend": "onnxruntime"})
    with pytest.raises(DeepSeekError, match="Gelu2"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_model(path, {"backend": "auto"})


def test_a_runtime_never_sees_a_file_whose_weights_lie_outside(tmp_path):
    path = write_onnx(
        tmp_path / "m.onnx", helper.make_node("Add", ["x", "w"], ["y"]), [4], {"w": numpy.ones(4, dtype="f")}
    )
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../w")
    path.write_bytes(model.SerializeToString())
    for config in ({}, {"backend": "onnxruntime"}, {"backend": "openvino"}, {"backend": "auto"}):
        with pytest.raises(UnsafeFileError, match="outside its own folder"):
            load_model(path, config)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_real_int8_weights_run_as_they_are(backend):
    loaded = load_model(minilm.find_int8_onnx(), {"backend": backend, "batch_size": 2, "sequence_length": 12})
    tokens_BT, mask_BT, _ = loaded.sample_inputs
    assert tokens_BT.shape == (2, 12) and bool(mask_BT.all())
    with torch.inference_mode():
        torch.testing.assert_close(
            loaded(*loaded.sample_inputs),
            load_model(minilm.find_int8_onnx())(*loaded.sample_inputs),
            rtol=1e-3,
            atol=1e-3,
        )


@pytest.mark.parametrize("backend", [None, "auto", "eager", "onnxruntime", "openvino"])
@pytest.mark.parametrize("operator", ["Sub", "com.microsoft.Fused"])
def test_a_file_is_called_with_arrays_and_by_its_own_names_on_every_backend(tmp_path, backend, operator):
    domain, _, kind = operator.rpartition(".")
    if domain and backend in (None, "eager", "openvino"):
        pytest.skip("only ONNX Runtime has this operator")
    if domain:
        node = helper.make_node("FusedMatMul", ["a:0", "class"], ["y"], domain=domain)
    else:
        node = helper.make_node(kind, ["a:0", "class"], ["y"])
    values = [
        helper.make_tensor_value_info("a:0", TensorProto.FLOAT, ["n", 2]),
        helper.make_tensor_value_info("class", TensorProto.FLOAT, [2, 2]),
    ]
    graph = helper.make_graph([node], "g", values, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    opsets = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "m.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it cannot be converted
        config = {"backend": backend, "batch_size": 2, "time_budget_s": 3} if backend else {}
        loaded = load_model(tmp_path / "m.onnx", config)
    first, second = numpy.array([[3.0, 5.0], [1.0, 2.0]]), numpy.array([[1.0, 0.5], [0.0, 2.0]], "f4")
    expected = torch.from_numpy(first @ second if domain else first - second).float()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for answer in (
            loaded(first, second),
            loaded(torch.from_numpy(first), second),
            loaded(**{"class": second, "a:0": first}),
        ):
            torch.testing.assert_close(answer, expected, rtol=1e-2, atol=1e-2)


# ---- TensorFlow


def test_a_tensorflow_model_has_one_runtime(tmp_path):
    weight = numpy.eye(4, 3, dtype="f")
    path = write_saved_model(tmp_path / "saved", weight, numpy.zeros(3, dtype="f"))
    for backend in ("auto", "openvino"):
        loaded = load_model(path, {"backend": backend, "batch_size": 2})
        assert loaded.sample_inputs[0].shape == (2, 4)
        torch.testing.assert_close(loaded(torch.ones(1, 4)), torch.ones(1, 3))
        assert "by openvino in fp32" in loaded.explain()
    with pytest.raises(ConfigError, match="run by openvino only and backend 'onnxruntime' was asked for"):
        load_model(path, {"backend": "onnxruntime"})


def test_a_precision_that_a_runtime_cannot_give_is_refused(tmp_path):
    path = write_saved_model(tmp_path / "saved", numpy.eye(4, 3, dtype="f"), numpy.zeros(3, dtype="f"))
    with pytest.raises(ConfigError, match="fp32, bf16 or fp16 and int8 was asked for"):
        load_model(path, {"precision": "int8"})
