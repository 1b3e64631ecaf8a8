"""YOLOv7 against ONNX graphs written by hand, its boxes and their suppression against plain Python, one at a time."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.export import Dim, export

from deepseek.core.errors import ConfigError
from deepseek.models.yolov7 import detection
from deepseek.models.yolov7.detection import overlap, select, to_corners
from deepseek.models.yolov7.letterbox import GREY, letterbox, restore
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
from deepseek.models.yolov7.reparameterization import fold_
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
from tests.onnx.onnx_graphs import Graph

SMALL = YOLOv7Config(width_multiple=0.125, num_classes=3, image_size=64)
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
LINES = [line.split() for line in NETWORK.replace("\n", ";").split(";") if line.strip()]


# ---- the layers, by hand


def conv_norm(graph, x, name, stride=1):
    if f"{name}.bn.weight" not in graph.weights:
        return graph.silu(graph.conv(x, f"{name}.conv", stride=stride))
    return graph.silu(graph.norm(graph.conv(x, f"{name}.conv", stride=stride), f"{name}.bn", EPS))


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


def write_row(graph, values, row):
    number, kind, *numbers = row
    name = f"model.{number}"
    if kind == "conv":
        _, kernel, stride, read = numbers
        assert graph.weights[f"{name}.conv.weight"].shape[-1] == int(kernel)
        return conv_norm(graph, values[read], name, int(stride))
    if kind == "cat":
        return graph.add("Concat", *(values[read] for read in numbers), axis=1)
    if kind == "pool":
        return graph.max_pool(values[numbers[0]], 2, 2, 0)
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


@pytest.fixture(scope="module")
def model():
    """Weights that are nowhere trivial, with statistics under which answers vary and no sigmoid saturates."""
    network = settle_(randomize(YOLOv7(SMALL)), noise(64, 3, 64, 96, seed=3))
    with torch.no_grad():
        for conv in network.head.m:
            conv.weight.copy_(noise(*conv.weight.shape, seed=4) * 0.3)
    return network


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


# ---- boxes


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


# ---- folding


def test_a_folded_network_answers_the_same_with_fewer_parameters(model):
    folded = fold_(copy.deepcopy(model))
    pictures = noise(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(folded(pictures), model(pictures), rtol=1e-10, atol=1e-10)
    assert not any(isinstance(each, nn.BatchNorm2d) for each in folded.modules())
    assert not any("implicit" in name or "rbr_1x1" in name for name in folded.state_dict())
    assert folded.config.is_folded and not model.config.is_folded


def test_a_folded_network_in_float32_is_off_by_rounding_only(model):
    single = copy.deepcopy(model).float()
    pictures = noise(1, 3, 64, 64).float()
    with torch.inference_mode():
        before, after, exact = single(pictures), fold_(copy.deepcopy(single))(pictures), model(pictures.double())
    error_before, error_after = ((each - exact).abs().max().item() for each in (before, after))
    assert error_after < 10 * error_before + 1e-6


def test_a_repconv_with_an_identity_folds_into_one_convolution():
    layer, x = randomize(RepConv(SMALL, 8, 8)), noise(2, 8, 7, 6)
    expected = layer(x)
    whole = YOLOv7(SMALL).double().eval()
    whole.model[102] = layer
    fold_(whole)
    assert set(layer.state_dict()) == {"rbr_reparam.weight", "rbr_reparam.bias"}
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_stored_folded_weights_load_into_a_network_built_folded(model):
    stored = fold_(copy.deepcopy(model)).state_dict()
    loaded = YOLOv7(SMALL.override({"is_folded": True})).double().eval()
    loaded.load_state_dict(stored)
    pictures = noise(1, 3, 64, 64)
    torch.testing.assert_close(loaded(pictures), model(pictures), rtol=1e-10, atol=1e-10)


def test_folding_twice_changes_nothing_more(model):
    folded = fold_(copy.deepcopy(model))
    before = {name: each.clone() for name, each in folded.state_dict().items()}
    torch.testing.assert_close(dict(fold_(folded).state_dict()), before, rtol=0, atol=0)


def test_folding_keeps_channels_last(model):
    folded = fold_(copy.deepcopy(model).to(memory_format=torch.channels_last))
    weight = folded.model[6].conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def test_a_network_in_training_is_not_folded():
    with pytest.raises(ConfigError, match="eval"):
        fold_(YOLOv7(SMALL).train())


@pytest.mark.parametrize(
    ("is_folded", "num_classes", "count"),
    [(False, 80, 37_622_682), (True, 80, 36_905_341), (False, 1, 37_196_556)],  # the authors' model summaries
    ids=["training", "folded", "one class"],
)
def test_published_counts_are_met(is_folded, num_classes, count):
    with torch.device("meta"):
        network = YOLOv7(YOLOv7Config(is_folded=is_folded, num_classes=num_classes))
    assert sum(each.numel() for each in network.parameters()) == count


# ---- suppression


def overlap_of_two(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union > 0 else 0.0


def select_one_by_one(predictions_NO, min_score, max_overlap, is_multi_label, max_candidates, max_detections):
    """The definition: take the best box, drop what it overlaps in its class, and so on."""
    found = []
    for x, y, w, h, objectness, *classes in predictions_NO.tolist():
        scores = [objectness * each for each in classes]
        best = max(range(len(scores)), key=lambda label: (scores[label], -label))
        labels = range(len(scores)) if is_multi_label else [best]
        corners = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
        found += [(scores[label], corners, label) for label in labels if scores[label] > min_score]
    waiting = sorted(found, key=lambda each: -each[0])[:max_candidates]
    kept = []
    while waiting:
        best = waiting.pop(0)
        kept.append(best)
        waiting = [each for each in waiting if each[2] != best[2] or overlap_of_two(each[1], best[1]) <= max_overlap]
    return kept[:max_detections]


# Coordinates and scores on coarse grids, so that overlaps, ties and chains are many and products are exact.
EIGHTHS = st.integers(0, 8).map(lambda number: number / 8)
BOX = st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(0, 8), st.integers(0, 8))
PREDICTION = st.tuples(BOX, EIGHTHS, st.lists(EIGHTHS, min_size=2, max_size=2)).map(
    lambda each: [*each[0], each[1], *each[2]]
)


@settings(max_examples=150, deadline=None)
@given(
    pictures=st.integers(0, 24).flatmap(
        lambda count: st.lists(st.lists(PREDICTION, min_size=count, max_size=count), min_size=1, max_size=3)
    ),
    min_score=st.sampled_from([0.0, 0.125, 0.3]),
    max_overlap=st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 1.0]),
    is_multi_label=st.booleans(),
    max_candidates=st.sampled_from([5, 3000]),
    max_detections=st.sampled_from([3, 300]),
)
def test_the_boxes_that_stay_are_those_of_the_definition(
    pictures, min_score, max_overlap, is_multi_label, max_candidates, max_detections
):
    predictions = torch.tensor(pictures, dtype=torch.float64).reshape(len(pictures), -1, 7)
    rules = {
        "min_score": min_score,
        "max_overlap": max_overlap,
        "is_multi_label": is_multi_label,
        "max_candidates": max_candidates,
        "max_detections": max_detections,
    }
    detections = select(predictions, **rules)
    for index, picture in enumerate(predictions):
        expected = select_one_by_one(picture, **rules)
        boxes, scores, labels = detections.of(index)
        assert scores.tolist() == [score for score, _, _ in expected]
        assert labels.tolist() == [label for _, _, label in expected]
        assert boxes.tolist() == [list(corners) for _, corners, _ in expected]


def chain(length):
    """Boxes in a row, of falling scores, of which each overlaps only with its neighbours."""
    boxes = [[10.0 * each, 0.0, 16.0, 10.0, 1 - each / (2 * length), 1.0] for each in range(length)]
    return torch.tensor([boxes], dtype=torch.float64)


def test_in_a_chain_every_other_box_stays():
    boxes, *_ = select(chain(41), max_overlap=0.2).of(0)
    assert boxes[:, 0].tolist() == [20.0 * each - 8 for each in range(21)]


def test_many_pictures_are_compared_in_parts_with_the_same_answer(monkeypatch):
    predictions = torch.rand(5, 60, 8, generator=torch.Generator().manual_seed(0)) * 40
    predictions[..., 4:] /= 40
    whole = select(predictions)
    monkeypatch.setattr(detection, "MAX_PAIRS", 2 * 60 * 60)
    parts = select(predictions)
    torch.testing.assert_close(vars(parts), vars(whole), rtol=0, atol=0)


def test_pictures_are_padded_with_zeros():
    predictions = chain(3).repeat(2, 1, 1)
    predictions[1, :, 4] = 0
    detections = select(predictions, max_overlap=1.0)
    assert detections.counts_B.tolist() == [3, 0]
    assert not detections.boxes_BM4[1].any() and not detections.scores_BM[1].any()


def test_nothing_is_found_where_there_is_nothing():
    for shape in ((2, 0, 7), (0, 5, 7), (2, 5, 7)):
        detections = select(torch.zeros(shape))
        assert detections.counts_B.tolist() == [0] * shape[0]
        assert detections.boxes_BM4.shape == (shape[0], 0, 4)


def test_scores_that_are_not_numbers_never_count():
    predictions = chain(3)
    predictions[0, 1, 4] = torch.nan
    assert detections_of(predictions) == [1.0, 1 - 2 / 6]


def detections_of(predictions):
    return select(predictions, max_overlap=1.0).of(0)[1].tolist()


def test_areas_too_large_for_float16_are_compared_all_the_same():
    box = [320.0, 320.0, 600.0, 600.0, 1.0, 1.0]
    twins = torch.tensor([[box, [322.0, *box[1:4], 0.9, 1.0], [100.0, 100.0, 20.0, 20.0, 0.9, 1.0]]]).half()
    assert select(twins).counts_B.tolist() == [2]


def test_overlap_is_zero_where_no_box_has_an_area():
    points = torch.zeros(1, 2, 4)
    assert overlap(points).tolist() == [[[0.0, 0.0], [0.0, 0.0]]]


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ({"min_score": 1.5}, "min_score"),
        ({"max_overlap": -0.1}, "max_overlap"),
        ({"max_candidates": 0}, "max_candidates"),
        ({"max_detections": 0}, "max_detections"),
    ],
)
def test_rules_out_of_range_are_refused(rules, named):
    with pytest.raises(ConfigError, match=named):
        select(torch.zeros(1, 2, 7), **rules)


@pytest.mark.parametrize("shape", [(2, 7), (1, 2, 5)])
def test_what_is_no_prediction_is_refused(shape):
    with pytest.raises(ConfigError, match="expected"):
        select(torch.zeros(shape))


# ---- letterboxing


@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    size=st.tuples(st.sampled_from([32, 64]), st.sampled_from([32, 96])),
    corners=st.tuples(*[st.floats(0, 1)] * 4),
)
@settings(max_examples=80, deadline=None)
def test_a_box_comes_back_from_where_the_letterbox_put_it(height, width, size, corners):
    picture = torch.ones(1, height, width, dtype=torch.float64)
    fitted, how = letterbox(picture, size, grey=0.0)
    assert fitted.shape == (1, *size)
    inner = fitted[0] > 0.5
    rows, columns = inner.any(1).nonzero().flatten(), inner.any(0).nonzero().flatten()
    assert inner.sum() == len(rows) * len(columns)  # one rectangle, which touches two sides
    assert len(rows) == size[0] or len(columns) == size[1]
    assert abs(len(rows) * width - len(columns) * height) <= max(width, height)  # undistorted but for whole pixels
    (x0, x1), (y0, y1) = sorted(corners[:2]), sorted(corners[2:])
    box = torch.tensor([x0 * width, y0 * height, x1 * width, y1 * height], dtype=torch.float64)
    zoom = np.array([len(columns) / width, len(rows) / height] * 2)
    placed = torch.from_numpy(box.numpy() * zoom + np.array([columns[0], rows[0]] * 2))
    torch.testing.assert_close(restore(placed, how), box, rtol=1e-9, atol=1e-9)


def test_a_letterbox_keeps_the_picture_and_greys_the_rest():
    picture = torch.rand(3, 64, 32, generator=torch.Generator().manual_seed(0))
    fitted, how = letterbox(picture, (64, 64))
    assert (how.left, how.top, how.scale_x, how.scale_y) == (16, 0, 1.0, 1.0)
    torch.testing.assert_close(fitted[:, :, 16:48], picture)
    assert fitted[:, :, :16].eq(GREY).all() and fitted[:, :, 48:].eq(GREY).all()


def test_a_small_picture_may_keep_its_size():
    fitted, how = letterbox(torch.ones(3, 10, 20), (64, 64), can_enlarge=False)
    assert (how.left, how.top, how.scale_x) == (22, 27, 1.0)
    assert fitted.eq(1).sum() == 3 * 10 * 20


def test_boxes_are_cut_off_at_the_edges_of_the_picture():
    _, how = letterbox(torch.ones(3, 100, 200), (64, 64))
    assert restore(torch.tensor([-5.0, 0.0, 70.0, 64.0]), how).tolist() == [0.0, 0.0, 200.0, 100.0]


@pytest.mark.parametrize(
    "picture",
    [torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(4, 4), torch.zeros(3, 0, 4)],
    ids=["bytes", "two dimensions", "empty"],
)
def test_what_is_no_picture_is_refused(picture):
    with pytest.raises(ConfigError, match="expected"):
        letterbox(picture, (64, 64))


# ---- capturing


def test_it_exports_with_any_batch(model):
    check_export_with_any_batch(copy.deepcopy(model), noise(2, 3, 64, 64))


def test_it_exports_folded_with_any_size(model):
    folded = fold_(copy.deepcopy(model))
    sizes = {0: Dim("batch", max=16), 2: 32 * Dim("rows", max=40), 3: 32 * Dim("columns", max=40)}
    program = export(folded, (noise(2, 3, 64, 96),), dynamic_shapes=(sizes,), strict=False).module()
    pictures = noise(1, 3, 96, 64)
    torch.testing.assert_close(program(pictures), folded(pictures))


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
    ],
)
def test_a_setting_out_of_range_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        SMALL.override(change)


def test_defaults_are_the_same_settings_after_a_round_trip():
    assert SMALL.override({}).digest == SMALL.digest


def test_corners_are_half_a_size_from_the_centre():
    assert to_corners(torch.tensor([[10.0, 20.0, 4.0, 6.0]])).tolist() == [[8.0, 17.0, 12.0, 23.0]]
