"""Attributes of a node: flags and words that ONNX does not know are refused, and what was asked for is remembered."""

import pytest

from deepseek.onnx.files import UnsupportedOperatorError
from deepseek.onnx.operators.node import Operator


def node(**attributes):
    return Operator("Some", "name", 21, attributes)


def test_a_flag_is_zero_or_one_and_nothing_else():
    op = node(on=1, off=0, seven=7, below=-1)
    assert (op.flag("on"), op.flag("off", True), op.flag("left_out"), op.flag("also", True)) == (
        True,
        False,
        False,
        True,
    )
    for name in ("seven", "below"):
        with pytest.raises(UnsupportedOperatorError, match=f"{name}=.* is not followed, only 0 and 1"):
            op.flag(name)


def test_a_word_is_one_of_those_known_and_the_first_where_it_is_left_out():
    op = node(mode=b"edge", other=b"foo")
    assert (op.choose("mode", "constant", "edge"), op.choose("left_out", "constant", "edge")) == ("edge", "constant")
    with pytest.raises(UnsupportedOperatorError, match="other='foo' is not followed, only 'constant', 'edge'"):
        op.choose("other", "constant", "edge")


def test_attributes_that_were_asked_for_are_remembered():
    op = node(mode=b"edge", axis=1)
    op.choose("mode", "edge")
    op.flag("keepdims")
    assert op.read == {"mode", "keepdims"}
