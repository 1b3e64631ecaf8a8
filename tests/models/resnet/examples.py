"""What the tests of ResNets share."""

from deepseek.models.resnet.model import ResNetConfig

SMALL = ResNetConfig(depths=(2, 1, 1), width=8, num_classes=5)
