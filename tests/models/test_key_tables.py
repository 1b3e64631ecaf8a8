import pytest
import torch

from deepseek.core.errors import ArtifactError, ConfigError
from deepseek.models.key_tables import check_settings, count_labels, rename


def test_a_module_takes_its_tensors_along_and_a_tensor_goes_by_itself():
    tensors = {"theirs.conv.weight": torch.ones(1), "theirs.conv.bias": torch.zeros(1), "token": torch.ones(2)}
    places = {"theirs.conv": "ours.0", "token": "class_token"}
    renamed = rename(tensors, places, noun="a model")
    assert list(renamed) == ["ours.0.weight", "ours.0.bias", "class_token"]
    assert renamed["class_token"] is tensors["token"]


@pytest.mark.parametrize("name", ["weight", "theirs.weight", "theirs.conv.weight.data"])
def test_a_tensor_without_a_place_is_named(name):
    with pytest.raises(ArtifactError, match=f"tensor '{name}' has no place in a model"):
        rename({name: torch.ones(1)}, {"theirs.conv": "ours.0"}, noun="a model")


def test_a_setting_that_ours_cannot_follow_is_named_with_what_it_follows():
    check_settings({}, {"hidden_act": "relu"}, noun="resnet")
    with pytest.raises(ConfigError, match="hidden_act='gelu' and ours follows 'relu'"):
        check_settings({"hidden_act": "gelu"}, {"hidden_act": "relu"}, noun="resnet")


@pytest.mark.parametrize(
    ("values", "count"),
    [({"id2label": {"0": "cat", "1": "dog", "2": "bird"}, "num_labels": 9}, 3), ({"num_labels": 9}, 9), ({}, 2)],
)
def test_labels_are_counted_as_transformers_counts_them(values, count):
    assert count_labels(values) == count
