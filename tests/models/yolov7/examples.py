"""What the tests of YOLOv7 share."""

import torch

from deepseek.models.yolov7.model import TINY_ANCHORS, YOLOv7Config

SMALL = YOLOv7Config(width_multiple=0.125, num_classes=3, image_size=64)
TINY = YOLOv7Config(variant="tiny", width_multiple=0.125, num_classes=3, image_size=64, anchors=TINY_ANCHORS)


def chain(length):
    """Boxes in a row, of falling scores, of which each overlaps only with its neighbours."""
    boxes = [[10.0 * each, 0.0, 16.0, 10.0, 1 - each / (2 * length), 1.0] for each in range(length)]
    return torch.tensor([boxes], dtype=torch.float64)
