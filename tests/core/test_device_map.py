import pytest

from deepseek.core.device_map import read_device_groups
from deepseek.core.errors import ConfigError


def test_groups_keep_their_order():
    assert read_device_groups({"b": [2, 3], "a": (0, 1)}) == ((2, 3), (0, 1))


@pytest.mark.parametrize(
    ("device_map", "sentence"),
    [
        ("auto", "'auto' is no table of devices; write for example"),
        ({}, "is no table of devices"),
        ({"gpu0": 0}, r"device_map\['gpu0'\]=0 is no list of devices"),
        ({"gpu0": "01"}, "is no list of devices"),
        ({"gpu0": []}, "is no list of devices"),
        ({"gpu0": [0, 1], "gpu1": [1]}, r"names \[0, 1, 1\]; give every device once"),
        ({"gpu0": [-1]}, "as a number from 0"),
        ({"gpu0": [True]}, "as a number from 0"),
        ({"gpu0": ["cuda:0"]}, "as a number from 0"),
    ],
)
def test_a_wrong_map_is_refused_in_one_sentence(device_map, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read_device_groups(device_map)
