"""ResNets of Hugging Face (`ResNetForImageClassification`) under torchvision's names.

resnet.embedder.embedder.{convolution, normalization}           conv1, bn1
resnet.encoder.stages.S.layers.B.layer.N.{convolution, ...}     layer(S+1).B.{conv, bn}(N+1)
resnet.encoder.stages.S.layers.B.shortcut.{convolution, ...}    layer(S+1).B.downsample.{0, 1}
classifier.1                                                    fc
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from deepseek.core.errors import ConfigError
from deepseek.models.key_tables import check_settings, count_labels, rename
from deepseek.models.resnet.model import EXPANSIONS, ResNetConfig

FOLLOWED = {
    "model_type": "resnet",
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
}
NUM_CONVOLUTIONS = {"basic": 2, "bottleneck": 3}


def import_config(values: Mapping[str, Any]) -> ResNetConfig:
    """Return our config for a Hugging Face `config.json`. Raises `ConfigError` for a setting that ours does not follow.

    >>> import_config({"depths": [2, 2], "hidden_sizes": [64, 128], "layer_type": "basic"}).depths
    (2, 2)
    """
    check_settings(values, FOLLOWED, noun="resnet")
    config = ResNetConfig(
        block=values.get("layer_type", "bottleneck"),
        depths=tuple(values.get("depths", (3, 4, 6, 3))),
        width=values.get("embedding_size", 64),
        in_channels=values.get("num_channels", 3),
        num_classes=count_labels(values),
    )
    sizes = [width * EXPANSIONS[config.block] for width in config.widths]
    if list(values.get("hidden_sizes", (256, 512, 1024, 2048))) != sizes:
        raise ConfigError(
            f"this resnet model has hidden_sizes={values.get('hidden_sizes')} and ours double from stage to stage, "
            f"{sizes}; choose another model"
        )
    return config


def import_tensors(tensors: Mapping[str, Tensor], config: ResNetConfig) -> dict[str, Tensor]:
    """Hugging Face tensors under torchvision's names. Raises `ArtifactError` for one that has no place."""
    return rename(tensors, find_places(config), noun="a ResNet")


def find_places(config: ResNetConfig) -> dict[str, str]:
    """Map modules at Hugging Face to modules of ours."""
    places = _place_pair("resnet.embedder.embedder", "conv1", "bn1") | {"classifier.1": "fc"}
    for stage, depth in enumerate(config.depths):
        for block in range(depth):
            theirs, ours = f"resnet.encoder.stages.{stage}.layers.{block}", f"layer{stage + 1}.{block}"
            places |= _place_pair(f"{theirs}.shortcut", f"{ours}.downsample.0", f"{ours}.downsample.1")
            for number in range(NUM_CONVOLUTIONS[config.block]):
                pair = f"{ours}.conv{number + 1}", f"{ours}.bn{number + 1}"
                places |= _place_pair(f"{theirs}.layer.{number}", *pair)
    return places


def _place_pair(theirs: str, convolution: str, norm: str) -> dict[str, str]:
    return {f"{theirs}.convolution": convolution, f"{theirs}.normalization": norm}
