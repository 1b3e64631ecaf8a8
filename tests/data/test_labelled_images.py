"""Images are found where folders and tables say, once each, with the class they say; what is wrong is named."""

from __future__ import annotations

import base64
import csv
import json
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from deepseek.core.errors import DataError
from deepseek.data.config import ImagesConfig
from deepseek.data.labelled_images import ImageSample, collate_images, open_images
from deepseek.data.samples import BrokenSampleError, SampleLoader


def encode(seed: int, size: tuple[int, int] = (6, 5)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    content = BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def write_images(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode(number))
    return folder


def open_folder(*sources: Path, **settings: Any) -> Any:
    return open_images(ImagesConfig(**{"sources": tuple(map(str, sources)), "heldout_fraction": 0.0} | settings))


def named(source: Any) -> list[tuple[str, int]]:
    return [(image.name, target) for image, target in zip(source.images, source.targets, strict=True)]


# ---- folders


def test_each_folder_is_a_class_and_names_are_sorted(tmp_path: Path) -> None:
    write_images(tmp_path, "wren/2.png", "wren/1.PNG", "robin/deep/er/1.png", "robin/.hidden.png", ".git/1.png")
    images = open_folder(tmp_path)
    assert images.classes == ("robin", "wren") and images.heldout is None
    assert named(images.train) == [("robin/deep/er/1.png", 0), ("wren/1.PNG", 1), ("wren/2.png", 1)]


def test_folders_called_by_numbers_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    assert open_folder(write_images(tmp_path, "10/1.png", "9/1.png")).classes == ("9", "10")


def test_folders_train_and_val_part_the_images(tmp_path: Path) -> None:
    write_images(tmp_path, "train/a/1.png", "train/b/1.png", "val/a/1.png")
    images = open_folder(tmp_path, heldout_fraction=0.5)
    assert [named(part) for part in (images.train, images.heldout)] == [
        [("train/a/1.png", 0), ("train/b/1.png", 1)],
        [("val/a/1.png", 0)],
    ]


def test_a_share_is_held_out_by_names_alone(tmp_path: Path) -> None:
    names = [f"{label}/{number}.png" for label in "ab" for number in range(40)]
    first = open_folder(write_images(tmp_path / "first", *names), heldout_fraction=0.3)
    parts = {image.name: False for image in first.train.images} | {image.name: True for image in first.heldout.images}
    assert sorted(parts) == sorted(names) and 12 <= sum(parts.values()) <= 36
    second = open_folder(write_images(tmp_path / "second", *names[::2], "a/new.png"), heldout_fraction=0.3)
    assert all(not parts.get(image.name, False) for image in second.train.images)
    assert all(parts.get(image.name, True) for image in second.heldout.images)


def test_other_sources_can_be_held_out(tmp_path: Path) -> None:
    train = write_images(tmp_path / "one", "a/1.png", "b/1.png")
    heldout = write_images(tmp_path / "two", "b/1.png")
    images = open_folder(train, heldout_sources=(str(heldout),), heldout_fraction=0.5)
    assert len(images.train) == 2 and named(images.heldout) == [("b/1.png", 1)]


def test_files_that_are_no_images_of_a_class_are_named(tmp_path: Path) -> None:
    write_images(tmp_path, "a/1.png", "b/1.png", "loose.png", "a/notes.txt")
    with pytest.warns(UserWarning, match=r"left out, .*loose\.png, .*a/notes\.txt"):
        assert len(open_folder(tmp_path).train) == 2


def test_links_are_followed_once_and_pipes_never_opened(tmp_path: Path) -> None:
    source = write_images(tmp_path / "birds", "a/1.png", "b/1.png")
    write_images(tmp_path / "more", "2.png")
    (source / "b" / "more").symlink_to(tmp_path / "more")
    for loop in (source / "self", source / "a" / "loop", source / "b" / "birds"):
        loop.symlink_to(source)
    (source / "a" / "circle.png").symlink_to("circle.png")
    os.mkfifo(source / "a" / "pipe.png")
    with pytest.warns(UserWarning, match=r"left out, .*self, .*a/circle\.png, .*a/loop and 2 more"):
        images = open_folder(source)
    assert named(images.train) == [("a/1.png", 0), ("b/1.png", 1), ("b/more/2.png", 1)]


def test_a_pipe_in_a_table_is_a_broken_sample(tmp_path: Path) -> None:
    write_images(tmp_path, "1.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "labels.csv").write_text("image,label\n1.png,a\npipe.png,b\n")
    images = open_folder(tmp_path / "labels.csv")
    with pytest.raises(BrokenSampleError, match=r"pipe\.png is no regular file; give the path of an image"):
        images.train.load(1, None)


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        ((), {}, "holds no image in a folder; expected a folder for each class"),
        (("1.png", "2.png"), {}, "holds no image in a folder; expected a folder for each class"),
        (("a/1.png",), {}, "has the one class 'a' alone; expected two or more"),
        (("a/1.png", "b/1.png"), {"classes": ("a", "b", "c")}, "no image to train on has the class c; add some"),
        (("a/1.png", "b/1.png"), {"classes": ("a", "d")}, "b/1.png has the label 'b', and the classes are a, d; mend"),
        (("train/a/1.png", "train/b/1.png", "val/c/1.png"), {"classes": ("a", "b")}, "val/c/1.png has the label 'c'"),
        (("train/a/1.png", "train/b/1.png", "val/c/1.png"), {}, "no image to train on has the class c"),
        (("a/1.png", "b/1.png"), {"heldout_fraction": 1e-9}, "none of the 2 images falls into the held-out part"),
    ],
)
def test_folders_that_do_not_fit_are_refused(
    tmp_path: Path, names: tuple[str, ...], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        open_folder(write_images(tmp_path, *names), **settings)


def test_a_class_whose_folder_is_empty_and_a_source_that_is_not_there_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "c").mkdir()
    with pytest.raises(DataError, match="no image to train on has the class c"):
        open_folder(tmp_path)
    with pytest.raises(DataError, match="absent' does not exist; give a folder with a folder for each class"):
        open_folder(tmp_path / "absent")


