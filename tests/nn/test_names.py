import importlib

import pytest
import torch

from deepseek import nn


def test_everything_of_torch_is_there():
    assert nn.Linear is torch.nn.Linear and nn.utils.vector_to_parameters is torch.nn.utils.vector_to_parameters
    assert {each for each in dir(torch.nn) if not each.startswith("_")} <= set(dir(nn))


@pytest.mark.parametrize("name", sorted(nn._OWN))
def test_our_own_layers_are_beside_it(name):
    own = getattr(nn, name)
    assert own.__name__ == name and own.__module__ == f"deepseek.nn.{nn._OWN[name]}"
    assert name in dir(nn)


def test_a_module_that_both_have_is_ours():
    assert nn.__getattr__("attention") is importlib.import_module("deepseek.nn.attention")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="NoSuchLayer"):
        _ = nn.NoSuchLayer
    assert not hasattr(nn, "__no_such_thing__")
