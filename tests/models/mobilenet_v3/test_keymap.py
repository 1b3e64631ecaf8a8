"""MobileNetV3 of timm under torchvision's names."""

import pytest
import torch

from deepseek.core.errors import ArtifactError, ConfigError
from deepseek.models.mobilenet_v3.keymap import import_config, import_tensors
from deepseek.models.mobilenet_v3.model import (
    MobileNetV3,
)
from tests.models.mobilenet_v3.examples import LARGE_TABLE, SMALL, SMALL_TABLE, write_blocks
from tests.models.pictures import (
    noise,
    randomize,
)
from tests.onnx.onnx_graphs import Graph


def run_timm(weights, pictures, table, eps=1e-5):
    graph = Graph(weights)
    x = graph.hardswish(graph.norm(graph.conv("pictures", "conv_stem", stride=2), "bn1", eps))
    x, _, last = write_blocks(graph, x, table, 1.0, eps, "timm")
    x = graph.hardswish(graph.norm(graph.conv(x, f"blocks.{last}.0.conv"), f"blocks.{last}.0.bn1", eps))
    hidden = graph.hardswish(graph.conv(graph.add("GlobalAveragePool", x), "conv_head"))
    logits = graph.linear(graph.add("Flatten", hidden), "classifier")
    return torch.from_numpy(graph.run([logits], pictures=pictures)[0])


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


def test_another_architecture_of_timm_is_answered_with_those_that_load():
    with pytest.raises(ConfigError, match="mobilenetv3_large_100"):
        import_config({"architecture": "tf_mobilenetv3_large_100"})


def test_a_tensor_without_a_place_is_refused():
    with pytest.raises(ArtifactError, match="conv_pwl"):
        import_tensors({"blocks.0.0.conv_pwl.weight": torch.zeros(1)}, SMALL)