# ---- tables


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json", ".parquet"])
def test_a_table_names_files_beside_it_and_their_classes(tmp_path: Path, suffix: str) -> None:
    write_images(tmp_path, "pictures/1.png", "pictures/2.png")
    rows = [
        {"file": "pictures/2.png", "bird": "wren", "x": 1},
        {"file": str(tmp_path / "pictures/1.png"), "bird": "robin", "x": 2},
    ]
    table = write_table(tmp_path / f"birds{suffix}", rows)
    images = open_folder(table, image_column="file", label_column="bird")
    assert images.classes == ("robin", "wren")
    assert named(images.train) == [("pictures/2.png", 1), (str(tmp_path / "pictures/1.png"), 0)]
    assert images.train.load(1, None).target == 0


@pytest.mark.parametrize("is_struct", [False, True])
def test_a_parquet_table_may_hold_the_files_themselves(tmp_path: Path, is_struct: bool) -> None:
    rows = [
        {"image": {"bytes": encode(number), "path": None} if is_struct else encode(number), "label": number % 3}
        for number in range(6)
    ]
    images = open_folder(write_table(tmp_path / "images.parquet", rows), image_size=5, crop_share=1.0)
    assert images.classes == ("0", "1", "2") and images.train.targets == [0, 1, 2, 0, 1, 2]
    pixels = np.asarray(Image.open(BytesIO(encode(4))))
    np.testing.assert_array_equal(images.train.load(4, None).pixels_HWC, pixels[:, :5])


def test_numbers_choose_among_the_classes_that_are_named(tmp_path: Path) -> None:
    write_images(tmp_path, "1.png")
    rows = [{"image": "1.png", "label": label} for label in ("1", "0", "1")]
    images = open_folder(write_table(tmp_path / "t.csv", rows), classes=("zebra", "ant"))
    assert images.classes == ("zebra", "ant") and images.train.targets == [1, 0, 1]
    with pytest.raises(DataError, match=r"1\.png has the label '2', and the classes are zebra, ant"):
        open_folder(write_table(tmp_path / "t.csv", [*rows, {"image": "1.png", "label": 2}]), classes=("zebra", "ant"))


def test_paths_of_a_table_may_begin_elsewhere(tmp_path: Path) -> None:
    write_images(tmp_path / "elsewhere", "1.png", "2.png")
    table = write_table(tmp_path / "t.csv", [{"image": f"{number}.png", "label": number} for number in (1, 2)])
    images = open_folder(table, image_folder=str(tmp_path / "elsewhere"))
    assert images.train.load(1, None).target == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"picture": "1.png", "label": "a"}, "unknown column 'image'"),
        ({"image": "1.png", "class": "a"}, "unknown column 'label'"),
        ({"image": "1.png", "label": 0.5}, "has 0.5 in 'label'; expected the class of the image as a text or an int"),
        ({"image": "1.png", "label": None}, "has None in 'label'; expected the class"),
        ({"image": "1.png", "label": ""}, "has '' in 'label'; expected the class"),
        ({"image": 7, "label": "a"}, "has int in 'image'; expected the path of an image, or the bytes of one"),
        ({"image": None, "label": "a"}, "has NoneType in 'image'; expected the path"),
    ],
)
def test_a_row_without_its_image_or_its_class_is_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    table = write_table(tmp_path / "t.jsonl", [row])
    with pytest.raises(DataError, match=message):
        open_folder(table)


