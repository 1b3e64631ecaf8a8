"""YOLOv7: the network, its boxes and the names of its weights."""

import copy
import math

import pytest
import torch

from deepseek.core.errors import ConfigError
from deepseek.models import zoo
from deepseek.models.yolov7.model import (
    COCO_ANCHORS,
    ROWS,
    SPPCSPC,
    ConvNorm,
    Head,
    RepConv,
    YOLOv7,
    YOLOv7Config,
    decode,
)
from deepseek.models.yolov7.suppression import select
from deepseek.models.zoo import settle_
from tests.models.pictures import (
    arrays,
    check_channels_last,
    check_export_with_any_batch,
    check_one_graph_in_training,
    find_modules_called_twice,
    noise,
    randomize,
)
from tests.models.yolov7.examples import SMALL, TINY, chain
from tests.onnx.onnx_graphs import Graph

EPS = 1e-3
# The network as its authors number it: row, kind, channels, kernel, stride, rows read.
NETWORK = """
0 conv 32 3 1 in; 1 conv 64 3 2 0; 2 conv 64 3 1 1; 3 conv 128 3 2 2
4 conv 64 1 1 3; 5 conv 64 1 1 3; 6 conv 64 3 1 5; 7 conv 64 3 1 6; 8 conv 64 3 1 7; 9 conv 64 3 1 8
10 cat 9 7 5 4; 11 conv 256 1 1 10
12 pool 11; 13 conv 128 1 1 12; 14 conv 128 1 1 11; 15 conv 128 3 2 14; 16 cat 15 13
17 conv 128 1 1 16; 18 conv 128 1 1 16; 19 conv 128 3 1 18; 20 conv 128 3 1 19; 21 conv 128 3 1 20; 22 conv 128 3 1 21
23 cat 22 20 18 17; 24 conv 512 1 1 23
25 pool 24; 26 conv 256 1 1 25; 27 conv 256 1 1 24; 28 conv 256 3 2 27; 29 cat 28 26
30 conv 256 1 1 29; 31 conv 256 1 1 29; 32 conv 256 3 1 31; 33 conv 256 3 1 32; 34 conv 256 3 1 33; 35 conv 256 3 1 34
36 cat 35 33 31 30; 37 conv 1024 1 1 36
38 pool 37; 39 conv 512 1 1 38; 40 conv 512 1 1 37; 41 conv 512 3 2 40; 42 cat 41 39
43 conv 256 1 1 42; 44 conv 256 1 1 42; 45 conv 256 3 1 44; 46 conv 256 3 1 45; 47 conv 256 3 1 46; 48 conv 256 3 1 47
49 cat 48 46 44 43; 50 conv 1024 1 1 49
51 spp 512 50
52 conv 256 1 1 51; 53 up 52; 54 conv 256 1 1 37; 55 cat 54 53
56 conv 256 1 1 55; 57 conv 256 1 1 55; 58 conv 128 3 1 57; 59 conv 128 3 1 58; 60 conv 128 3 1 59; 61 conv 128 3 1 60
62 cat 61 60 59 58 57 56; 63 conv 256 1 1 62
64 conv 128 1 1 63; 65 up 64; 66 conv 128 1 1 24; 67 cat 66 65
68 conv 128 1 1 67; 69 conv 128 1 1 67; 70 conv 64 3 1 69; 71 conv 64 3 1 70; 72 conv 64 3 1 71; 73 conv 64 3 1 72
74 cat 73 72 71 70 69 68; 75 conv 128 1 1 74
76 pool 75; 77 conv 128 1 1 76; 78 conv 128 1 1 75; 79 conv 128 3 2 78; 80 cat 79 77 63
81 conv 256 1 1 80; 82 conv 256 1 1 80; 83 conv 128 3 1 82; 84 conv 128 3 1 83; 85 conv 128 3 1 84; 86 conv 128 3 1 85
87 cat 86 85 84 83 82 81; 88 conv 256 1 1 87
89 pool 88; 90 conv 256 1 1 89; 91 conv 256 1 1 88; 92 conv 256 3 2 91; 93 cat 92 90 51
94 conv 512 1 1 93; 95 conv 512 1 1 93; 96 conv 256 3 1 95; 97 conv 256 3 1 96; 98 conv 256 3 1 97; 99 conv 256 3 1 98
100 cat 99 98 97 96 95 94; 101 conv 512 1 1 100
102 rep 256 75; 103 rep 512 88; 104 rep 1024 101
"""
TINY_NETWORK = """
0 conv 32 3 2 in; 1 conv 64 3 2 0
2 conv 32 1 1 1; 3 conv 32 1 1 1; 4 conv 32 3 1 3; 5 conv 32 3 1 4; 6 cat 5 4 3 2; 7 conv 64 1 1 6
8 pool 7; 9 conv 64 1 1 8; 10 conv 64 1 1 8; 11 conv 64 3 1 10; 12 conv 64 3 1 11; 13 cat 12 11 10 9; 14 conv 128 1 1 13
15 pool 14; 16 conv 128 1 1 15; 17 conv 128 1 1 15; 18 conv 128 3 1 17; 19 conv 128 3 1 18; 20 cat 19 18 17 16
21 conv 256 1 1 20
22 pool 21; 23 conv 256 1 1 22; 24 conv 256 1 1 22; 25 conv 256 3 1 24; 26 conv 256 3 1 25; 27 cat 26 25 24 23
28 conv 512 1 1 27
29 conv 256 1 1 28; 30 conv 256 1 1 28; 31 same 5 30; 32 same 9 30; 33 same 13 30; 34 cat 33 32 31 30
35 conv 256 1 1 34; 36 cat 35 29; 37 conv 256 1 1 36
38 conv 128 1 1 37; 39 up 38; 40 conv 128 1 1 21; 41 cat 40 39
42 conv 64 1 1 41; 43 conv 64 1 1 41; 44 conv 64 3 1 43; 45 conv 64 3 1 44; 46 cat 45 44 43 42; 47 conv 128 1 1 46
48 conv 64 1 1 47; 49 up 48; 50 conv 64 1 1 14; 51 cat 50 49
52 conv 32 1 1 51; 53 conv 32 1 1 51; 54 conv 32 3 1 53; 55 conv 32 3 1 54; 56 cat 55 54 53 52; 57 conv 64 1 1 56
58 conv 128 3 2 57; 59 cat 58 47
60 conv 64 1 1 59; 61 conv 64 1 1 59; 62 conv 64 3 1 61; 63 conv 64 3 1 62; 64 cat 63 62 61 60; 65 conv 128 1 1 64
66 conv 256 3 2 65; 67 cat 66 37
68 conv 128 1 1 67; 69 conv 128 1 1 67; 70 conv 128 3 1 69; 71 conv 128 3 1 70; 72 cat 71 70 69 68; 73 conv 256 1 1 72
74 conv 128 3 1 57; 75 conv 256 3 1 65; 76 conv 512 3 1 73
"""
LINES = [line.split() for line in NETWORK.replace("\n", ";").split(";") if line.strip()]
TINY_LINES = [line.split() for line in TINY_NETWORK.replace("\n", ";").split(";") if line.strip()]
# (first row, last row, the rows that are read from before)
PATTERNS = {
    "stem": (0, 3, {"in": 3}),
    "elan": (4, 11, {"3": 128}),
    "shrink": (12, 16, {"11": 256}),
    "deep elan": (43, 50, {"42": 1024}),
    "grow": (52, 55, {"51": 512, "37": 1024}),
    "gather": (56, 63, {"55": 512}),
    "shrink beside a shortcut": (76, 80, {"75": 128, "63": 256}),
}


