"""MobileNetV3 of timm, which is how Hugging Face hosts it (`timm/mobilenetv3_large_100...`), under torchvision's names.

    conv_stem, bn1                                features.0.{0, 1}
    blocks.S.B.{conv_pw, bn1}                     features.N.block.0.{0, 1}      widen
    blocks.S.B.{conv_dw, bn2}                     features.N.block.1.{0, 1}      depthwise
    blocks.S.B.se.{conv_reduce, conv_expand}      features.N.block.2.{fc1, fc2}
    blocks.S.B.{conv_pwl, bn3}                    features.N.block.3.{0, 1}      narrow
    blocks.6.0.{conv, bn1}                        features.16.{0, 1}
    conv_head, classifier                         classifier.{0, 3}              the first as a 1x1 convolution

A stage S of theirs begins where the table of the paper changes its width; a first block that does not widen has no
`conv_pw`, and its names move down by one. Their norms add 1e-5 to the variance, torchvision's 1e-3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from deepseek.core.errors import ConfigError
from deepseek.core.names import explain_unknown
from deepseek.models.key_tables import rename
from deepseek.models.mobilenet_v3.model import TABLES, BlockSpec, MobileNetV3Config

PREFIX = "timm_model."  # in front of every name where transformers wraps a timm model
ARCHITECTURES = {"mobilenetv3_large_100": "large", "mobilenetv3_small_100": "small"}
NORM_EPS, NORM_MOMENTUM = 1e-5, 0.1
PLACES = {
    "conv_stem": "features.0.0",
    "bn1": "features.0.1",
    "conv_head": "classifier.0",
    "classifier": "classifier.3",
}
# The parts of a block and their names: convolution, norm; with and without widening.
_WIDENING = (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3"))
_PLAIN = (("conv_dw", "bn1"), ("conv_pw", "bn2"))


def import_config(values: Mapping[str, Any]) -> MobileNetV3Config:
    """Return our config for the `config.json` of a timm model. Raises `ConfigError` for another architecture.

    >>> import_config({"architecture": "mobilenetv3_small_100", "num_classes": 10}).variant
    'small'
    """
    name = str(values.get("architecture"))
    if name not in ARCHITECTURES:
        raise ConfigError(explain_unknown("timm architecture", name, ARCHITECTURES))
    return MobileNetV3Config.from_dict(
        {
            "variant": ARCHITECTURES[name],
            "num_classes": values.get("num_classes", 1000),
            "norm_eps": NORM_EPS,
            "norm_momentum": NORM_MOMENTUM,
        }
    )


def import_tensors(tensors: Mapping[str, Tensor], config: MobileNetV3Config) -> dict[str, Tensor]:
    """Rename timm's tensors to torchvision's names. Raises `ArtifactError` for one that has no place."""
    plain = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    renamed = rename(plain, find_places(config), noun="a MobileNetV3")
    head = "classifier.0.weight"
    return renamed | ({head: renamed[head].flatten(1)} if head in renamed else {})


def find_places(config: MobileNetV3Config) -> dict[str, str]:
    """Map timm's modules to ours."""
    rows = TABLES[config.variant]
    places = {
        "conv_stem": "features.0.0",
        "bn1": "features.0.1",
        "conv_head": "classifier.0",
        "classifier": "classifier.3",
    }
    stages = _number_stages(rows)
    for feature, (row, theirs) in enumerate(zip(rows, stages, strict=True), start=1):
        is_plain = feature == 1 and row.num_inner == row.num_out
        places |= _place_block(f"blocks.{theirs}", f"features.{feature}.block", _PLAIN if is_plain else _WIDENING, row)
    last_stage, last_feature = int(stages[-1].partition(".")[0]) + 1, len(rows) + 1
    return places | {
        f"blocks.{last_stage}.0.conv": f"features.{last_feature}.0",
        f"blocks.{last_stage}.0.bn1": f"features.{last_feature}.1",
    }


def _place_block(theirs: str, ours: str, parts: tuple[tuple[str, str], ...], row: BlockSpec) -> dict[str, str]:
    """Map the convolutions and norms of a block; the squeeze stands before the last of them."""
    places: dict[str, str] = {}
    for index, (convolution, norm) in enumerate(parts):
        position = index + (1 if row.has_squeeze and index == len(parts) - 1 else 0)
        places |= {f"{theirs}.{convolution}": f"{ours}.{position}.0", f"{theirs}.{norm}": f"{ours}.{position}.1"}
    squeeze = f"{ours}.{len(parts) - 1}"
    return places | {f"{theirs}.se.conv_reduce": f"{squeeze}.fc1", f"{theirs}.se.conv_expand": f"{squeeze}.fc2"}


def _number_stages(rows: tuple[BlockSpec, ...]) -> list[str]:
    """Return timm's "stage.block" of each row.

    >>> _number_stages(TABLES["small"])
    ['0.0', '1.0', '1.1', '2.0', '2.1', '2.2', '3.0', '3.1', '4.0', '4.1', '4.2']
    """
    numbers: list[str] = []
    stage, block = -1, 0
    for index, row in enumerate(rows):
        is_new = index == 0 or row.num_out != rows[index - 1].num_out
        stage, block = (stage + 1, 0) if is_new else (stage, block + 1)
        numbers.append(f"{stage}.{block}")
    return numbers
