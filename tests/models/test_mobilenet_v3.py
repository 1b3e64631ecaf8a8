"""MobileNetV3 against graphs written by hand from the paper's tables, under torchvision's names and under timm's."""

import math

import onnxruntime
import pytest
import torch

from deepseek.core.errors import ArtifactError, ConfigError
from deepseek.models.mobilenet_v3.keymap import import_config, import_tensors
from deepseek.models.mobilenet_v3.model import (
    InvertedResidual,
    MobileNetV3,
    MobileNetV3Config,
    Row,
    SqueezeExcitation,
    round_channels,
)
from tests.models.pictures import (
    arrays,
    check_channels_last,
    check_export_with_any_batch,
    check_one_graph_in_training,
    find_modules_called_twice,
    noise,
    randomize,
)
from tests.onnx.onnx_graphs import Graph

SMALL = MobileNetV3Config(variant="small", width_multiple=0.25, num_classes=5)

# Howard et al. 2019, tables 1 and 2: kernel, widened, out, SE, NL, stride. A new line here is a new width.
LARGE_TABLE = """
3 16 16 - RE 1
3 64 24 - RE 2 | 3 72 24 - RE 1
5 72 40 SE RE 2 | 5 120 40 SE RE 1 | 5 120 40 SE RE 1
3 240 80 - HS 2 | 3 200 80 - HS 1 | 3 184 80 - HS 1 | 3 184 80 - HS 1
3 480 112 SE HS 1 | 3 672 112 SE HS 1
5 672 160 SE HS 2 | 5 960 160 SE HS 1 | 5 960 160 SE HS 1
"""
SMALL_TABLE = """
3 16 16 SE RE 2
3 72 24 - RE 2 | 3 88 24 - RE 1
5 96 40 SE HS 2 | 5 240 40 SE HS 1 | 5 240 40 SE HS 1
5 120 48 SE HS 1 | 5 144 48 SE HS 1
5 288 96 SE HS 2 | 5 576 96 SE HS 1 | 5 576 96 SE HS 1
"""


def act(graph, x, name):
    return graph.add("Relu", x) if name == "RE" else graph.hardswish(x)


def squeeze(graph, x, reduce, expand):
    mean = graph.add("GlobalAveragePool", x)
    inner = graph.add("Relu", graph.conv(mean, reduce))
    return graph.add("Mul", x, graph.hard_sigmoid(graph.conv(inner, expand)))


def torchvision_block(graph, x, prefix, has_widening, num_inner, has_squeeze, nonlinearity, stride, eps):
    position = 0
    if has_widening:
        x = act(graph, graph.norm(graph.conv(x, f"{prefix}.0.0"), f"{prefix}.0.1", eps), nonlinearity)
        position += 1
    name = f"{prefix}.{position}"
    x = graph.norm(graph.conv(x, f"{name}.0", stride=stride, groups=num_inner), f"{name}.1", eps)
    x = act(graph, x, nonlinearity)
    if has_squeeze:
        position += 1
        x = squeeze(graph, x, f"{prefix}.{position}.fc1", f"{prefix}.{position}.fc2")
    position += 1
    return graph.norm(graph.conv(x, f"{prefix}.{position}.0"), f"{prefix}.{position}.1", eps)


def timm_block(graph, x, prefix, has_widening, num_inner, has_squeeze, nonlinearity, stride, eps):
    if has_widening:
        x = act(graph, graph.norm(graph.conv(x, f"{prefix}.conv_pw"), f"{prefix}.bn1", eps), nonlinearity)
    first, last, project = ("bn2", "bn3", "conv_pwl") if has_widening else ("bn1", "bn2", "conv_pw")
    x = graph.norm(graph.conv(x, f"{prefix}.conv_dw", stride=stride, groups=num_inner), f"{prefix}.{first}", eps)
    x = act(graph, x, nonlinearity)
    if has_squeeze:
        x = squeeze(graph, x, f"{prefix}.se.conv_reduce", f"{prefix}.se.conv_expand")
    return graph.norm(graph.conv(x, f"{prefix}.{project}"), f"{prefix}.{last}", eps)


def scaled(number, width):
    """A multiple of 8 near `number` times `width`, by trying all."""
    exact = number * width
    candidates = range(8, 10_000, 8)
    nearest = min(candidates, key=lambda each: (abs(each - exact), -each))
    return nearest if nearest >= 0.9 * exact else nearest + 8


