"""Images from files: every mode that people have, damaged ones refused, and boxes that are where they should be."""

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image

from deepseek.core.errors import DataError, DeepSeekError
from deepseek.data import images
from deepseek.data.images import (
    change_colors,
    cut,
    read_image,
    read_picture,
    read_rgb,
    save_image,
    save_with_boxes,
)


def write(tmp_path, image, name="image.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_an_image_is_its_bytes_over_255_channels_first(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = read_image(write(tmp_path, Image.fromarray(pixels)))
    assert image.dtype is torch.float32 and image.is_contiguous()
    np.testing.assert_array_equal((image * 255).round().permute(1, 2, 0).numpy(), pixels)


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("L", 51, (0.2, 0.2, 0.2)),
        ("RGBA", (255, 0, 0, 255), (1, 0, 0)),
        ("RGBA", (255, 0, 0, 0), (1, 1, 1)),
        ("LA", (0, 0), (1, 1, 1)),
        ("1", 1, (1, 1, 1)),
        ("I;16", 65535, (1, 1, 1)),
        ("I;16", 0, (0, 0, 0)),
    ],
)
def test_every_mode_becomes_red_green_blue(tmp_path, mode, color, expected):
    image = read_image(write(tmp_path, Image.new(mode, (3, 2), color)))
    assert image.shape == (3, 2, 3)
    torch.testing.assert_close(image[:, 0, 0], torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        (np.float32, 0.5, "has floats for pixels"),
        (np.int32, 70000, "has pixels from 70000 to 70000, and 0 to 65535 are read"),
        (np.int32, -1, "has pixels from -1 to -1"),
    ],
)
def test_pixels_of_unknown_range_are_refused(tmp_path, kind, value, said):
    Image.fromarray(np.full((2, 3), value, dtype=kind)).save(tmp_path / "image.tiff")
    for read in (read_image, read_rgb):
        with pytest.raises(DataError, match=f"image.tiff {said}.*; save it with 8 or 16 bits"):
            read(tmp_path / "image.tiff")


def test_an_image_beyond_the_limit_of_pillow_is_told_to_be_smaller(tmp_path, monkeypatch):
    Image.new("L", (40, 10)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"has too many pixels .*; make it smaller"):
        read_image(tmp_path / "large.png")


def test_an_image_is_turned_the_way_its_camera_says(tmp_path):
    turned = Image.new("RGB", (6, 2), "black")
    turned.paste("white", (0, 0, 3, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    image = read_image(write(tmp_path, turned, "photo.png", exif=exif))
    assert image.shape == (3, 6, 2)
    assert image[:, 0].min() == 1 and image[:, -1].max() == 0  # what was left is now above


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_a_file_that_is_no_image_is_refused(tmp_path, content):
    (tmp_path / "odd.png").write_bytes(content)
    with pytest.raises(DataError, match="cannot be read as an image"):
        read_image(tmp_path / "odd.png")


def test_half_a_file_is_refused(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = write(tmp_path, Image.fromarray(noise))
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(DataError, match="cannot be read as an image"):
        read_image(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DeepSeekError, match=r"nothing\.png"):
        read_image(tmp_path / "nothing.png")


def test_an_image_too_large_for_memory_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 99)
    with pytest.raises(DataError, match="is 10 x 10 and 99 pixels are the limit"):
        read_image(write(tmp_path, Image.new("1", (10, 10))))


def test_a_box_is_drawn_on_its_edges_and_nowhere_else(tmp_path):
    boxes = torch.tensor([[20.0, 30.0, 60.0, 80.0]])
    save_with_boxes(torch.zeros(3, 100, 100), boxes, [""], tmp_path / "out.png", kinds=[3])
    drawn = read_image(tmp_path / "out.png").sum(0) > 0
    assert drawn[79:81, 25:55].any() and drawn[35:75, 60].all() and drawn[35:75, 20].all()
    assert not drawn[:28].any() and not drawn[82:].any() and not drawn[:, :18].any() and not drawn[:, 62:].any()
    assert not drawn[50:75, 25:55].any()


def test_an_image_that_is_not_there_is_not_called_unwritable(tmp_path):
    with pytest.raises(DataError, match=r"street\.jpg does not exist; give the path of an image"):
        read_image(tmp_path / "street.jpg")


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "I;16"])
def test_bytes_are_read_as_the_file_is_and_as_floats_are(tmp_path, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    image = Image.fromarray(pixels).convert("RGB" if mode == "I;16" else mode)
    image = Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16) * 257) if mode == "I;16" else image
    path = write(tmp_path, image)
    read = np.asarray(read_rgb(path))
    np.testing.assert_array_equal(np.asarray(read_rgb(path.read_bytes(), "row 3")), read)
    np.testing.assert_array_equal(read, (read_image(path) * 255).round().permute(1, 2, 0).numpy())


def test_bytes_that_are_no_image_are_refused_by_their_name():
    with pytest.raises(DataError, match=r"^row 3 cannot be read as an image"):
        read_rgb(b"no image", "row 3")


def test_a_part_is_cut_out_and_scaled_as_torch_does_it(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    found = cut(Image.fromarray(pixels), (10, 5, 40, 35), (10, 15))
    part = torch.from_numpy(pixels[5:35, 10:40]).permute(2, 0, 1).float()
    expected = torch.nn.functional.interpolate(part[None], (10, 15), mode="bilinear", antialias=True)[0]
    assert found.shape == (10, 15, 3) and found.flags.writeable
    difference = np.abs(found - expected.permute(1, 2, 0).numpy())
    assert difference[1:-1, 1:-1].max() <= 1
    assert difference.mean() < 3  # at the edges, Pillow also sees what lies beside the box


def test_a_picture_keeps_its_opacity(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    picture = read_picture(write(tmp_path, Image.fromarray(pixels, "RGBA")))
    np.testing.assert_array_equal((picture * 255).round().permute(1, 2, 0).numpy(), pixels)
    opaque = read_picture(write(tmp_path, Image.new("RGB", (3, 2), "red")))
    assert opaque[:, 0, 0].tolist() == [1.0, 0.0, 0.0, 1.0]


def test_a_saved_image_comes_back(tmp_path):
    image_CHW = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 5, 7))) / 255
    save_image(image_CHW, tmp_path / "image.png")
    torch.testing.assert_close(read_image(tmp_path / "image.png"), image_CHW.float())


@pytest.mark.parametrize(("hue", "saturation", "value"), [(0.0, 1.0, 0.5), (0.25, 1.0, 1.0), (-0.1, 0.5, 1.3)])
def test_colors_change_as_in_pythons_own_hsv(hue, saturation, value):
    colors = np.random.default_rng(0).random((40, 3))
    changed = change_colors(
        torch.tensor(colors.T[:, None], dtype=torch.float32), hue=hue, saturation=saturation, value=value
    )
    for before, after in zip(colors, changed[:, 0].T.tolist(), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*before)
        expected = colorsys.hsv_to_rgb((h + hue) % 1, min(1, s * saturation), min(1, v * value))
        assert after == pytest.approx(expected, abs=0.03)  # hue is in 256 steps


def test_colors_that_do_not_change_stay_within_a_rounding():
    image_CHW = torch.rand(3, 8, 8)
    same = change_colors(image_CHW, hue=0.0, saturation=1.0, value=1.0)
    torch.testing.assert_close(same, image_CHW, rtol=0, atol=0.03)