def leak(graph, x):
    """The larger of x and a tenth of it."""
    return graph.add("Max", x, graph.add("Mul", x, graph.constant(0.1)))


def conv_norm(graph, x, name, stride=1, activate=Graph.silu):
    if f"{name}.bn.weight" not in graph.weights:
        return activate(graph, graph.conv(x, f"{name}.conv", stride=stride))
    return activate(graph, graph.norm(graph.conv(x, f"{name}.conv", stride=stride), f"{name}.bn", EPS))


def sppcspc(graph, x, name):
    near = conv_norm(graph, conv_norm(graph, conv_norm(graph, x, f"{name}.cv1"), f"{name}.cv3"), f"{name}.cv4")
    pools = [graph.max_pool(near, kernel, 1, kernel // 2) for kernel in (5, 9, 13)]
    far = conv_norm(graph, graph.add("Concat", near, *pools, axis=1), f"{name}.cv5")
    far = conv_norm(graph, far, f"{name}.cv6")
    return conv_norm(graph, graph.add("Concat", far, conv_norm(graph, x, f"{name}.cv2"), axis=1), f"{name}.cv7")


def repconv(graph, x, name):
    dense = graph.norm(graph.conv(x, f"{name}.rbr_dense.0"), f"{name}.rbr_dense.1", EPS)
    point = graph.norm(graph.conv(x, f"{name}.rbr_1x1.0"), f"{name}.rbr_1x1.1", EPS)
    total = graph.add("Add", dense, point)
    if f"{name}.rbr_identity.weight" in graph.weights:
        total = graph.add("Add", total, graph.norm(x, f"{name}.rbr_identity", EPS))
    return graph.silu(total)


def head(graph, x, name, level):
    """(B, A * O, H, W): the convolution of one level of the head."""
    shifted = graph.add("Add", x, graph.weight(f"{name}.ia.{level}.implicit"))
    return graph.add("Mul", graph.conv(shifted, f"{name}.m.{level}"), graph.weight(f"{name}.im.{level}.implicit"))


def write_row(graph, values, row, activate=Graph.silu):
    number, kind, *numbers = row
    name = f"model.{number}"
    if kind == "conv":
        _, kernel, stride, read = numbers
        assert graph.weights[f"{name}.conv.weight"].shape[-1] == int(kernel)
        return conv_norm(graph, values[read], name, int(stride), activate)
    if kind == "cat":
        return graph.add("Concat", *(values[read] for read in numbers), axis=1)
    if kind == "pool":
        return graph.max_pool(values[numbers[0]], 2, 2, 0)
    if kind == "same":
        kernel, read = numbers
        return graph.max_pool(values[read], int(kernel), 1, int(kernel) // 2)
    if kind == "up":
        return graph.double_size(values[numbers[0]])
    return {"spp": sppcspc, "rep": repconv}[kind](graph, values[numbers[-1]], name)


def run_rows(model, first, last, **inputs):
    """Values of rows `first` to `last`; `inputs` are the rows read from before, as row11=..., or the picture."""
    graph = Graph(arrays(model))
    values = {name.removeprefix("row"): name for name in inputs}
    for row in LINES[first : last + 1]:
        values[row[0]] = write_row(graph, values, row)
    return torch.from_numpy(graph.run([values[str(last)]], **inputs)[0])


def run_layer(write, layer, x, *arguments):
    graph = Graph({f"layer.{name}": each for name, each in arrays(layer).items()})
    return torch.from_numpy(graph.run([write(graph, "x", "layer", *arguments)], x=x)[0])


def check_equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11 * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2)])
def test_a_convolution_is_normed_and_activated(kernel, stride):
    layer, x = randomize(ConvNorm(SMALL, 8, 16, kernel, stride)), noise(2, 8, 6, 10)
    check_equal(layer(x), run_layer(conv_norm, layer, x, stride))


