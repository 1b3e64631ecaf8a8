"""The digits that scikit-learn brings, as a folder of images: real data for an image classifier without a network.

1,797 digits of 43 people, 8 x 8 pixels with 17 shades of grey (Alpaydin and Kaynak 1998, "Optical Recognition of
Handwritten Digits"). They become PNG files in a folder for each of the ten classes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from deepseek.core.extras import require
from deepseek.core.storage import new_folder
from deepseek.data.images import write_pixels

DIGITS = "digits"
"""What a config calls them."""
_WHITE = 16  # of a pixel, as scikit-learn has it


def write_digits(folder: Path) -> None:
    """Write the digits into `folder`, whole or not at all; one that is there stays as it is."""
    if folder.exists():
        return
    digits = require("sklearn.datasets", extra="train").load_digits()
    pixels_NHW = (digits.images * (255 / _WHITE)).round().astype(np.uint8)
    with new_folder(folder) as temporary:
        for number, (pixels_HW, digit) in enumerate(zip(pixels_NHW, digits.target, strict=True)):
            class_folder = temporary / str(digit)
            class_folder.mkdir(exist_ok=True)
            write_pixels(pixels_HW, class_folder / f"{number:04d}.png")
