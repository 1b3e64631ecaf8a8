"""Model files run as they are: what goes in and comes out, against formulas, and what is refused when it is opened."""

import numpy
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from deepseek.core.errors import ConfigError, CorruptArtifactError, DeepSeekError, UnsafeFileError
from deepseek.models.loading import load_model
from deepseek.models.programs import find_tensorflow, run_onnx, run_tensorflow
from deepseek.onnx.files import UnsupportedOperatorError
from tests.models.tensorflow_files import write_saved_model

RUNTIMES = ["onnxruntime", "openvino"]
CLASSES = ["cat", "dog", "owl"]


def tensor_info(name, kind, shape):
    return helper.make_tensor_value_info(name, kind, shape)


X = tensor_info("x", TensorProto.FLOAT, ["n", 3])


def write_file(path, nodes, inputs, outputs, weights=None):
    stored = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(nodes, "test", inputs, outputs, stored)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def write_cast(path, source, target):
    node = helper.make_node("Cast", ["x"], ["y"], to=target)
    return write_file(path, [node], [tensor_info("x", source, ["n", 3])], [tensor_info("y", target, ["n", 3])])


def write_subtraction(path):
    """a - 2 b, in which the order of the inputs shows."""
    nodes = [helper.make_node("Mul", ["b", "two"], ["c"]), helper.make_node("Sub", ["a", "c"], ["y"])]
    inputs = [tensor_info(name, TensorProto.FLOAT, ["n", 3]) for name in "ab"]
    two = {"two": numpy.array(2, dtype="f")}
    return write_file(path, nodes, inputs, [tensor_info("y", TensorProto.FLOAT, ["n", 3])], two)


def write_classifier(path, weight, bias, *, labels, is_zipped):
    """A multinomial classifier as skl2onnx writes it: the label, and probabilities as a table or as one map a row."""
    is_text = isinstance(labels[0], str)
    probabilities = "table" if is_zipped else "probabilities"
    nodes = [
        helper.make_node(
            "LinearClassifier",
            ["x"],
            ["label", probabilities],
            domain="ai.onnx.ml",
            coefficients=weight.flatten().tolist(),
            intercepts=bias.tolist(),
            post_transform="SOFTMAX",
            **{"classlabels_strings" if is_text else "classlabels_ints": labels},
        )
    ]
    shown = tensor_info("probabilities", TensorProto.FLOAT, ["n", 3])
    if is_zipped:
        names = {"classlabels_strings" if is_text else "classlabels_int64s": labels}
        nodes.append(helper.make_node("ZipMap", ["table"], ["probabilities"], domain="ai.onnx.ml", **names))
        key = TensorProto.STRING if is_text else TensorProto.INT64
        value = helper.make_tensor_type_proto(TensorProto.FLOAT, [])
        rows = helper.make_sequence_type_proto(helper.make_map_type_proto(key, value))
        shown = helper.make_value_info("probabilities", rows)
    kind = TensorProto.STRING if is_text else TensorProto.INT64
    return write_file(path, nodes, [X], [tensor_info("label", kind, ["n"]), shown])


@pytest.fixture
def linear():
    generator = numpy.random.default_rng(0)
    return generator.standard_normal((3, 3)).astype("f"), generator.standard_normal(3).astype("f")


# ---- what is computed


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_inputs_are_taken_in_order_or_by_name_and_once_each(tmp_path, runtime):
    program = run_onnx(write_subtraction(tmp_path / "sub.onnx"), runtime)
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    for answer in (program(a, b), program(a, b=b), program(b=b, a=a), program(a.numpy(), b.numpy())):
        torch.testing.assert_close(answer, a - 2 * b)
    assert [(spec.name, spec.shape) for spec in program.inputs] == [("a", (None, 3)), ("b", (None, 3))]
    assert "a (any, 3), b (any, 3)" in program.explain()
    for inputs, named in (((a,), {}), ((a, b, a), {}), ((a, b), {"b": b}), ((a,), {"a": a})):
        with pytest.raises(ConfigError, match=f"takes a, b and {len(inputs) + len(named)} were given; give each once"):
            program(*inputs, **named)
    with pytest.raises(ConfigError, match="unknown input 'c'"):
        program(a, c=b)


