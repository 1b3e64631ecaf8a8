"""What the tests of YOLOv7 share."""

import pytest
import torch

from deepseek.models.yolov7.model import (
    YOLOv7,
)
from deepseek.models.zoo import settle_
from tests.models.pictures import (
    noise,
    randomize,
)
from tests.models.yolov7.examples import SMALL


@pytest.fixture(scope="module")
def model():
    """Weights that are nowhere trivial, with statistics under which answers vary and no sigmoid saturates."""
    network = settle_(randomize(YOLOv7(SMALL)), noise(64, 3, 64, 96, seed=3))
    with torch.no_grad():
        for conv in network.head.m:
            conv.weight.copy_(noise(*conv.weight.shape, seed=4) * 0.3)
    return network
