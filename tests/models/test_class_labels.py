"""Either all classes have a name or none has."""

from __future__ import annotations

import pytest

from deepseek.core.errors import ConfigError
from deepseek.models import zoo


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "vit_b_16", "yolov7"])
def test_a_model_has_a_name_for_each_class_or_for_none(name: str) -> None:
    with pytest.raises(ConfigError, match="labels has 2 names and there are 3 classes; name each of them"):
        zoo.configure(name, num_classes=3, labels=("cat", "dog"))
    assert zoo.configure(name, num_classes=2, labels=("cat", "dog")).to_dict()["labels"] == ["cat", "dog"]
    zoo.configure(name, num_classes=3)