def test_a_classifier_with_integer_labels_gives_labels_and_probabilities(tmp_path, linear):
    weight, bias = linear
    program = run_onnx(write_classifier(tmp_path / "c.onnx", *linear, labels=[7, 5, 3], is_zipped=False), "onnxruntime")
    x = torch.randn(6, 3)
    label, probabilities = program(x)
    expected = torch.softmax(x.double() @ torch.from_numpy(weight).T.double() + torch.from_numpy(bias), -1)
    torch.testing.assert_close(probabilities.double(), expected, rtol=1e-5, atol=1e-6)
    assert label.tolist() == [[7, 5, 3][index] for index in expected.argmax(-1)]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (TensorProto.FLOAT16, torch.float16),
        (TensorProto.DOUBLE, torch.float64),
        (TensorProto.INT8, torch.int8),
        (TensorProto.UINT8, torch.uint8),
        (TensorProto.UINT16, torch.uint16),
        (TensorProto.UINT32, torch.uint32),
        (TensorProto.UINT64, torch.uint64),
        (TensorProto.INT64, torch.int64),
        (TensorProto.BFLOAT16, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_type_of_numbers_goes_in_and_comes_out(tmp_path, runtime, kind, dtype):
    values = torch.tensor([[1.0, 2.0, 100.0]])
    into = write_cast(tmp_path / "into.onnx", kind, TensorProto.FLOAT)
    out_of = write_cast(tmp_path / "out.onnx", TensorProto.FLOAT, kind)
    if (runtime, dtype) == ("onnxruntime", torch.bfloat16):
        for path, name in ((into, "x"), (out_of, "y")):
            with pytest.raises(UnsupportedOperatorError, match=f"'{name}' in bfloat16, .*backend='openvino'"):
                run_onnx(path, runtime)
        return
    program = run_onnx(into, runtime)
    assert program.inputs[0].dtype is dtype
    assert torch.equal(program(values.to(dtype)), values)
    answer = run_onnx(out_of, runtime)(values)
    assert answer.dtype is dtype
    assert torch.equal(answer.float(), values)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_numbers_of_another_width_are_converted_and_fractions_are_not_cut_off(tmp_path, runtime):
    real = run_onnx(write_subtraction(tmp_path / "sub.onnx"), runtime)
    for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.uint8):
        torch.testing.assert_close(real(torch.full((1, 3), 5).to(dtype), torch.ones(1, 3)), torch.full((1, 3), 3.0))
    whole = run_onnx(write_cast(tmp_path / "whole.onnx", TensorProto.INT64, TensorProto.FLOAT), runtime)
    assert whole(torch.tensor([[1, 2, 3]], dtype=torch.int32)).tolist() == [[1, 2, 3]]
    with pytest.raises(ConfigError, match="'x' is int64 in the file and float32 was given; convert it"):
        whole(torch.full((1, 3), 1.7))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_inputs_that_do_not_fit_are_refused_in_one_sentence(tmp_path, runtime):
    program = run_onnx(write_subtraction(tmp_path / "sub.onnx"), runtime)
    for wrong in (torch.ones(2, 4), torch.ones(3), torch.ones(2, 3, 1)):
        with pytest.raises(ConfigError, match=r"'b' has shape \(any, 3\) and .* was given; give one that fits"):
            program(torch.ones(2, 3), wrong)
    with pytest.raises(ConfigError, match=r"on inputs of shapes \(2, 3\), \(4, 3\) .*; give others") as caught:
        program(torch.ones(2, 3), torch.ones(4, 3))  # each fits, and they do not fit each other
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="'a' is a list; give a tensor"):
        program([[1.0, 2.0, 3.0]], torch.ones(2, 3))


# ---- what is refused


@pytest.mark.parametrize("labels", [CLASSES, [0, 1, 2]])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_classifier_that_answers_in_maps_is_refused_when_it_is_opened(tmp_path, linear, labels, runtime):
    path = write_classifier(tmp_path / "zip.onnx", *linear, labels=labels, is_zipped=True)
    with pytest.raises(DeepSeekError, match="export it") as caught:
        run_onnx(path, runtime)
    assert "\n" not in str(caught.value)


def test_maps_and_texts_are_named_with_what_to_export_instead(tmp_path, linear):
    maps = write_classifier(tmp_path / "maps.onnx", *linear, labels=[0, 1, 2], is_zipped=True)
    with pytest.raises(UnsupportedOperatorError, match=r"'probabilities' of type seq\(map\(int64.*zipmap=False"):
        run_onnx(maps, "onnxruntime")
    texts = write_classifier(tmp_path / "texts.onnx", *linear, labels=CLASSES, is_zipped=False)
    with pytest.raises(UnsupportedOperatorError, match=r"'label' of type tensor\(string\).*class labels as integers"):
        run_onnx(texts, "onnxruntime")
    with (
        pytest.warns(UserWarning, match="only runtimes that take the file"),
        pytest.raises(ConfigError, match="string"),
    ):
        load_model(texts, {"backend": "auto"})


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_input_of_texts_is_refused_when_it_is_opened(tmp_path, runtime):
    given, shown = (tensor_info(name, TensorProto.STRING, ["n"]) for name in ("x", "y"))
    path = write_file(tmp_path / "text.onnx", [helper.make_node("Identity", ["x"], ["y"])], [given], [shown])
    with pytest.raises(UnsupportedOperatorError, match=r"'x' of type .*string.* only tensors of numbers"):
        run_onnx(path, runtime)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_what_is_no_model_is_damaged(tmp_path, runtime):
    (tmp_path / "m.onnx").write_bytes(b"\x08\x08nothing")
    with pytest.raises(CorruptArtifactError, match=r"m\.onnx") as caught:
        run_onnx(tmp_path / "m.onnx", runtime)
    assert "\n" not in str(caught.value)


def test_a_precision_that_a_runtime_does_not_give_is_refused(tmp_path):
    path = write_subtraction(tmp_path / "sub.onnx")
    with pytest.raises(ConfigError, match="in the precision that it was written in, and bf16 was asked for"):
        run_onnx(path, "onnxruntime", "bf16")
    with pytest.raises(ConfigError, match="fp32, bf16 or fp16 and int8 was asked for"):
        run_onnx(path, "openvino", "int8")


# ---- TensorFlow


def test_a_saved_model_is_found_by_name_and_run(tmp_path):
    weight = numpy.random.default_rng(0).standard_normal((4, 3)).astype("f")
    bias = numpy.array([1, 2, 3], dtype="f")
    path = write_saved_model(tmp_path / "saved", weight, bias)
    assert find_tensorflow(path)
    assert not find_tensorflow(tmp_path)
    program, x = run_tensorflow(path), torch.randn(5, 4)
    assert program.precision == "fp32"
    expected = torch.relu(x @ torch.from_numpy(weight) + torch.from_numpy(bias))
    torch.testing.assert_close(program(x), expected, rtol=1e-4, atol=1e-5)


def test_a_pickle_by_the_name_of_a_graph_is_never_opened(tmp_path):
    torch.save({"weight": torch.ones(1)}, tmp_path / "graph.pb")
    assert find_tensorflow(tmp_path / "graph.pb")
    with pytest.raises(UnsafeFileError, match="do not load it"):
        run_tensorflow(tmp_path / "graph.pb")
