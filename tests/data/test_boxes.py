"""Annotated images: what a file says is what is loaded, and what is wrong with it is said before a run begins."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepseek.core.errors import DataError
from deepseek.data.boxes import BoxSource, collate, open_boxes, read_annotations
from deepseek.data.config import BoxesConfig
from deepseek.data.images import read_image
from deepseek.data.letterbox import GREY, letterbox, restore
from deepseek.data.samples import BrokenSampleError, SampleLoader
from tests.data.coco_files import describe, write_data, write_images

SIZES = [(40, 20), (30, 60), (32, 32), (64, 48)]
BOXES = [
    (0, 3, 4.0, 2.0, 10.0, 8.0),
    (1, 1, 0.5, 30.25, 20.0, 10.5),
    (1, 7, -5.0, 50.0, 20.0, 30.0),  # reaches beyond two edges
    (3, 3, 10.0, 10.0, 20.0, 20.0, 1),  # a crowd
    (3, 1, 30.0, 10.0, 8.0, 8.0),
]


def settings_for(path: Path, **changes: Any) -> BoxesConfig:
    values = {"annotations": str(path), "images": str(path.parent / "images"), "image_size": 64, "heldout_fraction": 0}
    return BoxesConfig.from_dict(values | changes)


def test_classes_come_by_their_ids_and_boxes_as_corners_inside_their_images(tmp_path: Path) -> None:
    labels, images = read_annotations(write_data(tmp_path, SIZES, BOXES), tmp_path / "images", bad_boxes="stop")
    assert labels == ("cat", "dog", "owl")
    assert [image.path.name for image in images] == ["000.png", "001.png", "002.png", "003.png"]
    assert images[0].boxes == ((4.0, 2.0, 14.0, 10.0),) and images[0].labels == (1,)
    assert images[1].boxes == ((0.5, 30.25, 20.5, 40.75), (0.0, 50.0, 15.0, 60.0)) and images[1].labels == (0, 2)
    assert images[2].boxes == ()
    assert images[3].is_crowd == (True, False)


def test_without_a_generator_an_image_is_letterboxed_and_its_boxes_with_it(tmp_path: Path) -> None:
    source = open_boxes(settings_for(write_data(tmp_path, SIZES, BOXES))).train
    for index, annotated in enumerate(source.images):
        sample = source.load(index, None)
        expected, how = letterbox(read_image(annotated.path), (64, 64))
        assert torch.equal(sample.image_CHW, expected)
        torch.testing.assert_close(restore(sample.boxes_N4, how), torch.tensor(annotated.boxes).view(-1, 4))
        width, height = SIZES[index]
        torch.testing.assert_close(restore(sample.frame_4, how), torch.tensor([0.0, 0.0, width, height]))


def test_a_batch_knows_which_image_each_box_is_on(tmp_path: Path) -> None:
    source = open_boxes(settings_for(write_data(tmp_path, SIZES, BOXES))).train
    batch = collate([source.load(index, None) for index in range(4)])
    assert batch.images_BCHW.shape == (4, 3, 64, 64) and batch.frames_B4.shape == (4, 4)
    assert batch.images_N.tolist() == [0, 1, 1, 3, 3]
    assert batch.labels_N.tolist() == [1, 0, 2, 1, 0]
    assert batch.is_crowd_N.tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("mosaic", [0.0, 1.0])
def test_an_augmented_sample_depends_on_its_generator_alone(tmp_path: Path, mosaic: float) -> None:
    path = write_data(tmp_path, SIZES, BOXES)
    source = open_boxes(settings_for(path, augmentation={"mosaic": mosaic})).train
    samples = [source.load(3, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert torch.equal(samples[0].image_CHW, samples[1].image_CHW)
    assert torch.equal(samples[0].boxes_N4, samples[1].boxes_N4)
    assert not torch.equal(samples[0].image_CHW, samples[2].image_CHW)
    assert samples[0].image_CHW.shape == (3, 64, 64)


def test_crowds_are_left_out_of_training(tmp_path: Path) -> None:
    still = {"mosaic": 0, "scale": 0, "translate": 0, "flip": 0}
    path = write_data(tmp_path, SIZES, BOXES)
    source = open_boxes(settings_for(path, augmentation=still)).train
    sample = source.load(3, np.random.default_rng(0))
    assert sample.labels_N.tolist() == [0]
    torch.testing.assert_close(sample.boxes_N4, torch.tensor([[30.0, 18.0, 38.0, 26.0]]))


def test_workers_give_the_batches_that_one_process_gives(tmp_path: Path) -> None:
    source = open_boxes(settings_for(write_data(tmp_path, SIZES, BOXES))).train
    plain, with_worker = (
        SampleLoader(source, batch_size=3, collate=collate, seed=1, num_workers=number) for number in (0, 1)
    )
    for _ in range(3):
        ours, theirs = plain.next_batch(), with_worker.next_batch()
        for name in vars(ours):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))


def test_the_digest_follows_the_boxes_and_not_the_folder(tmp_path: Path) -> None:
    digests = []
    moved = [(*BOXES[0][:2], 5.0, *BOXES[0][3:]), *BOXES[1:]]
    for name, boxes in (("a", BOXES), ("b", BOXES), ("c", moved)):
        digests.append(open_boxes(settings_for(write_data(tmp_path / name, SIZES, boxes))).train.digest)
    assert digests[0] == digests[1] != digests[2]


def test_a_share_is_held_out_by_name(tmp_path: Path) -> None:
    sizes = [(8, 8)] * 40
    boxes = [(number, (1, 3, 7)[number % 3], 1, 1, 4, 4) for number in range(40)]
    data = open_boxes(settings_for(write_data(tmp_path, sizes, boxes), heldout_fraction=0.25))
    assert data.heldout is not None
    names = [{image.path.name for image in source.images} for source in (data.train, data.heldout)]
    assert names[0].isdisjoint(names[1]) and len(names[0] | names[1]) == 40
    assert 3 <= len(names[1]) <= 17


def test_a_file_of_its_own_may_be_held_out(tmp_path: Path) -> None:
    path = write_data(tmp_path, SIZES, BOXES)
    other = write_data(tmp_path / "other", SIZES[:2], BOXES[:3])
    changes = {"heldout_annotations": str(other), "heldout_images": str(tmp_path / "other" / "images")}
    data = open_boxes(settings_for(path, **changes))
    assert data.heldout is not None and len(data.train) == 4 and len(data.heldout) == 2
    assert data.heldout.images[0].path.parent == tmp_path / "other" / "images"


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def bad(**changes: Any) -> list[dict[str, Any]]:
    """The annotations, with the second of them changed."""
    annotations = describe(SIZES, BOXES)["annotations"]
    annotations[1] |= changes
    return annotations


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": bad(bbox=[0, 0, 0, 5])}, r"annotation 1 of .* has a box of no size, \[0, 0, 0, 5\]"),
        ({"annotations": bad(bbox=[40, 0, 5, 5])}, "annotation 1 .* outside its image 001.png of 30 x 60"),
        ({"annotations": bad(bbox=[-9, 0, 5, 5])}, "annotation 1 .* outside its image"),
        ({"annotations": bad(bbox=[1, 2, 3])}, "annotation 1 .* not four finite numbers"),
        ({"annotations": bad(bbox=[1, 2, 3, float("nan")])}, "annotation 1 .* not four finite numbers"),
        ({"annotations": bad(category_id=9)}, "annotation 1 .* has category 9 and the file has the categories 1, 3, 7"),
        ({"annotations": bad(image_id=99)}, "annotation 1 .* is for image 99, which the file does not have"),
        ({"annotations": [{"id": 5, "bbox": [0, 0, 1, 1]}]}, "annotation 5 .* has no image_id"),
        ({"annotations": bad(image_id=[10])}, "annotation 1 .* has no image_id that is a number or a name"),
        ({"annotations": bad(bbox=None)}, "annotation 1 .* not four finite numbers"),
        ({"annotations": []}, "has no annotations"),
        ({"images": [], "annotations": []}, "has no images"),
        ({"images": [{"id": 1, "file_name": "a.png"}]}, "entry 0 of images in .* has no width"),
        ({"images": [{"id": 1, "file_name": "a.png", "width": "9"}]}, "entry 0 of images in .* has the width '9'"),
        ({"categories": [{"id": 1, "name": "a"}] * 2}, "has the id 1 twice in categories"),
        ({"categories": "cat"}, "has no list of categories"),
        (
            {"categories": [{"id": 1, "name": "a"}, {"id": "2", "name": "b"}]},
            "categories 1, '2', whose ids are numbers",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_sentence(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = write_data(tmp_path, SIZES, BOXES)
    change(path, **changes)
    with pytest.raises(DataError, match=message) as caught:
        open_boxes(settings_for(path))
    assert "\n" not in str(caught.value)


def test_bad_boxes_are_left_out_and_counted_where_that_is_asked_for(tmp_path: Path) -> None:
    path = write_data(tmp_path, SIZES, [*BOXES, (0, 1, 0, 0, 0, 4), (2, 1, 90, 0, 4, 4)])
    with pytest.raises(DataError, match=re.escape("(so do 1 more boxes)")):
        open_boxes(settings_for(path))
    with pytest.warns(UserWarning, match="2 boxes of .* are left out, the first one since annotation 5"):
        data = open_boxes(settings_for(path, bad_boxes="skip"))
    assert [len(image.boxes) for image in data.train.images] == [1, 2, 0, 2]


def test_missing_images_are_named(tmp_path: Path) -> None:
    path = write_data(tmp_path, SIZES, BOXES)
    (tmp_path / "images" / "002.png").unlink()
    with pytest.raises(DataError, match=r"names images that are not in .*: 002\.png"):
        open_boxes(settings_for(path))


@pytest.mark.parametrize(("content", "message"), [(None, "does not exist"), ("{", "is no JSON")])
def test_a_file_that_is_none_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "boxes.json"
    if content:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        open_boxes(settings_for(path))


def test_a_class_without_boxes_is_named(tmp_path: Path) -> None:
    path = write_data(tmp_path, SIZES, BOXES[:2])
    with pytest.warns(UserWarning, match="no training image has a box of owl"):
        open_boxes(settings_for(path))


def test_held_out_files_need_the_same_categories(tmp_path: Path) -> None:
    path = write_data(tmp_path, SIZES, BOXES)
    other = write_data(tmp_path / "other", SIZES, BOXES)
    change(other, categories=[{"id": 1, "name": "cat"}, {"id": 3, "name": "wolf"}, {"id": 7, "name": "owl"}])
    with pytest.raises(DataError, match=r"cat, wolf, owl and .* has cat, dog, owl"):
        open_boxes(settings_for(path, heldout_annotations=str(other)))


def test_a_share_that_holds_out_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="leaves 4 to train on and 0 held out"):
        open_boxes(settings_for(write_data(tmp_path, SIZES, BOXES), heldout_fraction=1e-6))


def test_a_broken_image_is_named_left_out_and_counted_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    path = write_data(tmp_path, SIZES, BOXES)
    (tmp_path / "images" / "001.png").write_bytes(b"\x89PNG broken")
    source = open_boxes(settings_for(path, augmentation={"mosaic": 0})).train
    loader = SampleLoader(source, batch_size=4, collate=collate)
    with pytest.warns(UserWarning, match=r"left out: .*001\.png cannot be read as an image"):
        assert len(loader.next_batch().images_BCHW) == 3
    limited = SampleLoader(source, batch_size=4, collate=collate, max_broken=0)
    with warnings.catch_warnings(), pytest.raises(DataError, match="1 samples cannot be loaded and 0 may be"):
        warnings.simplefilter("ignore")
        limited.next_batch()


def test_an_image_of_another_size_than_its_annotations_is_broken(tmp_path: Path) -> None:
    path = write_data(tmp_path, SIZES, BOXES)
    write_images(tmp_path / "images", [(41, 20)])
    source: BoxSource = open_boxes(settings_for(path)).train
    with pytest.raises(BrokenSampleError, match=r"000.png is 41 x 20 and its annotations are for 40 x 20"):
        source.load(0, None)


def test_the_margin_of_a_letterbox_is_grey(tmp_path: Path) -> None:
    source = open_boxes(settings_for(write_data(tmp_path, SIZES, BOXES))).train
    sample = source.load(0, None)  # 40 x 20 becomes 64 x 32
    assert (sample.image_CHW[:, :16] == GREY).all() and sample.frame_4.tolist() == [0.0, 16.0, 64.0, 48.0]
