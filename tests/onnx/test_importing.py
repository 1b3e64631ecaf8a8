"""The converter against ONNX's own node tests, ONNX Runtime, and models of torch that were exported."""

import contextlib
import logging
import warnings
from collections import Counter, defaultdict

import numpy
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from deepseek.core.errors import ArtifactError, ConfigError, CorruptArtifactError, UnsafeFileError
from deepseek.models import zoo
from deepseek.onnx.files import (
    MAX_OPSET,
    MIN_OPSET,
    UnsupportedOperatorError,
    describe_inputs,
    draw_inputs,
    read_onnx,
)
from deepseek.onnx.importing import import_onnx, list_unsupported
from deepseek.onnx.operators import OPERATORS
from tests.models import minilm

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
NODE_TOLERANCE = {"rtol": 1e-3, "atol": 1e-5, "equal_nan": True}
# Answers of half precision differ in the last bit between libraries.
HALF_TOLERANCE = {"rtol": 2e-3, "atol": 2e-3, "equal_nan": True}
TORCH_TYPES = {numpy.dtype(name) for name in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "?")}


# ---- ONNX's own tests of its operators: a model of one node, inputs, and the outputs that numpy gave


def collect_cases():
    """Operator -> the cases that test it, at an opset that is read here and means the same."""
    with warnings.catch_warnings(), numpy.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        cases = collect_testcases(None)
    found = defaultdict(list)
    for case in cases:
        operators = {node.op_type for node in case.model.graph.node}
        arrays = [each for values in case.data_sets[0] for each in values]
        has_twins = all(isinstance(each, numpy.ndarray) and each.dtype in TORCH_TYPES for each in arrays)
        if has_twins and move_to_known_opset(case.model):
            found[operators.pop() if len(operators) == 1 else "several"].append(case)
    return found


def move_to_known_opset(model):
    """Rewrite the opset of `model` to one that is read here; False where an operator means something else there."""
    entry = next((each for each in model.opset_import if each.domain == ""), None)
    if entry is None:
        return False
    target = min(max(entry.version, MIN_OPSET), MAX_OPSET)
    for node in model.graph.node:
        if node.domain or not onnx.defs.has(node.op_type):
            return False
        try:
            versions = {onnx.defs.get_schema(node.op_type, each).since_version for each in (target, entry.version)}
        except onnx.defs.SchemaError:
            return False
        if len(versions) > 1:
            return False
    entry.version = target
    return not model.functions


def bake(model, inputs, *, with_reals):
    """Small inputs after the first become constants, as they are in any exported model: shapes, axes, bounds."""
    baked = onnx.ModelProto()
    baked.CopyFrom(model)
    del baked.graph.input[:]
    kept = []
    for place, (value, array) in enumerate(zip(model.graph.input, inputs, strict=True)):
        kinds = "iubf" if with_reals else "iub"
        if place and array.ndim < 2 and array.dtype.kind in kinds:
            baked.graph.initializer.append(numpy_helper.from_array(array, value.name))
        else:
            baked.graph.input.append(value)
            kept.append(array)
    return baked, kept


def run_case(case):
    """The answer to a case, or the refusal; inputs become constants only where they must be."""
    inputs, expected = case.data_sets[0]
    ways = [(case.model, inputs), *(bake(case.model, inputs, with_reals=each) for each in (False, True))]
    refusal = None
    for model, arrays in ways:
        tensors = [torch.from_numpy(numpy.array(each)) for each in arrays]
        try:
            answer = import_onnx(model, sample_inputs=tensors)(*tensors)
        except ConfigError as error:
            refusal = error
            continue
        compare(answer if isinstance(answer, tuple) else (answer,), expected)
        return None
    return refusal


def compare(answers, expected):
    for ours, theirs in zip(answers, expected, strict=True):
        tolerance = HALF_TOLERANCE if theirs.dtype == numpy.float16 else NODE_TOLERANCE
        torch.testing.assert_close(ours, torch.from_numpy(numpy.array(theirs)), **tolerance)


@pytest.fixture(scope="module")
def official_cases():
    return collect_cases()


@pytest.mark.parametrize("name", [*sorted(OPERATORS), "several"])
def test_every_official_example_of_an_operator_is_right_or_refused(name, official_cases):
    refused = [str(refusal) for refusal in map(run_case, official_cases[name]) if refusal is not None]
    assert all("cannot be converted to PyTorch" in each for each in refused), refused
    if official_cases[name] and name != "several":
        assert len(refused) < len(official_cases[name]), refused


def test_few_official_examples_of_known_operators_are_refused(official_cases):
    counts = Counter(run_case(case) is None for name in OPERATORS for case in official_cases[name])
    assert counts[True] >= 560 and counts[False] <= 60, counts


