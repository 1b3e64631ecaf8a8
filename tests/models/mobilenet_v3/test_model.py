"""MobileNetV3: shapes, parameters and numbers as published."""

import math

import onnxruntime
import pytest
import torch

from deepseek.core.errors import ConfigError
from deepseek.models.mobilenet_v3.model import (
    BlockSpec,
    InvertedResidual,
    MobileNetV3,
    MobileNetV3Config,
    SqueezeExcitation,
    round_channels,
)
from tests.models.mobilenet_v3.examples import LARGE_TABLE, SMALL, SMALL_TABLE, scaled, write_blocks
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

ROWS = {
    "widening": (BlockSpec(3, 24, 16, False, "relu", 1), "3 24 16 - RE 1"),
    "plain with squeeze": (BlockSpec(3, 16, 16, True, "relu", 2), "3 16 16 SE RE 2"),
    "wide view": (BlockSpec(5, 40, 24, True, "hardswish", 2), "5 40 24 SE HS 2"),
}


def run_torchvision(weights, pictures, table, width=1.0, eps=1e-3):
    graph = Graph(weights)
    x = graph.hardswish(graph.norm(graph.conv("pictures", "features.0.0", stride=2), "features.0.1", eps))
    x, last, _ = write_blocks(graph, x, table, width, eps, "torchvision")
    x = graph.hardswish(graph.norm(graph.conv(x, f"features.{last}.0"), f"features.{last}.1", eps))
    x = graph.add("Flatten", graph.add("GlobalAveragePool", x))
    logits = graph.linear(graph.hardswish(graph.linear(x, "classifier.0")), "classifier.3")
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


@pytest.mark.parametrize("change", [{"variant": "medium"}, {"width_multiple": 0}, {"dropout": 1.0}])
def test_a_setting_out_of_range_is_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        SMALL.override(change)