def write_blocks(graph, x, table, width, eps, naming):
    """The inverted residuals of a table; `naming` is torchvision or timm."""
    num_in, feature = scaled(16, width), 0
    for stage, line in enumerate(table.strip().splitlines()):
        for block, cells in enumerate(line.split("|")):
            kernel, inner, out, se, nonlinearity, stride = cells.split()
            num_inner, num_out, feature = scaled(int(inner), width), scaled(int(out), width), feature + 1
            write, prefix = (
                (torchvision_block, f"features.{feature}.block")
                if naming == "torchvision"
                else (timm_block, f"blocks.{stage}.{block}")
            )
            details = num_inner != num_in, num_inner, se == "SE", nonlinearity, int(stride), eps
            y = write(graph, x, prefix, *details)
            depthwise = f"{prefix}.{'conv_dw' if naming == 'timm' else f'{int(num_inner != num_in)}.0'}.weight"
            assert graph.weights[depthwise].shape == (num_inner, 1, int(kernel), int(kernel))
            x = graph.add("Add", x, y) if int(stride) == 1 and num_in == num_out else y
            num_in = num_out
    return x, feature + 1, stage + 1


def run_torchvision(weights, pictures, table, width=1.0, eps=1e-3):
    graph = Graph(weights)
    x = graph.hardswish(graph.norm(graph.conv("pictures", "features.0.0", stride=2), "features.0.1", eps))
    x, last, _ = write_blocks(graph, x, table, width, eps, "torchvision")
    x = graph.hardswish(graph.norm(graph.conv(x, f"features.{last}.0"), f"features.{last}.1", eps))
    x = graph.add("Flatten", graph.add("GlobalAveragePool", x))
    logits = graph.linear(graph.hardswish(graph.linear(x, "classifier.0")), "classifier.3")
    return torch.from_numpy(graph.run([logits], pictures=pictures)[0])


def run_timm(weights, pictures, table, eps=1e-5):
    graph = Graph(weights)
    x = graph.hardswish(graph.norm(graph.conv("pictures", "conv_stem", stride=2), "bn1", eps))
    x, _, last = write_blocks(graph, x, table, 1.0, eps, "timm")
    x = graph.hardswish(graph.norm(graph.conv(x, f"blocks.{last}.0.conv"), f"blocks.{last}.0.bn1", eps))
    hidden = graph.hardswish(graph.conv(graph.add("GlobalAveragePool", x), "conv_head"))
    logits = graph.linear(graph.add("Flatten", hidden), "classifier")
    return torch.from_numpy(graph.run([logits], pictures=pictures)[0])