def test_what_onnx_defines_by_other_operators_is_written_out(official_cases):
    """Attention and rotary embedding are in no row of the table and still run."""
    for name in ("Attention", "RotaryEmbedding", "MeanVarianceNormalization"):
        assert name not in OPERATORS
        counts = Counter(run_case(case) is None for case in official_cases[name])
        assert counts[True] > counts[False], (name, counts)


# ---- one graph at a time, against ONNX Runtime


def build_model(nodes, inputs, outputs, *, weights=None, opset=17, domain=""):
    weights = weights or {}
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
        [numpy_helper.from_array(numpy.asarray(value), name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def run_reference(model, inputs):
    content = model if isinstance(model, bytes | str) else model.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    feed = {each.name: value.numpy() for each, value in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(each) for each in session.run(None, feed)]


def check_against_runtime(model, inputs, **tolerance):
    converted = import_onnx(model, sample_inputs=inputs)
    with torch.no_grad():
        answer = converted(*inputs)
    answers = answer if isinstance(answer, tuple) else (answer,)
    for ours, theirs in zip(answers, run_reference(model, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, **(tolerance or {"rtol": 1e-4, "atol": 1e-5}))
    return converted


def test_lengths_are_followed_as_numbers_through_a_flatten_written_by_an_exporter():
    """Shape, Gather, Unsqueeze, Concat, Reshape: one graph, which also takes other lengths."""
    model = build_model(
        [
            helper.make_node("Shape", ["x"], ["shape"]),
            helper.make_node("Gather", ["shape", "zero"], ["batch"]),
            helper.make_node("Unsqueeze", ["batch", "axes"], ["row"]),
            helper.make_node("Concat", ["row", "rest"], ["target"], axis=0),
            helper.make_node("Reshape", ["x", "target"], ["y"]),
        ],
        {"x": (FLOAT, ["n", 3, 4])},
        {"y": FLOAT},
        weights={"zero": numpy.int64(0), "axes": numpy.array([0]), "rest": numpy.array([-1])},
    )
    converted = check_against_runtime(model, (torch.randn(2, 3, 4),))
    assert converted(torch.randn(5, 3, 4)).shape == (5, 12)
    program = torch.export.export(
        converted, (torch.randn(2, 3, 4),), dynamic_shapes=({0: torch.export.Dim("n", min=2, max=64)},)
    )
    assert program.module()(torch.randn(7, 3, 4)).shape == (7, 12)


def test_expanding_to_a_computed_shape_needs_no_values():
    """ConstantOfShape, Equal to -1, Where, Expand: how exporters write `expand(-1, n)`."""
    model = build_model(
        [
            helper.make_node("Shape", ["x"], ["length"]),
            helper.make_node("Concat", ["two", "length"], ["wanted"], axis=0),
            helper.make_node("Shape", ["wanted"], ["rank"]),
            helper.make_node("ConstantOfShape", ["rank"], ["ones"], value=numpy_helper.from_array(numpy.array([1]))),
            helper.make_node("Equal", ["wanted", "minus"], ["is_open"]),
            helper.make_node("Where", ["is_open", "ones", "wanted"], ["target"]),
            helper.make_node("Expand", ["x", "target"], ["y"]),
        ],
        {"x": (FLOAT, ["n"])},
        {"y": FLOAT},
        weights={"two": numpy.array([2]), "minus": numpy.array([-1])},
    )
    converted = check_against_runtime(model, (torch.randn(6),))
    assert converted(torch.randn(3)).shape == (2, 3)


def test_softmax_before_opset_13_takes_all_that_follows_as_one_row():
    inputs = (torch.randn(2, 3, 4),)
    for opset in (11, 13):
        model = build_model(
            [helper.make_node("Softmax", ["x"], ["y"], axis=1)], {"x": (FLOAT, [2, 3, 4])}, {"y": FLOAT}, opset=opset
        )
        check_against_runtime(model, inputs)
    old = build_model([helper.make_node("Softmax", ["x"], ["y"])], {"x": (FLOAT, [2, 3, 4])}, {"y": FLOAT}, opset=11)
    torch.testing.assert_close(import_onnx(old)(*inputs).sum((1, 2)), torch.ones(2))


@pytest.mark.parametrize(
    ("attributes", "shape"),
    [
        ({"pads": [1, 2, 0, 1], "kernel_shape": [3, 3]}, (2, 3, 8, 9)),
        ({"auto_pad": "SAME_UPPER", "strides": [2, 2], "kernel_shape": [3, 3]}, (1, 3, 7, 8)),
        ({"auto_pad": "SAME_LOWER", "strides": [3, 2], "kernel_shape": [3, 3]}, (1, 3, 7, 8)),
        ({"dilations": [2, 1], "kernel_shape": [3, 3]}, (1, 3, 9, 9)),
        ({"group": 3, "kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, (2, 3, 5, 5)),
    ],
)
def test_convolutions_pad_as_onnx_says(attributes, shape):
    generator = numpy.random.default_rng(0)
    weight = generator.standard_normal((6, 3 // attributes.get("group", 1), 3, 3)).astype("f")
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], **attributes)
    weights = {"w": weight, "b": generator.standard_normal(6).astype("f")}
    model = build_model([node], {"x": (FLOAT, shape)}, {"y": FLOAT}, weights=weights)
    converted = check_against_runtime(model, (torch.randn(shape),))
    assert [type(each) for each in converted.children()] == [nn.Conv2d]


@pytest.mark.parametrize("count_include_pad", [0, 1])
@pytest.mark.parametrize("pads", [[0, 1, 1, 0], [1, 1, 1, 1], [2, 2, 2, 2]])
def test_average_pooling_counts_padding_as_onnx_says(count_include_pad, pads):
    node = helper.make_node(
        "AveragePool", ["x"], ["y"], kernel_shape=[3, 3], pads=pads, count_include_pad=count_include_pad
    )
    model = build_model([node], {"x": (FLOAT, [1, 2, 6, 7])}, {"y": FLOAT})
    check_against_runtime(model, (torch.randn(1, 2, 6, 7),))


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("mapping", ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"])
@pytest.mark.parametrize("sizes", [[1, 2, 9, 4], [1, 2, 3, 13]])
def test_resizing_agrees_with_onnx_runtime(mode, mapping, sizes):
    node = helper.make_node(
        "Resize", ["x", "", "", "sizes"], ["y"], mode=mode, coordinate_transformation_mode=mapping, nearest_mode="floor"
    )
    model = build_model([node], {"x": (FLOAT, [1, 2, 5, 6])}, {"y": FLOAT}, weights={"sizes": numpy.array(sizes)})
    check_against_runtime(model, (torch.randn(1, 2, 5, 6),))


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


@pytest.mark.parametrize("kind", ["QDQ", "QOperator", "dynamic"])
def test_quantized_files_agree_with_onnx_runtime(kind, tmp_path):
    """A small network quantized by ONNX Runtime's own tool, run as floats on the same steps."""
    from onnxruntime import quantization

    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten()]
    linear = [nn.Linear(4 * 16, 16, bias=False), nn.ReLU(), nn.Linear(16, 5, bias=False)]
    model = nn.Sequential(*layers, *(linear if kind != "QOperator" else []))
    inputs = (torch.randn(4, 3, 8, 8),)
    export(model, inputs, tmp_path / "float.onnx", opset=13)
    with quiet():
        if kind == "dynamic":
            quantization.quantize_dynamic(
                tmp_path / "float.onnx", tmp_path / "int8.onnx", op_types_to_quantize=["MatMul"]
            )
        else:
            form = getattr(quantization.QuantFormat, kind)
            quantization.quantize_static(
                tmp_path / "float.onnx", tmp_path / "int8.onnx", Samples(inputs), quant_format=form
            )
    proto = read_onnx(tmp_path / "int8.onnx")
    with torch.no_grad():
        ours, exact = import_onnx(proto, sample_inputs=inputs)(*inputs), model(*inputs)
    (theirs,) = run_reference(str(tmp_path / "int8.onnx"), inputs)
    step = (theirs.max() - theirs.min()) / 255
    assert float((ours - theirs).abs().max()) <= 2.5 * float(step)
    assert float((ours - exact).abs().max()) > 0  # it is the quantized one


class Samples:
    """What ONNX Runtime's quantizer calibrates with."""

    def __init__(self, inputs):
        self.left = [{"x": inputs[0].numpy()}]

    def get_next(self):
        return self.left.pop() if self.left else None


@contextlib.contextmanager
def quiet():
    """Exporters and quantizers talk of what is theirs to mend."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def export(model, inputs, path, *, opset, **options):
    with quiet():
        torch.onnx.export(
            model.eval(), inputs, str(path), dynamo=False, opset_version=opset, input_names=["x"], **options
        )
    return path


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


# ---- whole models


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
        inputs = draw_inputs(describe_inputs(read_onnx(minilm.find_int8_onnx())), batch_size=2, sequence_length=9)
        compiled = torch.compile(converted, backend="eager", fullgraph=True, dynamic=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*inputs), converted(*inputs))
        kinds = Counter(type(each) for each in converted.modules())
        assert (kinds[nn.Linear], kinds[nn.LayerNorm], kinds[nn.Embedding]) == (36, 13, 3)


# ---- what is refused


def relu_model(**options):
    return build_model([helper.make_node("Relu", ["x"], ["y"])], {"x": (FLOAT, [2])}, {"y": FLOAT}, **options)


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


def test_a_use_that_is_not_followed_is_refused_and_never_nearly_right():
    node = helper.make_node("MaxPool", ["x"], ["y", "indices"], kernel_shape=[2, 2])
    model = build_model([node], {"x": (FLOAT, [1, 1, 4, 4])}, {"y": FLOAT, "indices": INT64})
    with pytest.raises(UnsupportedOperatorError, match=r"MaxPool of opset 17 .*indices of a pooling"):
        import_onnx(model)


@pytest.mark.parametrize("opset", [7, 10, 24, 99])
def test_an_opset_that_is_not_read_is_said(opset):
    with pytest.raises(ConfigError, match=f"opset {opset} and 11 to 23 are converted"):
        import_onnx(relu_model(opset=opset))


def test_sample_inputs_that_do_not_fit_are_explained():
    with pytest.raises(ConfigError, match=r"takes 1 inputs \(x\) and 2 were given"):
        import_onnx(relu_model(), sample_inputs=(torch.ones(2), torch.ones(2)))
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    model = build_model(nodes, {"x": (FLOAT, ["n"])}, {"y": FLOAT}, weights={"w": numpy.ones(3, "f")})
    with pytest.raises(UnsupportedOperatorError, match="Add of opset 17"):
        import_onnx(model, sample_inputs=(torch.ones(5),))
    specs = describe_inputs(model)
    assert draw_inputs(specs, {"x": [3]})[0].shape == (3,)
    with pytest.raises(ConfigError, match=r"did you mean 'x'|known: x"):
        draw_inputs(specs, {"xx": [3]})
    fixed = describe_inputs(relu_model())
    assert draw_inputs(fixed, batch_size=2)[0].shape == (2,)
    with pytest.raises(ConfigError, match="has 2 rows, always, and batch_size=3"):
        draw_inputs(fixed, batch_size=3)
    with pytest.raises(ConfigError, match=r"shape \(any\) and \(3, 4\) was given"):
        draw_inputs(specs, {"x": [3, 4]})


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x07", b"\xff" * 64])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(CorruptArtifactError, match=r"m\.onnx"):
        read_onnx(path)


def test_a_truncated_file_is_named(tmp_path):
    path = tmp_path / "m.onnx"
    content = minilm.find_int8_onnx().read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptArtifactError, match=r"m\.onnx"):
        read_onnx(path)


def test_a_pickle_and_nothing_are_refused(tmp_path):
    torch.save({"x": torch.ones(1)}, tmp_path / "m.onnx")
    with pytest.raises(UnsafeFileError, match="pickle"):
        read_onnx(tmp_path / "m.onnx")
    with pytest.raises(ArtifactError, match="does not exist"):
        read_onnx(tmp_path / "n.onnx")


def model_with_weights_at(location, path):
    model = build_model(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        {"x": (FLOAT, [4])},
        {"y": FLOAT},
        weights={"w": numpy.ones(4, "f")},
    )
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/../../secret", "..\\secret"])
def test_weights_outside_the_folder_are_refused(tmp_path, location):
    (tmp_path / "secret").write_bytes(bytes(16))
    (tmp_path / "model").mkdir()
    with pytest.raises(UnsafeFileError, match="outside its own folder"):
        read_onnx(model_with_weights_at(location, tmp_path / "model" / "m.onnx"))


def test_a_link_that_leads_outside_the_folder_is_refused(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(16))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "w").symlink_to(tmp_path / "secret")
    with pytest.raises(UnsafeFileError, match="outside its own folder"):
        read_onnx(model_with_weights_at("w", tmp_path / "model" / "m.onnx"))


def test_weights_that_are_missing_or_too_short_are_said(tmp_path):
    path = model_with_weights_at("w", tmp_path / "m.onnx")
    with pytest.raises(CorruptArtifactError, match=r"m\.onnx"):
        read_onnx(path)
    (tmp_path / "w").write_bytes(numpy.arange(4, dtype="<f4").tobytes())
    converted = import_onnx(read_onnx(path))
    torch.testing.assert_close(converted(torch.zeros(4)), torch.arange(4.0))
    (tmp_path / "w").write_bytes(bytes(3))
    with pytest.raises(CorruptArtifactError, match=r"'w' is damaged|weights of"):
        import_onnx(read_onnx(path))


def test_a_graph_that_reads_what_nothing_gives_is_damaged():
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    with pytest.raises(CorruptArtifactError, match=r"Add reads 'w', which nothing gives"):
        import_onnx(build_model(nodes, {"x": (FLOAT, [2])}, {"y": FLOAT}))
    with pytest.raises(CorruptArtifactError, match="promises the output 'z'"):
        import_onnx(build_model([helper.make_node("Relu", ["x"], ["y"])], {"x": (FLOAT, [2])}, {"z": FLOAT}))