def test_sppcspc_sees_surroundings_of_four_sizes():
    layer, x = randomize(SPPCSPC(SMALL, 16, 8)), noise(1, 16, 15, 14)
    check_equal(layer(x), run_layer(sppcspc, layer, x))


@pytest.mark.parametrize("num_out", [8, 16], ids=["with the input itself", "without"])
def test_repconv_adds_its_branches(num_out):
    layer, x = randomize(RepConv(SMALL, 8, num_out)), noise(2, 8, 7, 6)
    assert (layer.rbr_identity is not None) == (num_out == 8)
    check_equal(layer(x), run_layer(repconv, layer, x))


def test_the_head_convolves_between_an_offset_and_a_factor():
    layer = randomize(Head(SMALL, [8, 16, 24]))
    maps = [noise(2, size, 4, 3) for size in (8, 16, 24)]
    for level, (ours, x) in enumerate(zip(layer(*maps), maps, strict=True)):
        flat = run_layer(head, layer, x, level)
        check_equal(ours, flat.reshape(2, 3, 8, 4, 3).permute(0, 1, 3, 4, 2))


@pytest.mark.parametrize(("first", "last", "reads"), PATTERNS.values(), ids=PATTERNS)
def test_every_pattern_of_rows_computes_what_its_numbers_say(model, first, last, reads):
    rows = {name: SMALL.scale(size) if name != "in" else 3 for name, size in reads.items()}
    is_larger = {"37": 2, "63": 1, "75": 2}  # maps that meet have sizes that fit
    inputs = {f"row{name}": noise(1, size, *[8 * is_larger.get(name, 1)] * 2, seed=size) for name, size in rows.items()}
    values = {int(name) if name != "in" else -1: inputs[f"row{name}"] for name in rows}
    for index in range(first, last + 1):
        values[index] = model.model[index](*(values[read] for read in model.sources[index]))
    check_equal(values[last], run_rows(model, first, last, **inputs))


