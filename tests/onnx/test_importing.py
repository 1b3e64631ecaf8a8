"""The converter on graphs of several operators, whole models that were exported, and what it refuses."""

import copy
from collections import Counter

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from deepseek.core.errors import ConfigError, CorruptArtifactError
from deepseek.models import zoo
from deepseek.onnx.files import UnsupportedOperatorError, read_onnx
from deepseek.onnx.importing import import_onnx, list_unsupported
from deepseek.onnx.sample_inputs import build_inputs, describe_inputs
from tests.models import minilm
from tests.onnx.checks import FLOAT, INT64, build_model, check_against_runtime, export, quiet, run_reference


def test_a_product_and_a_sum_become_one_linear_layer():
    weights = {"w": numpy.eye(4, 3, dtype="f"), "b": numpy.arange(3, dtype="f")}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["b", "p"], ["y"])]
    model = build_model(nodes, {"x": (FLOAT, ["n", 4])}, {"y": FLOAT}, weights=weights)
    converted = check_against_runtime(model, (torch.randn(2, 4),))
    (layer,) = (each for each in converted.modules() if isinstance(each, nn.Linear))
    assert layer.bias is not None and len(list(converted.parameters())) == 2


def test_weights_outside_of_layers_are_parameters_under_their_names():
    nodes = [helper.make_node("Mul", ["x", "gain.value"], ["m"]), helper.make_node("Add", ["m", "i"], ["y"])]
    weights = {"gain.value": numpy.arange(3, dtype="f"), "i": numpy.float32(2)}
    model = build_model(nodes, {"x": (FLOAT, ["n", 3])}, {"y": FLOAT}, weights=weights)
    converted = check_against_runtime(model, (torch.randn(2, 3),))
    assert [name for name, _ in converted.named_parameters()] == ["gain.value"]


def test_a_sum_whose_product_is_used_twice_stays_a_sum():
    weights = {"w": numpy.eye(4, 3, dtype="f"), "b": numpy.arange(3, dtype="f")}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("Add", ["p", "b"], ["s"]),
        helper.make_node("Mul", ["p", "s"], ["y"]),
    ]
    model = build_model(nodes, {"x": (FLOAT, ["n", 4])}, {"y": FLOAT}, weights=weights)
    check_against_runtime(model, (torch.randn(2, 4),))


UNARY = ("Relu", "Sigmoid", "Tanh", "Erf", "Abs", "Neg", "Softplus", "HardSigmoid", "Identity", "Floor", "Exp")


BINARY = ("Add", "Sub", "Mul", "Max", "Min")


