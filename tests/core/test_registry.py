import pytest

from deepseek.core.errors import ConfigError
from deepseek.core.registry import Registry


@pytest.fixture
def colours():
    registry = Registry("colour")
    registry.add("red", 1)
    registry.add("green", 2)
    return registry


def test_it_is_a_mapping_in_the_order_of_adding(colours):
    assert dict(colours) == {"red": 1, "green": 2}
    assert list(colours) == ["red", "green"] and len(colours) == 2
    assert "red" in colours and "blue" not in colours and 3 not in colours


def test_adding_returns_the_value_so_that_it_can_stand_in_a_definition(colours):
    assert colours.add("blue", 3) == colours["blue"] == 3


def test_an_unknown_name_is_answered_with_the_nearest(colours):
    with pytest.raises(ConfigError, match=r"unknown colour 'gren'; did you mean 'green'\? \(known: green, red\)"):
        colours["gren"]


def test_get_has_a_default_like_every_mapping(colours):
    assert colours.get("red") == 1
    assert colours.get("blue") is None and colours.get("blue", 7) == 7


def test_a_name_is_given_once(colours):
    with pytest.raises(ConfigError, match="colour 'red' is already registered; choose another name"):
        colours.add("red", 4)
    assert colours["red"] == 1