# ---- samples and batches


def test_what_an_image_becomes_depends_on_its_generator_alone(tmp_path: Path) -> None:
    write_images(tmp_path, *(f"{label}/{number}.png" for label in "ab" for number in range(6)))

    def read(num_workers: int) -> list[torch.Tensor]:
        images = open_folder(tmp_path, image_size=4)
        images.train.mixup = 0.4
        loader: SampleLoader[Any, Any] = SampleLoader(
            images.train,
            batch_size=5,
            collate=lambda samples: collate_images(samples, num_classes=2),
            num_workers=num_workers,
        )
        return [batch.pixels_BCHW for _, batch in zip(range(6), loader, strict=False)]

    alone, helped = read(0), read(2)
    assert all(torch.equal(one, two) for one, two in zip(alone, helped, strict=True))
    assert not torch.equal(alone[0], alone[1])


@pytest.mark.parametrize("content", [b"", b"no image", encode(0, (300, 300))[:-2000], base64.b64encode(encode(0))])
def test_an_image_that_cannot_be_read_is_left_out_named_and_counted(tmp_path: Path, content: bytes) -> None:
    write_images(tmp_path, *(f"{label}/{number}.jpg" for label in "ab" for number in range(3)))
    (tmp_path / "b/1.jpg").write_bytes(content)
    images = open_folder(tmp_path, image_size=4)
    with pytest.raises(BrokenSampleError, match=r"b/1\.jpg cannot be read as an image"):
        images.train.load(4, None)
    loader: SampleLoader[Any, Any] = SampleLoader(
        images.train, batch_size=3, collate=lambda samples: collate_images(samples, num_classes=2)
    )
    with pytest.warns(UserWarning, match=r"left out: .*b/1\.jpg cannot be read"):
        sizes = [len(loader.next_batch().targets_BK) for _ in range(4)]
    assert Counter(sizes) == {3: 2, 2: 2}
    strict: SampleLoader[Any, Any] = SampleLoader(
        images.train, batch_size=6, collate=lambda samples: collate_images(samples, num_classes=2), max_broken=0
    )
    with warnings.catch_warnings(), pytest.raises(DataError, match="1 samples cannot be loaded and 0 may be left out"):
        warnings.simplefilter("ignore")
        strict.next_batch()


def test_a_file_that_went_away_is_a_broken_sample(tmp_path: Path) -> None:
    images = open_folder(write_images(tmp_path, "a/1.png", "b/1.png"))
    (tmp_path / "a/1.png").unlink()
    with pytest.raises(BrokenSampleError, match=r"a/1\.png does not exist"):
        images.train.load(0, None)


def test_a_digest_sees_names_sizes_and_classes(tmp_path: Path) -> None:
    write_images(tmp_path, "a/1.png", "b/1.png", "b/2.png")

    def digest(**settings: Any) -> str:
        return str(open_folder(tmp_path, **settings).train.digest)

    first = digest()
    assert digest() == first != digest(classes=("b", "a"))
    (tmp_path / "b/2.png").write_bytes(encode(9, (50, 50)))
    grown = digest()
    (tmp_path / "b/2.png").rename(tmp_path / "b/3.png")
    assert len({first, grown, digest()}) == 3


def test_blended_images_and_their_targets_are_sums_by_their_shares() -> None:
    random = np.random.default_rng(0)
    samples = [
        ImageSample(random.integers(0, 256, (3, 4, 3), dtype=np.uint8), target, share)
        for target, share in ((0, 0.25), (2, 0.7), (1, 1.0))
    ]
    batch = collate_images(samples, num_classes=4, label_smoothing=0.2)
    assert batch.pixels_BCHW.shape == (3, 3, 3, 4) and batch.pixels_BCHW.dtype is torch.uint8
    assert batch.pixels_BCHW.is_contiguous(memory_format=torch.channels_last)
    for number, sample in enumerate(samples):
        other = samples[(number + 1) % 3]
        pixels = sample.share * sample.pixels_HWC + (1 - sample.share) * other.pixels_HWC
        found = batch.pixels_BCHW[number].permute(1, 2, 0).numpy()
        assert np.abs(found - pixels).max() <= 0.51
        targets = np.full(4, 0.05)
        targets[sample.target] += 0.8 * sample.share
        targets[other.target] += 0.8 * (1 - sample.share)
        np.testing.assert_allclose(batch.targets_BK[number], targets, atol=1e-6)
