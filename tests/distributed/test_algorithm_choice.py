import json

import pytest

from deepseek.core.errors import ConfigError
from deepseek.distributed.algorithm_choice import AlgorithmTable


def test_torchs_own_stays_where_another_is_hardly_faster():
    table = AlgorithmTable()
    assert table.learn("all_reduce", 100, "flat", {"flat": [1.04], "ring": [1.0]}) == "flat"
    assert table.learn("all_reduce", 100, "flat", {"flat": [1.06], "ring": [1.0]}) == "ring"


def test_one_slow_round_of_three_changes_no_choice():
    assert AlgorithmTable().learn("x", 1, "flat", {"flat": [1.0, 9.0, 1.0], "tree": [2.0, 2.0, 2.0]}) == "flat"


def test_another_has_to_win_every_round():
    times_s = {"flat": [1.0, 1.0, 1.0], "ring": [0.8, 0.8, 0.8]}
    assert AlgorithmTable().learn("x", 1, "flat", times_s) == "ring"
    assert AlgorithmTable().learn("x", 1, "flat", times_s | {"ring": [0.8, 0.8, 1.1]}) == "flat"


def test_a_choice_holds_up_to_the_next_power_of_two_and_for_its_operation():
    table = AlgorithmTable()
    table.learn("all_reduce", 1024, "flat", {"ring": [1.0]})
    assert [table.find("all_reduce", size) for size in (1023, 1024, 2047, 2048)] == [None, "ring", "ring", None]
    assert table.find("all_gather", 1024) is None


def test_a_table_survives_json():
    table = AlgorithmTable({("dp:all_reduce", 11): "ring", ("world:all_reduce", 3): "tree"})
    assert AlgorithmTable.from_dict(json.loads(json.dumps(table.to_dict()))).choices == table.choices
    with pytest.raises(ConfigError, match="expected OPERATION/BITS"):
        AlgorithmTable.from_dict({"all_reduce": "ring"})