@st.composite
def chains(draw):
    """A random graph of element-wise operators and changes of shape on a (2, 3, 4) input."""
    nodes, values, weights = [], [("x", (2, 3, 4))], {}
    for index in range(draw(st.integers(1, 8))):
        name, (source, shape) = f"v{index}", draw(st.sampled_from(values))
        kind = draw(st.sampled_from(("unary", "binary", "reshape", "transpose", "slice", "reduce", "concat", "gather")))
        axis = draw(st.integers(-len(shape), len(shape) - 1)) if shape else 0
        if kind == "binary":
            other = draw(st.sampled_from([each for each, own in values if own == shape]))
            nodes.append(helper.make_node(draw(st.sampled_from(BINARY)), [source, other], [name]))
        elif kind == "reshape":
            weights[f"s{index}"] = numpy.array([-1, shape[-1]])
            nodes.append(helper.make_node("Reshape", [source, f"s{index}"], [name]))
            shape = (int(numpy.prod(shape[:-1])), shape[-1])
        elif kind == "transpose":
            order = draw(st.permutations(range(len(shape))))
            nodes.append(helper.make_node("Transpose", [source], [name], perm=order))
            shape = tuple(shape[each] for each in order)
        elif kind == "slice" and shape[axis] > 1:
            step = draw(st.sampled_from((1, 2, -1)))
            bounds = (0, 2**62) if step > 0 else (-1, -(2**62))
            for part, value in zip("betp", (bounds[0], bounds[1], axis, step), strict=True):
                weights[f"{part}{index}"] = numpy.array([value])
            nodes.append(helper.make_node("Slice", [source, *(f"{part}{index}" for part in "betp")], [name]))
            shape = tuple(-(-each // abs(step)) if dim == axis % len(shape) else each for dim, each in enumerate(shape))
        elif kind == "reduce":
            nodes.append(helper.make_node("ReduceMean", [source], [name], axes=[axis], keepdims=1))
            shape = tuple(1 if dim == axis % len(shape) else each for dim, each in enumerate(shape))
        elif kind == "concat":
            nodes.append(helper.make_node("Concat", [source, source], [name], axis=axis))
            shape = tuple(each * (2 if dim == axis % len(shape) else 1) for dim, each in enumerate(shape))
        elif kind == "gather":
            weights[f"i{index}"] = numpy.array([-1, 0])
            nodes.append(helper.make_node("Gather", [source, f"i{index}"], [name], axis=axis))
            shape = tuple(2 if dim == axis % len(shape) else each for dim, each in enumerate(shape))
        else:
            nodes.append(helper.make_node(draw(st.sampled_from(UNARY)), [source], [name]))
        values.append((name, shape))
    return build_model(nodes, {"x": (FLOAT, [2, 3, 4])}, {values[-1][0]: FLOAT}, weights=weights)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(chains())
def test_random_graphs_agree_with_onnx_runtime(model):
    inputs = (torch.linspace(-2, 2, 24).reshape(2, 3, 4),)
    check_against_runtime(model, inputs, rtol=1e-4, atol=1e-4)


SMALL = {
    "resnet18": {"width": 8, "num_classes": 10},
    "mobilenet_v3_small": {"num_classes": 10},
    "vit_b_16": {
        "num_layers": 2,
        "hidden_size": 48,
        "num_heads": 4,
        "mlp_size": 96,
        "image_size": 64,
        "num_classes": 10,
    },
}


@pytest.mark.parametrize("opset", [11, 13, 17])
def test_an_exported_resnet_comes_back_under_its_own_names(opset, tmp_path):
    torch.manual_seed(0)
    model = zoo.build("resnet18", **SMALL["resnet18"]).eval()
    inputs = (torch.randn(2, 3, 64, 64),)
    path = export(
        model,
        inputs,
        tmp_path / "r.onnx",
        opset=opset,
        training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False,
    )
    converted = import_onnx(read_onnx(path), sample_inputs=inputs)
    torch.testing.assert_close(converted(*inputs), model(*inputs), rtol=1e-4, atol=1e-4)
    assert set(converted.state_dict()) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(converted.state_dict()[name], tensor), name
    kinds = Counter(type(each) for each in converted.modules())
    assert (kinds[nn.Conv2d], kinds[nn.BatchNorm2d], kinds[nn.Linear]) == (20, 20, 1)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "vit_b_16"])
def test_exported_vision_models_answer_the_same(name, tmp_path):
    torch.manual_seed(0)
    model = zoo.build(name, **SMALL[name]).eval()
    inputs = (torch.randn(2, 3, 64, 64),)
    path = export(model, inputs, tmp_path / "m.onnx", opset=17, dynamic_axes={"x": {0: "batch"}})
    converted = import_onnx(read_onnx(path), sample_inputs=inputs)
    with torch.no_grad():
        torch.testing.assert_close(converted(*inputs), model(*inputs), rtol=1e-4, atol=1e-4)
        more = torch.randn(3, 3, 64, 64)
        torch.testing.assert_close(converted(more), model(more), rtol=1e-4, atol=1e-4)


def test_the_new_exporter_writes_weights_beside_the_file_and_they_are_read(tmp_path):
    torch.manual_seed(0)
    model = zoo.build("resnet18", **SMALL["resnet18"]).eval()
    inputs = (torch.randn(2, 3, 64, 64),)
    with quiet():
        torch.onnx.export(model, inputs, str(tmp_path / "m.onnx"), dynamo=True, verbose=False)
    assert (tmp_path / "m.onnx.data").exists()
    converted = import_onnx(read_onnx(tmp_path / "m.onnx"), sample_inputs=inputs)
    with torch.no_grad():
        torch.testing.assert_close(converted(*inputs), model(*inputs), rtol=1e-4, atol=1e-4)


def test_a_converted_model_trains_as_the_original_does(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 3)).eval()
    inputs = (torch.randn(5, 6),)
    converted = import_onnx(read_onnx(export(model, inputs, tmp_path / "m.onnx", opset=17)), sample_inputs=inputs)
    ours, theirs = (
        torch.autograd.grad(each(*inputs).square().sum(), list(each.parameters())) for each in (converted, model)
    )
    for one, other in zip(
        sorted(map(float, map(torch.norm, ours))), sorted(map(float, map(torch.norm, theirs))), strict=True
    ):
        assert one == pytest.approx(other, rel=1e-5)


