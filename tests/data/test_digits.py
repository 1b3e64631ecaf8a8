"""The files are scikit-learn's digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from deepseek.data.digits import write_digits


def test_every_digit_is_a_file_in_the_folder_of_its_class(tmp_path: Path) -> None:
    write_digits(tmp_path / "digits")
    digits = load_digits()
    files = sorted((tmp_path / "digits").glob("*/*.png"), key=lambda path: path.name)
    assert [int(path.parent.name) for path in files] == digits.target.tolist()
    for number in (0, 1000, 1796):
        pixels = np.asarray(Image.open(files[number]))
        np.testing.assert_allclose(pixels / 255 * 16, digits.images[number], atol=0.04)


def test_a_folder_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "digits").mkdir()
    write_digits(tmp_path / "digits")
    assert list((tmp_path / "digits").iterdir()) == []
