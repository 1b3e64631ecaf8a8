"""What needs no ranks: patterns, styles by name, refusals. Numbers are in test_parity.py."""

from types import SimpleNamespace

import pytest
from torch import nn

from deepseek.core.errors import ConfigError
from deepseek.distributed.parallel.tensor_parallel import TensorParallel, apply_rows, divide, find_tied, match_modules


def build_model():
    model = nn.Sequential(nn.Embedding(4, 2), nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 4)}))
    model.head = nn.Linear(2, 4, bias=False)
    model.head.weight = model[0].weight
    return model


def neighbors(size=2):
    return TensorParallel(SimpleNamespace(size=lambda: size), has_sequences=False)


def test_a_star_stands_for_one_part_of_a_name():
    model = build_model()
    assert set(match_modules(model, "1.*")) == {"1.a", "1.b"}
    assert set(match_modules(model, "*")) == {"0", "1", "head"}
    assert set(match_modules(model, "*.a")) == {"1.a"}


def test_a_row_that_matches_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"the row 'layers.\*.fc' matches no module of Sequential; its modules are 0"):
        apply_rows(build_model(), [("layers.*.fc", "columns")], neighbors())


def test_an_unknown_style_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="unknown style 'column'; did you mean 'columns'"):
        apply_rows(build_model(), [("1.a", "column")], neighbors())


def test_heads_that_do_not_divide_are_refused_with_what_does():
    heads = nn.Module()
    heads.num_heads = 6
    with pytest.raises(ConfigError, match="tp=4 does not divide num_heads=6; choose one of 1, 2, 3, 6"):
        divide("num_heads")(heads, neighbors(4))
    divide("num_heads")(heads, neighbors(3))
    assert heads.num_heads == 2


def test_tied_weights_are_found_by_both_names():
    assert find_tied(build_model()) == [("0.weight", "head.weight")]