@pytest.fixture(scope="module")
def converted():
    return import_onnx(read_onnx(minilm.find_int8_onnx()))


class TestRealWeights:
    @pytest.mark.parametrize("shape", [(1, 5), (3, 17)])
    def test_it_answers_as_onnx_runtime_does_for_any_length(self, converted, shape):
        generator = torch.Generator().manual_seed(1)
        tokens_BT = torch.randint(1000, 30000, shape, generator=generator)
        mask_BT = torch.ones(shape, dtype=torch.int64)
        mask_BT[-1, shape[1] // 2 :] = 0
        inputs = (tokens_BT, mask_BT, torch.zeros_like(mask_BT))
        (theirs,) = run_reference(str(minilm.find_int8_onnx()), inputs)
        with torch.no_grad():
            torch.testing.assert_close(converted(*inputs), theirs, rtol=1e-4, atol=1e-5)

    def test_it_is_one_graph_for_compilers(self, converted):
        inputs = build_inputs(describe_inputs(read_onnx(minilm.find_int8_onnx())), batch_size=2, sequence_length=9)
        compiled = torch.compile(converted, backend="eager", fullgraph=True, dynamic=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*inputs), converted(*inputs))
        kinds = Counter(type(each) for each in converted.modules())
        assert (kinds[nn.Linear], kinds[nn.LayerNorm], kinds[nn.Embedding]) == (36, 13, 3)


def test_an_unknown_operator_is_named_with_its_opset():
    model = build_model([helper.make_node("Det", ["x"], ["y"])], {"x": (FLOAT, [2, 2])}, {"y": FLOAT})
    assert list_unsupported(model) == ["Det"]
    with pytest.raises(UnsupportedOperatorError, match=r"Det of opset 17 .*backend='onnxruntime'"):
        import_onnx(model)


def test_an_operator_of_another_domain_is_named_with_it():
    node = helper.make_node("FusedGelu", ["x"], ["y"], domain="com.example")
    model = build_model([node], {"x": (FLOAT, [2])}, {"y": FLOAT}, domain="com.example")
    with pytest.raises(UnsupportedOperatorError, match=r"com\.example\.FusedGelu of opset 17"):
        import_onnx(model)


def test_a_graph_that_reads_what_nothing_gives_is_damaged():
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    with pytest.raises(CorruptArtifactError, match=r"Add reads 'w', which nothing gives"):
        import_onnx(build_model(nodes, {"x": (FLOAT, [2])}, {"y": FLOAT}))
    with pytest.raises(CorruptArtifactError, match="promises the output 'z'"):
        import_onnx(build_model([helper.make_node("Relu", ["x"], ["y"])], {"x": (FLOAT, [2])}, {"z": FLOAT}))


# ---- files as people have them


@pytest.mark.parametrize(
    "names", [("x:0", "x/0"), ("class", "class_"), ("1", "_1"), ("self", "input.1"), ("größe", "lambda")]
)
def test_inputs_and_weights_may_have_names_that_are_none_in_python(names):
    first, second = names
    weights = {"def": numpy.arange(3, dtype="f"), "layer.class.0": numpy.ones(3, "f"), "2": numpy.full(3, 2, "f")}
    nodes = [
        helper.make_node("Add", [first, second], ["s"]),
        helper.make_node("Sum", ["s", "def", "layer.class.0", "2"], ["y:0"], name="import"),
    ]
    model = build_model(nodes, {name: (FLOAT, [3]) for name in names}, {"y:0": FLOAT}, weights=weights)
    check_against_runtime(model, (torch.randn(3), torch.randn(3)))


def test_weights_of_layers_may_have_names_that_are_none_in_python():
    weights = {"class.weight": numpy.eye(4, 3, dtype="f")}
    model = build_model(
        [helper.make_node("MatMul", ["x", "class.weight"], ["y"])],
        {"x": (FLOAT, ["n", 4])},
        {"y": FLOAT},
        weights=weights,
    )
    check_against_runtime(model, (torch.randn(2, 4),))


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16])
def test_a_file_of_another_precision_is_computed_in_fp32_where_asked_for_and_answers_in_its_own(kind):
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    weight = numpy.random.default_rng(0).normal(size=(4, 3, 3, 3))
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1], name="conv"),
        helper.make_node("Cast", ["c"], ["s"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["s"], ["y"], to=kind),
    ]
    model = build_model(nodes, {"x": (kind, [1, 3, 8, 8])}, {"y": kind})
    model.graph.initializer.append(numpy_helper.from_array(weight.astype(dtype), "w"))
    plain, widened = import_onnx(model), import_onnx(model, in_float32=True)
    image = torch.randn(1, 3, 8, 8)
    given = image.to(dict(plain.named_parameters())["conv.weight"].dtype)
    exact = nn.functional.conv2d(given.double(), plain.conv.weight.double(), padding=1)
    assert {each.dtype for each in widened.parameters()} == {torch.float32}
    for converted in (plain, widened):
        answer = converted(given)
        assert answer.dtype is given.dtype
        torch.testing.assert_close(answer.double(), exact, rtol=0.02, atol=0.1)