@pytest.mark.parametrize(("variant", "table"), [("large", LARGE_TABLE), ("small", SMALL_TABLE)])
@pytest.mark.parametrize("width", [1.0, 0.35])
def test_it_computes_what_the_tables_of_the_paper_say(variant, table, width):
    model = randomize(MobileNetV3(MobileNetV3Config(variant=variant, width_multiple=width, num_classes=7)))
    pictures = noise(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(
            model(pictures), run_torchvision(arrays(model), pictures, table, width), rtol=1e-10, atol=1e-12
        )


ROWS = {
    "widening": (Row(3, 24, 16, False, "relu", 1), "3 24 16 - RE 1"),
    "plain with squeeze": (Row(3, 16, 16, True, "relu", 2), "3 16 16 SE RE 2"),
    "wide view": (Row(5, 40, 24, True, "hardswish", 2), "5 40 24 SE HS 2"),
}


@pytest.mark.parametrize(("row", "line"), ROWS.values(), ids=ROWS)
def test_an_inverted_residual_computes_what_its_row_says(row, line):
    block = randomize(InvertedResidual(MobileNetV3Config(), 16, row))
    weights = {f"features.1.{name}": each for name, each in arrays(block).items()}
    graph, x = Graph(weights), noise(2, 16, 12, 12)
    output, *_ = write_blocks(graph, "x", line, 1.0, 1e-3, "torchvision")
    torch.testing.assert_close(block(x), torch.from_numpy(graph.run([output], x=x)[0]), rtol=1e-11, atol=1e-12)


def test_squeeze_and_excitation_weighs_channels_by_their_means():
    layer = randomize(SqueezeExcitation(24))
    x = noise(2, 24, 5, 5) * 4
    mean = x.mean(dim=(2, 3))
    inner = (mean @ layer.fc1.weight.flatten(1).T + layer.fc1.bias).clamp(min=0)
    factor = ((inner @ layer.fc2.weight.flatten(1).T + layer.fc2.bias + 3) / 6).clamp(0, 1)
    torch.testing.assert_close(layer(x), x * factor[:, :, None, None], rtol=1e-12, atol=1e-12)


def name_for_timm(weights, table):
    """Our tensors under timm's names, which a reader of timm's tables would give them."""
    named = {}
    blocks = [(f"{stage}.{i}", cells) for stage, line in enumerate(table) for i, cells in enumerate(line.split("|"))]
    prefixes = {
        "features.0.0": "conv_stem",
        "features.0.1": "bn1",
        "classifier.0": "conv_head",
        "classifier.3": "classifier",
    }
    num_in = 16
    for feature, (place, cells) in enumerate(blocks, start=1):
        _, inner, out, se, *_ = cells.split()
        parts = ["conv_pw bn1"] if int(inner) != num_in else []
        parts += ["conv_dw bn2" if parts else "conv_dw bn1"]
        parts += ["se"] if se == "SE" else []
        parts += ["conv_pwl bn3" if int(inner) != num_in else "conv_pw bn2"]
        for position, part in enumerate(parts):
            ours, theirs = f"features.{feature}.block.{position}", f"blocks.{place}"
            if part == "se":
                prefixes |= {f"{ours}.fc1": f"{theirs}.se.conv_reduce", f"{ours}.fc2": f"{theirs}.se.conv_expand"}
            else:
                convolution, norm = part.split()
                prefixes |= {f"{ours}.0": f"{theirs}.{convolution}", f"{ours}.1": f"{theirs}.{norm}"}
        num_in = int(out)
    last = len(blocks) + 1
    prefixes |= {
        f"features.{last}.0": f"blocks.{len(table)}.0.conv",
        f"features.{last}.1": f"blocks.{len(table)}.0.bn1",
    }
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        is_head = name == "classifier.0.weight"
        named[f"{prefixes[module]}.{kind}"] = tensor[:, :, None, None] if is_head else tensor
    return named


@pytest.mark.parametrize("prefix", ["", "timm_model."])
@pytest.mark.parametrize(("variant", "table"), [("large", LARGE_TABLE), ("small", SMALL_TABLE)])
def test_weights_of_timm_load_and_compute_the_same(variant, table, prefix):
    config = import_config({"architecture": f"mobilenetv3_{variant}_100", "num_classes": 7})
    source = randomize(MobileNetV3(config))
    theirs = name_for_timm(source.state_dict(), table.strip().splitlines())
    ours = randomize(MobileNetV3(config), seed=5)
    ours.load_state_dict(import_tensors({prefix + name: each for name, each in theirs.items()}, config))
    pictures = noise(1, 3, 32, 32)
    expected = run_timm({name: each.numpy() for name, each in theirs.items()}, pictures, table)
    torch.testing.assert_close(ours(pictures), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore::FutureWarning:torch", "ignore::FutureWarning:copyreg")
def test_its_onnx_export_answers_the_same_in_onnx_runtime(tmp_path):
    model = randomize(MobileNetV3(SMALL)).float()
    pictures = noise(2, 3, 64, 64).float()
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (pictures,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: pictures.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(pictures), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("number", [1, 7.9, 8, 11.9, 12, 18, 30, 33.6, 100.8, 1280])
def test_channels_are_rounded_to_a_multiple_of_8_that_is_never_a_tenth_less(number):
    assert round_channels(number) == scaled(number, 1.0)


def test_depthwise_convolutions_start_with_the_deviation_of_one_group():
    torch.manual_seed(0)
    depthwise = MobileNetV3(MobileNetV3Config()).features[15].block[1][0]
    assert depthwise.weight.shape == (960, 1, 5, 5)
    assert depthwise.weight.std().item() == pytest.approx(math.sqrt(2 / 25), rel=0.02)


def test_it_exports_with_any_batch():
    check_export_with_any_batch(randomize(MobileNetV3(SMALL)), noise(2, 3, 64, 64))


def test_its_training_forward_is_one_graph():
    check_one_graph_in_training(MobileNetV3(SMALL).double(), noise(4, 3, 64, 64))


def test_it_runs_with_channels_last():
    check_channels_last(randomize(MobileNetV3(SMALL)), noise(2, 3, 64, 64))


def test_no_module_is_called_twice():
    assert find_modules_called_twice(MobileNetV3(SMALL), torch.zeros(2, 3, 64, 64)) == []


def test_another_architecture_of_timm_is_answered_with_those_that_load():
    with pytest.raises(ConfigError, match="mobilenetv3_large_100"):
        import_config({"architecture": "tf_mobilenetv3_large_100"})


def test_a_tensor_without_a_place_is_refused():
    with pytest.raises(ArtifactError, match="conv_pwl"):
        import_tensors({"blocks.0.0.conv_pwl.weight": torch.zeros(1)}, SMALL)


@pytest.mark.parametrize("change", [{"variant": "medium"}, {"width_multiple": 0}, {"dropout": 1.0}])
def test_a_setting_out_of_range_is_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        SMALL.override(change)
