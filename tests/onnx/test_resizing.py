"""Resize against ONNX Runtime, torch and the formulas of the definition."""

import numpy
import pytest
import torch
import torch.nn.functional as F
from onnx import helper

from deepseek.onnx.importing import import_onnx
from tests.onnx.checks import FLOAT, build_model, check_against_runtime


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("mapping", ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"])
@pytest.mark.parametrize("sizes", [[1, 2, 9, 4], [1, 2, 3, 13]])
def test_resizing_agrees_with_onnx_runtime(mode, mapping, sizes):
    node = helper.make_node(
        "Resize", ["x", "", "", "sizes"], ["y"], mode=mode, coordinate_transformation_mode=mapping, nearest_mode="floor"
    )
    model = build_model([node], {"x": (FLOAT, [1, 2, 5, 6])}, {"y": FLOAT}, weights={"sizes": numpy.array(sizes)})
    check_against_runtime(model, (torch.randn(1, 2, 5, 6),))


def scale_model(mapping, scale, shape, mode="linear"):
    node = helper.make_node("Resize", ["x", "", "scales"], ["y"], mode=mode, coordinate_transformation_mode=mapping)
    scales = numpy.array([1, 1, scale, scale], "f")
    return build_model([node], {"x": (FLOAT, shape)}, {"y": FLOAT}, weights={"scales": scales}, opset=19)


@pytest.mark.parametrize("mode", ["linear", "cubic", "nearest"])
@pytest.mark.parametrize("mapping", ["align_corners", "half_pixel_symmetric", "half_pixel", "asymmetric"])
@pytest.mark.parametrize(("length", "scale"), [(7, 0.6), (5, 1.5), (4, 2.3), (3, 1.7)])
def test_lengths_that_are_cut_off_agree_with_onnx_runtime(mode, mapping, length, scale):
    torch.manual_seed(0)
    if (mode, mapping, length) == ("nearest", "half_pixel_symmetric", 7):
        pytest.skip("a position halfway between two pixels, which FP32 rounds either way")
    shape = [1, 2, length, length]
    check_against_runtime(scale_model(mapping, scale, shape, mode), (torch.randn(shape),))


@pytest.mark.parametrize(("mode", "torch_mode"), [("linear", "bilinear"), ("cubic", "bicubic")])
@pytest.mark.parametrize(("length", "scale"), [(5, 1.5), (7, 0.6), (10, 0.7), (2, 1.3)])
def test_aligned_corners_stay_corners_as_in_torch_where_the_length_is_cut_off(mode, torch_mode, length, scale):
    x = torch.randn(1, 2, length, length)
    ours = import_onnx(scale_model("align_corners", scale, [1, 2, length, length], mode), sample_inputs=(x,))(x)
    theirs = F.interpolate(x, size=ours.shape[2:], mode=torch_mode, align_corners=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[..., -1, -1], x[..., -1, -1])


def test_a_scale_that_changes_no_length_still_moves_pixels():
    """By the formula; ONNX Runtime copies the input where every length stays."""
    x = torch.tensor([[[[0.0, 0.0], [1.0, 1.0]]]])
    ours = import_onnx(scale_model("half_pixel", 1.3, [1, 1, 2, 2]), sample_inputs=(x,))(x)
    rows = [max(0.0, 0.5 / 1.3 - 0.5), 1.5 / 1.3 - 0.5]
    torch.testing.assert_close(ours, torch.tensor(rows).reshape(1, 1, 2, 1).expand(1, 1, 2, 2))