def test_the_whole_network_computes_what_its_numbers_say(model):
    pictures = noise(1, 3, 64, 96)
    graph = Graph(arrays(model))
    values = {"in": "pictures"}
    for row in LINES:
        values[row[0]] = write_row(graph, values, row)
    outputs = [head(graph, values[str(102 + level)], "model.105", level) for level in range(3)]
    expected = graph.run(outputs, pictures=pictures)
    with torch.inference_mode():
        for ours, theirs in zip(model.predict_raw(pictures), expected, strict=True):
            batch, _, height, width = theirs.shape
            check_equal(ours, torch.from_numpy(theirs).reshape(batch, 3, 8, height, width).permute(0, 1, 3, 4, 2))


def test_the_whole_tiny_network_computes_what_its_numbers_say():
    network = settle_(randomize(YOLOv7(TINY)), noise(16, 3, 64, 96, seed=3))
    pictures = noise(1, 3, 64, 96)
    graph = Graph(arrays(network))
    values = {"in": "pictures"}
    for row in TINY_LINES:
        values[row[0]] = write_row(graph, values, row, leak)
    outputs = [head(graph, values[str(74 + level)], "model.77", level) for level in range(3)]
    expected = graph.run(outputs, pictures=pictures)
    with torch.inference_mode():
        for ours, theirs in zip(network.predict_raw(pictures), expected, strict=True):
            check_equal(ours, torch.from_numpy(theirs).unflatten(1, (3, 8)).permute(0, 1, 3, 4, 2))


def test_channels_and_names_of_the_tiny_network_are_those_of_its_numbers():
    with torch.device("meta"):
        full = zoo.build("yolov7-tiny")
    for number, kind, *numbers in TINY_LINES:
        if kind == "conv":
            assert full.model[int(number)].conv.out_channels == int(numbers[0])
    assert [conv.weight.shape for conv in full.head.m] == [(255, size, 1, 1) for size in (128, 256, 512)]
    with_weights = {name.split(".")[1] for name in full.state_dict()}
    assert with_weights == {row[0] for row in TINY_LINES if row[1] == "conv"} | {"77"}
    assert "model.77.m.0.weight" in full.state_dict() and "model.37.bn.running_var" in full.state_dict()
    # Of the 6,219,709 that the authors' summary counts once it is fused, training has a factor for each channel more
    # (a norm has two numbers and a bias one) and the offsets and factors of the head.
    num_channels = sum(int(numbers[0]) for _, kind, *numbers in TINY_LINES if kind == "conv")
    assert sum(each.numel() for each in full.parameters()) == 6_219_709 + num_channels + (128 + 256 + 512) + 3 * 255


def test_channels_of_the_published_network_are_those_of_its_numbers():
    with torch.device("meta"):
        full = YOLOv7(YOLOv7Config())
    assert len(LINES) == len(ROWS) == 105
    for number, kind, *numbers in LINES:
        layer = full.model[int(number)]
        if kind == "conv":
            assert layer.conv.out_channels == int(numbers[0])
        if kind == "spp":
            assert layer.cv7.conv.out_channels == int(numbers[0])
        if kind == "rep":
            assert layer.rbr_dense[0].out_channels == int(numbers[0])
    assert [conv.weight.shape for conv in full.head.m] == [(255, size, 1, 1) for size in (256, 512, 1024)]


def test_names_are_those_of_the_authors_files(model):
    names = set(model.state_dict())
    for name in (
        "model.0.conv.weight",
        "model.0.bn.running_var",
        "model.51.cv1.conv.weight",
        "model.51.cv7.bn.bias",
        "model.102.rbr_dense.0.weight",
        "model.102.rbr_dense.1.running_mean",
        "model.102.rbr_1x1.0.weight",
        "model.105.anchors",
        "model.105.anchor_grid",
        "model.105.m.2.bias",
        "model.105.ia.0.implicit",
        "model.105.im.2.implicit",
    ):
        assert name in names
    assert model.state_dict()["model.105.anchor_grid"].shape == (3, 1, 3, 1, 1, 2)
    assert model.state_dict()["model.105.anchors"][1, 0].tolist() == [36 / 16, 75 / 16]


def decode_one_by_one(raw_BAHWO, anchors, stride):
    """Wang et al. 2022 follow YOLOv5: plain loops over every cell."""
    boxes = []
    for picture in raw_BAHWO.numpy():
        boxes.append([])
        for anchor, map_HWO in zip(anchors, picture, strict=True):
            for row, cells in enumerate(map_HWO):
                for column, numbers in enumerate(cells):
                    x, y, w, h, *rest = (1 / (1 + math.exp(-each)) for each in numbers)
                    centre = (x * 2 - 0.5 + column) * stride, (y * 2 - 0.5 + row) * stride
                    boxes[-1].append([*centre, (w * 2) ** 2 * anchor[0], (h * 2) ** 2 * anchor[1], *rest])
    return torch.tensor(boxes, dtype=torch.float64)


