"""Options that contradict each other are refused with the right one; an explanation reads as text."""

import random

import pytest

from deepseek.compiler.dynamic_shapes.dynamic_graph import dynamic_graph
from deepseek.core.errors import ConfigError
from tests.compiler.dynamic_shapes.encoders import CUT_OFTEN, Encoder, build_pair, make_batch


def test_an_explanation_reads_as_text():
    model, _ = build_pair(Encoder().eval(), mask="mask", cost=CUT_OFTEN)
    for seed in range(3):
        model(*make_batch(random.Random(seed)))
    text = str(model.explain())
    assert "Block, 3 times" in text
    assert "of at most 8" in text
    assert "3 calls ran as" in text


def plain_function(x, mask):
    return x


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": "maks"}, "did you mean 'mask'"),
        ({"dims": {"y": 1}}, "unknown argument 'y'"),
        ({"pad_value": {"z": 1}}, "unknown argument 'z'"),
        ({"strategy": "bucket"}, "did you mean 'bucketed'"),
        ({"strategy": "bucketed"}, "mask="),
        ({"boundaries": [8]}, "mask="),
        ({"boundaries": [0], "pad_value": 0}, "at least 1"),
        ({"mask": "x", "pad_value": {"x": 1}}, "pads the mask 'x' with 1"),
        ({"max_compilations": 0}, "at least 1"),
        ({"num_checks": 0, "mask": "mask"}, "blindly"),
        ({"max_compilation": 3}, "did you mean 'max_compilations'"),
        ({"backend": "inducter"}, "did you mean 'inductor'"),
    ],
)
def test_a_wrong_option_is_refused_with_the_right_one(options, message):
    with pytest.raises(ConfigError, match=message):
        dynamic_graph(plain_function, **options)