def test_arrays_and_numbers_of_other_widths_are_taken_and_other_kinds_refused():
    nodes = [helper.make_node("Gather", ["table", "i"], ["rows"]), helper.make_node("Add", ["rows", "x"], ["y"])]
    model = build_model(
        nodes,
        {"i": (INT64, ["n"]), "x": (FLOAT, [4])},
        {"y": FLOAT},
        weights={"table": numpy.arange(12, dtype="f").reshape(3, 4)},
    )
    converted = import_onnx(model)
    expected = numpy.array([[8.0, 9, 10, 11], [4, 5, 6, 7]]) + 0.5
    for indices in (numpy.array([2, 1]), numpy.array([2, 1], "i4"), torch.tensor([2, 1], dtype=torch.int16)):
        for x in (numpy.full(4, 0.5), numpy.full(4, 0.5, "f"), torch.full((4,), 0.5, dtype=torch.float64)):
            answer = converted(indices, x)
            assert answer.dtype is torch.float32
            numpy.testing.assert_array_equal(answer.detach().numpy(), expected)
    with pytest.raises(ConfigError, match="input 'i' is int64 in the file and float32 was given"):
        converted(torch.tensor([2.0]), torch.zeros(4))


def test_a_call_may_use_the_names_of_the_file_and_copies_take_the_same_calls():
    node = helper.make_node("Sub", ["a:0", "class"], ["y"])
    model = build_model([node], {"a:0": (FLOAT, ["n", 2]), "class": (FLOAT, [2])}, {"y": FLOAT})
    first, second = numpy.array([[3.0, 5.0]]), numpy.array([1.0, 1.0], "f4")
    converted = import_onnx(model)
    for module in (converted, copy.deepcopy(converted), copy.deepcopy(copy.deepcopy(converted))):
        for answer in (
            module(first, second),
            module(**{"class": second, "a:0": first}),
            module(first, **{"class": torch.from_numpy(second)}),
            module(class_=second, a_0=first),  # as the arguments are called in Python
        ):
            assert (answer.dtype, answer.tolist()) == (torch.float32, [[2.0, 4.0]])
        with pytest.raises(ConfigError, match=r"unknown input 'b'.*a:0, class"):
            module(first, b=second)
        with pytest.raises(ConfigError, match=r"takes a:0, class and 1 were given; give each once"):
            module(first)
        with pytest.raises(ConfigError, match=r"takes a:0, class and 2 were given; give each once"):
            module(first, **{"a:0": first})
        with pytest.raises(ConfigError, match=r"'a:0' is a list; give a tensor or an array"):
            module(first.tolist(), second)


def test_negative_indices_that_are_known_at_run_time_count_from_the_end():
    table = numpy.arange(12, dtype="f").reshape(3, 4)
    model = build_model(
        [helper.make_node("Gather", ["t", "i"], ["y"])], {"i": (INT64, ["n"])}, {"y": FLOAT}, weights={"t": table}
    )
    converted = check_against_runtime(model, (torch.tensor([-1, 0, -3]),))
    assert [type(each) for each in converted.children()] == [nn.Embedding]


def test_an_attribute_that_is_not_followed_is_refused_and_not_dropped():
    node = helper.make_node("SpaceToDepth", ["x"], ["y"], blocksize=2)
    model = build_model([node], {"x": (FLOAT, [1, 1, 4, 4])}, {"y": FLOAT})
    model.graph.node[0].attribute.append(helper.make_attribute("order", "backwards"))
    with pytest.raises(UnsupportedOperatorError, match="its attribute order=b'backwards' is not followed"):
        import_onnx(model)


def test_a_type_that_torch_barely_has_is_refused_while_the_file_is_read():
    node = helper.make_node("Add", ["x", "x"], ["y"])
    model = build_model([node], {"x": (TensorProto.UINT16, [2])}, {"y": TensorProto.UINT16})
    with pytest.raises(UnsupportedOperatorError, match=r"Add of opset 17 .*UInt16"):
        import_onnx(model)