def test_boxes_are_decoded_cell_by_cell(model):
    pictures = noise(2, 3, 64, 96)
    with torch.inference_mode():
        raws, boxes = model.predict_raw(pictures), model(pictures)
    levels = zip(raws, COCO_ANCHORS, (8, 16, 32), strict=True)
    torch.testing.assert_close(boxes, torch.cat([decode_one_by_one(*level) for level in levels], dim=1))
    assert boxes.shape == (2, 3 * (8 * 12 + 4 * 6 + 2 * 3), 8)
    assert boxes[..., 4:].std() > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_boxes_of_a_16_bit_model_keep_their_pixels(dtype):
    raw = noise(1, 3, 80, 80, 6).to(dtype)
    anchors = torch.tensor(COCO_ANCHORS[0], dtype=dtype)[None, :, None, None]
    boxes = decode(raw, anchors, 8)
    torch.testing.assert_close(boxes, decode(raw.double(), anchors.double(), 8).float(), rtol=1e-6, atol=1e-4)


def test_an_untrained_head_expects_few_objects():
    untrained = YOLOv7(YOLOv7Config(width_multiple=0.125))
    expected = [8 / (640 / stride) ** 2 for stride in (8, 16, 32)]
    for conv, odds in zip(untrained.head.m, expected, strict=True):
        bias_AO = conv.bias.detach().view(3, 85)
        assert bias_AO[:, 4].exp().tolist() == pytest.approx([odds] * 3)
        assert bias_AO[:, 5:].exp().mean().item() == pytest.approx(0.6 / (80 - 0.99))
    with torch.inference_mode():
        boxes = settle_(untrained, torch.rand(2, 3, 640, 640)).eval()(torch.rand(1, 3, 640, 640))
    assert 1 < boxes[..., 4].sum().item() / 3 / 3 < 100


@pytest.mark.parametrize(
    ("variant", "is_folded", "num_classes", "count"),
    [
        ("base", False, 80, 37_622_682),
        ("base", True, 80, 36_905_341),
        ("base", False, 1, 37_196_556),
        ("tiny", True, 80, 6_219_709),
    ],  # the authors' model summaries
    ids=["training", "folded", "one class", "folded tiny"],
)
def test_published_counts_are_met(variant, is_folded, num_classes, count):
    with torch.device("meta"):
        network = YOLOv7(YOLOv7Config(variant=variant, is_folded=is_folded, num_classes=num_classes))
    assert sum(each.numel() for each in network.parameters()) == count


def test_scores_that_are_not_numbers_never_count():
    predictions = chain(3)
    predictions[0, 1, 4] = torch.nan
    assert detections_of(predictions) == [1.0, 1 - 2 / 6]


def detections_of(predictions):
    return select(predictions, max_overlap=1.0).of(0)[1].tolist()


def test_it_exports_with_any_batch(model):
    check_export_with_any_batch(copy.deepcopy(model), noise(2, 3, 64, 64))


@pytest.mark.slow
def test_its_training_forward_is_one_graph():
    check_one_graph_in_training(YOLOv7(SMALL).double(), noise(2, 3, 64, 64))


def test_its_forward_is_one_graph(model):
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    pictures = noise(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(pictures), model(pictures))


def test_it_runs_with_channels_last(model):
    check_channels_last(copy.deepcopy(model), noise(2, 3, 64, 64))


def test_no_module_is_called_twice(model):
    assert find_modules_called_twice(model, noise(1, 3, 64, 64)) == []


def test_a_picture_that_does_not_fit_the_strides_is_refused(model):
    with pytest.raises(ConfigError, match="letterbox"):
        model(noise(1, 3, 64, 80))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anchors": [[[1, 2]], [[1, 2]]]}, "strides"),
        ({"anchors": [[[1, 2]], [[1, 2]], [[1, 2], [3, 4]]]}, "as many"),
        ({"anchors": [[[1, 2]], [[1, 0]], [[3, 4]]]}, "without area"),
        ({"image_size": 100}, "image_size"),
        ({"num_classes": 0}, "num_classes"),
        ({"labels": ["cat", "dog"]}, "labels has 2 names"),
    ],
)
def test_a_setting_out_of_range_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        SMALL.override(change)


def test_defaults_are_the_same_settings_after_a_round_trip():
    assert SMALL.override({}).digest == SMALL.digest