def test_a_weight_that_is_text_is_no_damage():
    labels = numpy.array(["cat", "dog"], dtype=object)
    node = helper.make_node("Gather", ["labels", "i"], ["y"])
    model = build_model([node], {"i": (INT64, ["n"])}, {"y": TensorProto.STRING}, weights={"labels": labels})
    with pytest.raises(UnsupportedOperatorError, match=r"'labels' cannot be converted to PyTorch: .*type STRING"):
        import_onnx(model)


ODD_USES = {
    "GridSample of a matrix": ("GridSample", {}, [(2, 3), (2, 3)], "inputs of 2 and 2 dimensions"),
    "GridSample with a word": ("GridSample", {"mode": "foo"}, [(1, 1, 2, 2), (1, 2, 2, 2)], "mode='foo'"),
    "cubic volumes": ("GridSample", {"mode": "cubic"}, [(1, 1, 2, 2, 2), (1, 2, 2, 2, 3)], "only images"),
    "Resize with a word": ("Resize", {"mode": "foo"}, [(1, 1, 2, 2)], "mode='foo'"),
    "a flag of 7": ("ArgMax", {"keepdims": 7}, [(2, 3)], "keepdims=7"),
    "negative flags": ("IsInf", {"detect_negative": -1}, [(2,)], "detect_negative=-1"),
    "blocks of nothing": ("DepthToSpace", {"blocksize": 0}, [(1, 4, 2, 2)], "ZeroDivisionError"),
    "blocks in no order": ("DepthToSpace", {"blocksize": 2, "mode": "foo"}, [(1, 4, 2, 2)], "mode='foo'"),
    "strides backwards": ("MaxPool", {"kernel_shape": [2], "strides": [-1]}, [(1, 1, 4)], r"strides=\[-1\]"),
    "too many strides": ("MaxPool", {"kernel_shape": [2], "strides": [1, 1]}, [(1, 1, 4)], r"strides=\[1, 1\]"),
    "too few pads": ("AveragePool", {"kernel_shape": [2], "pads": [1]}, [(1, 1, 4)], r"pads=\[1\]"),
    "padding by a word": ("MaxPool", {"kernel_shape": [2], "auto_pad": "foo"}, [(1, 1, 4)], "auto_pad='foo'"),
    "a norm of power zero": ("LpPool", {"kernel_shape": [2], "p": 0}, [(1, 1, 4)], "p=0"),
    "no such axis": ("Softmax", {"axis": 7}, [(2, 3)], "axis=7"),
    "division by zero": ("Celu", {"alpha": 0.0}, [(2, 3)], "alpha=0"),
    "windows of four dimensions": ("Conv", {}, [(1, 1, 2, 2, 2, 2), (1, 1, 1, 1, 1, 1)], "windows of 4 dimensions"),
    "an input missing": ("MatMul", {}, [(2, 3)], "TypeError"),
    "a letter missing": ("Einsum", {"equation": "ij,jk"}, [(2, 3)], "RuntimeError"),
}


@pytest.mark.parametrize("use", ODD_USES)
def test_a_use_that_nobody_foresaw_is_refused_by_the_name_of_its_operator(use):
    operator, attributes, shapes, reason = ODD_USES[use]
    inputs = {f"i{index}": (FLOAT, shape) for index, shape in enumerate(shapes)}
    node = helper.make_node(operator, [*inputs, *(["", "w"] if operator == "Resize" else [])], ["y"], **attributes)
    weights = {"w": numpy.ones(4, "f")} if operator == "Resize" else {}
    model = build_model([node], inputs, {"y": FLOAT}, weights=weights, opset=22)
    with pytest.raises(UnsupportedOperatorError, match=f"{operator} of opset 22 cannot be converted.*{reason}"):
        import_onnx(model)


@pytest.mark.parametrize("operator", ["Abs", "Floor", "Mish", "HardSwish", "Softplus", "ThresholdedRelu"])
def test_types_that_onnx_does_not_list_are_refused_where_torch_has_no_such_operator_either(operator):
    node = helper.make_node(operator, ["x"], ["y"])
    model = build_model([node], {"x": (TensorProto.BOOL, [2, 3])}, {"y": TensorProto.BOOL}, opset=22)
    with pytest.raises(UnsupportedOperatorError, match=f"{operator} of opset 22.*not implemented"):
        import_onnx(model)
